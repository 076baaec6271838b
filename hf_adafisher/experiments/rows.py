"""What the cells of a comparison came to: a row each, and the seeds of one setting taken together."""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_adafisher.experiments.cells import Cell
from hf_adafisher.experiments.clm_setup import RESULTS_FILE
from hf_adafisher.experiments.processes import load_result

_MEASURES = (
    "steps", "planned seconds", "seconds", "ms per step", "optimizer bytes", "validation loss", "token perplexity",
    "word perplexity", "test loss", "test token perplexity", "test word perplexity",
)  # fmt: skip


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
    """

    cell: str
    settings: Mapping[str, Any]
    status: str
    reason: str
    values: Mapping[str, float | None]
    history: Sequence[Mapping[str, Any]]

    @property
    def loss(self) -> float:
        """Validation loss; infinite for a cell that diverged or failed."""
        loss = self.values["validation loss"]
        return math.inf if loss is None else loss


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
    def loss(self) -> float:
        """Mean validation loss; infinite if a seed diverged or failed."""
        return statistics.fmean(row.loss for row in self.rows)

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


def read_rows(cells: Sequence[Cell], output_dir: Path) -> list[Row]:
    """The rows of all cells that have a result, in their order."""
    found = [(cell, output_dir / cell.name) for cell in cells]
    return [_row(cell, load_result(folder)) for cell, folder in found if (folder / RESULTS_FILE).is_file()]


def _row(cell: Cell, result: Mapping[str, Any]) -> Row:
    validation, test = result.get("validation") or {}, result.get("test") or {}
    values = (
        result.get("steps"),
        cell.planned_seconds,
        result.get("train_seconds"),
        (result.get("step_time") or {}).get("mean_ms"),
        result.get("optimizer_state_bytes"),
        *(part.get(key) for part in (validation, test) for key in ("loss", "token_perplexity", "word_perplexity")),
    )
    reason = result.get("reason") or ""
    if result["status"] == "diverged":
        reason = f"the loss was not finite at step {result.get('diverged_at_step')}"
    measures = dict(zip(_MEASURES, values, strict=True))
    return Row(cell.name, cell.settings, result["status"], reason, measures, result.get("log_history") or [])


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
    """The setting of each optimizer with the lowest mean validation loss, the best optimizer first.

    Only those of its settings with the most seeds are candidates: where a coarse sweep with one seed is followed by
    several seeds at the best, a lucky single run must not win. Optimizers of which nothing ended well are left out.
    """
    best: dict[str, Setting] = {}
    good = [setting for setting in settings if math.isfinite(setting.loss)]
    for setting in good:
        seeds = max(len(other.rows) for other in good if other.optim == setting.optim)
        known = best.get(setting.optim)
        if len(setting.rows) == seeds and (known is None or setting.loss < known.loss):
            best[setting.optim] = setting
    return sorted(best.values(), key=lambda setting: setting.loss)


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """One line a cell, all measures at full precision, and a column for each argument that a cell has of its own."""
    arguments = list(dict.fromkeys(key for row in rows for key in row.settings))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["cell", *arguments, "status", "reason", *_MEASURES])
        for row in rows:
            own = [row.settings.get(key) for key in arguments]
            writer.writerow([row.cell, *own, row.status, row.reason, *row.values.values()])
