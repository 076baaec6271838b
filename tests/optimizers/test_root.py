"""AdaFisher(W) with step_size="root": its sizes and bounds, what it does not depend on, its state and checkpoints."""

from __future__ import annotations

import copy
import functools
import itertools
import logging
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close
from transformers.pytorch_utils import Conv1D

from hf_adafisher import AdaFisher, AdaFisherW, SpectralAdaFisher, create_optimizer, optimizer_state_bytes
from hf_adafisher.optimizers.factory.catalog import optimizer_record
from tests.cases import CASES, Case, TinyLanguageModel, frozen_mlp, mlp
from tests.equivalence import Training, assert_same_training
from tests.model_zoo import family
from tests.optimizers.test_root_lockstep import CLOSE
from tests.reference import root_mean_square
from tests.training_helper import hook_count, of_family, train

BY_NAME = {case.name: case for case in CASES}
FORMS = pytest.mark.parametrize("kind", [AdaFisher, AdaFisherW])
WITHOUT_HOOKS = pytest.mark.parametrize(
    "build",
    [
        functools.partial(AdaFisher, step_size="root"),
        functools.partial(AdaFisherW, step_size="root"),
        SpectralAdaFisher,
    ],
    ids=["adafisher by the root", "adafisherw by the root", "spectral"],
)


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers in float64."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def give_gradients(model: nn.Module, seed: int, scale: float = 1.0) -> None:
    """Normal numbers for every parameter."""
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = scale * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)


# ------------------------------------------------------------------------------ degenerate settings


@FORMS
def test_root_of_constant_squares_is_sgd_with_nesterov_momentum(kind: type[AdaFisher]) -> None:
    """Gradients of one magnitude c: F is c^2 everywhere, and the damping, 99 times that, keeps steps below their size.

    What is left is torch's SGD with its learning rate over 10 c, the bias correction in it, and the same decay.
    """
    beta, c, lr, decay = 0.8, 3.0, 0.01, 0.2
    model: Any = nn.Sequential(nn.Conv2d(2, 3, 2), nn.Linear(12, 9), nn.LayerNorm(9), nn.Embedding(10, 9)).double()
    model.append(nn.Linear(9, 4).double())
    model.register_parameter("table", nn.Parameter(normal(1, 3, 4)))
    twin = copy.deepcopy(model)
    big = [p for name, p in model.named_parameters() if name not in ("0.weight", "table")]  # whose size is 0.2
    twins = [p for name, p in twin.named_parameters() if name not in ("0.weight", "table")]
    options = {"lr": lr, "beta": beta, "damping": 99.0, "weight_decay": decay}
    optimizer = kind(model, big, step_size="root", **options)
    l2 = decay if kind is AdaFisher else 0.0
    sgd = torch.optim.SGD(twins, lr=1.0, momentum=beta, nesterov=True, weight_decay=l2, maximize=False)
    for step in range(6):
        for p, q in zip(big, twins, strict=True):
            p.grad = c * normal(*p.shape, seed=step).sign()
            q.grad = p.grad.clone()
        sgd.param_groups[0]["lr"] = lr * (1 - beta) / (1 - beta ** (step + 1)) / (10.0 * c)
        if kind is AdaFisherW:
            with torch.no_grad():
                for q in twins:
                    q.mul_(1 - lr * decay)
        optimizer.step()
        sgd.step()
        assert_close(list(model.parameters()), list(twin.parameters()), rtol=1e-11, atol=1e-13)
    for p in big:
        assert_close(optimizer.fisher_diagonal(p), torch.full_like(p, 100 * c * c))


@pytest.mark.parametrize("shape", [(7,), (9, 12), (2, 9, 10)])
def test_root_factors_of_one_step_are_adafactors(shape: tuple[int, ...]) -> None:
    """``F = rows (x) columns / mean`` of each matrix, and of a vector grad^2: that of Adafactor, and of Adam."""
    model = nn.ParameterList([normal(*shape)])
    optimizer = AdaFisherW(model, step_size="root")
    grad = normal(*shape, seed=1)
    model[0].grad = grad
    optimizer.step()
    squares = grad.square()
    if len(shape) > 1:
        squares = squares.mean(-1, keepdim=True) * squares.mean(-2, keepdim=True) / squares.mean((-2, -1), keepdim=True)
    assert_close(optimizer.fisher_diagonal(model[0], normalized=False), squares)
    assert_close(optimizer.fisher_diagonal(model[0]), squares + 0.1 * squares.mean())


