"""SpectralAdaFisher's step: Muon in a degenerate setting, invariance, steepest descent, and the diagonal part.

Models are float64 where a test does not say otherwise.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close
from transformers.pytorch_utils import Conv1D

from hf_adafisher import SpectralAdaFisher
from hf_adafisher.fisher.diagonals import INPUT, OUTPUT_GRAD
from hf_adafisher.optimizers import spectral, update
from hf_adafisher.optimizers.polar import COEFFICIENTS
from tests.cases import CASES, Case, TinyLanguageModel, mlp, regression
from tests.model_zoo import family
from tests.reference import MATRIX_RMS, TABLE_RMS, VECTOR_RMS

BY_NAME = {case.name: case for case in CASES}


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers in float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def signs(*shape: int, seed: int = 0) -> Tensor:
    """Ones and minus ones in float64."""
    return normal(*shape, seed=seed).sign()


def svd_polar(matrices: Tensor, dtype: object = None) -> Tensor:
    """The orthogonal factor itself."""
    u, _, vt = torch.linalg.svd(matrices, full_matrices=False)
    return u @ vt


def muon(momentum: Tensor) -> Tensor:
    """Newton-Schulz step by step, in the wide orientation; a matrix whose root mean square is 0.2."""
    x = momentum.flatten(1)
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / (1.01 * x.norm())
    for a, b, c in COEFFICIENTS:
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    x = x.T if tall else x
    return (MATRIX_RMS * x / (x.square().mean().sqrt())).reshape(momentum.shape)


def factor(optimizer: SpectralAdaFisher, p: Tensor, name: str) -> Tensor:
    """An averaged factor of a parameter's first use."""
    return optimizer.state[p][name] / optimizer.state[p]["factor_weight"]


# ------------------------------------------------------------------------------------ Muon


class Kinds(nn.Module):
    """A hidden matrix of each kind, taller than wide and the other way, in one network."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(2, 3, 1), nn.Conv2d(3, 5, (2, 3))
        self.tall, self.wide, self.transposed = nn.Linear(5, 8), nn.Linear(8, 4), Conv1D(6, 4)
        self.head = nn.Linear(6, 2)
        nn.init.normal_(self.transposed.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.conv(torch.tanh(self.stem(x)))).flatten(2).mT
        return self.head(torch.tanh(self.transposed(torch.tanh(self.wide(torch.tanh(self.tall(x)))))))


def test_spectral_without_factors_is_muon() -> None:
    """Both exponents 0: Nesterov's momentum, orthogonalised, at a root mean square of 0.2, and decoupled decay."""
    torch.manual_seed(0)
    model = Kinds().double()
    lr, beta, weight_decay = 0.03, 0.8, 0.1
    options = {"input_exponent": 0.0, "output_exponent": 0.0, "beta": beta, "weight_decay": weight_decay}
    optimizer = SpectralAdaFisher(model, lr=lr, update_interval=2, **options)
    hidden = {name: getattr(model, name).weight for name in ("conv", "tall", "wide", "transposed")}
    moments = {name: torch.zeros_like(p) for name, p in hidden.items()}
    for step in range(4):
        optimizer.zero_grad()
        model(normal(3, 2, 4, 4, seed=step)).square().mean().backward()
        expected = {}
        for name, p in hidden.items():
            assert p.grad is not None
            moments[name] = beta * moments[name] + (1 - beta) * p.grad
            update = muon(beta * moments[name] + (1 - beta) * p.grad)
            expected[name] = p.detach() - lr * (update + weight_decay * p.detach())
        optimizer.step()
        assert_close({name: p.detach() for name, p in hidden.items()}, expected, rtol=1e-9, atol=1e-11)


