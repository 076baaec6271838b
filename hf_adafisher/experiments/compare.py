"""Several runs that differ in optimizer and settings: each a process of its own with a folder of its own."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from hf_adafisher.experiments.clm_setup import RESULTS_FILE

LOG_FILE = "log.txt"
COMMAND_FILE = "command.json"


@dataclass(frozen=True)
class Cell:
    """One run of a comparison.

    Attributes:
        settings: Arguments of the run that make it this cell, ``optim`` among them.
        common: Arguments that all cells of the comparison share.
    """

    settings: Mapping[str, Any]
    common: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Folder name: ``adamw,learning_rate=0.001``."""
        rest = [f"{key}={value}" for key, value in self.settings.items() if key != "optim"]
        return ",".join([str(self.settings["optim"]), *rest])

    def arguments(self) -> list[str]:
        """Command line arguments of the run, without the program and the output directory."""
        pairs = []
        for key, value in {**self.common, **self.settings}.items():
            values = value if isinstance(value, list) else [value]
            pairs += [f"--{key}", *(str(v).lower() if isinstance(v, bool) else str(v) for v in values)]
        return pairs


def expand_cells(config: Mapping[str, Any]) -> list[Cell]:
    """The cells of a configuration.

    Args:
        config: ``{"common": {argument: value}, "cells": [{"optim": name, argument: value or list of values}]}``;
            the lists of one entry are combined with each other.

    Raises:
        ValueError: A missing or an unknown key, an entry without ``optim``, or the same cell twice.
    """
    unknown = sorted(set(config) - {"common", "cells", "description"})
    if unknown or not config.get("cells"):
        raise ValueError(
            f'a comparison needs "cells" and may have "common" and "description"; unknown: {unknown or "none"}'
        )
    cells = []
    for entry in config["cells"]:
        if "optim" not in entry:
            raise ValueError(f'each entry of "cells" names an "optim", this one does not: {entry}')
        lists = {key: value if isinstance(value, list) else [value] for key, value in entry.items()}
        for values in itertools.product(*lists.values()):
            cells.append(Cell(dict(zip(lists, values, strict=True)), config.get("common", {})))
    names = [cell.name for cell in cells]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"these cells stand in the configuration twice: {twice}")
    return cells


def local_files(folder: Path) -> dict[str, str]:
    """Arguments that read a corpus from ``train.txt``, ``valid.txt`` and ``test.txt`` in a folder.

    Raises:
        FileNotFoundError: One of them is missing.
    """
    files = {f"{split}_file": folder / f"{split[:5]}.txt" for split in ("train", "validation", "test")}
    for path in files.values():
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist: a local corpus needs train.txt, valid.txt and test.txt")
    return {key: str(path) for key, path in files.items()}


def run_cells(
    cells: Sequence[Cell], program: Path, output_dir: Path, jobs: int = 1, verbose: bool = False
) -> list[str]:
    """Run every cell that has no result yet, ``jobs`` at a time with the cores divided among them.

    A cell's folder below ``output_dir`` gets the run's files, its output (``log.txt``) and its command. Diverged runs
    are results too. Killed at any time, the same call goes on where it was.

    Args:
        cells: What to run, in this order.
        program: The script that runs one cell.
        output_dir: Folder of the comparison.
        jobs: Cells at a time, >= 1.
        verbose: Show the runs' own output (only with one job) instead of keeping it in ``log.txt``.

    Returns:
        One message for each cell that failed.

    Raises:
        ValueError: ``jobs`` below 1, or a folder whose result was made with other arguments.
    """
    if jobs < 1:
        raise ValueError(f"jobs must be at least 1, got {jobs}")
    todo = [cell for cell in cells if not _is_done(cell, output_dir / cell.name)]
    failures = []
    with (
        ThreadPoolExecutor(jobs) as pool,
        tqdm(total=len(cells), initial=len(cells) - len(todo), unit="run") as bar,
    ):
        run: Callable[[Cell], str | None] = lambda cell: _run_cell(cell, program, output_dir / cell.name, jobs, verbose)  # noqa: E731
        futures = {pool.submit(run, cell): cell for cell in todo}
        try:
            for future in as_completed(futures):
                failure = future.result()
                if failure is not None:
                    failures.append(failure)
                bar.update()
                bar.write(failure or _one_line(futures[future], output_dir))
        except BaseException:  # Ctrl-C above all: what waits must not start
            pool.shutdown(cancel_futures=True)
            raise
    return failures


def _is_done(cell: Cell, folder: Path) -> bool:
    if not (folder / RESULTS_FILE).is_file():
        return False
    command = folder / COMMAND_FILE
    if command.is_file() and json.loads(command.read_text()) != cell.arguments():
        raise ValueError(
            f"{folder} holds a result made with other arguments ({command} lists them): use another output "
            "directory, or delete the folder to run it again"
        )
    return True


def _run_cell(cell: Cell, program: Path, folder: Path, jobs: int, verbose: bool) -> str | None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / COMMAND_FILE).write_text(json.dumps(cell.arguments(), indent=2))
    threads = max(available_cores() // jobs, 1)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, str(program), *cell.arguments(), "--output_dir", str(folder)]
    started = time.perf_counter()
    if verbose and jobs == 1:
        code = subprocess.run(command, env=environment).returncode
    else:
        with (folder / LOG_FILE).open("w", encoding="utf-8") as log:
            code = subprocess.run(command, env=environment, stdout=log, stderr=subprocess.STDOUT).returncode
    if (folder / RESULTS_FILE).is_file():
        return None
    seconds = time.perf_counter() - started
    where = f", see {folder / LOG_FILE}" if (folder / LOG_FILE).is_file() else ""
    return f"{cell.name}: failed with exit status {code} after {seconds:.0f} s{where}"


def _one_line(cell: Cell, output_dir: Path) -> str:
    result = load_result(output_dir / cell.name)
    loss = (result.get("validation") or {}).get("loss")
    shown = "diverged" if loss is None else f"validation loss {loss:.4f}"
    return f"{cell.name}: {shown}, {result['steps']} steps, {result['train_seconds']:.0f} s"


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def load_result(folder: Path) -> dict[str, Any]:
    """The result of one finished cell."""
    return json.loads((folder / RESULTS_FILE).read_text(encoding="utf-8"))
