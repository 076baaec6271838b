"""Training runs that compare AdaFisher's F, Adam's second moment and K-FAC with the exact diagonal of the Fisher.

The exact diagonal is that of the last weights; the estimates are averages over the training, as the optimizers make
them, each with its own steps and decay. Controls show the effect of that difference alone: see ``agreement.CONTROLS``.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_adafisher.experiments.figures.command_line import require_at_least
from hf_adafisher.experiments.figures.training_run import (
    StepCallback,
    fixed_batches,
    prepare_papers_run,
    weights_by_layer,
)
from hf_adafisher.experiments.fisher_accuracy.agreement import (
    SCALE_SPREAD,
    Agreement,
    LayerAgreement,
    average,
    compare_layers,
    layers_in_mean,
    mean_of,
    over_seeds,
)
from hf_adafisher.experiments.fisher_accuracy.estimates import RunObserver
from hf_adafisher.experiments.fisher_accuracy.exact_fisher import KINDS, ExactFisher, exact_fisher
from hf_adafisher.experiments.runs.callbacks import StopOnDivergence
from hf_adafisher.experiments.runs.run import PreparedRun
from hf_adafisher.optimizers.validation.environment import unwrapped
from hf_adafisher.training.arguments import optimizer_name

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FisherSettings:
    """Settings of the training runs and of the exact diagonal.

    Attributes:
        task: One of ``command_line.TASKS``.
        output: File of the picture.
        optimizer: AdaFisher or AdaFisherW, as ``prepare_run`` reads it; None for the one that fits the network.
        steps: Number of optimizer steps, at least 1.
        kind: Labels of the exact Fisher, "empirical" (those of the data) or "true" (the model's).
        examples: Number of training examples, without augmentation, at least 2, or all if there are fewer.
        draws: Labels drawn for each example where the true Fisher cannot be summed up, at least 1.
        kfac_damping: Damping of K-FAC, > 0, in units of one term of the loss; controls have a hundredth and a hundred
            times of it.
        max_factor_dim: Longest side with a full factor of K-FAC, at least 1.
        seeds: Seeds of the runs, all different.
        further: Arguments of the runs.

    Raises:
        ValueError: A value outside its range.
    """

    task: str
    output: Path
    optimizer: str | None = None
    steps: int = 200
    kind: str = "empirical"
    examples: int = 512
    draws: int = 1
    kfac_damping: float = 1e-2
    max_factor_dim: int = 2048
    seeds: Sequence[int] = (0,)
    further: Sequence[str] = ()

    def __post_init__(self) -> None:
        require_at_least(self, steps=1, examples=2, draws=1, max_factor_dim=1)
        if self.kind not in KINDS:
            raise ValueError(f"--kind is {self.kind!r}; it must be one of {', '.join(KINDS)}")
        if not 0.0 < self.kfac_damping < math.inf:
            raise ValueError(f"--kfac_damping is {self.kfac_damping}; it must be finite and > 0")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise ValueError(f"--seeds are {list(self.seeds)}; give different whole numbers from 0 on")
        if any(word.partition("=")[0] == "--seed" for word in self.further):
            raise ValueError("--seed is not free here: give one or several with --seeds")


def compare_fisher(settings: FisherSettings) -> dict[str, Any]:
    """Train with every seed, compute the exact diagonal at the end, and compare.

    Returns:
        The content of the JSON file, the tables and the picture: ``layers`` (means over seeds), ``mean`` (over layers,
        then seeds) and ``by_seed`` (both of each). Means have the standard deviation over seeds, the number of seeds
        and, those over layers, the number of layers in the seed with the fewest, of ``complete_layers``.

    Raises:
        ValueError: Another optimizer than AdaFisher(W), training in fp16 or with several processes, an error of
            ``prepare_run``, all before any training; or a training run that diverges.
    """
    provenance: dict[str, Any] = {}
    by_seed: list[list[LayerAgreement]] = []
    for seed in settings.seeds:
        run = prepare_seed(settings, seed)
        layers, exact = compare_run(settings, run)
        by_seed.append(layers)
        provenance = provenance or describe_comparison(settings, run, exact)
    means = [mean_of(layers) for layers in by_seed]
    each = [
        {"seed": seed, "mean": mean, "layers": [asdict(row) for row in layers]}
        for seed, mean, layers in zip(settings.seeds, means, by_seed, strict=True)
    ]
    return {
        **provenance,
        "layers": [asdict(row) for row in average(by_seed)],
        "complete_layers": max(sum(row.complete for row in layers) for layers in by_seed),
        "mean": _mean_with_counts(means, by_seed),
        "by_seed": each,
    }


def _mean_with_counts(means: Sequence[Agreement], by_seed: Sequence[Sequence[LayerAgreement]]) -> dict[str, Any]:
    """Means over layers and seeds, each with the smallest number of layers in any seed."""
    counts = [layers_in_mean(layers) for layers in by_seed]
    found: dict[str, Any] = over_seeds(means)
    for name, spreads in found.items():
        for key, spread in spreads.items():
            counted = key.replace(SCALE_SPREAD, "log_scale")
            spread["layers"] = min(count.get(name, {}).get(counted, 0) for count in counts)
    return found


def describe_comparison(settings: FisherSettings, run: PreparedRun, exact: ExactFisher) -> dict[str, Any]:
    """Settings, model, data and examples that all seeds have in common, for the JSON file."""
    args = run.training_args
    common = {key: value for key, value in asdict(settings).items() if key not in ("output", "further", "optimizer")}
    common |= {"optimizer": optimizer_name(args), "learning_rate": args.learning_rate, "beta2": args.adam_beta2}
    common |= {"options": args.optimizer_options(), **run.describe()}
    return common | {"examples": exact.examples, "terms": exact.terms, "one_by_one": exact.looped}


def prepare_seed(settings: FisherSettings, seed: int) -> PreparedRun:
    """Prepare and check the run of one seed; raises ValueError as ``compare_fisher`` does."""
    further = [*settings.further, "--seed", str(seed)]
    run = prepare_papers_run(settings.task, settings.steps, settings.output, settings.optimizer, further)
    if run.training_args.seed != seed:
        raise ValueError(f"seed={run.training_args.seed} is among the optimizer's settings: use --seeds")
    name = optimizer_name(run.training_args)
    if name not in ("adafisher", "adafisherw"):
        raise ValueError(f"the optimizer is {name!r}; it must be adafisher or adafisherw, whose F is compared")
    if run.training_args.fp16:
        raise ValueError("fp16 is not supported here, whose loss scale would be in the factors: use bf16 or neither")
    return run


def compare_run(settings: FisherSettings, run: PreparedRun) -> tuple[list[LayerAgreement], ExactFisher]:
    """Train one run and compare at its end; the last row is that of all values together."""
    options = run.training_args.optimizer_options()
    estimates: dict[str, dict[int, Tensor]] = {}
    watch = StopOnDivergence()
    trainer = run.new_trainer([watch])
    observer = RunObserver(run.model, options["ema_decay"], run.training_args.adam_beta2, settings.max_factor_dim)
    with torch.random.fork_rng():  # a data loader draws a seed
        batches = fixed_batches(trainer, trainer.train_dataset, settings.examples)  # type: ignore[arg-type]

    def observe(step: int, model: nn.Module, optimizer: Any) -> None:
        observer.after_step(step, model, optimizer)
        if step == settings.steps:
            estimates["fisher"] = _diagonals(optimizer, model, normalized=True)
            estimates["product"] = _diagonals(optimizer, model, normalized=False)

    trainer.add_callback(StepCallback(None, observe))
    trainer.train()
    observer.close()
    if watch.diverged_at is not None or not estimates:
        raise ValueError(f"training diverged by step {watch.diverged_at}: lower the learning rate")
    estimates["second_moment"] = observer.moments.moments()
    estimates["second_moment_window"] = observer.window_moments.moments()
    estimates |= in_units_of_a_term(estimates, observer.factors.products(), observer.last_terms, observer.last_scale)
    estimates["exact_window"] = observer.window.diagonals()
    for name, factor in {"kfac": 1.0, "kfac_weaker": 1e-2, "kfac_stronger": 1e2}.items():
        estimates[name] = observer.factors.diagonals(settings.kfac_damping * factor)
    unwrapped(trainer.optimizer).close()
    exact = exact_fisher(
        run.model,
        batches,
        settings.kind,
        draws=settings.draws,
        seed=run.training_args.seed,
        progress=not run.training_args.disable_tqdm,
    )
    return compare_layers(run.model, exact, estimates), exact


def in_units_of_a_term(
    estimates: Mapping[str, Mapping[int, Tensor]], products: Mapping[int, Tensor], terms: int, scale: float
) -> dict[str, dict[int, Tensor]]:
    """Scale ``S (x) H`` and second moments to one term of the loss; within a layer only the scale changes.

    The second moment of a mean of M independent gradients is the M-th part of one's, if their mean is small. S has
    gradients of the loss as it is scaled in a step, and is a mean over the positions of a layer where a term has their
    sum: ``S (x) H`` times the positions of a term, which differ from layer to layer, estimates the same quantity as the
    exact diagonal, also in its scale. Normalisation layers have no full factors, from which to know these positions:
    their mean stays. So does that of every layer in "product_unscaled", where all layers have the same factor.

    Args:
        estimates: With "product" and second moments, by ``id(parameter)``.
        products: Diagonals of ``A (x) G``, where there are any.
        terms: Number of terms of the loss of a step.
        scale: AdaFisher's ``gradient_scale``, by which S has been divided already: ``1 / terms`` where Trainer counts
            the terms, as for texts, and 1 where it does not.
    """
    found: dict[str, dict[int, Tensor]] = {"product": {}, "product_unscaled": {}}
    for key, value in estimates["product"].items():
        known = key in products and bool(value.any())
        shared = (terms * scale) ** 2
        unit = products[key].double().mean().item() / value.double().mean().item() if known else shared
        found["product"][key], found["product_unscaled"][key] = value * unit, value * shared
    for name in ("second_moment", "second_moment_window"):
        if name in estimates:
            found[name] = {key: value * terms for key, value in estimates[name].items()}
    return found


def _diagonals(optimizer: Any, model: nn.Module, *, normalized: bool) -> dict[int, Tensor]:
    """AdaFisher's diagonals of all weights that it has statistics of, by ``id(parameter)``."""
    found = {}
    for layer, weight in weights_by_layer(model).items():
        try:
            found[id(weight)] = optimizer.fisher_diagonal(weight, normalized=normalized).cpu()
        except RuntimeError:  # the layer got no gradient in any step
            logger.warning("layer %s got no gradient and is left out", layer)
    return found