class Constant(nn.Module):
    """A layer whose input and output gradient are ones and minus ones, and a last layer that is none of it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.stem, self.layer, self.head = nn.Conv1d(1, 1, 1), layer, nn.Linear(2, 2)

    def loss(self, x: Tensor, seed: int) -> Tensor:
        out = self.layer(x)
        return (out * signs(*out.shape, seed=seed)).sum() + self.head(normal(3, 2)).sum() + self.stem.weight.sum()


@pytest.mark.parametrize(
    ("layer", "shape"),
    [(nn.Linear(5, 3), (2, 4, 5)), (Conv1D(7, 4), (2, 5, 4)), (nn.Conv2d(3, 4, (2, 1)), (2, 3, 3, 4))],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_spectral_with_constant_factors_is_muon(layer: nn.Module, shape: tuple[int, ...]) -> None:
    """Whatever the exponents: a constant metric is a change of the learning rate, and that is normalised away."""
    model = Constant(layer).double()
    nn.init.normal_(model.layer.weight)
    optimizer = SpectralAdaFisher(model, lr=0.1, beta=0.0, input_exponent=0.7, output_exponent=0.4, update_interval=1)
    for step in range(2):
        optimizer.zero_grad()
        model.loss(signs(*shape, seed=step), step).backward()
        expected = layer.weight.detach() - 0.1 * muon(layer.weight.grad)
        optimizer.step()
        for name, constant in ((INPUT, 1.0), (OUTPUT_GRAD, positions(layer, shape))):
            assert_close(factor(optimizer, layer.weight, name).unique(), torch.tensor([constant], dtype=torch.float64))
        assert_close(layer.weight.detach(), expected, rtol=1e-9, atol=1e-11)


def positions(layer: nn.Module, shape: tuple[int, ...]) -> float:
    """Output positions: those over which squares of gradients, here ones, are summed."""
    with torch.no_grad():
        out = layer(torch.zeros(shape, dtype=torch.float64))
    return float(out.numel() // layer.bias.numel())


@pytest.mark.parametrize("values", [1, 60, 100])
def test_spectral_steps_do_not_depend_on_how_many_matrices_are_taken_at_once(
    values: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One by one, two by two with one left, and more of the wide than of the square ones; all at once by default."""
    case, runs = Case("alike", lambda: mlp(4, 6, 6, 6, 6, 9, 6, 9, 2), regression(7, 4)), []
    for most in (spectral.BATCH_VALUES, values):
        monkeypatch.setattr(spectral, "BATCH_VALUES", most)
        model = case.build().double()
        optimizer = SpectralAdaFisher(model, lr=0.05)
        for step in range(3):
            optimizer.zero_grad()
            case.loss(model, torch.Generator().manual_seed(step)).backward()
            optimizer.step()
        runs.append([p.detach() for p in model.parameters()])
    assert_close(runs[1], runs[0], rtol=1e-10, atol=1e-12)


# ------------------------------------------------------------------------------ invariance


def cosine(a: Tensor, b: Tensor) -> float:
    """Of two updates as vectors: one where they differ by a positive scalar."""
    return float(F.cosine_similarity(a.flatten(), b.flatten(), dim=0))


def rescaled_cosines(largest: float, **options: Any) -> list[float]:
    """How alike the updates of a network and of its twin with other units are, mapped back to the same units.

    Inputs and hidden channels are measured in units between `1 / largest` and `largest`; rectifiers, without biases,
    make it the same function. An update ``dW`` must become ``E dW D^-1`` for outputs in units E, inputs in units D:
    the function's own update ``dW x`` is then the same, in the new units of the output.
    """
    widths = (6, 8, 7, 5, 3)
    units = []
    for seed, width in enumerate(widths[:-1]):
        order = torch.randperm(width, generator=torch.Generator().manual_seed(seed))
        units.append(largest ** torch.linspace(-1.0, 1.0, width, dtype=torch.float64)[order])
    units.append(torch.ones(widths[-1], dtype=torch.float64))
    runs = []
    for rescaled in (False, True):
        torch.manual_seed(1)
        layers = [nn.Linear(*pair, bias=False).double() for pair in itertools.pairwise(widths)]
        model = nn.Sequential(*[module for layer in layers for module in (layer, nn.ReLU())][:-1])
        x, target = normal(40, widths[0]), normal(40, widths[-1], seed=1)
        if rescaled:
            x = x * units[0]
            with torch.no_grad():
                for layer, (before, after) in zip(layers, itertools.pairwise(units), strict=True):
                    layer.weight.mul_(after[:, None] / before)
        before = [layer.weight.detach().clone() for layer in layers]
        optimizer = SpectralAdaFisher(model, lr=0.1, **options)
        loss = F.mse_loss(model(x), target)
        loss.backward()
        optimizer.step()
        runs.append((loss.item(), [layer.weight.detach() - old for layer, old in zip(layers, before, strict=True)]))
    (loss, updates), (other_loss, others) = runs
    assert loss == pytest.approx(other_loss)
    pairs = zip(others, itertools.pairwise(units), strict=True)
    back = [other / after[:, None] * before for other, (before, after) in pairs]
    return [cosine(*pair) for pair in list(zip(updates, back, strict=True))[:-1]]  # the last is a head


