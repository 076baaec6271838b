"""A comparison from its configuration to its cells: measured step times, the budget, and what is left to do."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hf_adafisher.experiments.comparison.budget import (
    Budget,
    StepTime,
    like_cell,
    plan_cell,
    read_step_time,
    timing_cell,
    window,
)
from hf_adafisher.experiments.comparison.cell_process import is_done, load_result
from hf_adafisher.experiments.comparison.cells import Cell, expand_cells, select_optimizers, task_of
from hf_adafisher.experiments.comparison.execution import run_cells, threads_for
from hf_adafisher.experiments.comparison.tasks import Task
from hf_adafisher.experiments.outputs import write_json
from hf_adafisher.experiments.report.published import read_paper
from hf_adafisher.experiments.runs.run import RESULTS_FILE

logger = logging.getLogger(__name__)

TIMES_FOLDER = "step_times"
_NOT_MEASURED = "step time not measured"


@dataclass(frozen=True)
class Comparison:
    """Cells, their budget, and where they run.

    Attributes:
        config: The configuration, with what the command line overrides.
        cells: All cells, not yet planned.
        budget: Of every cell, or None: then the configuration says itself how long they train.
        like: A cell of the optimizer whose epochs are the budget, for such a budget.
        program: The script that runs one cell.
        output_dir: Folder of the comparison.
        jobs: Cells at a time.
        backend: ``local`` or ``ray``.
    """

    config: Mapping[str, Any]
    cells: Sequence[Cell]
    budget: Budget | None
    like: Cell | None
    program: Path
    output_dir: Path
    jobs: int = 1
    backend: str = "local"

    @property
    def task(self) -> Task:
        """What is measured."""
        return task_of(self.config)

    def step_times(self) -> dict[str, StepTime]:
        """What has been measured so far, by the name of the measurement."""
        times = {}
        for cell in self._timing_cells():
            folders = [self._times / copy.name for copy in self._copies(cell)]
            results = [load_result(folder) for folder in folders if (folder / RESULTS_FILE).is_file()]
            if len(results) == len(folders):
                times[cell.name] = read_step_time(results, window(cell))
                _warn_of_threads(cell, results[0], threads_for(self.jobs))
        return times

    def measure(self, retry_failed: bool = False) -> list[str]:
        """Measure the step time of each optimizer, unless it has been; returns messages of failures.

        A measurement runs under the conditions of the cells: with ``jobs`` copies of itself side by side.
        """
        failures = []
        for cell in self._timing_cells():
            copies = self._copies(cell)
            if not all(is_done(copy, self._times / copy.name, retry_failed) for copy in copies):
                print(f"measuring the step time of {cell.name}")
                failures += run_cells(
                    copies, self.program, self._times, self.jobs, backend=self.backend, retry_failed=retry_failed
                )
        return failures

    def plan(self) -> list[Cell]:
        """The cells with their steps, as far as these are known; those whose step time failed are left out."""
        if self.budget is None:
            return list(self.cells)
        times = self.step_times() if self.budget.needs_times else {}
        like = times.get(timing_cell(self.like).name) if self.like is not None else None
        planned = []
        for cell in self.cells:
            time = times.get(timing_cell(cell).name)
            known = time is not None and time.seconds is not None and (self.like is None or _seconds(like) is not None)
            if known or not self.budget.needs_times:
                planned.append(plan_cell(cell, self.budget, time, like))
        return planned

    def unplanned(self) -> dict[str, str]:
        """Cells that ``plan`` leaves out, by name, and why."""
        if self.budget is None or not self.budget.needs_times:
            return {}
        names, times = {cell.name for cell in self.plan()}, self.step_times()
        like = times.get(timing_cell(self.like).name) if self.like is not None else None
        reasons = {}
        for cell in self.cells:
            if cell.name not in names:
                time = times.get(timing_cell(cell).name)
                failed = next((one.reason for one in (time, like) if one is not None and one.reason), "")
                reasons[cell.name] = f"step time: {failed}" if failed else _NOT_MEASURED
        return reasons

    def run(self, verbose: bool = False, retry_failed: bool = False) -> list[str]:
        """Measure what the budget needs, then run every cell without a result; returns messages of failures."""
        failures = self.measure(retry_failed) if self.budget is not None and self.budget.needs_times else []
        for name, reason in self.unplanned().items():
            folder = self.output_dir / name
            if reason != _NOT_MEASURED and not (folder / RESULTS_FILE).is_file():
                folder.mkdir(parents=True, exist_ok=True)
                write_json(folder / RESULTS_FILE, {"status": "failed", "reason": reason})
        return failures + run_cells(
            self.plan(),
            self.program,
            self.output_dir,
            self.jobs,
            verbose,
            backend=self.backend,
            retry_failed=retry_failed,
            headline=self.task.headline,
        )

    def commands(self) -> list[str]:
        """One shell line for each cell that has no result.

        Raises:
            ValueError: The steps of a cell are not known yet.
        """
        reasons = self.unplanned()
        if _NOT_MEASURED in reasons.values():
            raise ValueError("the budget needs step times: run the same with --measure_only first, on the same machine")
        cells = [cell for cell in self.plan() if not is_done(cell, self.output_dir / cell.name)]
        threads = threads_for(self.jobs)
        return [cell.shell_line(self.program, self.output_dir / cell.name, threads) for cell in cells]

    @property
    def _times(self) -> Path:
        return self.output_dir / TIMES_FOLDER

    def _timing_cells(self) -> list[Cell]:
        cells = [*([self.like] if self.like is not None else []), *self.cells]
        return list({cell.name: cell for cell in map(timing_cell, cells)}.values())

    def _copies(self, cell: Cell) -> list[Cell]:
        return [cell, *(replace(cell, label=f"{cell.name},copy={n}") for n in range(2, self.jobs + 1))]


def create_comparison(
    config: Mapping[str, Any],
    scripts: Path,
    output_dir: Path,
    *,
    optimizers: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    budget: str | None = None,
    jobs: int = 1,
    backend: str = "local",
) -> Comparison:
    """Reads a configuration; ``optimizers``, ``seeds`` and ``budget`` override what it says.

    Args:
        config: See ``hf_adafisher.experiments.comparison.cells.expand_cells``; besides, ``budget`` and ``paper``
            (see ``hf_adafisher.experiments.report.published.read_paper``).
        scripts: Folder of the scripts that run cells.
        output_dir: Folder of the comparison.
        optimizers: Only these.
        seeds: Instead of the configuration's.
        budget: Instead of the configuration's.
        jobs: Cells at a time, >= 1.
        backend: ``local`` or ``ray``.

    Raises:
        ValueError: The configuration, or what overrides it, makes no sense.
    """
    threads_for(jobs)
    whole = {**config, **({"budget": budget} if budget else {})}
    if seeds:
        entries = [{**entry, "seeds": list(seeds)} if "seeds" in entry else entry for entry in config.get("cells", [])]
        whole |= {"seeds": list(seeds), "cells": entries}
    selected = select_optimizers(whole, optimizers) if optimizers else whole
    cells = expand_cells(selected)
    parsed = Budget.parse(whole["budget"]) if whole.get("budget") else None
    like = None
    if parsed is not None and parsed.optim is not None:  # it may be one that is not compared this time
        like = like_cell(expand_cells(select_optimizers(whole, [parsed.optim])))
    if read_paper(whole) is None and "paper" in whole:
        by = whole["paper"].get("by")
        value = whole.get("common", {}).get(by, "not given")
        logger.warning("there are no published numbers for this comparison (%s: %s): no column for them", by, value)
    return Comparison(selected, cells, parsed, like, scripts / task_of(whole).program, output_dir, jobs, backend)


def _seconds(time: StepTime | None) -> float | None:
    return None if time is None else time.seconds


def _warn_of_threads(cell: Cell, result: Mapping[str, Any], threads: int) -> None:
    measured = result.get("hardware", {}).get("torch_threads", threads)
    if measured != threads:
        logger.warning(
            "the step time of %s was measured with %d threads, the cells now get %d: delete the folder %s to measure "
            "again, or use the same --jobs",
            cell.name, measured, threads, TIMES_FOLDER,
        )  # fmt: skip
