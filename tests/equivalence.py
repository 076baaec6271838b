"""One helper that says: these two trainings are the same."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import Trainer

from hf_adafisher.optimizers.base.kronecker_diagonal import KroneckerDiagonalOptimizer
from tests.training_helper import optimizer_of


@dataclass
class Training:
    """A model that was trained in a plain loop, and its optimizer."""

    model: nn.Module
    optimizer: KroneckerDiagonalOptimizer


def training_of(run: Training | Trainer) -> Training:
    """Model and optimizer of a Trainer, out of accelerate's wrapper."""
    if isinstance(run, Training):
        return run
    optimizer = optimizer_of(run)
    assert isinstance(run.model, nn.Module) and isinstance(optimizer, KroneckerDiagonalOptimizer)
    return Training(run.model, optimizer)


def assert_same_training(a: Training | Trainer, b: Training | Trainer, *, bitwise: bool = False, **close: Any) -> None:
    """Two runs have equal weights and buffers, equal optimizer states, and equal options and counters.

    Statistics and momenta may be tiny as a whole, where an absolute tolerance would say nothing: each factor is
    compared in units of its own largest entry, momenta in units of the largest of all parameters (that of one whose
    exact gradient is zero is rounding noise). Counts and the weights of averages must be equal to the bit.

    Args:
        a: A Trainer after `train()`, or a `Training`.
        b: The other.
        bitwise: Whether everything must be equal to the bit.
        close: Tolerances for `torch.testing.assert_close`, else its defaults.
    """
    first, second = training_of(a), training_of(b)
    if bitwise:
        close = {"rtol": 0, "atol": 0}
    assert_close(first.model.state_dict(), second.model.state_dict(), **close)
    for ours, theirs in zip(first.optimizer.param_groups, second.optimizer.param_groups, strict=True):
        assert options_of(ours) == options_of(theirs), "options or counters of the parameter groups differ"
    states, others = by_name(first), by_name(second)
    assert states.keys() == others.keys(), "not the same parameters have a state"
    assert states, "nothing was trained"
    momentum = max(float(state["exp_avg"].abs().max()) for state in others.values())
    assert momentum > 0 and all(state["exp_avg"].isfinite().all() for state in others.values())
    for name, state in states.items():
        assert state.keys() == others[name].keys(), name
        for key, value in state.items():
            other, where = others[name][key], f"{key} of {name}"
            if bitwise or value.dim() == 0:
                assert_close(value, other, rtol=0, atol=0, msg=lambda text, where=where: f"{where}: {text}")
            else:
                unit = momentum if key == "exp_avg" else float(other.abs().max()) or 1.0
                assert_close(value / unit, other / unit, **close, msg=lambda text, where=where: f"{where}: {text}")


def options_of(group: dict[str, Any]) -> dict[str, Any]:
    """A parameter group without its parameters."""
    return {key: value for key, value in group.items() if key != "params"}


def by_name(training: Training) -> dict[str, dict[str, Tensor]]:
    """The optimizer's state of each parameter that has one, by the parameter's name."""
    state = training.optimizer.state
    return {name: state[p] for name, p in training.model.named_parameters() if p in state}


def moved(training: Training | Trainer, initial: nn.Module) -> bool:
    """Whether every trainable parameter has left its initial value, so that equal weights say something."""
    before = initial.state_dict()
    named = training_of(training).model.named_parameters()
    return all(not torch.equal(p, before[name]) for name, p in named if p.requires_grad)