@pytest.mark.parametrize("polar_factor", [svd_polar, update.polar_factor], ids=["exact", "iterated"])
def test_spectral_steps_do_not_depend_on_the_units_of_channels(
    polar_factor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With next to no damping, to rounding; with the default's 0.1 less than Muon's do (measured).

    In units of 1/2 to 2 cosines are 0.94 to 0.98, Muon's 0.71 to 0.78; in units of 1/4 to 4, 0.67 to 0.88, Muon's 0.31
    to 0.44: mean squares below a tenth of the average are not whitened.
    """
    monkeypatch.setattr(update, "polar_factor", polar_factor)
    for cosine_of_layer in rescaled_cosines(4.0, relative_damping=1e-12):
        assert cosine_of_layer == pytest.approx(1.0, abs=1e-9)
    for largest, least, most in ((2.0, 0.93, 0.8), (4.0, 0.65, 0.45)):
        assert min(rescaled_cosines(largest)) > least
        assert max(rescaled_cosines(largest, input_exponent=0.0, output_exponent=0.0)) < most


# ------------------------------------------------------------------------- steepest descent


def test_spectral_steps_are_the_steepest_under_their_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    """None of many directions with ``|| S^1/2 dW H^1/2 || = 1`` has a larger inner product with the momentum.

    The largest is the nuclear norm of ``S^-1/2 M H^-1/2``, as that norm's dual.
    """
    monkeypatch.setattr(update, "polar_factor", svd_polar)
    model = mlp(5, 7, 6, 3).double()
    optimizer = SpectralAdaFisher(model, lr=0.1, beta=0.0, relative_damping=1e-13)
    before = [model[i].weight.detach().clone() for i in (0, 2)]
    model(normal(30, 5) * torch.linspace(0.2, 3.0, 5, dtype=torch.float64)).pow(4).mean().backward()
    optimizer.step()
    for layer, old in zip((model[0], model[2]), before, strict=True):
        momentum = layer.weight.grad
        s, h = (factor(optimizer, layer.weight, name).sqrt() for name in (OUTPUT_GRAD, INPUT))

        def gain(direction: Tensor, momentum: Tensor = momentum, s: Tensor = s, h: Tensor = h) -> float:
            norm = torch.linalg.matrix_norm(s[:, None] * direction * h, ord=2)
            return float((momentum * direction).sum() / norm)

        step = old - layer.weight.detach()
        best = gain(step)
        assert best == pytest.approx(float(torch.linalg.matrix_norm(momentum / (s[:, None] * h), ord="nuc")))
        rivals = [momentum, momentum.sign(), svd_polar(momentum[None])[0], momentum / (s[:, None] * h) ** 2]
        rivals += [normal(*step.shape, seed=seed) / (s[:, None] * h) for seed in range(300)]
        rivals += [step + 0.1 * step.std() * normal(*step.shape, seed=seed) for seed in range(300)]
        assert max(abs(gain(rival)) for rival in rivals) < best * (1 - 1e-5)


# ------------------------------------------------------------------- what is not a hidden matrix


class Layers(nn.Module):
    """Embedding, LayerNorm, a hidden matrix and a head, whose outputs can be looked at."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.norm = nn.Embedding(11, 6), nn.LayerNorm(6)
        self.mix, self.head = nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mix(self.norm(self.embedding(tokens)))))