def test_root_factors_of_a_gradient_of_rank_one_are_exact() -> None:
    """Where grad^2 is an outer product, with next to no damping every weight moves by its sign."""
    model = nn.ParameterList([normal(9, 11)])
    before = model[0].detach().clone()
    optimizer = AdaFisherW(model, lr=1e-3, damping=1e-14, step_size="root")
    model[0].grad = torch.outer(normal(9, seed=1), normal(11, seed=2))
    optimizer.step()
    assert_close(before - model[0].detach(), 0.2 * 1e-3 * model[0].grad.sign(), rtol=1e-5, atol=0)


# ---------------------------------------------------------------------------------- sizes by role


class Parts(nn.Module):
    """A parameter of every role, and of none."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.positions = nn.Embedding(11, 12), nn.Parameter(torch.zeros(1, 9, 12))
        self.cls, self.gain = nn.Parameter(torch.zeros(1, 1, 12)), nn.Parameter(torch.zeros(()))
        self.first, self.conv = nn.Conv2d(3, 12, 3), nn.Conv2d(12, 16, 3)
        self.grouped, self.up = nn.Conv2d(12, 24, 3, groups=2), nn.ConvTranspose2d(12, 13, 2)
        self.linear, self.conv1d = nn.Linear(12, 13), Conv1D(14, 12)
        self.norm, self.head = nn.LayerNorm(12), nn.Linear(12, 10)
        self.bag, self.tall_norm = nn.EmbeddingBag(10, 12), nn.LayerNorm((10, 12))


FULL = ("table.weight", "head.weight", "bag.weight", "linear.weight", "conv1d.weight", "conv.weight")
SIZES = dict.fromkeys(FULL, 1.0)


def steps_of_parts(
    options: dict[str, Any], scale: float = 1.0, size: float = 10.0, kind: type[AdaFisher] = AdaFisherW
) -> dict[str, Tensor]:
    """The first steps, over the learning rate, of parameters of this root mean square."""
    torch.manual_seed(0)
    model = Parts().double()
    with torch.no_grad():
        for seed, p in enumerate(model.parameters()):
            p.copy_(normal(*p.shape, seed=seed).sign() * size)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = kind(model, step_size="root", **{"lr": 0.01} | options)
    give_gradients(model, 1, scale)
    optimizer.step()
    lr = optimizer.param_groups[0]["lr"]
    return {name: (before[name] - p.detach()) / lr for name, p in model.named_parameters()}


def test_root_directions_have_the_size_of_their_role() -> None:
    """1 for tables, heads and hidden matrices, 0.2 for the rest; all reach it with no damping."""
    for name, step in steps_of_parts({"damping": 1e-9}).items():
        assert float(root_mean_square(step)) == pytest.approx(SIZES.get(name, 0.2), rel=1e-6), name


def test_root_directions_below_their_size_are_left_as_they_are() -> None:
    """``1.9 / sqrt(1 + rho)`` or so; a single value, which has no factors, has its size always."""
    short = steps_of_parts({"damping": 1e6})
    for name, step in short.items():
        rms = float(root_mean_square(step))
        # Nesterov's momentum is 1.9 gradients long at the first step.
        assert rms == pytest.approx({"gain": 0.2}.get(name, 1.9e-3), rel=0.01 if name != "gain" else 1e-6), name
    shorter = steps_of_parts({"damping": 4e6})
    for name in short.keys() - {"gain"}:
        assert_close(shorter[name], short[name] / 2, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (1, 1, 1)])
@pytest.mark.parametrize("scale", [1e-15, 1.0, 1e15])
def test_root_steps_of_a_single_value_are_signs(shape: tuple[int, ...], scale: float) -> None:
    """Whatever the gradient was before: the momentum's sign times 0.2."""
    model = nn.ParameterList([torch.full(shape, 3.0)])
    optimizer = AdaFisherW(model, lr=0.1, step_size="root")
    for grad, sign in ((1.0, 1.0), (0.01, 1.0), (-5.0, -1.0)):
        before = model[0].detach().clone()
        model[0].grad = torch.full(shape, grad * scale)
        optimizer.step()
        assert_close(before - model[0].detach(), torch.full(shape, 0.1 * 0.2 * sign), rtol=1e-4, atol=0)
    assert optimizer.state[model[0]].keys() == {"step", "exp_avg", "factor_weight"}


# ---------------------------------------------------------------------------- the bound on a step


