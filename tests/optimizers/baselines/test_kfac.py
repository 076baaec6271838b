"""K-FAC in degenerate settings, its checkpoints, what it reports and what it refuses."""

from __future__ import annotations

import copy
import logging
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import accelerate.state
import pytest
import torch
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.testing import assert_close
from transformers import Trainer

from hf_adafisher import AdaFisherW
from hf_adafisher.optimizers.base.hooked import HookedOptimizer
from hf_adafisher.optimizers.baselines.kfac import KFAC
from hf_adafisher.optimizers.baselines.kfac_blocks import KroneckerBlock
from tests.cases import CASES, Case, mlp, next_token, regression
from tests.model_zoo import FAMILIES, Family, family
from tests.training_helper import make_trainer, of_family, train

BY_NAME = {case.name: case for case in CASES}
OPTIONS: dict[str, Any] = {"lr": 0.02, "damping": 0.1, "update_interval": 3, "inverse_interval": 6, "weight_decay": 0.1}


def reloaded(state: Any) -> Any:
    """Through a file's bytes, as a Trainer reads it."""
    buffer = BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


# ------------------------------------------------------------------ degenerate settings


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("name", ["mlp", "tied", "conv_batch_norm"])
def test_a_huge_damping_makes_it_sgd(name: str, momentum: float) -> None:
    """Blocks then divide by the damping, so that a learning rate as many times larger gives SGD's steps."""
    case, damping, lr = BY_NAME[name], 1e20, 0.05
    model, twin = case.build().double(), case.build().double()
    blocks = {row.name for row in KFAC(copy.deepcopy(model)).coverage() if row.rule != "plain SGD"}
    named = dict(model.named_parameters())
    groups = [
        {"params": [p for n, p in named.items() if n in blocks], "lr": lr * damping, "weight_decay": 0.1 / damping},
        {"params": [p for n, p in named.items() if n not in blocks], "lr": lr, "weight_decay": 0.1},
    ]
    optimizer = KFAC(model, [g for g in groups if g["params"]], momentum=momentum, damping=damping, kl_clip=None)
    train(model, case, optimizer, steps=12)
    train(twin, case, torch.optim.SGD(twin.parameters(), lr=lr, momentum=momentum, weight_decay=0.1), steps=12)
    assert_close(model.state_dict(), twin.state_dict())
    assert not torch.equal(next(model.parameters()), next(case.build().double().parameters()))


def test_identity_factors_shrink_the_gradient_evenly() -> None:
    """White inputs and white output gradients: A = G = I, so the step is the gradient over (1 + sqrt(damping))^2."""
    layer = nn.Linear(4, 4, bias=False).double()
    noise = torch.randn(4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    start, white = layer.weight.detach().clone(), torch.linalg.qr(noise)[0]
    optimizer = KFAC(layer, lr=0.5, momentum=0.0, damping=0.04, kl_clip=None)
    (layer(2 * white) * torch.eye(4, dtype=torch.float64)).sum().backward()
    optimizer.step()
    assert_close(layer.weight, start - 0.5 * 2 * white / 1.2**2)


def test_without_statistics_and_rules_it_is_torch_sgd_bitwise() -> None:
    """Normalisation layers, and bare parameters, have no block."""
    case = Case("norms", lambda: nn.Sequential(nn.LayerNorm(4), nn.Tanh(), nn.LayerNorm(4)), regression(5, 4))
    model, twin = case.build(), case.build()
    train(model, case, KFAC(model, lr=0.1, weight_decay=0.01), 10)
    train(twin, case, torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01), 10)
    assert_close(model.state_dict(), twin.state_dict(), rtol=0, atol=0)


