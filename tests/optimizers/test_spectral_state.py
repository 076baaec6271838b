"""What SpectralAdaFisher keeps, its checkpoints, what it refuses, and the ends of float32."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from hf_adafisher import SpectralAdaFisher, create_optimizer
from hf_adafisher.fisher.gradient import GradientDiagonal, on_gradient_scale
from hf_adafisher.optimizers.polar import polar_factor
from tests.cases import CASES, Case, frozen_mlp, mlp
from tests.training_helper import hook_count, train

BY_NAME = {case.name: case for case in CASES}


# ------------------------------------------------------------------------------------ state


def test_spectral_state_holds_plain_options() -> None:
    """Which every kind of checkpoint can hold, a dtype among them as a word."""
    optimizer = SpectralAdaFisher(mlp(3, 2), momentum_dtype=torch.float32, polar_dtype=torch.bfloat16)
    assert optimizer.param_groups[0]["polar_dtype"] == "bfloat16"
    plain = (bool, int, float, str, type(None))
    assert all(isinstance(v, plain) for g in optimizer.param_groups for k, v in g.items() if k != "params")


# ------------------------------------------------------------------------------ checkpoints


@pytest.mark.parametrize("name", ["tied", "experts", "norm", "attention", "conv_batch_norm", "used_late"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_spectral_resumed_run_equals_an_uninterrupted_one_bitwise(name: str, dtype: torch.dtype, tmp_path: Any) -> None:
    """Loaded with weights_only, into an optimizer with other options."""
    case = BY_NAME[name]
    model = case.build().to(dtype)
    options: dict[str, Any] = {
        "relative_damping": 0.3,
        "ema_decay": 0.7,
        "nesterov": False,
    }
    optimizer = SpectralAdaFisher(model, lr=1e-2, weight_decay=0.1, **options)
    train(model, case, optimizer, steps=6)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "checkpoint.pt")
    forwards = getattr(model, "forwards", None)
    train(model, case, optimizer, steps=6, start=6)

    resumed = case.build(seed=1).to(dtype)
    if forwards is not None:
        resumed.forwards = forwards
    restored = SpectralAdaFisher(resumed, lr=1.0)
    checkpoint = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    resumed.load_state_dict(checkpoint["model"])
    restored.load_state_dict(checkpoint["optimizer"])
    train(resumed, case, restored, steps=6, start=6)
    assert_close(resumed.state_dict(), model.state_dict(), rtol=0, atol=0)
    assert_close(restored.state_dict(), optimizer.state_dict(), rtol=0, atol=0)


def test_spectral_checkpoint_says_which_options_it_changes(caplog: pytest.LogCaptureFixture) -> None:
    model = mlp(3, 2)
    options = {"relative_damping": 0.3, "ema_decay": 0.5, "nesterov": False, "max_relative_step": None}
    saved = SpectralAdaFisher(model, **options).state_dict()
    with caplog.at_level(logging.WARNING):
        SpectralAdaFisher(model).load_state_dict(saved)
    for name, value in options.items():
        assert f"{name}: {SpectralAdaFisher(model).param_groups[0][name]} -> {value}" in caplog.text


def test_spectral_checkpoint_from_before_an_option_existed_goes_on_with_this_optimizers(
    caplog: pytest.LogCaptureFixture,
) -> None:
    case, ends = BY_NAME["mlp"], []
    for older in (False, True):
        model = case.build()
        options: dict[str, Any] = {
            "lr": 0.1,
            "max_relative_step": 0.01,
            "polar_dtype": "bfloat16",
        }
        optimizer = SpectralAdaFisher(model, **options)
        train(model, case, optimizer, steps=2)
        saved = optimizer.state_dict()
        if older:
            for group in saved["param_groups"]:
                del group["max_relative_step"], group["polar_dtype"]
        restored = SpectralAdaFisher(model, **options)
        with caplog.at_level(logging.WARNING):
            restored.load_state_dict(saved)
        train(model, case, restored, steps=2, start=2)
        ends.append([p.detach() for p in model.parameters()])
    assert "max_relative_step" not in caplog.text
    assert_close(ends[1], ends[0], rtol=0, atol=0)


@pytest.mark.parametrize(("saved", "loaded"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_spectral_checkpoint_of_another_precision_loads_and_trains(saved: torch.dtype, loaded: torch.dtype) -> None:
    case = BY_NAME["tied"]
    model, other = case.build().to(saved), case.build().to(loaded)
    optimizer, restored = SpectralAdaFisher(model), SpectralAdaFisher(other)
    train(model, case, optimizer, steps=2)
    restored.load_state_dict(optimizer.state_dict())
    train(other, case, restored, steps=2)
    for p in other.parameters():
        state = restored.state[p]
        factors = {value.dtype for key, value in state.items() if key.endswith("_factor")}
        assert state["exp_avg"].dtype == loaded and factors <= {torch.float32}
        assert p.isfinite().all()


@pytest.mark.parametrize("name", ["adafisherw", "kfac", "adamw", "muon"])
def test_spectral_refuses_other_checkpoints_and_others_refuse_its(name: str) -> None:
    case = BY_NAME["mlp"]
    model = case.build()
    other = create_optimizer(name, model)
    train(model, case, other, steps=1)
    ours = SpectralAdaFisher(model)
    train(model, case, ours, steps=1)
    with pytest.raises(ValueError, match=r"not written by SpectralAdaFisher \(its options are .*resume with"):
        ours.load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match=r"not written by .*relative_damping=0\.1.*resume with"):
        other.load_state_dict(ours.state_dict())


def test_spectral_refuses_another_models_checkpoint() -> None:
    case = BY_NAME["mlp"]
    model = case.build()
    optimizer = SpectralAdaFisher(model)
    train(model, case, optimizer, steps=1)
    with pytest.raises(ValueError, match=r"0\.weight does not fit the model"):
        SpectralAdaFisher(mlp(4, 7, 5, 3)).load_state_dict(optimizer.state_dict())


# ---------------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("option", "values", "allowed"),
    [
        ("lr", [-1e-3, float("nan"), "fast"], "lr must be"),
        ("relative_damping", [0.0, -1.0, float("nan"), float("inf")], "relative_damping must be finite and > 0"),
        ("ema_decay", [-0.1, 1.0], r"ema_decay must lie in \[0, 1\)"),
        ("beta", [-0.1, 1.0], r"beta must lie in \[0, 1\)"),
        ("weight_decay", [-0.1, float("inf")], "weight_decay must be finite and >= 0"),
        ("nesterov", [1, "yes"], "nesterov must be True or False"),
        ("max_relative_step", [0.0, -0.1, float("nan"), float("inf"), "far"], "max_relative_step must be"),
        ("momentum_dtype", ["int32"], "momentum_dtype must be None .*'float32'"),
        ("polar_dtype", ["int32", "float8_e4m3fn", 7], "polar_dtype must be None .*bfloat16.*16 bits or more"),
    ],
)
def test_spectral_options_outside_their_range(option: str, values: list[Any], allowed: str) -> None:
    model = mlp(3, 2)
    for value in values:
        with pytest.raises(ValueError, match=allowed) as raised:
            SpectralAdaFisher(model, **{option: value})
        assert str(value) in str(raised.value)
        with pytest.raises(ValueError, match=allowed):
            SpectralAdaFisher(model, [{"params": model.parameters(), option: value}])


def test_spectral_has_no_damping_of_adafishers() -> None:
    with pytest.raises(TypeError, match="damping"):
        SpectralAdaFisher(mlp(3, 2), damping=0.1)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="spectral-adafisher has no option 'damping', did you mean 'relative_damping'"):
        create_optimizer("spectral-adafisher", mlp(3, 2), damping=0.1)
    with pytest.raises(TypeError, match="SpectralAdaFisher needs the model"):
        SpectralAdaFisher(mlp(3, 2).parameters())  # type: ignore[arg-type]


def test_spectral_options_reach_the_optimizer_by_name() -> None:
    model = mlp(3, 4, 2)
    options = {"relative_damping": 0.25, "nesterov": False, "ema_decay": 0.5, "max_relative_step": None}
    optimizer = create_optimizer("spectral-adafisher", model, lr=0.5, weight_decay=0.1, **options)
    assert isinstance(optimizer, SpectralAdaFisher)
    assert {key: optimizer.param_groups[0][key] for key in options} == options
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_spectral_groups_have_their_own_options() -> None:
    """Over given gradients each parameter moves as in an optimizer whose options are all those of its group.

    Hidden matrices of one shape, which are orthogonalised together, are in different groups.
    """
    options: list[dict[str, Any]] = [
        {"lr": 0.01, "relative_damping": 0.05, "beta": 0.5, "ema_decay": 0.6, "momentum_dtype": "float32"}
        | {"max_relative_step": 0.01, "polar_dtype": "bfloat16"},
        {"lr": 0.03, "relative_damping": 2.0, "weight_decay": 0.2, "nesterov": False} | {"max_relative_step": None},
    ]
    runs = []
    for kinds in ((0, 1), (0, 0), (1, 1)):
        torch.manual_seed(0)
        model = mlp(6, 6, 6, 6, 6, 3).double()
        weights, vectors = ([p for p in model.parameters() if (p.dim() > 1) == wanted] for wanted in (True, False))
        halves = [[*weights[::2], *vectors[1:]], [*weights[1::2], *vectors[:1]]]
        groups = [{"params": half, **options[kind]} for half, kind in zip(halves, kinds, strict=True)]
        optimizer = SpectralAdaFisher(model, groups)
        generator = torch.Generator().manual_seed(0)
        for _ in range(4):
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            optimizer.step()
        runs.append([[p.detach() for p in half] for half in halves])
    mixed, first, second = runs
    assert_close(mixed, [first[0], second[1]], rtol=0, atol=0)
    assert not any(torch.equal(p, q) for p, q in zip(first[0], second[0], strict=True))


@pytest.mark.parametrize("option", ["relative_damping", "max_relative_step"])
def test_spectral_options_that_change_count_at_the_next_step(option: str) -> None:
    case = BY_NAME["mlp"]
    moved = []
    for when in ("never", "between", "from the start"):
        model = case.build().double()
        optimizer = SpectralAdaFisher(model, lr=0.05, beta=0.0)
        for step in range(2):
            optimizer.zero_grad()
            case.loss(model, torch.Generator().manual_seed(0)).backward()
            before = [p.detach().clone() for p in model.parameters()]
            if when == "from the start" or (when == "between" and step == 1):
                optimizer.param_groups[0][option] = 0.001 if option == "max_relative_step" else 0.9
            optimizer.param_groups[0]["lr"] = 0.05 if step else 0.0
            optimizer.step()
        moved.append([p.detach() - old for p, old in zip(model.parameters(), before, strict=True)])
    never, between, start = moved
    assert_close(between, start, rtol=0, atol=0)
    assert not torch.equal(never[0], start[0])


# ------------------------------------------------------------------------- the model changes


def test_spectral_has_no_hooks() -> None:
    case = BY_NAME["mlp"]
    model = case.build()
    with SpectralAdaFisher(model) as optimizer:
        assert hook_count(model) == 0 and not optimizer.recording
        train(model, case, optimizer, steps=2)
        assert hook_count(model) == 0
    assert optimizer.fisher_diagonal(model[0].bias).isfinite().all()
    with pytest.raises(RuntimeError, match=r"0\.weight has no factors.*moves it without"):
        optimizer.fisher_diagonal(model[0].weight)
    with pytest.raises(RuntimeError, match="was closed"):
        optimizer.step()


@pytest.mark.parametrize("frozen", ["0.weight", "2.weight", "2.bias", "6.weight"])
def test_spectral_leaves_frozen_parameters_alone(frozen: str) -> None:
    case = Case("frozen", lambda: frozen_mlp(frozen), BY_NAME["mlp"].loss)
    model = case.build()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = SpectralAdaFisher(model, weight_decay=0.1)
    train(model, case, optimizer, steps=3)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == (name == frozen)
        assert (p in optimizer.state) == (name != frozen)


def test_spectral_follows_a_model_that_grows() -> None:
    """A layer that comes behind the last makes that a hidden matrix: from then on it moves as one."""
    model = nn.Sequential(nn.Linear(4, 6))
    optimizer = SpectralAdaFisher(model, lr=0.1, max_relative_step=None)

    def moved_by(layer: nn.Linear) -> float:
        before = layer.weight.detach().clone()
        optimizer.zero_grad()
        model(torch.randn(5, 4, generator=torch.Generator().manual_seed(0))).square().sum().backward()
        optimizer.step()
        return float((layer.weight.detach() - before).square().mean().sqrt())

    assert moved_by(model[0]) > 0.1 * 0.25
    model.append(nn.Linear(6, 2))
    optimizer.add_param_group({"params": model[1].parameters(), "relative_damping": 0.4})
    assert optimizer.param_groups[1]["relative_damping"] == 0.4
    for _ in range(2):
        assert moved_by(model[0]) == pytest.approx(0.1 * 0.2, rel=1e-4)
    assert [row.role for row in optimizer.coverage()] == ["hidden matrix", "", "head", ""]
    assert optimizer.state[model[0].weight].keys() == {"step", "exp_avg"}
    with pytest.raises(ValueError, match="does not belong"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})


def test_spectral_curvature_summary_is_that_of_the_diagonals() -> None:
    case = BY_NAME["tied"]
    model = case.build()
    optimizer = SpectralAdaFisher(model, relative_damping=0.2)
    train(model, case, optimizer, steps=1)
    summary = optimizer.curvature_summary()
    means, floors, values = 0.0, 0.0, 0
    for row in optimizer.coverage():
        if row.role == "hidden matrix":
            continue
        p = dict(model.named_parameters())[row.name]
        raw, damped = optimizer.fisher_diagonal(p, normalized=False), optimizer.fisher_diagonal(p)
        assert_close(damped - raw, torch.full_like(raw, 0.2 * raw.mean()), rtol=1e-3, atol=0)
        means, values = means + damped.sum().item(), values + p.numel()
        floors += (raw < 0.2 * raw.mean()).sum().item()
    assert summary["fisher_mean"] == pytest.approx(means / values)
    assert summary["floor_share"] == pytest.approx(floors / values, abs=1e-9)
    assert (summary["refreshes"], summary["dropped_refreshes"]) == (1, 0)
    assert summary["gradient_factor_share"] == pytest.approx(values / sum(p.numel() for p in model.parameters()))


@pytest.mark.parametrize("kind", ["GPT2Model", "GPT2LMHeadModel"])
def test_spectral_heads_without_an_output_layer_is_one_warning(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    """A base model has none; a language model's, tied to its embedding, is one."""
    model = getattr(transformers, kind)(transformers.GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=2))
    with caplog.at_level(logging.WARNING, "hf_adafisher"):
        SpectralAdaFisher(model, spectral_heads=True)
        SpectralAdaFisher(model)
    said = [r.getMessage() for r in caplog.records if "spectral_heads" in r.getMessage()]
    assert len(said) == (1 if kind == "GPT2Model" else 0)
    if kind == "GPT2LMHeadModel":
        hidden = [p for name, p in model.named_parameters() if ".h." in name]
        with caplog.at_level(logging.WARNING, "hf_adafisher"):
            optimizer = SpectralAdaFisher(model, hidden[:2], spectral_heads=True)
            optimizer.add_param_group({"params": hidden[2:]})
        assert caplog.text.count("spectral_heads=True changes nothing") == 1