def watched(model: nn.Module, names: tuple[str, ...]) -> dict[str, Callable[[], tuple[Tensor, Tensor]]]:
    """For each layer, inputs and gradients of outputs by position, once there was a backward."""
    calls: dict[str, tuple[Tensor, Tensor]] = {}

    def look(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            output.retain_grad()
            calls[name] = (args[0].detach(), output)

        return hook

    for name in names:
        model.get_submodule(name).register_forward_hook(look(name))

    def of(name: str) -> tuple[Tensor, Tensor]:
        x, output = calls[name]
        assert output.grad is not None
        return x.flatten(0, 1), output.grad.flatten(0, 1)

    return {name: lambda name=name: of(name) for name in names}  # type: ignore[misc]


def expected_step(momentum: Tensor, diagonal: Tensor, rho: float) -> Tensor:
    """``m / sqrt(F + rho mean(F))``, with a root mean square of 1 at most, a fifth of it for a vector."""
    u = momentum / (diagonal + rho * diagonal.mean()).sqrt()
    largest = TABLE_RMS if u.dim() > 1 else VECTOR_RMS
    return largest * u / max(1.0, float(u.square().mean().sqrt()))


@pytest.mark.parametrize("rho", [0.1, 2.0])
def test_spectral_diagonals_are_sums_over_positions(rho: float) -> None:
    """``F = sum_n g_n^2 (x) mean_n x_n^2``, of gradients by autograd, for head, embedding, norm and biases.

    With the small damping some of the steps are capped, with the large one none.
    """
    torch.manual_seed(0)
    model = Layers().double()
    looks = watched(model, ("embedding", "norm", "mix", "head"))
    options: dict[str, Any] = {"relative_damping": rho, "nesterov": False, "max_relative_step": None}
    optimizer = SpectralAdaFisher(model, lr=0.01, beta=0.5, **options)
    tokens = torch.randint(0, 11, (4, 5), generator=torch.Generator().manual_seed(0))
    F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten() % 4).backward()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer.step()

    squares = {name: look()[1].square().sum(0) for name, look in looks.items()}
    one_hot = F.one_hot(tokens.flatten(), 11).double()
    hidden, normalised = looks["head"]()[0], F.layer_norm(looks["norm"]()[0], (6,))
    diagonals = {
        "embedding.weight": torch.outer(one_hot.mean(0), squares["embedding"]),
        "norm.weight": squares["norm"] * normalised.square().mean(0),
        "norm.bias": squares["norm"],
        "mix.bias": squares["mix"],
        "head.weight": torch.outer(squares["head"], hidden.square().mean(0)),
        "head.bias": squares["head"],
    }
    parameters = dict(model.named_parameters())
    capped = 0
    for name, diagonal in diagonals.items():
        p = parameters[name]
        assert p.grad is not None
        assert_close(optimizer.fisher_diagonal(p, normalized=False), diagonal)
        assert_close(optimizer.fisher_diagonal(p), diagonal + rho * diagonal.mean())
        update = expected_step(p.grad, diagonal, rho)
        capped += int(update.square().mean() > 0.999999 * (TABLE_RMS if update.dim() > 1 else VECTOR_RMS) ** 2)
        assert_close(p.detach(), before[name] - 0.01 * update, rtol=1e-9, atol=1e-12)
    assert capped < len(diagonals) and (capped > 0) == (rho < 1)


def test_spectral_diagonals_of_a_tied_embedding_add_up() -> None:
    """The rows that were looked up, and the head's outputs, each by autograd."""
    torch.manual_seed(0)
    model = TinyLanguageModel(tied=True).double()
    looks = watched(model, ("embedding", "head"))
    optimizer = SpectralAdaFisher(model, lr=0.01, beta=0.0)
    tokens = torch.randint(0, 11, (3, 5), generator=torch.Generator().manual_seed(0))
    F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
    weight = model.embedding.weight
    before = weight.detach().clone()
    optimizer.step()
    hidden, logits = looks["head"]()
    counts = F.one_hot(tokens.flatten(), 11).double().mean(0)
    diagonal = torch.outer(counts, looks["embedding"]()[1].square().sum(0))
    diagonal = diagonal + torch.outer(logits.square().sum(0), hidden.square().mean(0))
    assert_close(optimizer.fisher_diagonal(weight, normalized=False), diagonal)
    assert weight.grad is not None
    assert_close(weight.detach(), before - 0.01 * expected_step(weight.grad, diagonal, 0.1), rtol=1e-9, atol=1e-12)


def test_spectral_diagonals_are_the_second_moments_of_batch_gradients() -> None:
    """Over all signs of the positions' gradients, exactly: that is what F estimates for positions without a drift."""
    n, model = 6, mlp(3, 4, 2).double()
    optimizer = SpectralAdaFisher(model, lr=0.0)
    x, r = signs(n, 3), normal(n, 2)
    moments = {p: torch.zeros_like(p) for p in (model[0].weight, model[0].bias, model[2].bias)}
    for flips in itertools.product((-1.0, 1.0), repeat=n):
        model.zero_grad()
        (model(x) * r).sum(1).mul(torch.tensor(flips, dtype=torch.float64)).mean().backward()
        for p, moment in moments.items():
            assert p.grad is not None
            moment += p.grad.square() / 2**n
        optimizer.discard_statistics()
    optimizer.zero_grad()
    (model(x) * r).sum(1).mean().backward()
    optimizer.step()
    for p, moment in moments.items():
        assert_close(optimizer.fisher_diagonal(p, normalized=False), moment)


