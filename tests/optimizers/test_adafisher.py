"""The optimizer in degenerate settings, its checkpoints, and what it refuses."""

from __future__ import annotations

import copy
import subprocess
import sys
from io import BytesIO
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from hf_adafisher import AdaFisher, AdaFisherW
from hf_adafisher.optimizers.update import Block, adafisher_update_, step_coefficients
from tests.cases import CASES, Case, mlp, regression
from tests.model_zoo import family
from tests.training_helper import hook_count, train

BY_NAME = {case.name: case for case in CASES}
KINDS = pytest.mark.parametrize("kind", [AdaFisher, AdaFisherW])


# ------------------------------------------------------------------ degenerate settings


def constant_factors() -> Case:
    """Layers of one input and one output: every factor has one entry, so F = 1 + damping everywhere."""
    return Case("constant", lambda: nn.Sequential(nn.Linear(1, 1), nn.Tanh(), nn.Linear(1, 1)), regression(7, 1))


@KINDS
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_constant_factors_make_it_sgd(kind: type[AdaFisher], weight_decay: float) -> None:
    """Without momentum, AdaFisher is then torch's SGD with L2, AdaFisherW SGD with AdamW's decoupled decay."""
    case, lr, damping = constant_factors(), 0.05, 0.25
    model, twin = case.build().double(), case.build().double()
    train(model, case, kind(model, lr=lr, beta=0.0, damping=damping, weight_decay=weight_decay), steps=10)
    coupled = 0.0 if kind is AdaFisherW else weight_decay
    sgd = torch.optim.SGD(twin.parameters(), lr=lr / (1 + damping), weight_decay=coupled)
    for step in range(10):
        sgd.zero_grad()
        case.loss(twin, torch.Generator().manual_seed(step)).backward()
        if kind is AdaFisherW:
            with torch.no_grad():
                for p in twin.parameters():
                    p.mul_(1 - lr * weight_decay)
        sgd.step()
    assert_close(list(model.parameters()), list(twin.parameters()))


@pytest.mark.parametrize(("kind", "peer"), [(AdaFisher, torch.optim.Adam), (AdaFisherW, torch.optim.AdamW)])
def test_momentum_is_adams_first_moment(kind: type[AdaFisher], peer: type[torch.optim.Adam]) -> None:
    """With learning rate 0 both see the same gradients; L2 enters the moment of Adam, decoupled decay does not."""
    case = BY_NAME["tied"]
    model, twin = case.build().double(), case.build().double()
    ours = kind(model, lr=0.0, beta=0.9, weight_decay=0.1)
    theirs = peer(twin.parameters(), lr=0.0, betas=(0.9, 0.999), weight_decay=0.1)
    train(model, case, ours, steps=10)
    train(twin, case, theirs, steps=10)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert_close(ours.state[p]["exp_avg"], theirs.state[q]["exp_avg"])
        assert_close(ours.state[p]["step"], theirs.state[q]["step"])


def test_one_update_by_hand() -> None:
    """theta 1, gradient 2, m = 0.1 * 2, m^ = 2, F = 0.5 * 0.4 + 0.05 = 0.25; lr 0.1, decay 0.3."""
    for decoupled, expected in ((True, 1 - 0.1 * (2 / 0.25 + 0.3)), (False, 1 - 0.1 * (2.3 / 0.25))):
        param, exp_avg = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
        term = (torch.full((1, 1), 0.5, dtype=torch.float64), torch.full((1, 1), 0.4, dtype=torch.float64))
        grad = torch.full((1, 1), 2.0, dtype=torch.float64)
        group = {"lr": 0.1, "beta": 0.9, "damping": 0.05, "weight_decay": 0.3}
        adafisher_update_([Block(param, grad, exp_avg, [term])], step_coefficients(group, 1, decoupled))
        assert_close(param.item(), expected)
        assert_close(grad.item(), 2.0)


def test_it_reduces_the_loss_of_a_gpt2() -> None:
    record = family("gpt2")
    model = record.build()
    optimizer = AdaFisherW(model, lr=0.05, damping=1e-2, update_interval=5)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = model(**record.batch()).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 2.0


