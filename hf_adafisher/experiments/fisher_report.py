"""The comparison of Fisher diagonals as tables and as a picture."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_adafisher.experiments.drawing import COLOURS, MARKERS, new_figure, save_figure
from hf_adafisher.experiments.fisher_agreement import ESTIMATES, HALVES
from hf_adafisher.experiments.tables import Table

MEAN = "mean, weighted by size"


def agreement_table(found: Mapping[str, Any], measure: str) -> Table:
    """One measure of every layer and estimate, the mean over layers with its spread over seeds last.

    Args:
        found: of :func:`compare_fisher`.
        measure: a key of :data:`MEASURES`.
    """
    names = [*ESTIMATES, HALVES]
    rows = []
    for row in found["layers"]:
        cells = [_number(row["measures"].get(name, {}).get(measure)) for name in names]
        rows.append([row["layer"], f"{row['values']:,}", *cells])
    cells = []
    for name in names:
        number = found["mean"][name][measure]
        spread = "" if number["sd"] is None else f" ± {number['sd']:.2f}"
        cells.append(_number(number["mean"]) + spread)
    rows.append([MEAN, "", *cells])
    return Table(["layer", "values", *ESTIMATES.values(), "exact, half and half"], rows, frozenset({len(rows) - 1}))


def _number(value: float | None) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{value:.2f}"


def draw_agreement(found: Mapping[str, Any], output: Path) -> list[Path]:
    """A dot for every layer and estimate: rank correlation with the exact diagonal; returns the files.

    Args:
        found: of :func:`compare_fisher`.
        output: where to.
    """
    rows = found["layers"]
    figure, (axes,) = new_figure(1, 1, (8.0, 1.9 + 0.3 * len(rows)))
    heights = list(range(len(rows), 0, -1))
    for index, (name, label) in enumerate(ESTIMATES.items()):
        offset = 0.18 - 0.12 * index  # equal numbers must not hide each other
        look = {"color": COLOURS[index], "marker": MARKERS[index], "linestyle": "", "markersize": 6}
        values = [row["measures"].get(name, {}).get("spearman", math.nan) for row in rows]
        axes.plot(values, [height + offset for height in heights], **look, label=label)
    halves = [row["measures"][HALVES]["spearman"] for row in rows]
    axes.plot(halves, heights, color="black", marker="|", markersize=14, linestyle="", label="exact, half and half")
    axes.axvline(0.0, color="black", linewidth=0.8)
    axes.set_yticks(heights, [f"{row['layer']} ({row['values']:,})" for row in rows], fontsize=8)
    axes.set(xlabel="Spearman's rank correlation with the exact diagonal (no unit)", ylim=(0.4, len(rows) + 0.6))
    axes.set_xlim(right=1.03)
    seeds = f"{len(found['seeds'])} seeds" if len(found["seeds"]) > 1 else f"seed {found['seeds'][0]}"
    axes.set_title(
        f"{found['model']['type']} on {found['corpus']['name']}, {found['optimizer']}, step {found['steps']}, {seeds}\n"
        f"{found['kind']} Fisher of {found['examples']:,} examples",
        fontsize=10,
    )
    figure.legend(loc="outside lower center", ncols=5, fontsize=8)
    return save_figure(figure, output, found)