@FORMS
@pytest.mark.parametrize("size", [0.0, 0.01, 0.1, 1.0])
@pytest.mark.parametrize("lr", [1e-4, 0.03, 1.0, 100.0])
def test_root_steps_are_at_most_a_twentieth_of_the_norm(size: float, lr: float, kind: type[AdaFisher]) -> None:
    """Of everything with several axes, counted from a root mean square of 0.02; vectors and single values are free."""
    bounded = steps_of_parts({"lr": lr, "damping": 1e-9}, size=size, kind=kind)
    for name, step in bounded.items():
        role = SIZES.get(name, 0.2)
        moved = float(root_mean_square(step)) * lr
        expected = lr * role
        if step.dim() > 1:
            expected = min(expected, 0.05 * max(size, 0.02))
        assert moved == pytest.approx(expected, rel=1e-6), name


def test_root_steps_that_are_bounded_keep_their_direction_and_their_decay() -> None:
    steps = {}
    for lr in (1e-3, 10.0):
        for decay in (0.0, 0.01):
            steps[lr, decay] = steps_of_parts({"lr": lr, "weight_decay": decay}, size=1.0)
    for name, free in steps[1e-3, 0.0].items():
        assert float(F.cosine_similarity(free.flatten(), steps[10.0, 0.0][name].flatten(), dim=0)) == pytest.approx(1.0)
        for lr in (1e-3, 10.0):
            decayed = steps[lr, 0.01][name] - steps[lr, 0.0][name]
            assert_close(decayed.abs(), torch.full_like(decayed, 0.01), rtol=1e-6, atol=1e-9)


# --------------------------------------------------------------------------------- scale of the loss


@pytest.mark.parametrize("scale", [2.0**-8, 1e-2, 1e6, 2.0**40])
@pytest.mark.parametrize("name", ["tied", "conv_batch_norm", "bare_parameter", "experts"])
def test_root_steps_do_not_depend_on_the_scale_of_gradients(name: str, scale: float) -> None:
    """A loss scale or a clipping that holds for all steps; in float32 too, to rounding."""
    for dtype, close in ((torch.float64, CLOSE), (torch.float32, {"rtol": 1e-4, "atol": 1e-6})):
        case = BY_NAME[name]
        torch.manual_seed(0)
        model = case.build().to(dtype)
        other = copy.deepcopy(model)
        pairs = [(m, AdaFisherW(m, lr=0.02, weight_decay=0.1, step_size="root")) for m in (model, other)]
        for step in range(4):
            model.zero_grad()
            case.loss(model, torch.Generator().manual_seed(step)).backward()
            for p, q in zip(model.parameters(), other.parameters(), strict=True):
                q.grad = None if p.grad is None else p.grad * scale
            for _, optimizer in pairs:
                optimizer.step()
        ends = [[p.detach() for p in m.parameters()] for m, _ in pairs]
        assert_close(*ends, **close)


def test_root_ignores_gradient_scale_which_hooks_would_need() -> None:
    """Factors are those of the gradient as it is: a loop that sets the scale for the paper's form changes nothing."""
    ends = []
    for scale in (1.0, 1 / 20):
        model = BY_NAME["untied"].build().double()
        optimizer = AdaFisherW(model, lr=0.02, step_size="root")
        optimizer.gradient_scale = scale
        train(model, BY_NAME["untied"], optimizer, steps=3)
        ends.append(Training(model, optimizer))
    assert_same_training(*ends, bitwise=True)


# ------------------------------------------------------------------------------ rows of a table


def test_root_rows_of_a_table_that_are_absent_stay_and_then_take_no_huge_step() -> None:
    """Without decay a row never seen stays to the bit; at its first use it moves as far as a row that always was."""
    model = TinyLanguageModel(tied=False).double()
    table = model.embedding.weight
    before = table.detach().clone()
    optimizer = AdaFisherW(model, lr=1e-4, step_size="root")
    for step in range(30):
        optimizer.zero_grad()
        tokens = torch.randint(0, 8, (4, 5), generator=torch.Generator().manual_seed(step))
        F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
        optimizer.step()
    assert torch.equal(table[8:], before[8:]) and not (table[:8] == before[:8]).any()
    optimizer.zero_grad()
    tokens = torch.tensor([[1, 9, 2, 9, 3]])
    F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
    before = table.detach().clone()
    optimizer.step()
    moved = (table.detach() - before).square().mean(1).sqrt()
    assert moved[9] > 0 and not moved[[8, 10]].any()
    assert moved[9] < 1e-4 * (1 / 0.1) ** 0.5 * 2  # of the order of lr / sqrt(rho), whatever its own factor
    assert torch.equal(table[10], before[10])