def test_no_learning_rate_puts_nothing_into_the_momentum_where_steps_are_clipped() -> None:
    """A warm-up starts at 0, where the clip cannot tell how long a step would be."""
    case, model = BY_NAME["mlp"], BY_NAME["mlp"].build()
    optimizer = KFAC(model, lr=0.0)
    train(model, case, optimizer, 1)
    assert not any(optimizer.state[p]["momentum_buffer"].any() for p in model.parameters())
    optimizer.param_groups[0]["lr"] = 0.1
    train(model, case, optimizer, 1, start=1)
    assert all(optimizer.state[p]["momentum_buffer"].any() for p in model.parameters())


def test_clipped_steps_have_the_size_that_was_asked_for() -> None:
    """`sum lr^2 <preconditioned gradient, gradient>` is `kl_clip` where that is less than it would have been."""
    case = BY_NAME["mlp"]
    for clip in (1e-4, 1e9):
        model = case.build().double()
        optimizer = KFAC(model, lr=0.3, momentum=0.0, damping=1e-2, kl_clip=clip)
        before = [p.detach().clone() for p in model.parameters()]
        train(model, case, optimizer, 1)
        moved = [(old - p.detach(), p.grad) for old, p in zip(before, model.parameters(), strict=True)]
        products = [0.3 * float((step * grad).sum()) for step, grad in moved]
        factor = optimizer.curvature_summary()["kl_factor"]
        size = factor * sum(products)  # the step is nu times lr times the preconditioned gradient
        assert (factor < 1.0 and size == pytest.approx(clip)) if clip < 1 else (factor == 1.0 and size < clip)