def test_spectral_caps_the_root_mean_square_of_other_updates() -> None:
    """Nine equal positions give a bias three times its scale, which is capped; two that nearly cancel give less."""
    for x, expected in ((torch.ones(9), 1.0), (torch.tensor([1.0, -0.9]), 0.1 / 1.81**0.5)):
        model = nn.Sequential(nn.Linear(1, 1)).double()
        optimizer = SpectralAdaFisher(model, lr=1.0, beta=0.0, relative_damping=1e-12)
        before = model[0].bias.item()
        (model(torch.zeros(len(x), 1, dtype=torch.float64)).flatten() * x.double()).sum().backward()
        optimizer.step()
        assert before - model[0].bias.item() == pytest.approx(VECTOR_RMS * expected)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_spectral_steps_of_parameters_without_a_rule(scale: float) -> None:
    """A vector and a matrix of a few rows take their own squared gradients, a single value its sign."""
    case, lr, beta, rho = BY_NAME["bare_parameter"], 0.01, 0.6, 0.2
    model: Any = case.build().double()
    options: dict[str, Any] = {"update_interval": 1, "ema_decay": 0.7, "max_relative_step": None}
    optimizer = SpectralAdaFisher(model, lr=lr, beta=beta, relative_damping=rho, **options)
    moments = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    vector, table, weight = 0.0, 0.0, 0.0
    for step in range(3):
        optimizer.zero_grad()
        (scale * case.loss(model, torch.Generator().manual_seed(step))).backward()
        gradients = {name: p.grad for name, p in model.named_parameters()}
        for name, grad in gradients.items():
            moments[name] = beta * moments[name] + (1 - beta) * grad
        table = 0.7 * table + 0.3 * model.table.grad.square()
        vector = 0.7 * vector + 0.3 * model.shift.grad.square()
        weight = 0.7 * weight + 0.3
        diagonals = {"shift": vector / weight, "table": table / weight}
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        optimizer.step()
        for name, diagonal in diagonals.items():
            ahead = beta * moments[name] + (1 - beta) * gradients[name]
            update = expected_step(ahead / (1 - beta ** (step + 1)), diagonal, rho)
            assert_close(getattr(model, name).detach(), before[name] - lr * update, rtol=1e-9, atol=1e-12)
        sign = (beta * moments["gain"] + (1 - beta) * gradients["gain"]).sign()
        assert_close(model.gain.detach(), before["gain"] - VECTOR_RMS * lr * sign, rtol=1e-12, atol=0)


# ------------------------------------------------------------- the precision of the iteration


def test_spectral_steps_in_the_precision_asked_for() -> None:
    """A hidden matrix follows a polar factor made in that dtype, in the group that asks for it; no other does."""
    ends = []
    for dtype in (None, "bfloat16"):
        torch.manual_seed(0)
        model = mlp(6, 6, 6, 6, 3)
        groups = [{"params": model[:2].parameters(), "polar_dtype": dtype}, {"params": model[2:].parameters()}]
        optimizer = SpectralAdaFisher(model, groups, lr=0.1, max_relative_step=None)
        model(normal(9, 6).float()).square().mean().backward()
        optimizer.step()
        ends.append([p.detach() for p in model.parameters()])
    for i, (exact, rounded) in enumerate(zip(*ends, strict=True)):
        if i == 0:
            difference = (exact - rounded).norm() / (0.1 * MATRIX_RMS * 6)
            assert 1e-3 < difference < 0.1
        else:
            assert_close(rounded, exact, rtol=0, atol=0)


# ----------------------------------------------------------------------- the bound on a step


