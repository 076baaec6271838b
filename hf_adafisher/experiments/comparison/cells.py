"""Cells (optimizer, settings, seed) of a comparison, and its configuration."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

from hf_adafisher.experiments.comparison.configuration import check_configuration
from hf_adafisher.experiments.comparison.tasks import TASKS, Task
from hf_adafisher.optimizers.factory.catalog import canonical_name

_DATA_SETS = ("dataset", "dataset_name", "dataset_config_name", "text_column_name")
_SLUG_LENGTH, _HASH_LENGTH = 30, 10


@dataclass(frozen=True)
class Cell:
    """One run of a comparison.

    Attributes:
        settings: Arguments of this cell, ``optim`` among them.
        common: Arguments that all cells of the comparison share.
        copy: Number of a copy, for cells that run side by side with themselves.
        planned_seconds: Training time of a budget of time.
        time_limit: Seconds after which the run is stopped and counts as failed; None: no limit.
        task: Name of the comparison's task.
    """

    settings: Mapping[str, Any]
    common: Mapping[str, Any] = field(default_factory=dict)
    copy: int = 1
    planned_seconds: float | None = None
    time_limit: float | None = None
    task: str = "clm"

    @property
    def optim(self) -> str:
        """Name of the optimizer."""
        return str(self.settings["optim"])

    @property
    def name(self) -> str:
        """The settings as text: ``adamw,learning_rate=0.001,seed=0``."""
        rest = [f"{key}={value}" for key, value in self.settings.items() if key != "optim"]
        return ",".join([self.optim, *rest, *([f"copy={self.copy}"] if self.copy > 1 else [])])

    @property
    def folder_name(self) -> str:
        """Name of its folder: letters, digits and hyphens, the same for the same settings in any order."""
        slug = re.sub(r"[^a-z0-9]+", "-", self.optim.lower())[:_SLUG_LENGTH].strip("-") or "cell"
        identity = json.dumps([canonical(self.settings), self.copy], sort_keys=True)
        return f"{slug}-{hashlib.sha256(identity.encode()).hexdigest()[:_HASH_LENGTH]}"

    @property
    def all_settings(self) -> dict[str, Any]:
        """Shared and own arguments; its own count."""
        return {**self.common, **self.settings}

    def arguments(self) -> list[str]:
        """Return the command line arguments of the run, without the program and the output directory."""
        return [word for key, value in self.all_settings.items() for word in (f"--{key}", *_words(value))]

    def command(self, program: Path, folder: Path) -> list[str]:
        """Return the command that runs it."""
        return [sys.executable, str(program), *self.arguments(), "--output_dir", str(folder)]

    def shell_line(self, program: Path, folder: Path, threads: int) -> str:
        """Return the command for a shell or a scheduler, with the number of threads."""
        return f"OMP_NUM_THREADS={threads} TOKENIZERS_PARALLELISM=false {shlex.join(self.command(program, folder))}"


def canonical(settings: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return arguments as the words of a command line, with equal numbers as equal words: 1, 1.0 and "1e0"."""
    return {key: [_canonical(word) for word in _words(value)] for key, value in settings.items()}


def _words(value: Any) -> list[str]:
    values = value if isinstance(value, list) else [value]
    return [str(one).lower() if isinstance(one, bool) else str(one) for one in values]


def _canonical(word: str) -> str:
    try:
        number = Decimal(word)
        return str(number.normalize()) if number.is_finite() else word
    except ArithmeticError:  # no number, or one beyond all bounds
        return word


def expand_cells(config: Mapping[str, Any]) -> list[Cell]:
    """Expand a configuration into its cells.

    Args:
        config: ``{"common": {argument: value}, "cells": [{"optim": name, argument: value or list of values}]}``;
            the lists of one entry are combined with each other, and with ``"seeds": [...]`` if there are any. An entry
            with ``"seeds"`` of its own has these instead; those of its cells that stand in the configuration already
            add nothing.

    Raises:
        ValueError: No configuration (see ``hf_adafisher.experiments.comparison.configuration``), two sources of seeds,
            or the same cell twice.
    """
    check_configuration(config)
    cells: dict[str, Cell] = {}
    twice = []
    for entry in config["cells"]:
        seeds = entry.get("seeds") or config.get("seeds")
        if seeds and "seed" in entry:
            raise ValueError(f'seeds stand in "seeds" or in an entry, not in both: {entry}')
        settings = {key: value for key, value in entry.items() if key != "seeds"} | ({"seed": seeds} if seeds else {})
        settings = _with_short_names(settings)
        lists = {key: value if isinstance(value, list) else [value] for key, value in settings.items()}
        lists["optim"] = [canonical_name(name) for name in lists["optim"]]
        for values in itertools.product(*lists.values()):
            chosen = dict(zip(lists, values, strict=True))
            cell = Cell(chosen, _with_short_names(config.get("common", {})), task=config.get("task", "clm"))
            if cells.setdefault(cell.folder_name, cell) is not cell and "seeds" not in entry:
                twice.append(cell.name)
    names = [cell.name for cell in cells.values()]
    twice += [name for name in names if names.count(name) > 1]  # of values that hold commas and equals signs
    if twice:
        raise ValueError(f"these cells stand in the configuration twice: {sorted(set(twice))}")
    return list(cells.values())