def test_root_rows_that_are_no_longer_seen_come_to_rest() -> None:
    """Their momentum fades; with decay they go on shrinking, with L2 they move by what is left."""
    for decay in (0.0, 0.1):
        model = nn.Sequential(nn.Embedding(12, 9), nn.Linear(9, 9)).double()
        optimizer = AdaFisherW(model, lr=1e-3, weight_decay=decay, step_size="root")
        for step in range(150):
            optimizer.zero_grad()
            model(torch.arange(12 if step == 0 else 6)).square().mean().backward()
            before = model[0].weight.detach().clone()
            optimizer.step()
        expected = before[6:] * (1 - 1e-3 * decay)
        assert_close(model[0].weight.detach()[6:], expected, rtol=1e-7, atol=1e-9)


# -------------------------------------------------------------------------- zeros and what is not finite


@WITHOUT_HOOKS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", ["untied", "bare_parameter", "conv_grouped", "experts"])
def test_steps_of_zero_gradients_stay_where_they_are(name: str, dtype: torch.dtype, build: Any) -> None:
    """At the first step, and later without momentum; nothing is divided by zero."""
    case = BY_NAME[name]
    model = case.build().to(dtype)
    optimizer = build(model, lr=0.1, beta=0.0)
    for step, scale in enumerate((0.0, 1.0, 0.0, 0.0)):
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.zero_grad()
        (scale * case.loss(model, torch.Generator().manual_seed(step))).backward()
        optimizer.step()
        assert all(bool(p.isfinite().all()) for p in model.parameters())
        if not scale:
            assert_close([p.detach() for p in model.parameters()], before, rtol=0, atol=0)
    assert all(bool(v.isfinite().all()) for state in optimizer.state.values() for v in state.values())


def test_root_weights_without_gradients_decay_by_l2_in_full_steps() -> None:
    """F is that of the gradient alone, here zero: the decay's momentum takes the largest step, and stops at zero."""
    model = nn.ParameterList([normal(9, 10), normal(9)])
    before = [p.detach().clone() for p in model]
    optimizer = AdaFisher(model, lr=0.01, weight_decay=0.1, step_size="root")
    for p in model:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for p, old, size in zip(model, before, (0.2, 0.2), strict=True):
        assert_close(old - p.detach(), 0.01 * size * old / root_mean_square(old), rtol=1e-6, atol=0)


@pytest.mark.parametrize("lr", [0.0, -0.0])
def test_root_with_a_learning_rate_of_zero_moves_nothing(lr: float) -> None:
    """Also of what is zero itself, and of what has no gradient."""
    model = Parts()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = AdaFisherW(model, weight_decay=0.1, step_size="root")
    optimizer.param_groups[0]["lr"] = lr
    for seed, scale in enumerate((0.0, 1.0)):
        give_gradients(model, seed, scale)
        optimizer.step()
    assert_close([p.detach() for p in model.parameters()], before, rtol=0, atol=0)


@pytest.mark.parametrize("size", [1e-10, 1e-30])
def test_root_takes_gradients_far_below_1e_8_for_noise(size: float) -> None:
    """As Adam does by its eps: the step is the momentum over 1e-8; that of a bias before a BatchNorm, for one."""
    model = nn.ParameterList([normal(9, 10), normal(9)])
    before = [p.detach().clone() for p in model]
    optimizer = AdaFisherW(model, lr=1.0, step_size="root")
    for p in model:
        p.grad = size * normal(*p.shape, seed=1)
    optimizer.step()
    for p, old in zip(model, before, strict=True):
        assert p.grad is not None
        assert_close((old - p.detach()) / size, 1.9 * p.grad / size / 1e-8, rtol=1e-3, atol=1e-15 / size)


@pytest.mark.parametrize("scale", [1e-3, 1e6, 1e12])
def test_root_in_float32_far_from_one(scale: float) -> None:
    """Squares of these gradients are within float32; the step is as at a scale of one."""
    expected = steps_of_parts({}, scale=1.0)
    model = Parts()
    with torch.no_grad():
        for seed, p in enumerate(model.parameters()):
            p.copy_(normal(*p.shape, seed=seed).sign() * 10)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = AdaFisherW(model, lr=0.01, step_size="root")
    give_gradients(model, 1, scale)
    optimizer.step()
    for old, p, right in zip(before, model.parameters(), expected.values(), strict=True):
        assert_close((old - p.detach()) / 0.01, right.float(), rtol=1e-2, atol=2e-3)


# ----------------------------------------------------------------------------------------- groups