def test_spectral_heads_are_reported_as_they_move() -> None:
    """A head that moves as a matrix has no diagonal, and its rule is that of hidden matrices."""
    model = mlp(9, 10, 11)
    for heads, rule in ((False, "gradient factors"), (True, "momentum's rows and columns")):
        optimizer = SpectralAdaFisher(model, spectral_heads=heads)
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        row = next(row for row in optimizer.coverage() if row.role == "head")
        assert row.rule == rule
        head = dict(model.named_parameters())[row.name]
        if heads:
            with pytest.raises(RuntimeError, match="has no factors"):
                optimizer.fisher_diagonal(head)
        else:
            assert optimizer.fisher_diagonal(head).shape == head.shape


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("power", [-120, -80, -60, 60, 100])
@pytest.mark.parametrize("shape", [(1, 8, 8), (2, 8, 24)])
def test_spectral_polar_factor_of_very_small_and_large_matrices(power: int, shape: tuple[int, ...]) -> None:
    """Squares leave float32's range long before the values do."""
    x = draw(*shape)
    assert_close(polar_factor(x * 2.0**power), polar_factor(x))


def test_spectral_weights_stay_finite_while_momentum_fades() -> None:
    """A step with gradients, then a thousand with zeros: 0.9^1000 is beyond float32."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))
    optimizer = SpectralAdaFisher(model, lr=1e-3)
    model(draw(16, 8)).square().mean().backward()
    for _ in range(1000):
        optimizer.step()
        for p in model.parameters():
            assert p.grad is not None and p.isfinite().all()
            p.grad.zero_()


@pytest.mark.parametrize("axes", [2, 3, 4, 5])
@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e9])
def test_spectral_estimates_of_parameters_without_a_rule_scale_as_gradients_squared(axes: int, scale: float) -> None:
    grad = draw(*range(2, axes), 9, 10)
    product = torch.ones(())
    diagonal = GradientDiagonal()
    term = diagonal.expand(diagonal.from_gradient(grad * scale), grad.shape, normalize=False)
    for factor in on_gradient_scale(term):
        product = product * factor
    square = grad.double().square()  # of each matrix: row means times column means over the mean
    expected = square.mean(-1, keepdim=True) * square.mean(-2, keepdim=True) / square.mean((-2, -1), keepdim=True)
    assert_close(product.double() / scale**2, expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e18])
def test_spectral_hidden_steps_of_very_small_and_large_gradients(scale: float) -> None:
    """Those of a hidden matrix do not depend on the scale, however far squares are from float32's range."""
    ends = []
    for factor in (1.0, scale):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 9), nn.Linear(9, 2))
        optimizer = SpectralAdaFisher(model, lr=0.1, max_relative_step=None)
        model[0].weight.grad = draw(9, 8) * factor
        optimizer.step()
        ends.append(model[0].weight.detach())
    assert_close(*ends, rtol=1e-3, atol=1e-4)


