"""Curvature record of a run: tables of layers and refreshes, relative steps, ranking."""

from __future__ import annotations

import fnmatch
import math
import statistics
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hf_adafisher.optimizers.diagnostics.layer_curvature import NUMBERS
from hf_adafisher.training.curvature_callback import CURVATURE_FILE, read_curvature


@dataclass(frozen=True)
class CurvatureRecord:
    """Curvature record as tables of L layers and T refreshes.

    Attributes:
        layers: Names of the parameters, in the model's order.
        steps: Steps at which the factors were refreshed, ascending.
        tables: Array (L, T) for each of ``NUMBERS``, with nan for missing numbers.
        relative_step: Array (L, T): ``step_gain`` divided by its median over all layers at that refresh. Above 1 a
            layer takes larger steps for the same momentum than the median layer.
        cost: Share of the run's time that recording took; None without any record of it.
    """

    layers: list[str]
    steps: list[int]
    tables: dict[str, np.ndarray]
    relative_step: np.ndarray
    cost: float | None

    def ranking(self) -> list[tuple[str, float]]:
        """Layers and their relative step, largest first: geometric mean over the later half of the refreshes."""
        late = self.relative_step[:, len(self.steps) // 2 :]
        positive = {name: row[row > 0] for name, row in zip(self.layers, late, strict=True)}  # also without nan
        means = {name: float(np.exp(np.log(row).mean())) for name, row in positive.items() if len(row)}
        return sorted(means.items(), key=lambda item: -item[1])

    def select(self, pattern: str) -> CurvatureRecord:
        """Select layers by a pattern of their names (``*``, ``?``, ``[...]``); steps stay relative to the whole model.

        Raises:
            ValueError: No layer fits.
        """
        rows = [row for row, name in enumerate(self.layers) if fnmatch.fnmatchcase(name, pattern)]
        if not rows:
            some = ", ".join(self.layers[:3])
            raise ValueError(f"no layer fits --layers {pattern!r}; there are {len(self.layers)}, such as {some}")
        tables = {key: table[rows] for key, table in self.tables.items()}
        return CurvatureRecord(
            [self.layers[row] for row in rows], self.steps, tables, self.relative_step[rows], self.cost
        )


def load_record(run: Path) -> CurvatureRecord:
    """Load the record of a run.

    Args:
        run: Folder of the run, or the file.

    Raises:
        FileNotFoundError: There is no record.
        ValueError: The record is empty or malformed.
    """
    file = record_file(run)
    lines = read_curvature(file)
    layers = list(dict.fromkeys(name for line in lines for name in line["layers"]))
    if not layers:
        raise ValueError(f"{file} is empty: the run has not refreshed its factors yet")
    tables = {
        key: np.array([[line["layers"].get(name, {}).get(key) for line in lines] for name in layers], dtype=float)
        for key in NUMBERS
    }
    gain = tables["step_gain"]
    middle = [statistics.median([value for value in column if value > 0] or [math.nan]) for column in gain.T]
    seconds = sum(line.get("interval_seconds", 0.0) for line in lines)
    cost = sum(line.get("record_seconds", 0.0) for line in lines) / seconds if seconds else None
    return CurvatureRecord(layers, [line["step"] for line in lines], tables, gain / np.array(middle), cost)


def record_file(run: Path) -> Path:
    """Record in the folder of a run, or the file itself."""
    return run / CURVATURE_FILE if run.is_dir() else run