def test_root_groups_have_their_own_options() -> None:
    """Over given gradients each parameter moves as in an optimizer whose options are all those of its group."""
    options: list[dict[str, Any]] = [
        {"lr": 0.01, "damping": 0.05, "beta": 0.5, "ema_decay": 0.6, "momentum_dtype": "float32"},
        {"lr": 0.03, "damping": 2.0, "weight_decay": 0.2, "ema_decay": 0.9},
    ]
    runs = []
    for kinds in ((0, 1), (0, 0), (1, 1)):
        torch.manual_seed(0)
        model = mlp(6, 6, 6, 6, 6, 3).double()
        weights, vectors = ([p for p in model.parameters() if (p.dim() > 1) == wanted] for wanted in (True, False))
        halves = [[*weights[::2], *vectors[1:]], [*weights[1::2], *vectors[:1]]]
        groups = [{"params": half, **options[kind]} for half, kind in zip(halves, kinds, strict=True)]
        optimizer = AdaFisherW(model, groups, step_size="root")
        for seed in range(4):
            give_gradients(model, seed)
            optimizer.step()
        runs.append([[p.detach() for p in half] for half in halves])
    mixed, first, second = runs
    assert_close(mixed, [first[0], second[1]], rtol=1e-14, atol=0)
    assert not any(torch.equal(p, q) for p, q in zip(first[0], second[0], strict=True))


@FORMS
def test_root_has_defaults_of_its_own(kind: type[AdaFisher]) -> None:
    """Also in groups that leave an option out or to None; the paper's form keeps the paper's."""
    paper = {"lr": 1e-3, "damping": 1e-3, "ema_decay": 0.8, "update_interval": 100}
    root = {"lr": 4e-3, "damping": 0.1, "ema_decay": 0.95, "update_interval": 1}
    model = mlp(3, 2)
    for step_size, expected in (("paper", paper), ("root", root)):
        none: dict[str, Any] = dict.fromkeys(expected)
        for groups in (None, [{"params": model.parameters(), **none}]):
            for given in ({}, none):
                optimizer = kind(model, groups and copy.copy(groups), step_size=step_size, **given)
                assert {key: optimizer.param_groups[0][key] for key in expected} == expected
                groups = groups and [{"params": model.parameters(), **none}]
    optimizer = kind(model, step_size="root", damping=0.3)
    assert optimizer.param_groups[0]["damping"] == 0.3 and optimizer.param_groups[0]["lr"] == 4e-3


def test_root_takes_no_update_interval() -> None:
    """Neither as an argument nor in a group; the message says what to do."""
    model = mlp(3, 2)
    for value in (2, 10, 100):
        with pytest.raises(ValueError, match=rf"update_interval={value} belongs to step_size='paper'.*Leave .* out"):
            AdaFisherW(model, step_size="root", update_interval=value)
        with pytest.raises(ValueError, match=rf"update_interval={value} belongs to step_size='paper'"):
            AdaFisherW(model, [{"params": model.parameters(), "update_interval": value}], step_size="root")
        with pytest.raises(ValueError, match=rf"update_interval={value} belongs to step_size='paper'"):
            create_optimizer("adafisherw", model, update_interval=value)
    assert AdaFisherW(model, step_size="root", update_interval=1).param_groups[0]["update_interval"] == 1


@pytest.mark.parametrize(("own", "others"), [("root", "paper"), ("paper", "root")])
def test_root_and_paper_are_not_mixed_in_groups(own: str, others: str) -> None:
    """The first group alone would not differ from any other."""
    model = mlp(3, 2)
    free = {"update_interval": 1}
    with pytest.raises(ValueError, match=rf"step_size='{others}' of a parameter group differs .* '{own}'"):
        AdaFisherW(model, [{"params": model.parameters(), "step_size": others, **free}], step_size=own, **free)
    optimizer = AdaFisherW(model, [model[0].weight], step_size=own)
    with pytest.raises(ValueError, match="one form, which is given to the constructor"):
        optimizer.add_param_group({"params": [model[0].bias], "step_size": others, **free})
    for wrong in ("sqrt", None, 1):
        with pytest.raises(ValueError, match="step_size must be 'paper' or 'root', got"):
            AdaFisherW(model, step_size=wrong)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="step_size must be 'paper' or 'root', got"):
            optimizer.add_param_group({"params": [model[0].bias], "step_size": wrong})
    optimizer.add_param_group({"params": [model[0].bias], "step_size": own})