@pytest.mark.parametrize("most", [0.03, 1e-4])
@pytest.mark.parametrize("size", [1.0, 1e-2, 0.0])
def test_spectral_steps_are_bounded_by_the_size_of_the_weights(size: float, most: float) -> None:
    """No table or matrix moves by more than that part of its norm (of a root mean square of 0.02 at least).

    It moves in the direction it would without the bound; smaller steps, vectors and the decay stay as they are.
    """
    ends, lr, weight_decay = [], 0.02, 0.3
    for bound in (None, most):
        torch.manual_seed(0)
        model = Layers().double()
        with torch.no_grad():
            for p in (model.embedding.weight, model.mix.weight):
                p.mul_(size)
        before = [p.detach().clone() for p in model.parameters()]
        optimizer = SpectralAdaFisher(model, lr=lr, weight_decay=weight_decay, max_relative_step=bound)
        tokens = torch.randint(0, 11, (4, 5), generator=torch.Generator().manual_seed(0))
        F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten() % 4).backward()
        optimizer.step()
        decayed = [(1 - lr * weight_decay) * old for old in before]
        ends.append([p.detach() - old for p, old in zip(model.parameters(), decayed, strict=True)])
    shortened = 0
    for old, free, bounded in zip(before, *ends, strict=True):
        allowed = most * max(float(old.square().mean().sqrt()), 0.02)
        part = allowed / float(free.square().mean().sqrt()) if free.dim() > 1 and free.any() else 1.0
        shortened += part < 1.0
        assert_close(bounded, min(part, 1.0) * free, rtol=1e-9, atol=1e-15)
    assert shortened == 3 if size and (size < 1.0 or most < 0.01) else 0 < shortened < 3


def test_spectral_steps_of_shared_shapes_are_bounded_one_by_one() -> None:
    """Two matrices of one shape, orthogonalised together: the small one's step is the smaller by as much."""
    torch.manual_seed(0)
    model = mlp(6, 6, 6, 3).double()
    with torch.no_grad():
        model[2].weight.copy_(model[0].weight * 0.25)
    before = [model[i].weight.detach().clone() for i in (0, 2)]
    optimizer = SpectralAdaFisher(model, lr=10.0, max_relative_step=0.1)
    model(normal(9, 6)).square().mean().backward()
    optimizer.step()
    moved = [(model[i].weight.detach() - old).norm() for i, old in zip((0, 2), before, strict=True)]
    assert_close(moved[0], 0.1 * before[0].norm())
    assert_close(moved[1], 0.25 * moved[0])


# --------------------------------------------------------------------- scales and conventions

Backward = Callable[[nn.Module, SpectralAdaFisher, int], None]


def weights_after(case_name: str, backward: Backward, steps: int = 4) -> list[Tensor]:
    """Weights of a case's model after a few steps whose gradients `backward` makes."""
    model = BY_NAME[case_name].build().double()
    optimizer = SpectralAdaFisher(model, lr=0.02, update_interval=2, weight_decay=0.1)
    for step in range(steps):
        optimizer.zero_grad()
        backward(model, optimizer, step)
        optimizer.step()
    return [p.detach() for p in model.parameters()]


def tokens_of(step: int) -> Tensor:
    """Four rows of five tokens."""
    return torch.randint(0, 11, (4, 5), generator=torch.Generator().manual_seed(step))


def batch_loss(model: nn.Module, x: Tensor) -> Tensor:
    """Cross-entropy of a language model over a batch of tokens, a mean over positions."""
    return F.cross_entropy(model(x).flatten(0, 1), (x.flatten() * 3 + 1) % 11)


def plain(model: nn.Module, optimizer: SpectralAdaFisher, step: int) -> None:
    """One batch."""
    batch_loss(model, tokens_of(step)).backward()


def in_two_parts(model: nn.Module, optimizer: SpectralAdaFisher, step: int) -> None:
    """Two micro-batches of half the size, of half the weight."""
    for part in tokens_of(step).chunk(2):
        (batch_loss(model, part) / 2).backward()


def own_losses(model: nn.Module, optimizer: SpectralAdaFisher, step: int) -> None:
    """With factors of each position's own loss, and the number of positions."""
    optimizer.gradient_scale, optimizer.loss_terms = 1 / 20, 20.0
    plain(model, optimizer, step)


def own_losses_by_default(model: nn.Module, optimizer: SpectralAdaFisher, step: int) -> None:
    """The number of terms is then taken from the scale."""
    optimizer.gradient_scale = 1 / 20
    plain(model, optimizer, step)