def test_spectral_heads_that_are_grouped_convolutions_are_no_matrices() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(4, 8, 3), nn.Tanh(), nn.Conv1d(8, 16, 3, groups=2))
    optimizer = SpectralAdaFisher(model, spectral_heads=True)
    before = model[2].weight.detach().clone()
    model(draw(2, 4, 12)).square().mean().backward()
    optimizer.step()
    assert model[2].weight.isfinite().all() and not torch.equal(model[2].weight, before)


class SharedKernel(nn.Module):
    """One weight, used by a convolution with groups and by one without."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(4, 4, 1)
        self.dense, self.grouped = nn.Conv1d(4, 8, 3), nn.Conv1d(8, 8, 3, groups=2)
        self.grouped.weight = self.dense.weight
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.grouped(torch.tanh(self.dense(self.first(x)))))
        return self.head(F.gelu(hidden).mean(-1))


def test_spectral_kernels_shared_by_convolutions_of_different_groups_move() -> None:
    torch.manual_seed(0)
    model = SharedKernel()
    optimizer = SpectralAdaFisher(model)
    before = model.dense.weight.detach().clone()
    model(draw(2, 4, 12)).square().mean().backward()
    optimizer.step()
    assert model.dense.weight.isfinite().all() and not torch.equal(model.dense.weight, before)