def test_root_is_what_create_optimizer_builds() -> None:
    """With the form's own defaults; asked for the paper's form it has the paper's."""
    optimizer = create_optimizer("adafisherw", mlp(3, 2))
    assert isinstance(optimizer, AdaFisherW) and optimizer.step_size == "root"
    options = {key: optimizer.param_groups[0][key] for key in ("damping", "ema_decay", "update_interval")}
    assert options == {"damping": 0.1, "ema_decay": 0.95, "update_interval": 1}
    assert optimizer.param_groups[0]["lr"] == optimizer_record("adafisherw").learning_rate.value
    paper = create_optimizer("adafisherw", mlp(3, 2), step_size="paper")
    assert isinstance(paper, AdaFisherW) and paper.step_size == "paper"
    assert paper.param_groups[0]["damping"] == 1e-3


# ------------------------------------------------------------------------------------------ state


@WITHOUT_HOOKS
def test_state_of_a_gpt2_is_half_of_adamws(build: Any) -> None:
    """Of one of the original's width, by shapes; those of a small one are what a step really makes."""
    with torch.device("meta"):
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=2))
    optimizer = build(model)
    ours = sum(
        4 * torch.Size(shape).numel() for p in model.parameters() for shape in optimizer.state_shapes(p).values()
    )
    adamw = sum(8 * p.numel() + 4 for p in model.parameters())
    assert 0.5 < ours / adamw <= 0.502

    record = family("gpt2")
    small = record.build()
    optimizer, peer = build(small), torch.optim.AdamW(small.parameters())
    small(**record.batch()).loss.backward()
    optimizer.step()
    peer.step()
    expected = 0
    for p in small.parameters():
        shapes = optimizer.state_shapes(p)
        assert {key: tuple(value.shape) for key, value in optimizer.state[p].items()} == shapes
        doubles = sum(key.startswith("factor_weight") for key in shapes)
        expected += 4 * sum(torch.Size(shape).numel() for shape in shapes.values()) + 4 * doubles
    assert optimizer_state_bytes(optimizer) == expected
    assert optimizer_state_bytes(optimizer) < 0.62 * optimizer_state_bytes(peer)  # 16 wide: factors count for more


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_root_state_has_the_dtype_of_the_weights_and_factors_float32(dtype: torch.dtype) -> None:
    case = BY_NAME["untied"]
    model = case.build().to(dtype)
    optimizer = AdaFisherW(model, lr=0.05, step_size="root")
    losses = []
    for _ in range(30):
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


@WITHOUT_HOOKS
def test_root_momentum_in_float32_updates_bfloat16_weights_as_float32_ones(build: Any) -> None:
    """The step is rounded once, at the end: to the bfloat16 nearest to the float32 result."""
    low = BY_NAME["mlp"].build().to(torch.bfloat16)
    high = copy.deepcopy(low).float()
    options: dict[str, Any] = {"lr": 0.05, "momentum_dtype": "float32", "weight_decay": 0.1}
    optimizers = [build(model, **options) for model in (low, high)]
    for step in range(4):
        give_gradients(low, step)
        for p, q in zip(low.parameters(), high.parameters(), strict=True):
            with torch.no_grad():
                q.copy_(p)
            assert p.grad is not None
            q.grad = p.grad.float()
        for optimizer in optimizers:
            optimizer.step()
        for p, q in zip(low.parameters(), high.parameters(), strict=True):
            assert_close(p, q.to(torch.bfloat16), rtol=0, atol=0)
            assert optimizers[0].state[p]["exp_avg"].dtype == torch.float32
            assert_close(optimizers[0].state[p]["exp_avg"], optimizers[1].state[q]["exp_avg"], rtol=0, atol=0)


@WITHOUT_HOOKS
def test_root_of_several_dtypes_is_that_of_each_alone(build: Any) -> None:
    """One optimizer over layers of four dtypes, against one optimizer a layer; the last layer, a head, apart."""
    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.float32)
    whole = nn.ModuleList(nn.Linear(9, 10).to(dtype) for dtype in dtypes)
    apart = [copy.deepcopy(layer) for layer in whole[:-1]]
    optimizers = [build(whole, lr=0.01)]
    optimizers += [build(nn.ModuleList([layer, nn.Linear(10, 2)]), layer.parameters(), lr=0.01) for layer in apart]
    for step in range(3):
        for i, layer in enumerate(whole):
            give_gradients(layer, 10 * step + i)
            if i < len(apart):
                give_gradients(apart[i], 10 * step + i)
        for optimizer in optimizers:
            optimizer.step()
    for layer, alone in zip(whole, apart, strict=False):
        assert_close(list(layer.parameters()), list(alone.parameters()), rtol=0, atol=0)


