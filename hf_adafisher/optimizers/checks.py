"""Errors that name the value, the allowed range and the way out, before any work is lost."""

from __future__ import annotations

import logging
import math
import numbers
from collections.abc import Iterable, Mapping, Set
from typing import TYPE_CHECKING, Any

import torch

from hf_adafisher.fisher.uses import new_state

if TYPE_CHECKING:
    from hf_adafisher.optimizers.adafisher import AdaFisher

logger = logging.getLogger(__name__)

ADAFISHER_KEYS = frozenset({"damping", "ema_decay", "update_interval"})
"""Options that the saved groups of AdaFisher(W) have and those of other optimizers lack."""

_CHECKED_ON_LOAD = ("beta", "damping", "ema_decay", "update_interval", "weight_decay")


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (numbers.Real, torch.Tensor)):
        raise ValueError(f"{name} must be a number, got {value!r}")
    return float(value)


def check_options(group: Mapping[str, Any], first: Mapping[str, Any], kind: str) -> None:
    """Check the options of one parameter group of AdaFisher(W).

    Args:
        group: The group.
        first: The optimizer's first group, whose ``update_interval`` all others share.
        kind: The optimizer's name, for the messages.

    Raises:
        ValueError: An option is outside its range, or a parameter is complex.
    """
    lr, damping, decay = (_number(name, group[name]) for name in ("lr", "damping", "weight_decay"))
    if not (math.isfinite(lr) and lr >= 0.0):
        raise ValueError(f"lr must be finite and >= 0, got {lr}")
    if not (math.isfinite(damping) and damping > 0.0):
        raise ValueError(
            f"damping must be finite and > 0, got {damping}: it is the smallest value that {kind} divides by"
        )
    if not (math.isfinite(decay) and decay >= 0.0):
        raise ValueError(f"weight_decay must be finite and >= 0, got {decay}")
    for name in ("beta", "ema_decay"):
        value = _number(name, group[name])
        if not 0.0 <= value < 1.0:
            raise ValueError(f"{name} must lie in [0, 1), got {value}")
    interval = group["update_interval"]
    if isinstance(interval, bool) or not isinstance(interval, numbers.Integral) or interval < 1:
        raise ValueError(f"update_interval must be a whole number of steps >= 1, got {interval!r}")
    if interval != first["update_interval"]:
        raise ValueError(
            f"update_interval must be the same in all parameter groups, since the hooks serve them all at once: "
            f"got {interval} beside {first['update_interval']}"
        )
    for p in group["params"]:
        if not p.is_floating_point():
            raise ValueError(
                f"{kind} trains real floating-point parameters, got one of {p.dtype} and shape {tuple(p.shape)}"
            )


def check_kind(kind: str, keys: Set[str], decoupled: bool | None, groups: Iterable[Mapping[str, Any]]) -> None:
    """Check that saved parameter groups were written by this kind of optimizer; torch loads any without a word.

    Args:
        kind: The optimizer's name, for the message.
        keys: Options that its groups have and those of other kinds lack.
        decoupled: Its ``decoupled_weight_decay``, by which Adam differs from AdamW; None where it has no such option.
        groups: ``state_dict["param_groups"]``.

    Raises:
        ValueError: They were not.
    """
    for group in groups:
        saved = group.get("decoupled_weight_decay", decoupled)
        if not group.keys() >= keys or saved != decoupled:
            options = {k: v for k, v in sorted(group.items()) if k not in ("params", "param_names", "initial_lr")}
            shown = ", ".join(f"{key}={value}" for key, value in options.items())
            raise ValueError(
                f"this checkpoint was not written by {kind} (its options are {shown}): resume with the optimizer that "
                "wrote it, or start without the optimizer state"
            )


def warn_changed_options(optimizer: AdaFisher, state_dict: Mapping[str, Any]) -> None:
    """Say which options a checkpoint is about to change from what the optimizer was built with."""
    changed = {
        f"{name}: {group[name]} -> {saved[name]}"
        for group, saved in zip(optimizer.param_groups, state_dict["param_groups"], strict=False)
        for name in _CHECKED_ON_LOAD
        if group[name] != saved[name]
    }
    if changed:
        logger.warning(
            "The checkpoint's options replace those given to the optimizer (%s). To change them, set them in "
            "optimizer.param_groups after loading.",
            ", ".join(sorted(changed)),
        )


def check_checkpoint(optimizer: AdaFisher, state_dict: Mapping[str, Any]) -> None:
    """Check that a saved state belongs to this kind of optimizer and to this model.

    Raises:
        ValueError: It does not; the message says what it looks like instead.
    """
    groups = state_dict["param_groups"]
    check_kind(type(optimizer).__name__, ADAFISHER_KEYS, optimizer._decoupled, groups)
    saved_ids = [i for group in groups for i in group["params"]]
    params = optimizer._params()
    if len(saved_ids) != len(params):
        return  # torch's own message says which groups differ
    for saved_id, p in zip(saved_ids, params, strict=True):
        saved = state_dict["state"].get(saved_id)
        if saved:
            factors = new_state(optimizer._curvature.uses_of(p), p)
            expected = {"step": (), "exp_avg": tuple(p.shape)} | {k: tuple(v.shape) for k, v in factors.items()}
            found = {key: tuple(value.shape) for key, value in saved.items()}
            if found != expected:
                raise ValueError(
                    f"the saved state of {optimizer._curvature.name_of(p)} does not fit the model: saved {found}, "
                    f"needed {expected}; "
                    "resume with the model that the checkpoint was written for"
                )