def _with_short_names(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with ``damping`` for ``adafisher_damping``, so that a cell is the same by either name.

    Raises:
        ValueError: One is given by both names.
    """
    short = {key.removeprefix("adafisher_"): value for key, value in settings.items()}
    if len(short) < len(settings):
        twice = next(key for key in short if f"adafisher_{key}" in settings and key in settings)
        raise ValueError(f"{twice} and adafisher_{twice} are one argument: give one of them only")
    return short


def task_of(config: Mapping[str, Any]) -> Task:
    """Return the task of a configuration, ``clm`` if it names none. Raise ValueError if it is unknown."""
    name = config.get("task", "clm")
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}; available: {', '.join(TASKS)}")
    return TASKS[name]


def set_arguments(config: Mapping[str, Any], pairs: Sequence[str]) -> dict[str, Any]:
    """Override shared arguments of a configuration.

    Args:
        config: Of a comparison.
        pairs: ``key=value``; a value that is JSON (a number, true, a list) is read as such, ``null`` takes the
            argument out.

    Raises:
        ValueError: Not of this form, or an argument that belongs to the cells or to the comparison.
    """
    common = _with_short_names(config.get("common", {}))
    for pair in pairs:
        key, equals, text = pair.partition("=")
        key = key.removeprefix("--").strip().removeprefix("adafisher_")
        if not key or not equals:
            raise ValueError(f"--set takes key=value, got {pair!r}")
        _check_settable(key, config)
        try:
            value = json.loads(text)
        except (json.JSONDecodeError, RecursionError):
            value = text
        if isinstance(value, dict):
            raise ValueError(f"--set {key}: {text} is no value of an argument")
        common[key] = value
    return {**config, "common": {key: value for key, value in common.items() if value is not None}}


def _check_settable(key: str, config: Mapping[str, Any]) -> None:
    own = {"output_dir": "--output_dir", "optim": "--optimizers", "seed": "--seeds" if config.get("seeds") else None}
    if config.get("budget"):
        own |= dict.fromkeys(("max_steps", "num_train_epochs"), "--budget")
    if own.get(key):
        raise ValueError(f"--set {key}: use {own[key]}")
    if any(key in _with_short_names(entry) for entry in config.get("cells", [])):
        raise ValueError(f"--set {key}: cells of the configuration have a {key} of their own, change it there")


def select_optimizers(config: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Keep the entries of these optimizers only.

    Raises:
        ValueError: One of them has no entry.
    """
    names = [canonical_name(name) for name in names]
    known = list(dict.fromkeys(canonical_name(entry.get("optim")) for entry in config.get("cells", [])))
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(
            f"the configuration has no entry for {', '.join(unknown)}; it has: {', '.join(map(str, known))}"
        )
    return {**config, "cells": [entry for entry in config["cells"] if canonical_name(entry.get("optim")) in names]}


def local_files(folder: Path) -> dict[str, str]:
    """Return the arguments that read a corpus from ``train.txt``, ``valid.txt`` and ``test.txt`` in a folder.

    Penn Treebank's files may keep their names, ``ptb.train.txt`` and so on.

    Raises:
        FileNotFoundError: One of them is missing.
    """
    prefix = "ptb." if (folder / "ptb.train.txt").is_file() else ""
    files = {f"{split}_file": folder / f"{prefix}{split[:5]}.txt" for split in ("train", "validation", "test")}
    for path in files.values():
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist: a local corpus needs train.txt, valid.txt and test.txt")
    return {key: str(path) for key, path in files.items()}


def local_images(folder: Path) -> dict[str, str]:
    """Return the arguments that read images from a folder. Raise FileNotFoundError if it does not exist."""
    if not folder.exists():
        raise FileNotFoundError(
            f"{folder} does not exist: give a folder of images, of parquet files, or a saved data set"
        )
    return {"data_dir": str(folder)}


def use_local_data(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Replace the data set of a configuration by data from a folder."""
    read = {"clm": local_files, "image": local_images}[config.get("task", "clm")]
    common = {key: value for key, value in config.get("common", {}).items() if key not in _DATA_SETS}
    return {**config, "common": {**common, **read(folder)}}
