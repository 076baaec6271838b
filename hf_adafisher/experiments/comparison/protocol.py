"""A comparison: its configuration, measured step times, planned cells and their execution."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hf_adafisher.experiments.comparison.budget import (
    Budget,
    StepTime,
    plan_cell,
    read_step_time,
    reference_cell,
    timing_cell,
    work_period,
)
from hf_adafisher.experiments.comparison.cell_process import prepare_cell, threads_for
from hf_adafisher.experiments.comparison.cells import Cell, expand_cells, select_optimizers, task_of
from hf_adafisher.experiments.comparison.configuration import check_configuration
from hf_adafisher.experiments.comparison.execution import run_cells
from hf_adafisher.experiments.comparison.identity import cell_folder
from hf_adafisher.experiments.comparison.published import decided_by, read_published_results
from hf_adafisher.experiments.comparison.stored import is_done, load_result, stored_result
from hf_adafisher.experiments.comparison.tasks import Task

logger = logging.getLogger(__name__)

TIMES_FOLDER = "step_times"
_NOT_MEASURED = "step time not measured"


@dataclass(frozen=True)
class Comparison:
    """Cells, their budget, and their place of execution.

    Attributes:
        config: The configuration, with the overrides of the command line.
        cells: All cells, not yet planned.
        budget: Of every cell, or None: the steps or epochs stand in the configuration.
        reference: A cell of the optimizer whose epochs are the budget, for such a budget.
        program: The script that runs one cell.
        output_dir: Folder of the comparison.
        jobs: Cells at a time.
        backend: ``local`` or ``ray``.
    """

    config: Mapping[str, Any]
    cells: Sequence[Cell]
    budget: Budget | None
    reference: Cell | None
    program: Path
    output_dir: Path
    jobs: int = 1
    backend: str = "local"

    @property
    def task(self) -> Task:
        """The task of the configuration."""
        return task_of(self.config)

    @property
    def tuning_seeds(self) -> tuple[int, ...] | None:
        """Seeds whose runs choose settings and stand in no claim; empty: no run chooses; None: all runs do both."""
        return tuple(self.config["tuning_seeds"]) if "tuning_seeds" in self.config else None

    def step_times(self) -> dict[str, StepTime]:
        """Read the step times measured so far, by the name of the measurement."""
        times = {}
        for cell in self._timing_cells():
            copies = self._copies(cell)
            try:
                found = [stored_result(copy, cell_folder(self.times_folder, copy), archive=True) for copy in copies]
            except ValueError as error:  # measured with other arguments or data
                times[cell.name] = StepTime(None, reason=str(error))
                continue
            results = [result for result in found if result is not None]
            if len(results) == len(copies):
                times[cell.name] = read_step_time(results, work_period(cell))
                _warn_of_threads(cell, results[0], threads_for(self.jobs))
        return times

    def measure(self, retry_failed: bool = False) -> list[str]:
        """Measure the step time of each optimizer, unless it has been; return messages of failures.

        A measurement runs under the conditions of the cells: with ``jobs`` copies of itself side by side.
        """
        failures = []
        for cell in self._timing_cells():
            copies = self._copies(cell)
            if not all(is_done(copy, cell_folder(self.times_folder, copy), retry_failed) for copy in copies):
                print(f"measuring the step time of {cell.name}")
                failures += run_cells(
                    copies, self.program, self.times_folder, self.jobs, backend=self.backend, retry_failed=retry_failed
                )
        return failures

    def plan(self) -> list[Cell]:
        """Return the cells with their steps; those without a step time are left out."""
        cells, unplanned = self.plans()
        return [cell for cell in cells if cell.name not in unplanned]

    def unplanned(self) -> dict[str, str]:
        """Return the reasons of the cells that ``plan`` leaves out, by name."""
        return self.plans()[1]

    def folder(self, cell: Cell) -> Path:
        """Return the folder of a cell."""
        return cell_folder(self.output_dir, cell)

    def is_done(self, cell: Cell) -> bool:
        """Check that a cell has a result; see ``hf_adafisher.experiments.comparison.stored.is_done``."""
        return is_done(cell, self.folder(cell))

    def plans(self) -> tuple[list[Cell], dict[str, str]]:
        """Return all cells, with their steps if these are known; and the reasons why some are not, by name."""
        if self.budget is None:
            return list(self.cells), {}
        times = self.step_times() if self.budget.needs_times else {}
        reference = times.get(timing_cell(self.reference).name) if self.reference is not None else None
        cells, reasons = [], {}
        for cell in self.cells:
            time = times.get(timing_cell(cell).name)
            needed = [time, reference] if self.reference is not None else [time]
            missing = [one for one in needed if one is None or one.seconds is None]
            if self.budget.needs_times and missing:
                failure = next((one.reason for one in missing if one is not None), None)
                reasons[cell.name] = f"step time: {failure}" if failure else _NOT_MEASURED
                cells.append(cell)
            else:
                cells.append(plan_cell(cell, self.budget, time, reference))
        return cells, reasons

    def run(self, verbose: bool = False, retry_failed: bool = False) -> list[str]:
        """Measure step times if the budget needs them, run every cell without a result; return messages of failures."""
        failures = self.measure(retry_failed) if self.budget is not None and self.budget.needs_times else []
        return failures + run_cells(
            seed_by_seed(self.plan()),
            self.program,
            self.output_dir,
            self.jobs,
            verbose,
            backend=self.backend,
            retry_failed=retry_failed,
            headline=self.task.headline,
        )

    def commands(self) -> list[str]:
        """Return a shell line for each cell that has no result, and write the records of these cells.

        Raises:
            ValueError: The steps of a cell are not known yet.
        """
        planned, reasons = self.plans()
        if _NOT_MEASURED in reasons.values():
            raise ValueError("the budget needs step times: run the same with --measure_only first, on the same machine")
        cells = [cell for cell in planned if cell.name not in reasons and not self.is_done(cell)]
        for cell in cells:
            prepare_cell(cell, self.folder(cell))
        threads = threads_for(self.jobs)
        return [cell.shell_line(self.program, self.folder(cell), threads) for cell in cells]

    @property
    def times_folder(self) -> Path:
        """Folder of the measured step times."""
        return self.output_dir / TIMES_FOLDER

    def _timing_cells(self) -> list[Cell]:
        cells = [*([self.reference] if self.reference is not None else []), *self.cells]
        return list({cell.name: cell for cell in map(timing_cell, cells)}.values())

    def _copies(self, cell: Cell) -> list[Cell]:
        return [cell, *(replace(cell, copy=n) for n in range(2, self.jobs + 1))]


def with_measured_jobs(comparison: Comparison) -> Comparison:
    """Return the comparison with as many jobs as its step times were measured with, if they were.

    A report needs all copies of a measurement, and does not know the ``--jobs`` of the run.
    """
    cell = timing_cell(comparison.reference or comparison.cells[0])
    jobs = 1
    while load_result(cell_folder(comparison.times_folder, replace(cell, copy=jobs + 1))) is not None:
        jobs += 1
    return replace(comparison, jobs=jobs)


def seed_by_seed(cells: Sequence[Cell]) -> list[Cell]:
    """Order cells so that all settings run with one seed, then all with the next: none has a quieter hour."""
    seeds = list(dict.fromkeys(cell.settings.get("seed") for cell in cells))
    return sorted(cells, key=lambda cell: seeds.index(cell.settings.get("seed")))


def failed_measurements(unplanned: Mapping[str, str]) -> dict[str, str]:
    """Select the cells that cannot run, since a measurement of their budget failed."""
    return {name: reason for name, reason in unplanned.items() if reason != _NOT_MEASURED}


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
    """Create a comparison from a configuration, which ``optimizers``, ``seeds`` and ``budget`` override.

    Args:
        config: See ``hf_adafisher.experiments.comparison.cells.expand_cells``; besides, ``budget`` and ``paper``
            (see ``hf_adafisher.experiments.comparison.published.read_published_results``).
        scripts: Folder of the scripts that run cells.
        output_dir: Folder of the comparison.
        optimizers: Only these.
        seeds: Instead of those of the configuration.
        budget: Instead of that of the configuration.
        jobs: Cells at a time, >= 1.
        backend: ``local`` or ``ray``.

    Raises:
        ValueError: A configuration or an override that is not valid.
    """
    threads_for(jobs)
    check_configuration(config)
    full = {**config, **({} if budget is None else {"budget": budget})}
    if seeds:
        entries = [{**entry, "seeds": list(seeds)} if "seeds" in entry else entry for entry in config["cells"]]
        full |= {"seeds": list(seeds), "cells": entries}
        if full.get("tuning_seeds"):
            left = [seed for seed in full.pop("tuning_seeds") if seed in seeds]
            full |= {"tuning_seeds": left} if left else {}
    _check_tuning_seeds(full)
    selected = select_optimizers(full, optimizers) if optimizers else full
    cells = expand_cells(selected)
    parsed = Budget.parse(full["budget"]) if "budget" in full else None
    reference = None
    if parsed is not None and parsed.optim is not None:  # it may be one that is not compared this time
        reference = reference_cell(expand_cells(select_optimizers(full, [parsed.optim])))
    if read_published_results(full) is None and "paper" in full:
        common = full.get("common", {})
        chosen = ", ".join(f"{name}: {common.get(name, 'not given')}" for name in decided_by(full["paper"]))
        logger.warning("there are no published numbers for this comparison (%s): no column for them", chosen)
    return Comparison(selected, cells, parsed, reference, scripts / task_of(full).script, output_dir, jobs, backend)


def _check_tuning_seeds(config: Mapping[str, Any]) -> None:
    """Refuse tuning seeds that no run has: a mistyped one would make claims of the runs that chose."""
    seeds = {*config.get("seeds", ()), *(cell.settings.get("seed") for cell in expand_cells(config))}
    unknown = [seed for seed in config.get("tuning_seeds", ()) if seed not in seeds]
    if unknown:
        known = ", ".join(sorted(map(str, seeds - {None}))) or "none"
        raise ValueError(f"'tuning_seeds' has {unknown[0]}, which is no seed of the comparison (its seeds: {known})")


def _warn_of_threads(cell: Cell, result: Mapping[str, Any], threads: int) -> None:
    measured = result.get("hardware", {}).get("torch_threads", threads)
    if measured != threads:
        logger.warning(
            "the step time of %s was measured with %d threads, the cells now get %d: delete the folder %s to measure "
            "again, or use the same --jobs",
            cell.name, measured, threads, TIMES_FOLDER,
        )  # fmt: skip