@WITHOUT_HOOKS
def test_root_takes_statistics_of_every_gradient_also_after_a_failed_step(
    build: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A parameter whose first gradient comes after an interrupted step: its factors have a weight by then."""
    model = nn.ModuleList([nn.Embedding(9, 10), nn.Embedding(9, 10)])
    optimizer = build(model, lr=0.01)
    give_gradients(model[0], 0)

    def interrupt() -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(optimizer, "_update_parameters", interrupt)
        with pytest.raises(KeyboardInterrupt):
            optimizer.step()
    give_gradients(model, 1)
    optimizer.step()
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    assert optimizer.state[model[1].weight]["factor_weight"].item() == pytest.approx(0.05)


@WITHOUT_HOOKS
def test_a_refused_group_leaves_the_optimizer_as_the_model_is(build: Any) -> None:
    """The model has lost its last layer when a foreign parameter is refused: the next step goes on with the rest."""
    model = nn.Sequential(nn.Linear(9, 10), nn.Linear(10, 11), nn.Linear(11, 9))
    kept = [*model[0].parameters(), *model[1].parameters()]
    optimizer = build(model, kept, lr=0.01)
    give_gradients(model, 0)
    optimizer.step()
    del model[2]
    with pytest.raises(ValueError, match="does not belong to the model"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))]})
    before = [p.detach().clone() for p in kept]
    give_gradients(model, 1)
    optimizer.step()
    assert all(bool((p != old).any()) for p, old in zip(kept, before, strict=True))


def test_groups_of_adafisher_have_no_say_about_options_of_the_spectral_form() -> None:
    ends = []
    for more in ({}, {"max_relative_step": 1e-9, "nesterov": False}):
        torch.manual_seed(0)
        model = nn.Linear(9, 10)
        optimizer = AdaFisherW(model, [{"params": list(model.parameters()), **more}], lr=0.01, step_size="root")
        give_gradients(model, 0)
        optimizer.step()
        ends.append(list(model.parameters()))
    assert_close(*ends, rtol=0, atol=0)


def test_root_steps_of_before_are_forgotten_with_the_state() -> None:
    model = nn.Linear(9, 10)
    optimizer = AdaFisherW(model, lr=0.01, step_size="root")
    fresh = optimizer.state_dict()
    give_gradients(model, 0)
    optimizer.step()
    assert set(optimizer.root_steps()) == {id(p) for p in model.parameters()}
    optimizer.load_state_dict(fresh)
    assert optimizer.root_steps() == {}


def test_root_puts_no_hook_on_the_model() -> None:
    """From the constructor to the close, and a compiled or functional model is none of its business."""
    model = BY_NAME["untied"].build()
    with AdaFisherW(model, step_size="root") as optimizer:
        assert hook_count(model) == 0
        train(model, BY_NAME["untied"], optimizer, steps=2)
        assert hook_count(model) == 0 and not optimizer.recording
        assert optimizer.refresh_due
    with pytest.raises(RuntimeError, match="was closed"):
        optimizer.step()
    with AdaFisherW(model) as paper:
        assert paper.recording and hook_count(model) > 0


@pytest.mark.parametrize("frozen", ["0.weight", "2.weight", "2.bias", "6.weight"])
def test_root_leaves_frozen_parameters_alone(frozen: str) -> None:
    case = Case("frozen", lambda: frozen_mlp(frozen), BY_NAME["mlp"].loss)
    model = case.build()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = AdaFisherW(model, weight_decay=0.1, step_size="root")
    train(model, case, optimizer, steps=3)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == (name == frozen)
        assert (p in optimizer.state) == (name != frozen)


def test_root_parameters_that_come_late_start_as_at_the_first_step() -> None:
    """Bias corrections of momentum and of factors are each parameter's own; in steps without a gradient it rests."""
    model = nn.ParameterList([normal(9, 10), normal(9, 10)])
    alone = nn.ParameterList([model[1].detach().clone()])
    options: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.1, "step_size": "root"}
    optimizer, single = AdaFisherW(model, **options), AdaFisherW(alone, **options)
    for step in range(9):
        model[0].grad, model[1].grad = normal(9, 10, seed=step), None
        if step in (3, 4, 7):
            model[1].grad = normal(9, 10, seed=100 + step)
            alone[0].grad = model[1].grad.clone()
            single.step()
        before = model[1].detach().clone()
        optimizer.step()
        if model[1].grad is None:
            assert torch.equal(model[1], before)
        assert_close(model[1].detach(), alone[0].detach(), rtol=1e-14, atol=0)
    assert optimizer.state[model[1]]["step"] == 3 and optimizer.state[model[0]]["step"] == 9


