"""Configurations of comparisons: found by path or name, read strictly, and described once."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from hf_adafisher.experiments.comparison.schema import (
    Check,
    either,
    json_schema,
    listing,
    mapping,
    number,
    one_of,
    refuse,
    scalar,
    text,
    with_schema,
)
from hf_adafisher.experiments.comparison.tasks import TASKS
from hf_adafisher.experiments.settings_files import read_json
from hf_adafisher.optimizers.factory.records import did_you_mean

PRESETS = Path(__file__).parents[1] / "presets"
"""Folder of the configurations that have a name."""

_SEEDS = listing(number(0, whole=True), empty=False, unique=True)
_VALUE = either(scalar, listing(scalar, empty=False))
_SECRET = ("token", "hub_token")
_NAME_OF_ARGUMENT = r"^[A-Za-z_][A-Za-z0-9_]*$"


@with_schema({"type": "string", "pattern": r"\S"})
def _name(value: Any, place: str) -> None:
    text(value, place)
    if not value.strip():
        refuse(place, value, "the name of an optimizer")


def _arguments(values: Check, more: Mapping[str, Check] | None = None, required: Collection[str] = ()) -> Check:
    """Accept arguments of runs with their values."""
    check_all = mapping(more, others=values, required=required)
    names = {"pattern": _NAME_OF_ARGUMENT, "not": {"enum": [*_SECRET, "output_dir"]}}

    @with_schema({**json_schema(check_all), "propertyNames": names})
    def check(value: Any, place: str) -> None:
        check_all(value, place)
        for key in value:
            if not re.fullmatch(_NAME_OF_ARGUMENT, key):
                raise ValueError(f"{place}: {key!r} is no name of an argument: write it without hyphens and spaces")
        secret = [key for key in _SECRET if key in value]
        if secret:
            raise ValueError(f"{place}: {secret[0]!r} would stand in every record: log in with `hf auth login`")
        if "output_dir" in value:
            raise ValueError(f"{place}: 'output_dir' is that of the comparison: use --output_dir")

    return check


_ENTRY = _arguments(
    either(scalar, listing(_VALUE, empty=False)),
    {"optim": either(_name, listing(_name, empty=False)), "seeds": _SEEDS},
    required=("optim",),
)


def _by_argument(deeper: Check) -> Check:
    """Accept numbers by name, or one more level, the value of an argument."""
    return mapping(others=either(number(), deeper))


CONFIGURATION = mapping(
    {
        "description": text,
        "task": one_of(TASKS),
        "common": _arguments(_VALUE),
        "cells": listing(_ENTRY, empty=False),
        "seeds": _SEEDS,
        "tuning_seeds": listing(number(0, whole=True), unique=True),
        "budget": text,
        "step_seconds": mapping(others=number(0, above=True)),
        "train_examples": number(1, whole=True),
        "overhead_seconds": number(0),
        "paper": mapping(
            {
                "source": text,
                "measure": text,
                "by": either(text, listing(text)),
                "values": _by_argument(_by_argument(mapping(others=number()))),
            },
            required=("source", "measure", "values"),
        ),
    },
    required=("cells",),
)
"""Every key of a configuration, with what it may hold."""

MEANINGS = {
    "description": "what is compared, on what, and how long it takes; the head of the report",
    "task": "`clm` (language models, the default) or `image` (image classifiers)",
    "common": "arguments that all runs share: those of `hf-adafisher clm` or `hf-adafisher image`",
    "cells": "one entry an optimizer: `optim` and its arguments; every combination of its lists is a cell",
    "seeds": "seeds of every entry that has none of its own",
    "tuning_seeds": "those of the seeds whose runs only choose settings; [] where none does, so that all are shown",
    "budget": "`steps=N`, `seconds=N`, or `like=NAME:epochs=N`: the seconds that NAME needs for N epochs",
    "step_seconds": "seconds of a step by optimizer, for the forecast of `--dry_run`",
    "train_examples": "number of training examples, for the forecast",
    "overhead_seconds": "seconds that a run takes beside its training, for the forecast",
    "paper": "published numbers that the report shows beside one's own",
}
"""Meaning of every key, in Markdown."""


def configuration_schema() -> dict[str, Any]:
    """Return the JSON schema of configurations, made from ``CONFIGURATION`` and ``MEANINGS``."""
    schema = json_schema(CONFIGURATION)
    described = {key: {"description": MEANINGS[key], **value} for key, value in schema["properties"].items()}
    about = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "Comparison of optimizers"}
    return {**about, **schema, "properties": described}


def check_configuration(config: Any) -> None:
    """Check a configuration against ``CONFIGURATION``.

    Raises:
        ValueError: An unknown key (the message holds the nearest known one), or a value of another kind; the message
            says where.
    """
    CONFIGURATION(config, "the configuration")


def available_presets() -> list[str]:
    """List the names of the presets."""
    return sorted(path.relative_to(PRESETS).with_suffix("").as_posix() for path in PRESETS.rglob("*.json"))


def find_configuration(name: Path) -> Path:
    """Return the path of a configuration.

    Args:
        name: Path of a file, or the name of a preset, with or without ``.json``.

    Raises:
        FileNotFoundError: There is neither; the message holds the nearest preset.
    """
    candidates = [name, PRESETS / name, PRESETS / f"{name}.json"]
    for path in candidates:
        if path.is_file():
            return path
    known = available_presets()
    wanted = name.name.removesuffix(".json")
    raise FileNotFoundError(
        f"there is no configuration {str(name)!r}{did_you_mean(wanted, known) or '.'} Presets: {', '.join(known)}"
    )


def load_configuration(name: Path) -> dict[str, Any]:
    """Read and check a configuration; see ``find_configuration``.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is no JSON or no configuration; the message names the file.
    """
    path = find_configuration(name)
    config = read_json(path)
    try:
        check_configuration(config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return dict(config)
