"""Diagnosis of a run after a few of its steps: one function for each ailment of these optimizers."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch

from hf_adafisher.optimizers.base.kronecker_diagonal import KroneckerDiagonalOptimizer
from hf_adafisher.optimizers.diagnostics.coverage import GRADIENT_FACTORS
from hf_adafisher.optimizers.diagnostics.diagnosis import Diagnosis, Finding, listed
from hf_adafisher.optimizers.diagnostics.observations import Observations
from hf_adafisher.optimizers.factory.learning_rates import FAR
from hf_adafisher.optimizers.factory.param_groups import head_matrices, hidden_matrices, output_embeddings

FAR_BELOW_FINE_TUNING = 200.0
"""A learning rate this many times below that of fine-tuning is a finding: training on preferences takes a hundredth."""
RESCALED = 5.0
"""Clipping is a finding where it shortens every gradient, usually by more than this factor."""
DOMINATED = 0.9
"""Damping is a finding where this share of the values of matrices is at the floor. Good runs have up to 0.8."""
UNREACHED = 0.05
"""Gradient factors are a finding for this share of all values: class tokens and position tables have less."""
LARGEST_STEP = 0.5
"""Steps of more than this share of a layer's norm are a finding. Good runs of the paper's form begin with up to 0.2."""
LARGEST_FINE_TUNING_STEP = 0.03
"""The same for pretrained weights, which the usual rates of fine-tuning move by 0.001 to 0.01 of their norm."""
SMALLEST_STEP = 1e-6
"""It is a finding where no layer moves by more than this share of its norm: ten thousand steps would change little."""
SKIPPED = 0.25
"""Share of steps that a loss scaler may skip; it skips the first few, until it has found its scale."""


@torch.no_grad()
def diagnose(
    optimizer: KroneckerDiagonalOptimizer,
    grad_norms: Sequence[float] = (),
    max_grad_norm: float | None = None,
    skipped_steps: int = 0,
) -> Diagnosis:
    """Diagnose a run: see ``hf_adafisher.optimizers.base.kronecker_diagonal.KroneckerDiagonalOptimizer.diagnose``."""
    if not optimizer.param_groups[0]["steps"] and not skipped_steps:
        raise RuntimeError("there is nothing to diagnose before the first step: call diagnose() after a few of them")
    seen = Observations(optimizer, grad_norms, max_grad_norm, skipped_steps)
    findings = tuple(found for check in AILMENTS.values() if (found := check(seen)) is not None)
    form = getattr(optimizer, "step_size", "")
    kind = type(optimizer).__name__ + (f'(step_size="{form}")' if form else "")
    return Diagnosis(kind, seen.made, findings, seen.numbers())


def not_finite(seen: Observations) -> Finding | None:
    """Weights or steps with NaN or infinity in them."""
    if not seen.broken:
        return None
    return Finding(
        "not-finite",
        f"{len(seen.broken)} of {len(seen.parameters)} parameters, or their steps, are no longer finite "
        f"({listed(seen.broken)}): the run has "
        "diverged and cannot recover. Lower learning_rate, and train in bf16 or float32 where it is fp16.",
        "learning_rate",
        {"parameters": list(seen.broken)},
    )


def skipped_steps(seen: Observations) -> Finding | None:
    """Steps that a loss scaler skips, of which the first few are its search for a scale."""
    tried = seen.skipped + seen.made
    if seen.skipped <= SKIPPED * tried:
        return None
    return Finding(
        "skipped-steps",
        f"The loss scaler skipped {seen.skipped} of {tried} steps, whose gradients overflowed in fp16: they trained "
        "nothing. Set bf16=True in the place of fp16=True, or lower the scaler's init_scale.",
        "fp16",
        {"skipped": seen.skipped, "steps": tried},
    )


def learning_rate(seen: Observations) -> Finding | None:
    """A learning rate of another order than the optimizer's usual ones."""
    ratios = {meaning: seen.rate / usual for meaning, usual in seen.usual_rates.items()}
    far_below = FAR if seen.is_papers or seen.source == "" else FAR_BELOW_FINE_TUNING
    if any(1 / far_below <= ratio <= FAR for ratio in ratios.values()):
        return None
    said = " and ".join(
        f"{ratio:.3g} times the usual {seen.usual_rates[meaning]:.3g} ({meaning})" for meaning, ratio in ratios.items()
    )
    where = f": these weights are pretrained ({seen.source})" if seen.source else ""
    return Finding(
        "learning-rate",
        f"The learning rate {seen.rate:.3g} is {said}{where}. Set learning_rate (lr) near it.",
        "learning_rate",
        {"learning_rate": seen.rate, "usual": seen.usual_rates, "ratio": ratios},
    )