def scaled_own_losses(model: nn.Module, optimizer: SpectralAdaFisher, step: int) -> None:
    """As a loss scaler does it under AdaFisherTrainer."""
    optimizer.gradient_scale, optimizer.loss_terms = 1024 / 20, 20.0
    (1024 * batch_loss(model, tokens_of(step))).backward()
    for p in model.parameters():
        assert p.grad is not None
        p.grad /= 1024


def scaled(model: nn.Module, optimizer: SpectralAdaFisher, step: int) -> None:
    """As a loss scaler does it in a loop that knows no number of terms."""
    optimizer.gradient_scale = 1024.0
    (1024 * batch_loss(model, tokens_of(step))).backward()
    for p in model.parameters():
        assert p.grad is not None
        p.grad /= 1024


def multiplied(model: nn.Module, optimizer: SpectralAdaFisher, step: int) -> None:
    """Another loss: a million times as large."""
    (1e6 * batch_loss(model, tokens_of(step))).backward()


@pytest.mark.parametrize(
    "backward",
    [in_two_parts, own_losses, own_losses_by_default, scaled_own_losses, scaled, multiplied],
    ids=lambda function: function.__name__,
)
@pytest.mark.parametrize("name", ["tied", "untied"])
def test_spectral_steps_do_not_depend_on_how_the_loss_is_written(name: str, backward: Backward) -> None:
    expected = weights_after(name, plain)
    assert_close(weights_after(name, backward), expected, rtol=1e-8, atol=1e-10)
    initial = [p.detach() for p in BY_NAME[name].build().double().parameters()]
    assert not any(torch.equal(p, q) for p, q in zip(expected, initial, strict=True))


def test_spectral_steps_of_a_position_table_do_not_depend_on_how_the_loss_is_written() -> None:
    """Its factors come from the gradient itself, whose scale is not that of each position's own loss."""
    record, runs = family("gpt2"), []
    for own in (False, True):
        model: Any = record.build().double()
        optimizer = SpectralAdaFisher(model, lr=0.01, update_interval=2)
        for step in range(3):
            batch = record.batch(n=3, seed=step)
            items = float(batch["labels"][:, 1:].ne(-100).sum())
            if own:
                optimizer.gradient_scale, optimizer.loss_terms = 1 / items, items
            optimizer.zero_grad()
            model(**batch).loss.backward()
            optimizer.step()
        runs.append([p.detach() for p in model.parameters()])
    assert_close(runs[1], runs[0], rtol=1e-4, atol=1e-5)  # the model's loss is in float32


def test_spectral_steps_know_how_many_positions_a_batch_has() -> None:
    """Where scales are not declared consistently, the steps are others: the numbers are used."""

    def wrong(model: nn.Module, optimizer: SpectralAdaFisher, step: int) -> None:
        optimizer.gradient_scale, optimizer.loss_terms = 1 / 20, 1.0
        plain(model, optimizer, step)

    difference = [p - q for p, q in zip(weights_after("untied", wrong), weights_after("untied", plain), strict=True)]
    assert max(float(d.abs().max()) for d in difference) > 1e-3


def test_spectral_loss_terms_are_checked() -> None:
    optimizer = SpectralAdaFisher(mlp(3, 2))
    for value in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=rf"loss_terms must be finite and > 0, or None, got {value}"):
            optimizer.loss_terms = value
    assert optimizer.loss_terms == 1.0
    optimizer.loss_terms = 7
    assert optimizer.loss_terms == 7.0
    optimizer.loss_terms = None
    optimizer.gradient_scale = 0.25
    assert optimizer.loss_terms == 4.0


# ----------------------------------------------------------------------------- degenerate batches


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", ["untied", "bare_parameter", "conv_grouped", "experts"])
def test_spectral_steps_of_zero_gradients_stay_where_they_are(name: str, dtype: torch.dtype) -> None:
    """At the first step, and later without momentum; nothing is divided by zero."""
    case = BY_NAME[name]
    model = case.build().to(dtype)
    optimizer = SpectralAdaFisher(model, lr=0.1, beta=0.0, update_interval=1)
    for step, scale in enumerate((0.0, 1.0, 0.0, 0.0)):
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.zero_grad()
        (scale * case.loss(model, torch.Generator().manual_seed(step))).backward()
        optimizer.step()
        assert all(bool(p.isfinite().all()) for p in model.parameters())
        if not scale:
            assert_close([p.detach() for p in model.parameters()], before, rtol=0, atol=0)
    assert all(bool(v.isfinite().all()) for state in optimizer.state.values() for v in state.values())


