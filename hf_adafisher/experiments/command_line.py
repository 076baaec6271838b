"""Parsers of command lines that take whole names only."""

from __future__ import annotations

import argparse
import re
from collections.abc import Collection, Iterable, Sequence
from typing import Any, NoReturn

from transformers import HfArgumentParser

from hf_adafisher.optimizers.factory.records import did_you_mean


class StrictParser(argparse.ArgumentParser):
    """ArgumentParser without abbreviations; the error about an unknown name holds the nearest known one.

    A misspelled ``--dampin`` would otherwise be taken as ``--damping``.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{**options, "allow_abbrev": False})

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse, as ``ArgumentParser.parse_args`` does."""
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.error(describe_unknown(unknown, self._option_string_actions))
        return found


class RunParser(StrictParser, HfArgumentParser):
    """HfArgumentParser without abbreviations, whose errors are a ValueError each."""

    def error(self, message: str) -> NoReturn:
        """Raise ValueError instead of a page of usage on the standard error stream."""
        raise ValueError(message)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse, as ``ArgumentParser.parse_known_args`` does, which makes an empty list of the value ``--``."""
        for word in args or ():
            if word.startswith("--") and word.endswith("=--"):
                self.error(f"argument {word.removesuffix('=--')}: -- is no value")
        return super().parse_known_args(args, namespace)

    def aliases(self) -> dict[str, str]:
        """Return the arguments by their further names, which stand in ``metadata["aliases"]`` of their fields."""
        return {
            option.removeprefix("--"): action.dest
            for option, action in self._option_string_actions.items()
            if "-" not in option.removeprefix("--") and action.dest != option.removeprefix("--") and action.nargs != 0
        }

    def parse_into(self, argv: Sequence[str]) -> tuple[Any, ...]:
        """Return an object of each dataclass.

        Raises:
            ValueError: An unknown argument, a value of another type or out of its range.
        """
        *objects, unknown = self.parse_args_into_dataclasses(
            list(argv), return_remaining_strings=True, look_for_args_file=False
        )
        if unknown:
            self.error(describe_unknown(unknown, self._option_string_actions))
        return tuple(objects)


def describe_unknown(words: Sequence[str], known: Iterable[str]) -> str:
    """Describe the words that a parser has left over, each name with the nearest known one.

    Args:
        words: Names and values.
        known: Every name, with its hyphens.
    """
    names = [word.split("=")[0] for word in words if re.match(r"--?[A-Za-z]", word)]
    if not names:
        hint = ""
        if any(word.endswith((".json", ".yaml", ".yml")) for word in words):
            hint = " (a file of arguments stands alone: put all others into it)"
        return f"these words belong to no argument: {' '.join(words)}{hint}"
    choices = list(known)
    return "unknown argument " + "; ".join(name + did_you_mean(name, choices) for name in dict.fromkeys(names))


def describe_unknown_keys(keys: Iterable[str], known: Collection[str]) -> str:
    """Describe unknown keys of a file, each with the nearest known one."""
    return "; ".join(f"unknown key {key!r}{did_you_mean(key, known)}" for key in keys)