def clipping(seen: Observations) -> Finding | None:
    """The paper's steps are as long as the gradient, so that clipping is a second learning rate.

    The other forms do not notice the length of the gradient.
    """
    if not (seen.is_papers and seen.clipping and min(seen.clipping) > 1.0):
        return None
    factor = statistics.median(seen.clipping)
    if factor <= RESCALED:
        return None
    return Finding(
        "clipping",
        f"Clipping rescales every step by {1 / factor:.3g}: all {len(seen.clipping)} gradients are longer than "
        f"max_grad_norm={seen.max_grad_norm:g} (median norm {statistics.median(seen.grad_norms):.3g}), and in the "
        f"paper's form a step is as long as its gradient, so the learning rate is in effect "
        f"{seen.rate / factor:.3g}. If training is slow, raise max_grad_norm, or take step_size='root', which clipping "
        "does not shorten.",
        "max_grad_norm",
        {"factor": factor, "max_grad_norm": seen.max_grad_norm, "grad_norms": seen.grad_norms},
    )


def unclipped(seen: Observations) -> Finding | None:
    """Long gradients without clipping, in the paper's form."""
    if not (seen.is_papers and seen.max_grad_norm == 0 and seen.grad_norms):
        return None
    norm = statistics.median(seen.grad_norms)
    if norm <= 1.0:
        return None
    return Finding(
        "unclipped",
        f"Gradients are not clipped, and their median norm is {norm:.3g}: in the paper's form a step is as long as its "
        "gradient, up to lr / damping times. Set max_grad_norm=1.0, or take step_size='root'.",
        "max_grad_norm",
        {"median_norm": norm, "largest_norm": max(seen.grad_norms)},
    )


def damping(seen: Observations) -> Finding | None:
    """A damping above nearly every value of the paper's diagonal: momentum SGD is what remains."""
    if seen.floor_share is None or seen.floor_share < DOMINATED:
        return None
    shares = {one.name: one.floor_share for one in seen.layers if (one.floor_share or 0.0) >= DOMINATED}
    value = seen.optimizer.param_groups[0]["damping"]
    return Finding(
        "damping",
        f"Damping dominates {len(shares)} of {len(seen.layers)} layers ({listed(list(shares))}): "
        f"{100 * seen.floor_share:.0f} % of the "
        f"values of all matrices have a Fisher below damping={value:g}, and move as under momentum SGD with a learning "
        "rate of lr / damping. Lower damping, and learning_rate with it.",
        "damping",
        {"floor_share": seen.floor_share, "layers": shares, "damping": value},
    )


def gradient_factors(seen: Observations) -> Finding | None:
    """Parameters that no layer rule reaches, where layer rules are wanted: in the paper's form."""
    rows = [row for row in seen.coverage if row.rule == GRADIENT_FACTORS]
    share = sum(row.share for row in rows)
    if not seen.is_papers or share < UNREACHED:
        return None
    modules = dict(seen.optimizer.model.named_modules())
    uses = {t.name: t.uses for t in seen.parameters}
    silent, classes = [], []
    for row in sorted(rows, key=lambda row: -row.share):
        if uses[row.name][0].tracked is not None:
            silent.append(row.name)
        else:
            classes += [type(modules[name]).__name__ for name in row.modules]
    reasons, ways = [], []
    if classes:
        classes = list(dict.fromkeys(classes))
        reasons.append(f"no layer rule knows their class ({listed(classes)})")
        ways.append(f"write a rule for it and call register_layer({classes[0]}, rule)")
    if silent:
        reasons.append(
            f"the layers of {listed(silent)} recorded nothing, since the model reads their weights without calling them"
        )
        ways.append("call these layers as modules")
    names = [row.name for row in sorted(rows, key=lambda row: -row.share)]
    return Finding(
        "gradient-factors",
        f"{100 * share:.0f} % of all values take factors of their own gradient instead of their layers' "
        f"({listed(names)}): {' and '.join(reasons)}. Either {' and '.join(ways)}, or take step_size='root', which "
        "needs no rule.",
        "register_layer" if classes else "step_size",
        {"share": share, "parameters": names, "classes": classes, "recorded_nothing": silent},
    )