def test_spectral_steps_with_dead_channels_stay_finite() -> None:
    """Inputs that are always zero and outputs without a gradient: zeros in the factors, and no update there."""
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2)).double()
    with torch.no_grad():
        model[0].bias[1:3] = -100.0
    before = [model[i].weight.detach().clone() for i in (0, 2)]
    x = normal(8, 4)
    x[:, 3] = 0.0
    optimizer = SpectralAdaFisher(model, lr=0.1, max_relative_step=None)
    model(x).square().mean().backward()
    optimizer.step()
    moved = [model[i].weight.detach() - old for i, old in zip((0, 2), before, strict=True)]
    assert all(bool(update.isfinite().all()) for update in moved)
    assert not moved[0][1:3].any() and not moved[0][:, 3].any() and not moved[1][:, 1:3].any()
    assert moved[0][0, :3].all() and float(moved[0].square().mean().sqrt()) == pytest.approx(0.1 * MATRIX_RMS)


class WithEmpty(nn.Module):
    """A hidden matrix, and a vector and a table without values."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(4, 5), nn.Linear(5, 2)
        self.vector, self.table = nn.Parameter(torch.zeros(0)), nn.Parameter(torch.zeros(3, 0))

    def forward(self, x: Tensor) -> Tensor:
        nothing = self.vector.sum() + self.table.sum()
        return self.head(torch.tanh(self.first(x))) + nothing


def test_spectral_steps_over_parameters_without_values() -> None:
    model = WithEmpty().double()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = SpectralAdaFisher(model, lr=0.1, update_interval=2)
    for seed in range(3):
        optimizer.zero_grad()
        model(normal(6, 4, seed=seed)).square().mean().backward()
        optimizer.step()
    for name, p in model.named_parameters():
        assert p.isfinite().all() and torch.equal(p, before[name]) == (p.numel() == 0)


# ------------------------------------------------------------------------------------ dtypes


def test_spectral_momentum_in_float32_updates_bfloat16_weights_as_float32_ones() -> None:
    """The step itself is rounded once, at the end: to the bfloat16 nearest to the float32 result."""
    case = BY_NAME["mlp"]
    low, high = case.build().to(torch.bfloat16), case.build()
    high.load_state_dict({key: value.float() for key, value in low.state_dict().items()})
    options = {"lr": 0.05, "momentum_dtype": "float32", "weight_decay": 0.1}
    optimizers = [SpectralAdaFisher(model, **options) for model in (low, high)]
    for step in range(3):
        copied = copy.deepcopy(low)  # without hooks that record: both sides take the curvature from one gradient
        copied.zero_grad()
        case.loss(copied, torch.Generator().manual_seed(step)).backward()
        for p, q, source in zip(low.parameters(), high.parameters(), copied.parameters(), strict=True):
            with torch.no_grad():
                q.copy_(p)
            assert source.grad is not None
            p.grad, q.grad = source.grad, source.grad.float()
        for optimizer in optimizers:
            optimizer.step()
        for p, q in zip(low.parameters(), high.parameters(), strict=True):
            assert_close(p, q.to(torch.bfloat16), rtol=0, atol=0)
            assert optimizers[0].state[p]["exp_avg"].dtype == torch.float32
            assert_close(optimizers[0].state[p]["exp_avg"], optimizers[1].state[q]["exp_avg"], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_spectral_state_has_the_dtype_of_the_weights_and_statistics_float32(dtype: torch.dtype) -> None:
    case = BY_NAME["untied"]
    model = case.build().to(dtype)
    optimizer = SpectralAdaFisher(model, lr=0.01)
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        loss = case.loss(model, torch.Generator().manual_seed(0))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.4
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    for p in model.parameters():
        state = optimizer.state[p]
        assert p.dtype == state["exp_avg"].dtype == dtype
        assert {value.dtype for key, value in state.items() if key.endswith("_factor")} == {expected}
        assert optimizer.fisher_diagonal(p).dtype == expected


def test_spectral_reduces_the_loss_of_a_gpt2() -> None:
    record = family("gpt2")
    model = record.build()
    optimizer = SpectralAdaFisher(model, lr=0.02, update_interval=5)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = model(**record.batch()).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 2.0
