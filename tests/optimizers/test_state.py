"""What the optimizer keeps: where it lives, and that it follows the model, the groups and the checkpoints."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from hf_adafisher import AdaFisherW
from hf_adafisher.optimizers.base.hooked import HookedOptimizer
from hf_adafisher.optimizers.baselines.kfac import KFAC
from tests.training_helper import train


class Scaled(nn.Module):
    """CLIP's logit scale: a parameter without axes beside a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * self.scale


def mean_square(model: nn.Module, step: int) -> Tensor:
    return model(torch.randn(6, 4, generator=torch.Generator().manual_seed(step))).square().mean()


@pytest.mark.parametrize("kind", [AdaFisherW, KFAC])
def test_only_scalars_that_are_read_as_numbers_stay_on_the_cpu(kind: type[HookedOptimizer]) -> None:
    model = Scaled()
    optimizer = kind(model)
    train(model, mean_square, optimizer, 1)
    elsewhere = Scaled().to("meta")
    restored = kind(elsewhere)
    restored.load_state_dict(optimizer.state_dict())
    for p in elsewhere.parameters():
        for key, value in restored.state[p].items():
            on_device = key == restored.momentum_key or value.dim() > 0
            assert value.device.type == ("meta" if on_device else "cpu"), key


@pytest.mark.parametrize("kind", [AdaFisherW, KFAC])
def test_a_default_device_does_not_move_the_scalars(kind: type[HookedOptimizer]) -> None:
    model = Scaled()
    optimizer = kind(model)
    model(torch.randn(6, 4)).square().mean().backward()
    with torch.device("meta"):
        optimizer.step()
    assert {value.device.type for state in optimizer.state.values() for value in state.values()} == {"cpu"}


def test_a_late_refresh_does_not_shift_those_after_it() -> None:
    """The refresh of step 0 is dropped twice for a NaN: it is made up for at step 2, and the next is due at step 4."""
    model, refreshed = Scaled(), []
    optimizer = AdaFisherW(model, update_interval=4)
    for step in range(10):
        optimizer.zero_grad()
        x = torch.randn(6, 4)
        if step < 2:
            x[0, 0] = float("nan")
        before = optimizer.param_groups[0]["refreshes"]
        loss = model(x).square().mean()
        loss.backward()
        if step < 2:
            for p in model.parameters():
                assert p.grad is not None
                p.grad.nan_to_num_()
        optimizer.step()
        if optimizer.param_groups[0]["refreshes"] > before:
            refreshed.append(step)
    assert refreshed == [2, 4, 8]


def test_loading_forgets_what_was_recorded_before_it() -> None:
    model, twin = Scaled(), Scaled()
    twin.load_state_dict(model.state_dict())
    optimizer, reference = AdaFisherW(model, update_interval=1), AdaFisherW(twin, update_interval=1)
    train(model, mean_square, optimizer, 2)
    saved, weights = optimizer.state_dict(), {key: value.clone() for key, value in model.state_dict().items()}
    twin.load_state_dict(weights)
    reference.load_state_dict(saved)
    (1e3 * model(torch.randn(6, 4))).square().mean().backward()  # recorded, and its gradients are then thrown away
    optimizer.load_state_dict(saved)
    for one, its in ((model, optimizer), (twin, reference)):
        one.zero_grad()  # the model's: the optimizer's would forget by itself
        one(torch.ones(6, 4)).square().mean().backward()
        its.step()
    assert_close(optimizer.state_dict()["state"], reference.state_dict()["state"], rtol=0, atol=0)


def test_a_checkpoint_without_a_newer_option_loads(caplog: pytest.LogCaptureFixture) -> None:
    """And leaves it as it is, without a word."""
    model = Scaled()
    optimizer = AdaFisherW(model)
    train(model, mean_square, optimizer, 1)
    saved = optimizer.state_dict()
    for group in saved["param_groups"]:
        del group["momentum_dtype"]
    restored = AdaFisherW(model)
    with caplog.at_level(logging.WARNING):
        restored.load_state_dict(saved)
    assert "options replace" not in caplog.text
    train(model, mean_square, restored, 1)
    restored = AdaFisherW(model, momentum_dtype="float64")
    restored.load_state_dict(saved)
    assert "momentum_dtype" not in caplog.text
    assert all(group["momentum_dtype"] == "float64" for group in restored.param_groups)
    assert {state["exp_avg"].dtype for state in restored.state.values()} == {torch.float64}


def test_the_scale_of_the_loss_outlives_a_new_group() -> None:
    model = Scaled()
    optimizer = AdaFisherW(model, model.layer.parameters())
    optimizer.gradient_scale = 8.0
    optimizer.add_param_group({"params": [model.scale]})
    assert optimizer.gradient_scale == 8.0


class Tied(nn.Module):
    """Two layers of the same shape, of which the second may take the weight of the first."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.a, self.b, self.late = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False), nn.Linear(4, 2)
        if tied:
            self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.late(self.b(self.a(x)))


def test_a_use_that_a_parameter_gains_later_joins_its_curvature() -> None:
    model = Tied(tied=False)
    optimizer = AdaFisherW(model, [model.a.weight], update_interval=1, lr=0.0)
    train(model, mean_square, optimizer, 2)
    model.b.weight = model.a.weight
    optimizer.add_param_group({"params": model.late.parameters()})
    kept = optimizer.state[model.a.weight]["input_factor"].clone()
    assert kept.any()
    train(model, mean_square, optimizer, 1)
    twin = Tied(tied=True)
    twin.load_state_dict(model.state_dict())
    fresh = AdaFisherW(twin, update_interval=1, lr=0.0)
    train(twin, mean_square, fresh, 1)
    state, expected = optimizer.state[model.a.weight], fresh.state[twin.a.weight]
    assert state.keys() == expected.keys()
    # The new use knows this batch alone, as that of the new optimizer, up to its average's weight.
    assert_close(state["input_factor_1"], expected["input_factor_1"])
    assert state["factor_weight"].item() > state["factor_weight_1"].item()
    restored = AdaFisherW(twin, [{"params": [twin.a.weight]}, {"params": twin.late.parameters()}])
    restored.load_state_dict(optimizer.state_dict())


def test_a_parameter_that_a_rule_reaches_later_starts_its_factors_again() -> None:
    """Its factors were those of its gradient, one an axis; a layer's are something else."""

    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.late = nn.Parameter(torch.randn(3, 4)), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            layer = getattr(self, "layer", None)
            return self.late(x @ self.weight.T if layer is None else layer(x))

    model = Functional()
    optimizer = AdaFisherW(model, [model.weight], update_interval=1, lr=0.0)
    train(model, mean_square, optimizer, 1)
    momentum = optimizer.state[model.weight]["exp_avg"].clone()
    model.layer = nn.Linear(4, 3, bias=False)
    model.layer.weight = model.weight
    optimizer.add_param_group({"params": model.late.parameters()})
    assert_close(optimizer.state[model.weight]["exp_avg"], momentum, rtol=0, atol=0)
    x = torch.randn(6, 4)
    model(x).square().mean().backward()
    optimizer.step()
    state = optimizer.state[model.weight]
    assert {key: tuple(value.shape) for key, value in state.items()} == optimizer.state_shapes(model.weight)
    assert_close(state["input_factor"] / state["factor_weight"].float(), x.square().mean(0))
