"""What a comparison consists of: its configuration, and the cells (optimizer, settings, seed) that it stands for."""

from __future__ import annotations

import itertools
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PROGRAMS = {"clm": "run_clm.py"}
"""The script, beside ``compare_optimizers.py``, that runs one cell of a task."""

_KEYS = {"description", "task", "common", "cells", "seeds", "budget", "step_seconds", "overhead_seconds"}


@dataclass(frozen=True)
class Cell:
    """One run of a comparison.

    Attributes:
        settings: Arguments of the run that make it this cell, ``optim`` among them.
        common: Arguments that all cells of the comparison share.
        label: Folder name, where it is not to follow from the settings.
        planned_seconds: Training time that the budget gives it, if the budget is one of time.
    """

    settings: Mapping[str, Any]
    common: Mapping[str, Any] = field(default_factory=dict)
    label: str | None = None
    planned_seconds: float | None = None

    @property
    def optim(self) -> str:
        """Name of the optimizer."""
        return str(self.settings["optim"])

    @property
    def name(self) -> str:
        """Folder name: ``adamw,learning_rate=0.001,seed=0``."""
        rest = [f"{key}={value}" for key, value in self.settings.items() if key != "optim"]
        return self.label or ",".join([self.optim, *rest])

    def arguments(self) -> list[str]:
        """Command line arguments of the run, without the program and the output directory."""
        pairs = []
        for key, value in {**self.common, **self.settings}.items():
            values = value if isinstance(value, list) else [value]
            pairs += [f"--{key}", *(str(v).lower() if isinstance(v, bool) else str(v) for v in values)]
        return pairs

    def command(self, program: Path, folder: Path) -> list[str]:
        """The command that runs it."""
        return [sys.executable, str(program), *self.arguments(), "--output_dir", str(folder)]

    def shell_line(self, program: Path, folder: Path, threads: int) -> str:
        """The same for a shell or a scheduler, with the number of threads."""
        return f"OMP_NUM_THREADS={threads} TOKENIZERS_PARALLELISM=false {shlex.join(self.command(program, folder))}"


def expand_cells(config: Mapping[str, Any]) -> list[Cell]:
    """The cells of a configuration.

    Args:
        config: ``{"common": {argument: value}, "cells": [{"optim": name, argument: value or list of values}]}``;
            the lists of one entry are combined with each other, and with ``"seeds": [...]`` if there are any.

    Raises:
        ValueError: A missing or an unknown key, an unknown task, an entry without ``optim``, two sources of seeds, or
            the same cell twice.
    """
    _check(config)
    seeds = {"seed": list(config["seeds"])} if config.get("seeds") else {}
    cells = []
    for entry in config["cells"]:
        if seeds and "seed" in entry:
            raise ValueError(f'seeds stand in "seeds" or in an entry, not in both: {entry}')
        lists = {key: value if isinstance(value, list) else [value] for key, value in {**entry, **seeds}.items()}
        for values in itertools.product(*lists.values()):
            cells.append(Cell(dict(zip(lists, values, strict=True)), config.get("common", {})))
    names = [cell.name for cell in cells]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"these cells stand in the configuration twice: {twice}")
    return cells


def _check(config: Mapping[str, Any]) -> None:
    unknown = sorted(set(config) - _KEYS)
    if unknown or not config.get("cells"):
        raise ValueError(f'a comparison needs "cells" and may have {sorted(_KEYS)}; unknown: {unknown or "none"}')
    task = config.get("task", "clm")
    if task not in PROGRAMS:
        raise ValueError(f"unknown task {task!r}; available: {', '.join(PROGRAMS)}")
    for entry in config["cells"]:
        if "optim" not in entry:
            raise ValueError(f'each entry of "cells" names an "optim", this one does not: {entry}')


def select_optimizers(config: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """The same configuration with the entries of these optimizers only.

    Raises:
        ValueError: One of them has no entry.
    """
    known = list(dict.fromkeys(entry.get("optim") for entry in config.get("cells", [])))
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(
            f"the configuration has no entry for {', '.join(unknown)}; it has: {', '.join(map(str, known))}"
        )
    return {**config, "cells": [entry for entry in config["cells"] if entry.get("optim") in names]}


def local_files(folder: Path) -> dict[str, str]:
    """Arguments that read a corpus from ``train.txt``, ``valid.txt`` and ``test.txt`` in a folder.

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