# ------------------------------------------------------------------------------------ checkpoints


@FORMS
@pytest.mark.parametrize("name", ["tied", "experts", "norm", "attention", "conv_batch_norm", "used_late"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_root_resumed_run_equals_an_uninterrupted_one_bitwise(
    name: str, dtype: torch.dtype, kind: type[AdaFisher], tmp_path: Any
) -> None:
    """Loaded with weights_only, into an optimizer with other options."""
    case = BY_NAME[name]
    model = case.build().to(dtype)
    optimizer = kind(model, lr=1e-2, damping=0.3, ema_decay=0.7, weight_decay=0.1, step_size="root")
    train(model, case, optimizer, steps=6)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "checkpoint.pt")
    forwards = getattr(model, "forwards", None)
    train(model, case, optimizer, steps=6, start=6)

    resumed = case.build(seed=1).to(dtype)
    if forwards is not None:
        resumed.forwards = forwards
    restored = kind(resumed, lr=1.0, step_size="root")
    checkpoint = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    resumed.load_state_dict(checkpoint["model"])
    restored.load_state_dict(checkpoint["optimizer"])
    train(resumed, case, restored, steps=6, start=6)
    assert_same_training(Training(resumed, restored), Training(model, optimizer), bitwise=True)


@FORMS
@pytest.mark.parametrize(("saved", "loaded"), [("paper", "root"), ("root", "paper")])
@pytest.mark.parametrize("steps", [0, 2])
def test_root_and_paper_refuse_each_others_checkpoints(
    saved: str, loaded: str, steps: int, kind: type[AdaFisher]
) -> None:
    case = BY_NAME["mlp"]
    model = case.build()
    optimizer = kind(model, step_size=saved)
    train(model, case, optimizer, steps=steps)
    other = kind(model, step_size=loaded)
    before = copy.deepcopy(other.param_groups[0] | {"params": []})
    with pytest.raises(ValueError, match=rf"written with step_size={saved} and this optimizer built with {loaded}"):
        other.load_state_dict(optimizer.state_dict())
    assert not other.state and other.param_groups[0] | {"params": []} == before


def test_root_refuses_a_checkpoint_from_before_there_was_a_root(caplog: pytest.LogCaptureFixture) -> None:
    """It says nothing of a form, and is the paper's, which loads it without a word."""
    case = BY_NAME["mlp"]
    model = case.build()
    optimizer = AdaFisherW(model)
    train(model, case, optimizer, steps=2)
    saved = optimizer.state_dict()
    for group in saved["param_groups"]:
        del group["step_size"]
    with pytest.raises(ValueError, match=r"saved state of 0\.weight does not fit"):
        AdaFisherW(model, step_size="root").load_state_dict(saved)
    with caplog.at_level(logging.WARNING):
        paper = AdaFisherW(model)
        paper.load_state_dict(saved)
    assert "options replace" not in caplog.text and paper.param_groups[0]["step_size"] == "paper"


def test_root_checkpoints_tell_decoupled_decay_from_l2() -> None:
    case = BY_NAME["mlp"]
    model = case.build()
    optimizers = [kind(model, step_size="root") for kind in (AdaFisher, AdaFisherW)]
    for one, other in itertools.permutations(optimizers):
        with pytest.raises(ValueError, match="not written by AdaFisher"):
            one.load_state_dict(other.state_dict())


# ------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("name", ["gpt2", "vit"])
def test_root_reduces_the_loss(name: str) -> None:
    """Over one batch."""
    record = family(name)
    model = record.build()
    optimizer = create_optimizer("adafisherw", model)
    losses = train(model, of_family(record, seed=0), optimizer, steps=60)
    assert losses[-1] < losses[0] - 0.5


def test_root_summary_is_that_of_the_diagonals() -> None:
    case = BY_NAME["tied"]
    model = case.build()
    optimizer = AdaFisherW(model, damping=0.2, step_size="root")
    train(model, case, optimizer, steps=2)
    summary = optimizer.curvature_summary()
    means, values = 0.0, 0
    for p in model.parameters():
        raw, damped = optimizer.fisher_diagonal(p, normalized=False), optimizer.fisher_diagonal(p)
        assert_close(damped - raw, torch.full_like(raw, 0.2 * raw.mean()), rtol=1e-3, atol=0)
        means, values = means + damped.sum().item(), values + p.numel()
    assert summary["fisher_mean"] == pytest.approx(means / values)
    assert (summary["refreshes"], summary["dropped_refreshes"]) == (2, 0)
