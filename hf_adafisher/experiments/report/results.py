"""Results of a comparison: one for each cell, and the seeds of one setting taken together."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from hf_adafisher.experiments.comparison.cells import Cell, canonical
from hf_adafisher.experiments.comparison.identity import cell_folder, read_record
from hf_adafisher.experiments.comparison.stored import stored_result
from hf_adafisher.experiments.comparison.tasks import TASKS, Task
from hf_adafisher.experiments.outputs import replacing

COST = "cost"
EPOCH_SECONDS = "seconds per epoch"
CPU_TIME = "CPU ms per step"
FORM = "step_size"
"""Argument that makes two forms of an optimizer two optimizers in tables and pictures."""


@dataclass(frozen=True)
class CellResult:
    """Result of one cell.

    Attributes:
        cell: Its name.
        settings: Arguments of this cell.
        status: ``completed``, ``diverged`` or ``failed``.
        reason: Of a failure.
        values: Metrics by name; None where there is no value.
        history: Trainer's log, for curves.
        task: Of the comparison.
        folder: Its name.
        content: All of ``results.json``.
        record: Its ``command.json``; None for results of earlier versions.
    """

    cell: str
    settings: Mapping[str, Any]
    status: str
    reason: str
    values: Mapping[str, float | None]
    history: Sequence[Mapping[str, Any]]
    task: Task = TASKS["clm"]
    folder: str = ""
    content: Mapping[str, Any] = field(default_factory=dict)
    record: Mapping[str, Any] | None = None

    @property
    def cost(self) -> float:
        """Selection metric as a cost, lower is better (validation loss or error); infinite unless completed."""
        return self.task.cost(self.values) if self.status == "completed" else math.inf


@dataclass(frozen=True)
class SettingResults:
    """Results of the cells that differ in their seed alone.

    Attributes:
        cells: At least one.
        tuning: These runs choose settings, so that no claim rests on them.
    """

    cells: Sequence[CellResult]
    tuning: bool = False

    @property
    def base(self) -> str:
        """Name of the optimizer, without its form."""
        return str(self.cells[0].settings["optim"])

    @property
    def optim(self) -> str:
        """Name of the optimizer; with the form where its cells say one, as ``adafisherw (paper)``: a row of its own."""
        form = self.cells[0].settings.get(FORM)
        return self.base if form is None else f"{self.base} ({form})"

    @property
    def others(self) -> dict[str, Any]:
        """Arguments beside optimizer and seed."""
        return {key: value for key, value in self.cells[0].settings.items() if key not in ("optim", "seed")}

    @property
    def name(self) -> str:
        """The other arguments as text, but for the form: ``damping=0.001, learning_rate=0.02``, or ``defaults``."""
        return ", ".join(f"{key}={value}" for key, value in self.others.items() if key != FORM) or "defaults"

    @property
    def task(self) -> Task:
        """Task of the comparison."""
        return self.cells[0].task

    @cached_property
    def values(self) -> pd.DataFrame:
        """Metrics and cost (columns) by seed (rows); nan where there is no value."""
        return pd.DataFrame([{**result.values, COST: result.cost} for result in self.cells], dtype=float)

    def by_seed(self, metric: str) -> dict[int, float | None]:
        """Values of a metric by seed; runs without a seed are left out."""
        runs = {cell.settings.get("seed"): cell.values[metric] for cell in self.cells}
        return {seed: value for seed, value in runs.items() if seed is not None}

    @property
    def cost(self) -> float:
        """Mean cost over the seeds, lower is better; infinite if a seed diverged or failed."""
        return float(self.values[COST].mean())

    @property
    def rank(self) -> tuple[float, float]:
        """Sort key, the best setting first: the cost, between equals the task's tie breaker."""
        tie = self.mean(self.task.tie_breaker)
        return round(self.cost, 9), math.inf if tie is None else tie  # means of equal shares differ in the last bits

    def mean(self, metric: str) -> float | None:
        """Mean over the seeds; None if a seed has no value."""
        return _number(self.values[metric].mean(skipna=False))

    def spread(self, metric: str) -> float | None:
        """Standard deviation over the seeds (divisor n - 1); None for fewer than two values."""
        return _number(self.values[metric].std())