def test_an_inverse_that_rounding_made_indefinite_is_clipped_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its product with the gradient may then be negative; the step is as large as one in the right direction."""
    case, precondition = BY_NAME["mlp"], KroneckerBlock.precondition

    def reversed_direction(self: KroneckerBlock, *args: Any) -> Any:
        return tuple(None if part is None else -part for part in precondition(self, *args))

    factors = []
    for method in (precondition, reversed_direction):
        monkeypatch.setattr(KroneckerBlock, "precondition", method)
        model = case.build().double()
        optimizer = KFAC(model, lr=0.3, damping=1e-2, kl_clip=1e-4)
        train(model, case, optimizer, 1)
        factors.append(optimizer.curvature_summary()["kl_factor"])
    assert factors[0] == factors[1] and 0.0 < factors[0] < 1.0


# ------------------------------------------------------------------------------ training


@pytest.mark.parametrize("name", ["gpt2", "vit", "resnet"])
def test_it_trains_tiny_transformers_with_its_defaults(name: str) -> None:
    record = family(name)
    model = record.build()
    optimizer, before = KFAC(model), copy.deepcopy(model.state_dict())
    losses = train(model, of_family(record, n=8, seed=0), optimizer, steps=20)
    assert losses[-1] < 0.3 * losses[0]
    assert not [name for name, p in model.named_parameters() if torch.equal(p, before[name])]
    assert optimizer.curvature_summary()["plain_share"] < 0.12
    for p in optimizer.param_groups[0]["params"]:
        assert all(value.isfinite().all() for value in optimizer.state[p].values())


@pytest.mark.slow
@pytest.mark.parametrize("record", FAMILIES, ids=lambda record: record.name)
def test_every_parameter_of_every_family_moves(record: Family) -> None:
    model = record.build()
    optimizer, before = KFAC(model), copy.deepcopy(model.state_dict())
    losses = train(model, of_family(record, seed=0), optimizer, steps=6)
    assert min(losses[1:]) < losses[0]
    assert not [name for name, p in model.named_parameters() if p.requires_grad and torch.equal(p, before[name])]
    rows = optimizer.coverage()
    assert sum(row.share for row in rows) == pytest.approx(1.0)
    assert {row.name for row in rows} == {name for name, p in model.named_parameters() if p.requires_grad}


def test_refreshes_and_inversions_happen_when_they_are_due() -> None:
    case, model = BY_NAME["mlp"], BY_NAME["mlp"].build()
    optimizer, changed = KFAC(model, update_interval=2, inverse_interval=6), {"input_factor": [], "row_inverse": []}
    for step in range(14):
        assert optimizer.refresh_due == (step % 2 == 0)
        assert bool(model[0]._forward_hooks) == (step % 2 == 0)
        state = optimizer.state[model[0].weight]
        old = {key: state[key].clone() if state else None for key in changed}
        train(model, case, optimizer, 1, start=step)
        for key, steps in changed.items():
            if old[key] is None or not torch.equal(old[key], state[key]):
                steps.append(step)
    assert changed == {"input_factor": [0, 2, 4, 6, 8, 10, 12], "row_inverse": [0, 6, 12]}


def test_a_layer_that_comes_late_is_inverted_at_its_first_step() -> None:
    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.always, self.late, self.used = nn.Linear(4, 4), nn.Linear(4, 4), False

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hidden = torch.tanh(self.always(x))
            return self.late(hidden) if self.used else hidden

    case, ready = Case("late", Late, regression(6, 4)), []
    model = case.build()
    optimizer = KFAC(model, update_interval=2, inverse_interval=20)
    for step in range(6):
        model.used = step >= 1
        train(model, case, optimizer, 1, start=step)
        ready.append(bool(optimizer.state[model.late.weight].get("inverse_ready", torch.zeros(())).item()))
    assert ready == [False, True, True, True, True, True]


def test_non_finite_statistics_are_dropped_and_refresh_and_inversion_stay_due() -> None:
    """As if that batch had never been: its gradients were reset, but the optimizer was not told."""
    case, runs = BY_NAME["mlp"], []
    for broken in (True, False):
        model = case.build()
        optimizer = KFAC(model, update_interval=2, inverse_interval=4)
        train(model, case, optimizer, 4)
        if broken:
            (model(torch.full((2, 4), float("inf"))).sum() * 0).backward()
        model.zero_grad(set_to_none=False)
        optimizer.step()  # refresh and inversion are due
        assert optimizer.refresh_due
        inverse = optimizer.state[model[0].weight]["row_inverse"].clone()
        train(model, case, optimizer, 4, start=4)
        assert not torch.equal(inverse, optimizer.state[model[0].weight]["row_inverse"])
        runs.append((model, optimizer))
    (model, optimizer), (twin, healthy) = runs
    assert_close(model.state_dict(), twin.state_dict(), rtol=0, atol=0)
    assert_close(optimizer.state_dict()["state"], healthy.state_dict()["state"], rtol=0, atol=0)
    counts = [[o.param_groups[0][key] for key in ("refreshes", "dropped_refreshes")] for o in (optimizer, healthy)]
    assert counts == [[5, 1], [5, 0]]  # at steps 0, 2, 5 (late), 6, 8


def test_a_late_refresh_makes_up_for_the_inversion_it_missed() -> None:
    """The refresh of step 2 comes at step 5 only, when the inversion of step 4 has been missed: it is made then."""
    case, model = BY_NAME["mlp"], BY_NAME["mlp"].build()
    optimizer = KFAC(model, update_interval=2, inverse_interval=4)
    train(model, case, optimizer, 2)
    inverse = optimizer.state[model[0].weight]["row_inverse"].clone()
    for _ in range(3):
        (model(torch.full((2, 4), float("inf"))).sum() * 0).backward()
        model.zero_grad()
        optimizer.step()
    assert optimizer.param_groups[0]["dropped_refreshes"] == 3
    assert torch.equal(inverse, optimizer.state[model[0].weight]["row_inverse"])
    train(model, case, optimizer, 1, start=5)
    assert not torch.equal(inverse, optimizer.state[model[0].weight]["row_inverse"])
    assert optimizer.param_groups[0]["next_refresh"] == 6


@pytest.mark.parametrize("how", ["zero_grad", "discard_statistics"])
def test_forgotten_statistics_leave_no_trace(how: str) -> None:
    case = BY_NAME["mlp"]
    model, twin = case.build(), case.build()
    optimizer, reference = KFAC(model), KFAC(twin)
    (1e3 * model(torch.randn(5, 4))).square().sum().backward()
    model.zero_grad()
    if how == "zero_grad":
        optimizer.zero_grad()
    else:
        optimizer.discard_statistics()
    for m, o in ((model, optimizer), (twin, reference)):
        case.loss(m, torch.Generator().manual_seed(0)).backward()
        o.step()
    assert_close(optimizer.state_dict(), reference.state_dict(), rtol=0, atol=0)


def test_a_closure_is_evaluated_with_gradients_and_closing_is_for_good() -> None:
    model = mlp(4, 3)
    with KFAC(model) as optimizer:
        assert isinstance(optimizer, HookedOptimizer)

        def closure() -> float:
            optimizer.zero_grad()
            loss = model(torch.ones(2, 4)).square().sum()
            loss.backward()
            return loss.item()

        assert optimizer.step(closure) > 0
        assert optimizer.param_groups[0]["refreshes"] == 1
        with pytest.raises(TypeError, match=r"KFAC cannot be copied or pickled.*state_dict"):
            copy.deepcopy(optimizer)
    assert not model[0]._forward_hooks
    with pytest.raises(RuntimeError, match="was closed"):
        optimizer.step()


# --------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("name", ["mlp", "tied", "conv_batch_norm", "experts"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("stop", [4, 7, 8])
def test_a_resumed_run_equals_an_uninterrupted_one_bitwise(name: str, dtype: torch.dtype, stop: int) -> None:
    """Saved in the middle of both intervals, and between a refresh and the next inversion."""
    case = BY_NAME[name]
    model = case.build().to(dtype)
    optimizer = KFAC(model, **OPTIONS)
    train(model, case, optimizer, stop)
    saved = reloaded({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    kept = copy.deepcopy(saved)
    train(model, case, optimizer, 8, start=stop)

    resumed = case.build(seed=1).to(dtype)
    restored = KFAC(resumed, lr=1.0)
    resumed.load_state_dict(saved["model"])
    restored.load_state_dict(saved["optimizer"])
    train(resumed, case, restored, 8, start=stop)
    assert_close(resumed.state_dict(), model.state_dict(), rtol=0, atol=0)
    assert_close(restored.state_dict(), optimizer.state_dict(), rtol=0, atol=0)
    assert_close(saved, kept, rtol=0, atol=0)  # the caller's dictionary is untouched
    assert {s["momentum_buffer"].dtype for s in restored.state.values()} == {dtype}


def test_an_empty_state_goes_round_before_the_first_step() -> None:
    """As accelerate does when it prepares the optimizer."""
    case = BY_NAME["tied"]
    model, twin = case.build(), case.build()
    optimizer, reference = KFAC(model), KFAC(twin)
    optimizer.load_state_dict(optimizer.state_dict())
    assert not optimizer.state_dict()["state"]
    train(model, case, optimizer, 3)
    train(twin, case, reference, 3)
    assert_close(model.state_dict(), twin.state_dict(), rtol=0, atol=0)


def test_the_state_is_tensors_and_the_groups_are_plain_values() -> None:
    case, model = BY_NAME["tied"], BY_NAME["tied"].build()
    optimizer = KFAC(model)
    train(model, case, optimizer, 1)
    for p in model.parameters():
        shapes = {key: tuple(value.shape) for key, value in optimizer.state[p].items()}
        assert shapes == optimizer.state_shapes(p)
    for state in optimizer.state.values():
        assert all(isinstance(value, torch.Tensor) for value in state.values())
    plain = (bool, int, float, type(None))
    assert all(isinstance(v, plain) for g in optimizer.param_groups for k, v in g.items() if k != "params")
    assert optimizer.state_shapes(model.embedding.weight) == {
        "momentum_buffer": (11, 6),
        **{"input_factor": (11,), "output_grad_factor": (6, 6), "factor_weight": ()},
        **{"output_grad_factor_1": (11, 11), "input_factor_1": (6, 6), "factor_weight_1": ()},
        **{"row_inverse": (11, 11), "column_inverse": (6, 6), "inverse_ready": ()},
    }
    assert optimizer.state_shapes(model.mix.bias) == {"momentum_buffer": (6,)}


@pytest.mark.parametrize(("saved", "loaded"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_statistics_stay_float32_in_a_model_of_another_precision(saved: torch.dtype, loaded: torch.dtype) -> None:
    case = BY_NAME["tied"]
    model, other = case.build().to(saved), case.build().to(loaded)
    optimizer, restored = KFAC(model), KFAC(other)
    train(model, case, optimizer, 2)
    restored.load_state_dict(optimizer.state_dict())
    train(other, case, restored, 2)
    for p in other.parameters():
        dtypes = {key: value.dtype for key, value in restored.state[p].items() if value.dim()}
        assert dtypes.pop("momentum_buffer") == loaded
        assert set(dtypes.values()) <= {torch.float32}
        assert p.isfinite().all()


def test_foreign_checkpoints_are_refused_and_changed_options_said(caplog: pytest.LogCaptureFixture) -> None:
    case = BY_NAME["mlp"]
    model = case.build()
    optimizer = KFAC(model)
    train(model, case, optimizer, 1)
    for other in (torch.optim.SGD(mlp(4, 6, 5, 3).parameters(), lr=0.1), AdaFisherW(mlp(4, 6, 5, 3))):
        with pytest.raises(ValueError, match="not written by KFAC"):
            KFAC(case.build()).load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match="not written by AdaFisherW"):
        AdaFisherW(case.build()).load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"0\.weight does not fit the model"):
        KFAC(mlp(4, 7, 5, 3)).load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"max_factor_dim=8192 and this optimizer built with 5"):
        KFAC(case.build(), max_factor_dim=5).load_state_dict(optimizer.state_dict())
    restored = KFAC(case.build(), damping=0.5, kl_clip=None)
    with caplog.at_level(logging.WARNING):
        restored.load_state_dict(optimizer.state_dict())
    assert "damping: 0.5 -> 0.01" in caplog.text and "kl_clip: None -> 0.001" in caplog.text


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_resumes_bitwise_under_a_stock_trainer(dtype: torch.dtype, tmp_path: Path) -> None:
    """From a checkpoint in the middle of both intervals, with accumulation."""
    record, runs = family("gpt2"), []
    for seed, folder in enumerate("ab"):
        model = record.build(seed).to(dtype)
        optimizer = KFAC(model, **OPTIONS)
        options = {"max_steps": 9, "save_strategy": "steps", "save_steps": 5, "gradient_accumulation_steps": 2}
        options |= {"per_device_train_batch_size": 2, "optimizers": (optimizer, None)}
        trainer = make_trainer(tmp_path / folder, record, Trainer, model=model, **options)
        runs.append((trainer, optimizer))
    (whole, first), (resumed, second) = runs
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-5"))
    assert_close(resumed.model.state_dict(), whole.model.state_dict(), rtol=0, atol=0)
    assert_close(second.state_dict(), first.state_dict(), rtol=0, atol=0)
    assert second.param_groups[0]["refreshes"] == 3 and second.param_groups[0]["dropped_refreshes"] == 0


# ------------------------------------------------------------------------------- reports


def test_coverage_names_every_parameter_and_a_warning_those_that_are_not_preconditioned(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = BY_NAME["tied"].build()
    with caplog.at_level(logging.WARNING):
        rows = {row.name: row for row in KFAC(model).coverage()}
    assert [r.getMessage() for r in caplog.records] == [
        "K-FAC preconditions nothing of 2 parameters (10.0 % of all values): norm.weight, norm.bias; plain SGD is used "
        "instead."
    ]
    assert {name: row.rule for name, row in rows.items()} == {
        "embedding.weight": "Embedding+Linear",
        "norm.weight": "plain SGD",
        "norm.bias": "plain SGD",
        "mix.weight": "Linear",
        "mix.bias": "Linear",
    }
    assert rows["embedding.weight"].modules == ("embedding", "head")
    assert sum(row.share for row in rows.values()) == pytest.approx(1.0)


def test_grouped_convolutions_lone_biases_and_long_sides_are_said(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.Flatten(), nn.Linear(6, 9), nn.Linear(9, 2))
    model[2].weight.requires_grad_(False)
    with caplog.at_level(logging.WARNING):
        rows = {row.name: row.rule for row in KFAC(model, max_factor_dim=7).coverage()}
    assert rows == {
        **{"0.weight": "plain SGD", "0.bias": "plain SGD", "2.bias": "plain SGD"},
        **{"3.weight": "Linear, diagonal input", "3.bias": "Linear, diagonal input"},
    }
    assert "2.bias; plain SGD" in caplog.text
    assert "longer than max_factor_dim=7" in caplog.text and "3.weight" in caplog.text


def test_layers_that_record_nothing_are_said_once_and_shown(caplog: pytest.LogCaptureFixture) -> None:
    case, model = BY_NAME["experts"], BY_NAME["experts"].build()
    assert [row.rule for row in KFAC(model).coverage()].count("plain SGD") == 3
    bypassed = nn.MultiheadAttention(4, 2)  # its output layer is used without being called
    holder = Case("attention", lambda: bypassed, lambda m, g: m(*[torch.randn(3, 2, 4, generator=g)] * 3)[0].sum())
    optimizer = KFAC(bypassed, update_interval=1, inverse_interval=1)
    with caplog.at_level(logging.WARNING):
        train(bypassed, holder, optimizer, 3)
    assert caplog.text.count("recorded nothing") == 1 and "out_proj.weight" in caplog.text
    assert {row.rule for row in optimizer.coverage()} == {"plain SGD"}
    assert case.name == "experts"


def test_a_bias_that_comes_later_joins_its_block() -> None:
    case, model = BY_NAME["mlp"], BY_NAME["mlp"].build()
    weights = [p for p in model.parameters() if p.dim() == 2]
    optimizer = KFAC(model, weights, update_interval=2, inverse_interval=2)
    train(model, case, optimizer, 2)
    assert optimizer.state[weights[0]]["input_factor"].shape == (4, 4)
    optimizer.add_param_group({"params": [p for p in model.parameters() if p.dim() == 1], "lr": 0.01})
    train(model, case, optimizer, 2, start=2)
    assert optimizer.state[weights[0]]["input_factor"].shape == (5, 5)
    assert optimizer.state[weights[0]]["inverse_ready"].item() == 1
    assert {row.rule for row in optimizer.coverage()} == {"Linear"}
    grown = nn.Sequential(*model, nn.Linear(3, 3))
    with pytest.raises(ValueError, match="does not belong"):
        optimizer.add_param_group({"params": grown[-1].parameters()})


# ------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("option", "values", "allowed"),
    [
        ("lr", [-1e-3, float("nan"), float("inf"), "fast"], "lr must be"),
        ("momentum", [-0.1, 1.0, float("nan")], r"momentum must lie in \[0, 1\)"),
        ("damping", [0.0, -1.0, float("nan"), float("inf")], r"damping must be finite and > 0"),
        ("stat_decay", [-0.1, 1.0], r"stat_decay must lie in \[0, 1\)"),
        ("update_interval", [0, 2.5, True], "update_interval must be a whole number of steps >= 1"),
        ("inverse_interval", [0, -10, 1.5], "inverse_interval must be a whole number of steps >= 1"),
        ("inverse_interval", [15], "inverse_interval must be a multiple of update_interval"),
        ("weight_decay", [-0.1, float("inf")], "weight_decay must be finite and >= 0"),
        ("kl_clip", [0.0, -1e-3, float("nan"), "no"], "kl_clip must be"),
        ("max_factor_dim", [0, 3.5], "max_factor_dim must be a whole number of entries >= 1"),
    ],
)
def test_options_outside_their_range(option: str, values: list[Any], allowed: str) -> None:
    model = mlp(3, 2)
    for value in values:
        with pytest.raises(ValueError, match=allowed) as raised:
            KFAC(model, **{option: value})
        assert str(value) in str(raised.value)
        with pytest.raises(ValueError, match=allowed):
            KFAC(model, [{"params": model.parameters(), option: value}])
    assert not model[0]._forward_hooks


@pytest.mark.parametrize(("option", "value"), [("update_interval", 5), ("inverse_interval", 20), ("kl_clip", None)])
def test_options_of_the_hooks_are_the_same_in_all_groups(option: str, value: Any) -> None:
    model = mlp(3, 2)
    weight, bias = model.parameters()
    with pytest.raises(ValueError, match=f"{option} must be the same in all parameter groups"):
        KFAC(model, [{"params": [weight]}, {"params": [bias], option: value}])


def test_what_is_no_model_or_has_nothing_to_train() -> None:
    model = mlp(3, 2)
    with pytest.raises(TypeError, match=r"KFAC needs the model.*KFAC\(model, lr=\.\.\.\)"):
        KFAC(model.parameters())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no trainable parameter"):
        KFAC(mlp(3, 2).requires_grad_(False))
    with pytest.raises(ValueError, match="does not belong to the model"):
        KFAC(model, [*model.parameters(), nn.Parameter(torch.zeros(2))])
    with pytest.raises(ValueError, match=r"floating-point parameters, got one of torch\.complex64"):
        KFAC(nn.Linear(2, 2, dtype=torch.complex64))
    sparse = nn.Sequential(nn.Embedding(5, 3, sparse=True))
    optimizer = KFAC(sparse)
    sparse(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match=r"0\.weight has a sparse gradient"):
        optimizer.step()


def test_sharded_parameters_are_refused_before_and_after_it_was_built(process_group: None) -> None:
    from torch.distributed.fsdp import fully_shard

    mesh, refusal = (
        init_device_mesh("cpu", (1,)),
        r"KFAC does not support FSDP2.*use DistributedDataParallel \(torchrun",
    )
    with pytest.raises(ValueError, match=refusal) as raised:
        KFAC(fully_shard(mlp(4, 2, 2), mesh=mesh))
    assert "fully_shard" not in str(raised.value)
    model = mlp(4, 2, 2)
    optimizer = KFAC(model)
    fully_shard(model, mesh=mesh)
    optimizer.param_groups[0]["params"] = list(model.parameters())  # as accelerate does
    model(torch.ones(1, 4)).sum().backward()
    with pytest.raises(ValueError, match=refusal):
        optimizer.step()


def test_accelerates_fsdp2_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    plugin = SimpleNamespace(fsdp_version=2)
    state = {"distributed_type": DistributedType.FSDP, "fsdp_plugin": plugin}
    monkeypatch.setattr(accelerate.state.AcceleratorState, "_shared_state", state)
    AdaFisherW(mlp(3, 2)).close()
    with pytest.raises(ValueError, match="KFAC does not support FSDP2"):
        KFAC(mlp(3, 2))


def test_data_parallel_is_refused() -> None:
    with pytest.raises(ValueError, match=r"KFAC does not support nn\.DataParallel.*use DistributedDataParallel"):
        KFAC(nn.DataParallel(mlp(3, 2)))


def test_a_tied_vocabulary_needs_no_square_matrix() -> None:
    """The side of the vocabulary is diagonal above max_factor_dim: memory grows with it, not with its square."""
    case = Case("tied", BY_NAME["tied"].make, next_token())
    model = case.build()
    optimizer = KFAC(model, max_factor_dim=10)  # 11 words
    train(model, case, optimizer, 2)
    shapes = optimizer.state_shapes(model.embedding.weight)
    assert max(torch.Size(shape).numel() for shape in shapes.values()) == 11 * 6
    assert shapes["row_inverse"] == (11,) and shapes["column_inverse"] == (6, 6)
