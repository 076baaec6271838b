"""SpectralAdaFisher's step: Muon in degenerate settings, units of channels, steepest descent, and the rest of it.

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
from hf_adafisher.optimizers import spectral, update
from hf_adafisher.optimizers.polar import COEFFICIENTS
from tests.cases import CASES, Case, mlp, regression
from tests.model_zoo import family
from tests.reference import FULL_RMS, MATRIX_RMS, SMALL_RMS

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


def test_spectral_with_all_damping_is_muon() -> None:
    """A damping that drowns the metric: Nesterov's momentum, orthogonalised, at a root mean square of 0.2, and decay.

    The first convolution moves as the other matrices do.
    """
    torch.manual_seed(0)
    model = Kinds().double()
    lr, beta, weight_decay = 0.03, 0.8, 0.1
    options = {"relative_damping": 1e14, "beta": beta, "weight_decay": weight_decay, "max_relative_step": None}
    optimizer = SpectralAdaFisher(model, lr=lr, **options)
    hidden = {name: getattr(model, name).weight for name in ("stem", "conv", "tall", "wide", "transposed")}
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


@pytest.mark.parametrize(
    "layer", [nn.Linear(5, 3), Conv1D(7, 4), nn.Conv2d(3, 4, (2, 1))], ids=lambda m: type(m).__name__
)
def test_spectral_with_a_constant_metric_is_muon(layer: nn.Module) -> None:
    """A momentum of one magnitude, whatever the damping: rows and columns are alike already."""
    model = nn.ModuleList([nn.Conv1d(1, 1, 1), layer, nn.Linear(2, 2)]).double()
    weight = layer.weight
    nn.init.normal_(weight)
    optimizer = SpectralAdaFisher(model, lr=0.1, beta=0.0, relative_damping=0.03, max_relative_step=None)
    for step in range(2):
        weight.grad = 3.0 * signs(*weight.shape, seed=step)
        expected = weight.detach() - 0.1 * muon(weight.grad)
        optimizer.step()
        assert_close(weight.detach(), expected, rtol=1e-9, atol=1e-11)


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


def test_spectral_steps_depend_less_on_the_units_of_channels_than_muons() -> None:
    """They are not alike: rows are measured in the units of all columns, and columns in those of all rows.

    Measured: in units of 1/2 to 2 cosines are 0.83 to 0.95, Muon's 0.71 to 0.79; of 1/4 to 4, 0.59 to 0.68 and 0.31
    to 0.43.
    """
    for largest, least, most in ((2.0, 0.82, 0.8), (4.0, 0.58, 0.45)):
        ours, muons = rescaled_cosines(largest), rescaled_cosines(largest, relative_damping=1e14)
        assert min(ours) > least and max(muons) < most


# ------------------------------------------------------------------------- steepest descent


def test_spectral_steps_are_the_steepest_under_their_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    """None of many directions with ``|| R^1/2 dW C^1/2 || = 1`` has a larger inner product with the momentum.

    ``R`` and ``C`` are the mean squares of the momentum's rows and columns. The largest is the nuclear norm of
    ``R^-1/2 M C^-1/2``, as that norm's dual.
    """
    monkeypatch.setattr(update, "polar_factor", svd_polar)
    model = mlp(5, 7, 6, 3).double()
    optimizer = SpectralAdaFisher(model, lr=0.1, beta=0.0, relative_damping=1e-13)
    before = [model[i].weight.detach().clone() for i in (0, 2)]
    model(normal(30, 5) * torch.linspace(0.2, 3.0, 5, dtype=torch.float64)).pow(4).mean().backward()
    optimizer.step()
    for layer, old in zip((model[0], model[2]), before, strict=True):
        momentum = layer.weight.grad
        s, h = (momentum.square().mean(axis).sqrt() for axis in (1, 0))

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


def expected_step(momentum: Tensor, diagonal: Tensor, rho: float, size: float) -> Tensor:
    """``u = m / sqrt(F + rho mean(F))``, with a root mean square of ``size`` at most."""
    u = momentum / (diagonal + rho * diagonal.mean()).sqrt()
    return u * min(1.0, size / float(u.square().mean().sqrt()))


@pytest.mark.parametrize("rho", [0.1, 200.0])
def test_spectral_steps_of_the_rest_are_by_the_root_of_their_gradients_moments(rho: float) -> None:
    """All of them are small or vectors, and have grad^2 itself; at the large damping no step is cut."""
    torch.manual_seed(0)
    model = Layers().double()
    options: dict[str, Any] = {"relative_damping": rho, "nesterov": False, "max_relative_step": None}
    optimizer = SpectralAdaFisher(model, lr=0.01, beta=0.5, **options)
    tokens = torch.randint(0, 11, (4, 5), generator=torch.Generator().manual_seed(0))
    F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten() % 4).backward()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer.step()
    capped = 0
    for name, p in model.named_parameters():
        if name == "mix.weight":
            continue
        assert p.grad is not None
        squares = p.grad.square()
        assert_close(optimizer.fisher_diagonal(p, normalized=False), squares)
        assert_close(optimizer.fisher_diagonal(p), squares + rho * squares.mean())
        size = FULL_RMS if p.dim() > 1 else SMALL_RMS
        update = expected_step(p.grad, squares, rho, size)
        capped += float(update.square().mean().sqrt()) > 0.999999 * size
        assert_close(p.detach(), before[name] - 0.01 * update, rtol=1e-9, atol=1e-12)
    assert (capped > 0) == (rho < 1)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_spectral_steps_of_parameters_without_a_rule(scale: float) -> None:
    """A vector and a matrix of a few rows take their own squared gradients, a single value its sign."""
    case, lr, beta, rho = BY_NAME["bare_parameter"], 0.01, 0.6, 0.2
    model: Any = case.build().double()
    options: dict[str, Any] = {"ema_decay": 0.7, "max_relative_step": None}
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
            update = expected_step(ahead / (1 - beta ** (step + 1)), diagonal, rho, SMALL_RMS)
            assert_close(getattr(model, name).detach(), before[name] - lr * update, rtol=1e-9, atol=1e-12)
        sign = (beta * moments["gain"] + (1 - beta) * gradients["gain"]).sign()
        assert_close(model.gain.detach(), before["gain"] - SMALL_RMS * lr * sign, rtol=1e-12, atol=0)


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
    optimizer = SpectralAdaFisher(model, lr=0.02, weight_decay=0.1)
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


def scaled(model: nn.Module, optimizer: SpectralAdaFisher, step: int) -> None:
    """As a loss scaler does it."""
    (1024 * batch_loss(model, tokens_of(step))).backward()
    for p in model.parameters():
        assert p.grad is not None
        p.grad /= 1024


def multiplied(model: nn.Module, optimizer: SpectralAdaFisher, step: int) -> None:
    """Another loss: a million times as large."""
    (1e6 * batch_loss(model, tokens_of(step))).backward()


@pytest.mark.parametrize(
    "backward",
    [in_two_parts, scaled, multiplied],
    ids=lambda function: function.__name__,
)
@pytest.mark.parametrize("name", ["tied", "untied"])
def test_spectral_steps_do_not_depend_on_how_the_loss_is_written(name: str, backward: Backward) -> None:
    expected = weights_after(name, plain)
    assert_close(weights_after(name, backward), expected, rtol=1e-8, atol=1e-10)
    initial = [p.detach() for p in BY_NAME[name].build().double().parameters()]
    assert not any(torch.equal(p, q) for p, q in zip(expected, initial, strict=True))


# ----------------------------------------------------------------------------- degenerate batches


def test_spectral_steps_with_dead_channels_stay_finite() -> None:
    """Inputs that are always zero and outputs without a gradient: zeros in the metric, and no update there."""
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
    optimizer = SpectralAdaFisher(model, lr=0.1)
    for seed in range(3):
        optimizer.zero_grad()
        model(normal(6, 4, seed=seed)).square().mean().backward()
        optimizer.step()
    for name, p in model.named_parameters():
        assert p.isfinite().all() and torch.equal(p, before[name]) == (p.numel() == 0)


# ------------------------------------------------------------------------------------ dtypes


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
    expected, parameters = torch.float64 if dtype == torch.float64 else torch.float32, dict(model.named_parameters())
    for p in model.parameters():
        state = optimizer.state[p]
        assert p.dtype == state["exp_avg"].dtype == dtype
        factors = {value.dtype for key, value in state.items() if key.endswith("_factor")}
        hidden = next(row.role for row in optimizer.coverage() if p is parameters[row.name]) == "hidden matrix"
        assert factors == (set() if hidden else {expected})
        assert hidden or optimizer.fisher_diagonal(p).dtype == expected


def test_spectral_reduces_the_loss_of_a_gpt2() -> None:
    record = family("gpt2")
    model = record.build()
    optimizer = SpectralAdaFisher(model, lr=0.02)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = model(**record.batch()).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 2.0


def test_spectral_matrices_of_one_shape_keep_the_options_of_their_groups() -> None:
    """Two groups over layers of one shape, against an optimizer for each layer; the last layer, a head, has none."""
    torch.manual_seed(0)
    whole = nn.Sequential(nn.Linear(9, 9), nn.Linear(9, 9), nn.Linear(9, 2)).double()
    apart = copy.deepcopy(whole)
    options = ({"lr": 0.01, "relative_damping": 0.3, "beta": 0.5}, {"lr": 0.03, "weight_decay": 0.1, "nesterov": False})
    groups = [{"params": list(layer.parameters()), **own} for layer, own in zip(whole, options, strict=False)]
    optimizers = [SpectralAdaFisher(whole, groups)]
    optimizers += [
        SpectralAdaFisher(apart, layer.parameters(), **own) for layer, own in zip(apart, options, strict=False)
    ]
    for step in range(3):
        for model in (whole, apart):
            generator = torch.Generator().manual_seed(step)
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)
        for optimizer in optimizers:
            optimizer.step()
    assert_close(list(whole.parameters()), list(apart.parameters()), rtol=1e-12, atol=1e-12)
