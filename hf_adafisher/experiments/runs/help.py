"""Help of the training commands: their own arguments in groups, a line or two each, or every argument there is."""

from __future__ import annotations

import argparse
import inspect
import shutil
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import Field, fields
from typing import Any

from transformers import TrainingArguments

from hf_adafisher.experiments.command_line import RunParser
from hf_adafisher.training.option_fields import PREFIX, OptionArguments

_USUAL = (
    "max_steps", "weight_decay", "gradient_accumulation_steps", "seed", "bf16", "gradient_checkpointing",
    "dataloader_num_workers", "report_to", "resume_from_checkpoint", "push_to_hub",
)  # fmt: skip
"""Arguments of Trainer's that most runs need."""
_KNOWN = (
    "output_dir", "optim", "learning_rate", "num_train_epochs", "do_train", "do_eval", "per_device_train_batch_size",
    "per_device_eval_batch_size",
)  # fmt: skip
"""Arguments of Trainer's that have a line of their own; others stand together with their new defaults."""
_COLUMN, _WIDTH = 40, 120


def show_help(argv: Sequence[str] | None, program: str, about: str, groups: Mapping[str, type]) -> bool:
    """Print the help if a command line asks for it: ``--help``, or ``--help_all`` for every argument.

    Args:
        argv: Arguments (default: those of the process).
        program: Name of the command.
        about: Purpose and examples.
        groups: Dataclasses of the arguments, by the titles of their groups.

    Returns:
        True if it was printed.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if "--help_all" in words or "--help-all" in words:
        types = tuple(groups.values())
        options: dict[str, Any] = {"prog": program, "formatter_class": argparse.RawDescriptionHelpFormatter}
        print(RunParser(types, description=about, **options).format_help())
        return True
    if "--help" in words or "-h" in words:
        print("\n".join(_lines(program, about, groups)))
        return True
    return False


def _lines(program: str, about: str, groups: Mapping[str, type]) -> Iterator[str]:
    yield f"usage: {program} [--ARGUMENT VALUE ...]   or   {program} FILE   with them as JSON or YAML"
    yield from ["", about.strip()]
    options = [one.name for one in fields(OptionArguments)]
    short = [name.removeprefix(PREFIX) for name in options]  # as every command takes them
    others = [one.name for one in fields(TrainingArguments) if one.name not in _KNOWN]
    changed: dict[str, Any] = {}
    for title, type_ in groups.items():
        yield from ["", f"{title}:"]
        for one in _own_fields(type_):
            if one.name in others:
                changed[one.name] = one.default
            elif one.name not in options:
                yield from _argument(one)
    defaults = ", ".join(f"--{name} {value}" for name, value in changed.items())
    yield from ["", *_wrapped(f"Defaults that are not Trainer's: {defaults}.")]
    yield from _wrapped(f"Options of the optimizers (`hf-adafisher list` explains them): {_names(short)}.")
    yield from _wrapped(
        f"Trainer's own arguments work too, such as {_names(_USUAL)}. --help_all lists and explains all of them."
    )


def _own_fields(type_: type) -> list[Field[Any]]:
    """Fields that this package declares, or declares anew with another default."""
    names: list[str] = []
    for base in type_.__mro__:
        if base.__module__.startswith("hf_adafisher."):
            names += inspect.get_annotations(base)
    found = {one.name: one for one in fields(type_)}
    return [found[name] for name in dict.fromkeys(names) if name in found]


def _argument(one: Field[Any]) -> list[str]:
    """Names, default, and the first sentence of the help of an argument."""
    further = [name for name in one.metadata.get("aliases", []) if "-" not in name.removeprefix("--")]
    names = ", ".join([f"--{one.name}", *further])
    first, *rest = str(one.metadata.get("help", "")).split(". ")
    default = "" if one.default in (None, False) or isinstance(one.default, type) else f" (default {one.default})"
    if not default:  # it may stand in words
        default = "".join(f". {sentence}" for sentence in rest if sentence.startswith("Default"))
    text = f"{first.rstrip('.')}{default}"
    lines = textwrap.wrap(text, _width() - _COLUMN) or [""]
    head = f"  {names}"
    if len(head) >= _COLUMN:
        return [head, *(" " * _COLUMN + line for line in lines)]
    return [f"{head:<{_COLUMN}}{lines[0]}", *(" " * _COLUMN + line for line in lines[1:])]


def _names(names: Sequence[str]) -> str:
    return ", ".join(f"--{name}" for name in names)


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, _width())


def _width() -> int:
    return min(shutil.get_terminal_size((_WIDTH, 24)).columns, _WIDTH)
