"""Options of optimizers: keywords that a constructor does not have, and values that libraries check late or never."""

from __future__ import annotations

import contextlib
import difflib
import inspect
import math
import numbers
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
from torch.optim import Optimizer

_ADAMS = {"betas": ("beta", "momentum"), "eps": ("damping", "relative_damping"), "learning_rate": ("lr",)}
"""Keywords that users of Adam and of training arguments are used to, and what they are called here."""


def check_keywords(cls: type, given: Iterable[str]) -> None:
    """Check keywords before Python does, whose error names the base class and no way out.

    Args:
        cls: Class that is called.
        given: Names of the keywords.

    Raises:
        TypeError: The constructor of ``cls`` does not take one of them.
    """
    signature = inspect.signature(cls.__init__).parameters  # type: ignore[misc]
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in signature.values()):
        return
    known = [name for name in signature if name != "self"]
    for name in given:
        if name not in known:
            usual = [word for word in _ADAMS.get(name, ()) if word in known]
            near = (usual or difflib.get_close_matches(name, known, n=1) or [""])[0]
            advice = f": write {near}={'betas[0]' if name == 'betas' else '...'}" if near else ""
            raise TypeError(f"{cls.__name__} has no option {name!r}{advice}; its options are {', '.join(known)}")


def check_values(kind: str, cls: type[Optimizer], defaults: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Check the values of an optimizer's options against the annotations and defaults of its class.

    Args:
        kind: The optimizer's name, for the message.
        cls: Its class.
        defaults: Defaults of options that are not the class's own.
        given: The options to check; learning rates, weight decays and epsilons must be finite and >= 0, momenta and
            betas in [0, 1), whole numbers >= 1 (>= 0 where that is the default), words among those of the class,
            switches True or False.

    Raises:
        ValueError: One is of another type, or out of its range; the message names it.
    """
    init: Callable[..., None] = cls.__init__
    hints: dict[str, Any] = {}
    with contextlib.suppress(NameError, TypeError):
        hints = get_type_hints(init)
    parameters = inspect.signature(init).parameters
    for name, value in given.items():
        known = parameters[name].default if name in parameters else inspect.Parameter.empty
        default = defaults.get(name) if known is inspect.Parameter.empty else known
        expected = _expected(name, value, default, hints.get(name, type(default)))
        if expected is not None:
            raise ValueError(f"{kind}: option {name} must be {expected}, got {value!r}")


def _expected(name: str, value: Any, default: Any, hint: Any) -> str | None:
    """Describe the values that the option takes; None if ``value`` is one of them."""
    if value is None and default is None:
        return None
    if isinstance(default, bool) or bool in get_args(hint):
        return None if isinstance(value, bool) else "True or False"
    if get_origin(hint) is Literal:
        words = get_args(hint)
        return None if value in words else f"one of {', '.join(map(repr, words))}"
    if hint is int:
        least = min(default, 1) if isinstance(default, int) else 1
        whole = isinstance(value, numbers.Integral) and not isinstance(value, bool) and int(value) >= least
        return None if whole else f"a whole number >= {least}"
    if isinstance(default, tuple):
        return _expected_tuple(name, value, default, hint)
    if name == "momentum" or name.endswith("beta"):
        return None if _is_number(value) and 0 <= value < 1 else "a number in [0, 1)"
    if name in ("weight_decay", "learning_rate") or name.endswith(("lr", "eps")):
        return None if _is_number(value) and value >= 0 else "a finite number >= 0"
    if isinstance(default, (int, float)):
        return None if _is_number(value) else "a number"
    if isinstance(default, str):  # what words there are, the class knows, and what tables may stand for them
        return None if isinstance(value, (str, tuple, list)) else f"a word, as {default!r}"
    return None


def _expected_tuple(name: str, value: Any, default: tuple[Any, ...], hint: Any) -> str | None:
    values = value if isinstance(value, (tuple, list)) else ()
    if Ellipsis in get_args(hint):
        whole = values and all(isinstance(v, int) and not isinstance(v, bool) for v in values)
        return None if whole else f"whole numbers, as {default}"
    fits = len(values) == len(default)
    fits = fits and all(_is_number(v) or (v is None and d is None) for v, d in zip(values, default, strict=True))
    if name.endswith("betas"):
        return None if fits and all(0 <= v < 1 for v in values) else f"{len(default)} numbers in [0, 1), as {default}"
    return None if fits else f"{len(default)} numbers, as {default}"


def _is_number(value: Any) -> bool:
    """Also one in a tensor, as learning rates may be; not -0.0, by which a division gives -inf."""
    single = value.numel() == 1 if isinstance(value, torch.Tensor) else isinstance(value, numbers.Real)
    if isinstance(value, bool) or not single:
        return False
    try:
        number = float(value)
    except OverflowError:
        return False
    return math.isfinite(number) and (number != 0.0 or math.copysign(1.0, number) > 0.0)