def guessed_head(seen: Observations) -> Finding | None:
    """The last matrix of a model that does not name its output layer, where others could read its outputs.

    Only the spectral form treats an output layer otherwise than a hidden matrix.
    """
    model = seen.optimizer.model
    declared = any(getattr(type(module), "base_model_prefix", "") for module in model.modules())
    if "spectral_heads" not in seen.optimizer.defaults or declared or output_embeddings(model):
        return None
    trained = {id(t.param): t for t in seen.parameters if not t.group["spectral_heads"]}
    readers = {matrix.weight.shape[0 if matrix.transposed else 1]: matrix for matrix in hidden_matrices(model)}
    for head in head_matrices(model):
        outputs = head.weight.shape[1 if head.transposed else 0]
        if id(head.weight) in trained and outputs in readers:
            name = trained[id(head.weight)].name
            reader = next((t.name for t in trained.values() if t.param is readers[outputs].weight), "another layer")
            return Finding(
                "head",
                f"{name} was taken for the output layer, since the model names none and registers it last, but its "
                f"{outputs} outputs fit the input of {reader}. If it is a hidden layer, set spectral_heads=True and "
                "register the output layer last.",
                "spectral_heads",
                {"head": name, "outputs": outputs, "reader": reader},
            )
    return None


def large_steps(seen: Observations) -> Finding | None:
    """Steps that replace the weights instead of training them."""
    most = LARGEST_FINE_TUNING_STEP if seen.source else LARGEST_STEP
    large = {layer.name: layer.relative for layer in reversed(seen.layers) if layer.relative > most}
    if not large:
        return None
    kind = f"the pretrained weights ({seen.source})" if seen.source else "their weights"
    relative = max(large.values())
    return Finding(
        "large-steps",
        f"{len(large)} of {len(seen.layers)} layers move by up to {100 * relative:.3g} % of {kind} in one step "
        f"({listed(list(large))}): "
        "lower learning_rate" + (", or take step_size='root', which bounds each step." if seen.is_papers else "."),
        "learning_rate",
        {"largest": relative, "layers": large, "limit": most},
    )


def small_steps(seen: Observations) -> Finding | None:
    """Steps, at the full learning rate, that change nothing in any layer."""
    peaks = [layer.peak for layer in seen.layers if layer.peak is not None]
    if not peaks or max(peaks) > SMALLEST_STEP:
        return None
    return Finding(
        "small-steps",
        f"No layer moves by more than {max(peaks):.1e} of its weights in a step, even at the full learning rate "
        f"{seen.rate:.3g}: nothing will be learned. Raise learning_rate, or look for a loss that does not depend on "
        "the weights.",
        "learning_rate",
        {"largest": max(peaks), "limit": SMALLEST_STEP},
    )


AILMENTS: dict[str, Callable[[Observations], Finding | None]] = {
    "not-finite": not_finite,
    "skipped-steps": skipped_steps,
    "large-steps": large_steps,
    "small-steps": small_steps,
    "learning-rate": learning_rate,
    "unclipped": unclipped,
    "clipping": clipping,
    "damping": damping,
    "gradient-factors": gradient_factors,
    "head": guessed_head,
}
"""Checks in order, by the ``ailment`` of the finding; the most serious first."""