@pytest.mark.subprocess
def test_the_plain_loop_needs_no_transformers() -> None:
    program = (
        "import sys; sys.modules['transformers'] = None; sys.modules['accelerate'] = None\n"
        "import torch; from hf_adafisher import AdaFisherW\n"
        "model = torch.nn.Linear(3, 2); optimizer = AdaFisherW(model)\n"
        "model(torch.randn(4, 3)).square().sum().backward(); optimizer.step(); print(len(optimizer.state))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "2"


# ------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("name", ["tied", "experts", "norm", "attention"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("step_size", "interval"), [("paper", 4), ("root", 1)])
def test_a_resumed_run_equals_an_uninterrupted_one_bitwise(
    name: str, dtype: torch.dtype, step_size: str, interval: int, tmp_path: Any
) -> None:
    """Saved in the middle of an interval, loaded with weights_only."""
    case = BY_NAME[name]
    model = case.build().to(dtype)
    options: dict[str, Any] = {"damping": 0.5, "update_interval": interval, "weight_decay": 0.1}
    optimizer = AdaFisherW(model, lr=1e-2, step_size=step_size, **options)
    train(model, case, optimizer, steps=6)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "checkpoint.pt")
    train(model, case, optimizer, steps=6, start=6)

    resumed = case.build(seed=1).to(dtype)
    restored = AdaFisherW(resumed, lr=1.0, step_size=step_size)
    checkpoint = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    resumed.load_state_dict(checkpoint["model"])
    restored.load_state_dict(checkpoint["optimizer"])
    assert hook_count(resumed) == 0
    train(resumed, case, restored, steps=6, start=6)
    assert_close(resumed.state_dict(), model.state_dict(), rtol=0, atol=0)
    assert_close(restored.state_dict()["state"], optimizer.state_dict()["state"], rtol=0, atol=0)
    assert restored.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]


@pytest.mark.parametrize("step_size", ["paper", "root"])
def test_state_holds_one_tensor_of_the_parameters_size_and_vectors(step_size: str) -> None:
    record = family("llama")
    model = record.build()
    optimizer = AdaFisherW(model, step_size=step_size)
    model(**record.batch()).loss.backward()
    optimizer.step()
    for p in model.parameters():
        sizes = {key: value.numel() for key, value in optimizer.state[p].items()}
        assert sizes.pop("exp_avg") == p.numel()
        assert sum(sizes.values()) <= 2 * sum(p.shape) + 4
    assert all(isinstance(v, torch.Tensor) for state in optimizer.state.values() for v in state.values())
    plain = (bool, int, float, str, type(None))
    assert all(isinstance(v, plain) for g in optimizer.param_groups for k, v in g.items() if k != "params")


@pytest.mark.parametrize("peer", [torch.optim.AdamW, torch.optim.SGD])
def test_another_optimizers_checkpoint_is_refused(peer: type[torch.optim.Optimizer]) -> None:
    case = BY_NAME["mlp"]
    model = case.build()
    other = peer(model.parameters(), lr=0.1)
    train(model, case, other, steps=1)
    with pytest.raises(ValueError, match=r"not written by AdaFisherW .*lr.* resume with the optimizer"):
        AdaFisherW(model).load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match=r"not written by AdaFisherW .*decoupled_weight_decay=False"):
        AdaFisherW(model).load_state_dict(AdaFisher(model).state_dict())


def test_another_models_checkpoint_is_refused() -> None:
    tied, untied = BY_NAME["mlp"], BY_NAME["mlp_without_bias"]
    model = tied.build()
    optimizer = AdaFisherW(model)
    train(model, tied, optimizer, steps=1)
    with pytest.raises(ValueError):
        AdaFisherW(untied.build()).load_state_dict(optimizer.state_dict())
    wider = mlp(4, 7, 5, 3)
    with pytest.raises(ValueError, match=r"0\.weight does not fit the model"):
        AdaFisherW(wider).load_state_dict(optimizer.state_dict())


# ---------------------------------------------------------------------------- bad input


@KINDS
@pytest.mark.parametrize(
    ("option", "values", "allowed"),
    [
        ("lr", [-1e-3, float("nan"), float("inf"), "fast"], "lr must be"),
        ("damping", [0.0, -1.0, float("nan"), float("inf")], r"damping must be finite and > 0"),
        ("ema_decay", [-0.1, 1.0, float("nan")], r"ema_decay must lie in \[0, 1\)"),
        ("beta", [-0.1, 1.0, float("nan")], r"beta must lie in \[0, 1\)"),
        ("update_interval", [0, -3, 2.5, True], "update_interval must be a whole number of steps >= 1"),
        ("weight_decay", [-0.1, float("inf")], r"weight_decay must be finite and >= 0"),
    ],
)
def test_options_outside_their_range(kind: type[AdaFisher], option: str, values: list[Any], allowed: str) -> None:
    model = mlp(3, 2)
    for value in values:
        with pytest.raises(ValueError, match=allowed) as raised:
            kind(model, **{option: value})
        assert str(value) in str(raised.value)
        with pytest.raises(ValueError, match=allowed):
            kind(model, [{"params": model.parameters(), option: value}])


