"""Option values of the optimizers that come from libraries, which check some of theirs, some late, some never."""

from __future__ import annotations

import contextlib
import inspect
import numbers
from collections.abc import Mapping
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch

from hf_adafisher.optimizers.checks import check_size


def check_values(kind: str, cls: type, defaults: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Check the values of an optimizer's options against the annotations and defaults of its class.

    Args:
        kind: The optimizer's name, for the message.
        cls: Its class.
        defaults: Defaults of options that are not the class's own.
        given: The options to check; learning rates and decays must be finite and >= 0, whole numbers >= 1 (>= 0 where
            that is the default), words among those of the class, switches True or False.

    Raises:
        ValueError: One is of another type, or out of its range; the message names it.
    """
    hints: dict[str, Any] = {}
    with contextlib.suppress(NameError, TypeError):
        hints = get_type_hints(cls.__init__)
    parameters = inspect.signature(cls.__init__).parameters
    for name, value in given.items():
        known = parameters[name].default if name in parameters else inspect.Parameter.empty
        default = defaults.get(name) if known is inspect.Parameter.empty else known
        expected = _expected(name, value, default, hints.get(name, type(default)))
        if expected is not None:
            raise ValueError(f"{kind}: option {name} must be {expected}, got {value!r}")


def _expected(name: str, value: Any, default: Any, hint: Any) -> str | None:
    """What the value should have been; None if it is that."""
    if value is None and default is None:
        return None
    if isinstance(default, bool):
        return None if isinstance(value, bool) else "True or False"
    if name == "weight_decay" or name in ("lr", "learning_rate") or name.endswith("_lr"):
        try:
            check_size(name, value)
        except (ValueError, TypeError):
            return "a finite number >= 0"
        return None
    if get_origin(hint) is Literal:
        words = get_args(hint)
        return None if value in words else f"one of {', '.join(map(repr, words))}"
    if hint is int:
        least = min(default, 1) if isinstance(default, int) else 1
        whole = isinstance(value, numbers.Integral) and not isinstance(value, bool) and value >= least
        return None if whole else f"a whole number >= {least}"
    if isinstance(default, (int, float)):
        return None if _is_number(value) else "a number"
    if isinstance(default, tuple):
        fits = isinstance(value, (tuple, list)) and len(value) == len(default)
        fits = fits and all(_is_number(v) or (v is None and d is None) for v, d in zip(value, default, strict=True))
        return None if fits else f"{len(default)} numbers, as {default}"
    if isinstance(default, str):
        return None if isinstance(value, str) else "a word"
    return None


def _is_number(value: Any) -> bool:
    return isinstance(value, (numbers.Real, torch.Tensor)) and not isinstance(value, bool) and value == value