def _number(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


def read_results(
    cells: Sequence[Cell], output_dir: Path, task: Task = TASKS["clm"], unplanned: Mapping[str, str] | None = None
) -> list[CellResult]:
    """Read the results of all cells that have one, in their order.

    A damaged result is a failure, and so is one made with other arguments or other data: no table mixes them.

    Args:
        cells: With their steps, if these are known.
        output_dir: Folder of the comparison.
        task: Of the comparison.
        unplanned: Reasons of the cells whose steps are not known, by name.
    """
    results, first = [], None
    for cell in cells:
        folder = cell_folder(output_dir, cell)
        try:
            planned = cell.name not in (unplanned or {})
            content = stored_result(cell, folder, planned=planned, archive=True)
            record = None if content is None or content["status"] == "failed" else read_record(folder)
        except ValueError as error:
            content, record = {"status": "failed", "reason": str(error)}, None
        if content is None:
            continue
        if record is not None:
            first = first or (cell.name, record["data"])
            changed = [key for key, value in record["data"].items() if first[1].get(key, value) != value]
            if changed:  # where the data themselves are not there to be compared with
                reason = f"{folder} was made with other data than {first[0]} ({', '.join(changed)} changed)"
                content = {"status": "failed", "reason": reason}
        results.append(_cell_result(cell, content, task, folder.name, record))
    return results


def failed_result(cell: Cell, reason: str, task: Task) -> CellResult:
    """Return the result of a cell that could not run."""
    return _cell_result(cell, {"status": "failed", "reason": reason}, task, cell.folder_name, None)


def _cell_result(
    cell: Cell, result: Mapping[str, Any], task: Task, folder: str, record: Mapping[str, Any] | None
) -> CellResult:
    times, steps = result.get("step_time") or {}, result.get("steps_per_epoch")
    milliseconds = times.get("mean_ms")
    values = {
        "steps": result.get("steps"),
        "planned seconds": cell.planned_seconds,
        "seconds": result.get("train_seconds"),
        "ms per step": milliseconds,
        CPU_TIME: times.get("mean_cpu_ms"),
        EPOCH_SECONDS: None if milliseconds is None or steps is None else milliseconds / 1000 * steps,
        "optimizer bytes": result.get("optimizer_state_bytes"),
        **{metric.name: metric.read(result) for metric in task.metrics},
    }
    reason = result.get("reason") or ""
    if result["status"] == "diverged":
        reason = f"the loss was not finite at step {result.get('diverged_at_step')}"
    history = result.get("log_history") or []
    return CellResult(cell.name, cell.settings, result["status"], reason, values, history, task, folder, result, record)


def group_by_setting(results: Sequence[CellResult]) -> list[SettingResults]:
    """Group results by everything but the seed, whatever the order of the arguments and the spelling of numbers."""
    groups: dict[tuple[Any, ...], list[CellResult]] = {}
    for result in results:
        words = canonical({name: value for name, value in result.settings.items() if name != "seed"})
        groups.setdefault(tuple(sorted((name, *value) for name, value in words.items())), []).append(result)
    return [SettingResults(group) for group in groups.values()]


def best_settings(settings: Sequence[SettingResults]) -> list[SettingResults]:
    """Select the best setting of each optimizer (see ``SettingResults.rank``), the best optimizer first.

    Only those of its settings with the most seeds are candidates: where a coarse sweep with one seed is followed by
    several seeds at the best, a lucky single run must not win. Optimizers with diverged or failed runs only are left
    out.
    """
    rows = [(s, s.optim, len(s.cells), *s.rank) for s in settings if math.isfinite(s.cost)]
    table = pd.DataFrame(rows, columns=["setting", "optim", "seeds", "cost", "tie"])
    candidates = table[table["seeds"] == table.groupby("optim")["seeds"].transform("max")]
    return list(candidates.sort_values(["cost", "tie"]).drop_duplicates("optim")["setting"])


def write_csv(path: Path, results: Sequence[CellResult]) -> None:
    """Write one line a cell (at least one): its arguments, and all metrics at full precision."""
    arguments = dict.fromkeys(key for result in results for key in result.settings)
    rows = [
        {"cell": r.cell, "folder": r.folder, **r.settings, "status": r.status, "reason": r.reason, **r.values}
        for r in results
    ]
    columns = ["cell", "folder", *arguments, "status", "reason", *results[0].values]
    table = pd.DataFrame(rows, columns=columns, dtype=object)  # so that whole numbers stay whole beside missing ones
    with replacing(path) as partial:
        table.to_csv(partial, index=False, lineterminator="\r\n")