def test_a_foreign_parameter_a_frozen_model_and_other_impossible_things() -> None:
    model = mlp(3, 2)
    foreign = nn.Parameter(torch.zeros(5, 7))
    with pytest.raises(ValueError, match=r"shape \(5, 7\) does not belong to the model"):
        AdaFisherW(model, [*model.parameters(), foreign])
    optimizer = AdaFisherW(model)
    with pytest.raises(ValueError, match="does not belong"):
        optimizer.add_param_group({"params": foreign})
    assert len(optimizer.param_groups) == 1
    with pytest.raises(ValueError, match="no trainable parameter"):
        AdaFisherW(mlp(3, 2).requires_grad_(False))
    first, second = model.parameters()
    with pytest.raises(ValueError, match="must be the same in all parameter groups"):
        AdaFisherW(model, [{"params": [first]}, {"params": [second], "update_interval": 3}])
    with pytest.raises(ValueError, match=r"floating-point parameters, got one of torch\.complex64"):
        AdaFisherW(nn.Linear(2, 2, dtype=torch.complex64))
    with pytest.raises(RuntimeError, match=r"no curvature of 0\.weight"):
        optimizer.fisher_diagonal(model[0].weight)
    sparse = nn.Sequential(nn.Embedding(5, 3, sparse=True))
    optimizer = AdaFisherW(sparse)
    sparse(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match=r"0\.weight has a sparse gradient"):
        optimizer.step()


# ---------------------------------------------------------------------------- reporting


def test_coverage_names_rules_modules_and_shares() -> None:
    model = BY_NAME["tied"].build()
    rows = {row.name: row for row in AdaFisherW(model).coverage()}
    assert rows["embedding.weight"].rule == "Embedding+Linear"
    assert rows["embedding.weight"].modules == ("embedding", "head")
    assert rows["norm.bias"].rule == "LayerNorm" and rows["mix.weight"].rule == "Linear"
    total = sum(p.numel() for p in model.parameters())
    for name, p in model.named_parameters():
        assert (rows[name].numel, rows[name].share) == (p.numel(), p.numel() / total)


def test_one_message_names_the_parameters_on_gradient_factors(caplog: pytest.LogCaptureFixture) -> None:
    AdaFisherW(BY_NAME["experts"].build())
    messages = [r.getMessage() for r in caplog.records]
    assert len(messages) == 1
    assert "router, up, down" in messages[0] and "3 parameters (93.0 % of all values)" in messages[0]


def test_the_summary_is_that_of_the_diagonals() -> None:
    case, damping = BY_NAME["tied"], 0.02
    model = case.build()
    optimizer = AdaFisherW(model, damping=damping)
    assert "fisher_mean" not in optimizer.curvature_summary()
    train(model, case, optimizer, steps=1)
    summary = optimizer.curvature_summary()
    values = torch.cat([optimizer.fisher_diagonal(p).flatten() for p in model.parameters()])
    assert summary["fisher_mean"] == pytest.approx(values.mean().item())
    assert summary["floor_share"] == pytest.approx((values < 2 * damping).float().mean().item())
    assert (summary["refreshes"], summary["dropped_refreshes"], summary["gradient_factor_share"]) == (1, 0, 0)


# ------------------------------------------------------------------ used in other ways


