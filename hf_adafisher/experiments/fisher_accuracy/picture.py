"""Tables and picture of the agreement of Fisher diagonals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_adafisher.experiments.drawing import COLOURS, MARKERS, new_figure, save_figure
from hf_adafisher.experiments.fisher_accuracy.agreement import (
    AGAINST_WINDOW,
    CONTROLS,
    ESTIMATES,
    HALVES,
    TOGETHER,
    WINDOW,
)
from hf_adafisher.experiments.report.tables import Table

MEAN = "mean, weighted by size"
LABELS = {
    **ESTIMATES,
    HALVES: "exact, half and half",
    **CONTROLS,
    **{key: label for key, (_, label) in AGAINST_WINDOW.items()},
}
"""Titles of the columns by their key in the JSON file."""
MAIN_COLUMNS = (*ESTIMATES, HALVES)
"""Columns of the first table."""
CONTROL_COLUMNS = (*CONTROLS, *AGAINST_WINDOW)
"""Columns of the table of controls."""
LEGEND = f"""\
All columns are held against the exact diagonal at the last weights, unless they say against what.
"exact, half and half": the exact diagonals of every other example against each other. It says how noisy a diagonal of
half of the examples is, and is no ceiling: an average over more examples can do better.
"{MEAN}": over the layers that have all estimates, which leaves out normalisation layers (K-FAC has no block of them).
"{TOGETHER}": the values of these layers in one row, F~ as AdaFisher divides by it (each layer normalised by itself),
S (x) H, v and K-FAC in the unit of one term of the loss. For S (x) H this means times the positions of a layer that
serve one term, which differ between layers; "S (x) H, unscaled" leaves that out.
Windows: F~, S (x) H and K-FAC are averages over the steps on which AdaFisher refreshes, with its decay; v is one over
all steps, with Adam's; the exact diagonal is that of the end. "exact, averaged as F~" is the exact empirical diagonal
of the mini-batches of AdaFisher's steps and "v, averaged as F~" the square of their gradients, averaged as F~ is.
K-FAC: one over the diagonal of its damped inverse, whose ranks depend on the damping {{damping}}, which nobody tuned.
Without damping and inversion its diagonal has, within a layer whose weight is not tied, the ranks of S (x) H.
"""
"""Explanation of the tables, to be formatted with ``damping``."""


def agreement_table(found: Mapping[str, Any], measure: str, columns: Sequence[str] = MAIN_COLUMNS) -> Table:
    """Table of one measure for every layer and estimate, the mean over layers with its spread over seeds last.

    A number of fewer seeds than all, or a mean over fewer layers, has a note with their number.

    Args:
        found: Result of ``compare_fisher``.
        measure: A key of ``MEASURES``.
        columns: Keys of ``LABELS``; those without any number are left out.
    """
    names = [name for name in columns if name in found["mean"]]
    rows = []
    for row in found["layers"]:
        spreads = [row["measures"].get(name, {}).get(measure) for name in names]
        cells = [_number(spread) + _fewer(spread, "seeds", len(found["seeds"])) for spread in spreads]
        rows.append([row["layer"], f"{row['values']:,}", *cells])
    cells = []
    for name in names:
        spread = found["mean"][name][measure]
        deviation = "" if spread["sd"] is None else f" ± {spread['sd']:.2f}"
        fewer = _fewer(spread, "seeds", len(found["seeds"])) + _fewer(spread, "layers", found["complete_layers"])
        cells.append(_number(spread) + deviation + fewer)
    rows.append([MEAN, "", *cells])
    return Table(["layer", "values", *(LABELS[name] for name in names)], rows, frozenset({len(rows) - 1}))


def _number(spread: Mapping[str, Any] | None) -> str:
    return "-" if spread is None or not spread["seeds"] else f"{spread['mean']:.2f}"


def _fewer(spread: Mapping[str, Any] | None, what: str, of: int) -> str:
    """Note for a mean over fewer than all."""
    return "" if spread is None or not 0 < spread[what] < of else f" ({spread[what]} of {of} {what})"


def draw_agreement(found: Mapping[str, Any], output: Path) -> list[Path]:
    """Draw the rank correlation with the exact diagonal, one dot for every layer and estimate.

    A dot is hollow if not all seeds have that number.

    Args:
        found: Result of ``compare_fisher``.
        output: SVG or PNG; the numbers stand beside it as JSON.

    Returns:
        The two files.
    """
    rows = found["layers"]
    figure, (axes,) = new_figure(1, 1, (8.0, 2.1 + 0.33 * len(rows)))
    heights = list(range(len(rows), 0, -1))
    names = [*ESTIMATES, *([WINDOW] if WINDOW in found["mean"] else [])]
    hollow = False
    for index, name in enumerate(names):
        offset = 0.24 - 0.12 * index  # equal numbers must not hide each other
        colour = COLOURS[index + (name == WINDOW)]  # black is that of the halves
        look = {"color": colour, "marker": MARKERS[index], "linestyle": "", "markersize": 6}
        for all_seeds in (True, False):
            chosen = [_dot(row, name, height + offset) for row, height in zip(rows, heights, strict=True)]
            points = [(x, y) for x, y, seeds in chosen if (seeds == len(found["seeds"])) is all_seeds and seeds]
            hollow |= bool(points) and not all_seeds
            more = {"label": LABELS[name]} if all_seeds else {"markerfacecolor": "none"}
            axes.plot([x for x, _ in points], [y for _, y in points], **look, **more)
    halves = [_dot(row, HALVES, height) for row, height in zip(rows, heights, strict=True)]
    bars = {"color": "black", "marker": "|", "markersize": 14, "linestyle": "", "label": LABELS[HALVES]}
    axes.plot([x for x, _, _ in halves], heights, **bars)
    axes.axvline(0.0, color="black", linewidth=0.8)
    axes.set_yticks(heights, [f"{row['layer']} ({row['values']:,})" for row in rows], fontsize=8)
    axes.set(xlabel="Spearman's rank correlation with the exact diagonal (no unit)", ylim=(0.4, len(rows) + 0.6))
    axes.set_xlim(right=1.03)
    seeds = f"{len(found['seeds'])} seeds" if len(found["seeds"]) > 1 else f"seed {found['seeds'][0]}"
    axes.set_title(
        f"{found['model']['type']} on {found['corpus']['name']}, {found['optimizer']}, step {found['steps']}, {seeds}"
        f"{' (hollow: not all of them)' if hollow else ''}\n"
        f"{found['kind']} Fisher of {found['examples']:,} examples; K-FAC with damping {found['kfac_damping']:g}",
        fontsize=10,
    )
    figure.legend(loc="outside lower center", ncols=3, fontsize=8)
    return save_figure(figure, output, found)


def _dot(row: Mapping[str, Any], name: str, height: float) -> tuple[float, float, int]:
    """Position of an estimate's dot, and its number of seeds."""
    spread = row["measures"].get(name, {}).get("spearman", {"mean": math.nan, "seeds": 0})
    return spread["mean"], height, spread["seeds"]
