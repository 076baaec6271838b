"""What the cells of a comparison came to: a row each, and the seeds of one setting taken together."""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_adafisher.experiments.comparison.cell_process import load_result
from hf_adafisher.experiments.comparison.cells import Cell
from hf_adafisher.experiments.comparison.tasks import TASKS, Task
from hf_adafisher.experiments.runs.run import RESULTS_FILE

EPOCH_SECONDS = "seconds per epoch"


@dataclass(frozen=True)
class Row:
    """One cell with a result.

    Attributes:
        cell: Its name.
        settings: What makes it this cell.
        status: ``completed``, ``diverged`` or ``failed``.
        reason: Of a failure.
        values: Measures by name; None where there is no value.
        history: Trainer's log, for curves.
        task: What was measured.
    """

    cell: str
    settings: Mapping[str, Any]
    status: str
    reason: str
    values: Mapping[str, float | None]
    history: Sequence[Mapping[str, Any]]
    task: Task = TASKS["clm"]

    @property
    def cost(self) -> float:
        """What decides, less being better (validation loss or error); infinite for a cell that did not end well."""
        return self.task.cost_of(self.values) if self.status == "completed" else math.inf


@dataclass(frozen=True)
class Setting:
    """The cells that differ in their seed alone."""

    optim: str
    others: Mapping[str, Any]
    rows: Sequence[Row]

    @property
    def name(self) -> str:
        """``damping=0.001, learning_rate=0.02``, or ``defaults``."""
        return ", ".join(f"{key}={value}" for key, value in self.others.items()) or "defaults"

    @property
    def task(self) -> Task:
        """What was measured."""
        return self.rows[0].task

    @property
    def cost(self) -> float:
        """Mean of what decides, less being better; infinite if a seed diverged or failed."""
        return statistics.fmean(row.cost for row in self.rows)

    @property
    def rank(self) -> tuple[float, float]:
        """Orders settings, the best first: by the cost, equal ones by the task's second measure."""
        tie = self.mean(self.task.tie)
        return round(self.cost, 9), math.inf if tie is None else tie  # means of equal shares differ in the last bits

    def mean(self, measure: str) -> float | None:
        """Mean over the seeds; None if a seed has no value."""
        values = self.values(measure)
        return statistics.fmean(values) if len(values) == len(self.rows) else None

    def spread(self, measure: str) -> float | None:
        """Standard deviation over the seeds (divisor n - 1); None for fewer than two values."""
        values = self.values(measure)
        return statistics.stdev(values) if len(values) > 1 else None

    def values(self, measure: str) -> list[float]:
        """The values that there are."""
        return [value for row in self.rows if (value := row.values[measure]) is not None]


def read_rows(cells: Sequence[Cell], output_dir: Path, task: Task = TASKS["clm"]) -> list[Row]:
    """The rows of all cells that have a result, in their order."""
    found = [(cell, output_dir / cell.name) for cell in cells]
    return [_row(cell, load_result(folder), task) for cell, folder in found if (folder / RESULTS_FILE).is_file()]


def _row(cell: Cell, result: Mapping[str, Any], task: Task) -> Row:
    values = {
        "steps": result.get("steps"),
        "planned seconds": cell.planned_seconds,
        "seconds": result.get("train_seconds"),
        "ms per step": (result.get("step_time") or {}).get("mean_ms"),
        EPOCH_SECONDS: _epoch_seconds(result),
        "optimizer bytes": result.get("optimizer_state_bytes"),
        **{measure.name: measure.read(result) for measure in task.measures},
    }
    reason = result.get("reason") or ""
    if result["status"] == "diverged":
        reason = f"the loss was not finite at step {result.get('diverged_at_step')}"
    return Row(cell.name, cell.settings, result["status"], reason, values, result.get("log_history") or [], task)


def _epoch_seconds(result: Mapping[str, Any]) -> float | None:
    """Mean time of a step, warm-up left out, times the optimizer steps of an epoch; None where either is missing."""
    milliseconds, steps = (result.get("step_time") or {}).get("mean_ms"), result.get("steps_per_epoch")
    return None if milliseconds is None or steps is None else milliseconds / 1000 * steps


def group_settings(rows: Sequence[Row]) -> list[Setting]:
    """The rows by everything but the seed."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple((k, str(v)) for k, v in row.settings.items() if k != "seed"), []).append(row)
    return [
        Setting(
            str(group[0].settings["optim"]),
            {key: value for key, value in group[0].settings.items() if key not in ("optim", "seed")},
            group,
        )
        for group in groups.values()
    ]


def best_settings(settings: Sequence[Setting]) -> list[Setting]:
    """The setting of each optimizer that its task's measure prefers (see ``Setting.rank``), the best optimizer first.

    Only those of its settings with the most seeds are candidates: where a coarse sweep with one seed is followed by
    several seeds at the best, a lucky single run must not win. Optimizers of which nothing ended well are left out.
    """
    best: dict[str, Setting] = {}
    good = [setting for setting in settings if math.isfinite(setting.cost)]
    for setting in good:
        seeds = max(len(other.rows) for other in good if other.optim == setting.optim)
        known = best.get(setting.optim)
        if len(setting.rows) == seeds and (known is None or setting.rank < known.rank):
            best[setting.optim] = setting
    return sorted(best.values(), key=lambda setting: setting.rank)


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """One line a cell (at least one), all measures at full precision, and a column for each of the cells' arguments."""
    arguments = list(dict.fromkeys(key for row in rows for key in row.settings))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["cell", *arguments, "status", "reason", *rows[0].values])
        for row in rows:
            own = [row.settings.get(key) for key in arguments]
            writer.writerow([row.cell, *own, row.status, row.reason, *row.values.values()])
