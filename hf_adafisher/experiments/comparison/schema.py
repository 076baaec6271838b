"""Checks of values read from JSON files: each takes a value and its place, and raises ValueError with both.

``json_schema`` describes what a check accepts, for editors and other programs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

from hf_adafisher.experiments.command_line import describe_unknown_keys

Check = Callable[[Any, str], None]
_NO_NULL = r"^[^\x00]*$"


def json_schema(check: Check) -> dict[str, Any]:
    """Return the JSON schema of what a check accepts; the empty one, which accepts everything, where it has none."""
    return getattr(check, "schema", {})


def with_schema(schema: Mapping[str, Any]) -> Callable[[Check], Check]:
    """Decorate a check with its JSON schema."""

    def decorate(check: Check) -> Check:
        check.schema = dict(schema)  # type: ignore[attr-defined]
        return check

    return decorate


def refuse(place: str, value: Any, expected: str) -> None:
    """Raise ValueError for a value, shortened, at its place."""
    shown = repr(value)
    shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
    raise ValueError(f"{place} must be {expected}, got {shown}")


@with_schema({"type": "string", "pattern": _NO_NULL})
def text(value: Any, place: str) -> None:
    """Accept text that a file or a command line can hold."""
    if not isinstance(value, str):
        refuse(place, value, "a text")
    if "\0" in value or any("\ud800" <= letter <= "\udfff" for letter in value):
        refuse(place, value, "a text without null characters and lone surrogates")


def number(low: float = -math.inf, *, whole: bool = False, above: bool = False) -> Check:
    """Accept finite numbers from ``low`` on (``above``: without it); ``whole``: integers only."""
    kind = "an integer" if whole else "a number"
    bound = "" if low == -math.inf else f" {'above' if above else 'of at least'} {low:g}"

    bounds = {} if low == -math.inf else {"exclusiveMinimum" if above else "minimum": low}

    @with_schema({"type": "integer" if whole else "number", **bounds})
    def check(value: Any, place: str) -> None:
        right = isinstance(value, int) if whole else isinstance(value, int | float)
        if not right or isinstance(value, bool) or not low <= value < math.inf or (above and value == low):
            refuse(place, value, kind + bound)

    return check


@with_schema({"type": ["string", "number", "boolean"], "pattern": _NO_NULL})
def scalar(value: Any, place: str) -> None:
    """Accept what stands for one word of a command line: text, a finite number, true or false."""
    if isinstance(value, str):
        text(value, place)
    elif not isinstance(value, bool | int) and not (isinstance(value, float) and math.isfinite(value)):
        refuse(place, value, "a text, a finite number, true or false")


def one_of(choices: Collection[str]) -> Check:
    """Accept one of these texts."""

    @with_schema({"enum": list(choices)})
    def check(value: Any, place: str) -> None:
        if not isinstance(value, str) or value not in choices:
            refuse(place, value, f"one of {', '.join(choices)}")

    return check


def optional(check: Check) -> Check:
    """Accept null, and what ``check`` accepts."""
    schema = {"anyOf": [{"type": "null"}, json_schema(check)]}
    return with_schema(schema)(lambda value, place: None if value is None else check(value, place))


def either(single: Check, several: Check) -> Check:
    """Accept lists and objects that ``several`` accepts, and other values that ``single`` accepts."""
    schema = {"anyOf": [json_schema(single), json_schema(several)]}
    return with_schema(schema)(
        lambda value, place: (several if isinstance(value, list | dict) else single)(value, place)
    )


def listing(check: Check, *, empty: bool = True, unique: bool = False) -> Check:
    """Accept lists of such values."""
    least = {} if empty else {"minItems": 1}

    @with_schema({"type": "array", "items": json_schema(check), "uniqueItems": unique, **least})
    def check_all(value: Any, place: str) -> None:
        if not isinstance(value, list):
            refuse(place, value, "a list")
        if not value and not empty:
            refuse(place, value, "a list with something in it")
        for index, item in enumerate(value):
            check(item, f"{place}[{index}]")
            if unique and item in value[:index]:
                refuse(place, value, "a list without duplicates")

    return check_all


def mapping(
    checks: Mapping[str, Check] | None = None, *, others: Check | None = None, required: Collection[str] = ()
) -> Check:
    """Accept objects.

    Args:
        checks: Of the values of known keys.
        others: Of the values of all other keys; None: there must not be any.
        required: Keys that must be there.
    """
    known = checks or {}

    @with_schema(
        {
            "type": "object",
            "properties": {key: json_schema(check) for key, check in known.items()},
            "additionalProperties": False if others is None else json_schema(others),
            "required": list(required),
        }
    )
    def check_all(value: Any, place: str) -> None:
        if not isinstance(value, dict):
            refuse(place, value, "an object")
        unknown = [key for key in value if key not in known]
        if unknown and others is None:
            raise ValueError(f"{place}: {describe_unknown_keys(unknown, known)}; known: {', '.join(known)}")
        missing = [key for key in required if key not in value]
        if missing:
            raise ValueError(f"{place} needs {', '.join(map(repr, missing))}")
        for key, item in value.items():
            check = known.get(key, others)
            assert check is not None
            check(item, f"{place}, {key!r}")

    return check_all


def anything(value: Any, place: str) -> None:
    """Accept everything."""