@pytest.mark.parametrize(("saved", "loaded"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_a_checkpoint_of_another_precision_loads_and_trains(saved: torch.dtype, loaded: torch.dtype) -> None:
    case = BY_NAME["tied"]
    model, other = case.build().to(saved), case.build().to(loaded)
    optimizer, restored = AdaFisherW(model), AdaFisherW(other)
    train(model, case, optimizer, steps=2)
    restored.load_state_dict(optimizer.state_dict())
    train(other, case, restored, steps=2)
    for p in other.parameters():
        state = restored.state[p]
        assert state["exp_avg"].dtype == loaded and state["output_grad_factor"].dtype == torch.float32
        assert p.isfinite().all()


def test_the_gradients_of_another_loss_leave_no_statistics_once_zeroed() -> None:
    """A discriminator that the generator's loss runs through, as in a GAN."""
    case = BY_NAME["mlp"]
    model, twin = case.build(), case.build()
    optimizer, reference = AdaFisherW(model), AdaFisherW(twin)
    (1e3 * model(torch.randn(5, 4))).square().sum().backward()
    train(model, case, optimizer, steps=1)  # begins with zero_grad
    train(twin, case, reference, steps=1)
    assert_close(optimizer.state_dict()["state"], reference.state_dict()["state"], rtol=0, atol=0)


def test_zero_grad_between_forward_and_backward_keeps_what_the_backward_records() -> None:
    model, x = mlp(4, 3), torch.randn(5, 4)
    optimizer = AdaFisherW(model)
    loss = model(x).square().sum()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    assert {row.rule for row in optimizer.coverage()} == {"Linear"}


def test_a_layer_added_to_the_model_later_can_be_added_to_the_optimizer() -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    optimizer = AdaFisherW(model, update_interval=2)
    model(torch.randn(5, 4)).square().sum().backward()
    optimizer.step()
    model.append(nn.Linear(3, 2))
    optimizer.add_param_group({"params": model[1].parameters()})
    optimizer.zero_grad()
    for _ in range(2):
        model(torch.randn(5, 4)).square().sum().backward()
        optimizer.step()
    assert [row.rule for row in optimizer.coverage()] == ["Linear"] * 4


def test_frozen_parameters_copies_and_numpy_numbers() -> None:
    import copy

    import numpy

    frozen = mlp(3, 2).requires_grad_(False)
    with pytest.raises(ValueError, match="none of the parameters given to AdaFisherW is trainable"):
        AdaFisherW(frozen, frozen.parameters())
    model = mlp(3, 2)
    optimizer = AdaFisherW(model, lr=numpy.float32(0.1), update_interval=numpy.int64(3))
    with pytest.raises(TypeError, match=r"cannot be copied or pickled.*state_dict"):
        copy.deepcopy(optimizer)


# ------------------------------------------------------------------ the dtype of the momentum


@pytest.mark.parametrize("name", [torch.float32, "float32", "torch.float32"])
def test_momentum_of_bfloat16_weights_in_float32_on_request(name: Any) -> None:
    """It is then the average of the gradients in float32, comes back so from a checkpoint, and goes on bitwise."""
    case = BY_NAME["tied"]
    model = case.build().to(torch.bfloat16)
    optimizer = AdaFisherW(model, lr=1e-2, momentum_dtype=name)
    expected = {p: torch.zeros(p.shape) for p in model.parameters()}
    for step in range(3):
        optimizer.zero_grad()
        case.loss(model, torch.Generator().manual_seed(step)).backward()
        for p, mean in expected.items():
            mean.lerp_(p.grad.float(), 0.1)
        optimizer.step()
    assert_close([optimizer.state[p]["exp_avg"] for p in expected], list(expected.values()))
    copied = case.build().to(torch.bfloat16)
    copied.load_state_dict(model.state_dict())
    restored = AdaFisherW(copied, lr=1e-2)
    saved = BytesIO()
    torch.save(optimizer.state_dict(), saved)
    saved.seek(0)
    restored.load_state_dict(torch.load(saved, weights_only=True))
    assert restored.param_groups[0]["momentum_dtype"] == "float32"
    train(model, case, optimizer, 3, start=3)
    train(copied, case, restored, 3, start=3)
    assert_close(copied.state_dict(), model.state_dict(), rtol=0, atol=0)
    assert_close(restored.state_dict()["state"], optimizer.state_dict()["state"], rtol=0, atol=0)


def test_momentum_has_the_dtype_of_the_weights_by_default() -> None:
    case = BY_NAME["mlp"]
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        model = case.build().to(dtype)
        optimizer = AdaFisherW(model)
        train(model, case, optimizer, 1)
        assert {state["exp_avg"].dtype for state in optimizer.state.values()} == {dtype}


def test_momentum_in_float32_updates_bfloat16_weights_as_float32_ones() -> None:
    """The step itself is rounded once, at the end: to the bfloat16 nearest to the float32 result."""
    case = BY_NAME["mlp"]
    low = case.build().to(torch.bfloat16)
    high = case.build()
    high.load_state_dict({key: value.float() for key, value in low.state_dict().items()})
    optimizers = [AdaFisherW(model, lr=0.05, momentum_dtype="float32") for model in (low, high)]
    copied = copy.deepcopy(low)  # without hooks that record: both sides take the curvature from one gradient
    case.loss(copied, torch.Generator().manual_seed(0)).backward()
    for p, q, source in zip(low.parameters(), high.parameters(), copied.parameters(), strict=True):
        p.grad, q.grad = source.grad, source.grad.float()
    for optimizer in optimizers:
        optimizer.step()
    for p, q in zip(low.parameters(), high.parameters(), strict=True):
        assert_close(p, q.to(torch.bfloat16), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["int32", "half precision", 16])
def test_a_momentum_dtype_that_is_none_is_refused(name: Any) -> None:
    with pytest.raises(ValueError, match=r"momentum_dtype must be None .*'float32'.* got"):
        AdaFisherW(mlp(2, 2), momentum_dtype=name)


def test_a_closed_optimizer_takes_no_more_groups() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    optimizer = AdaFisherW(model, model[0].parameters())
    optimizer.close()
    with pytest.raises(RuntimeError, match="closed"):
        optimizer.add_param_group({"params": list(model[1].parameters())})
    assert not any(layer._forward_hooks for layer in model)
