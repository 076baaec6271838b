"""What all pictures share: colours and marks that anybody can tell apart, and how panels are made and saved."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_adafisher.experiments.outputs import empty_figure, write_json

# Okabe and Ito's colours, which people with any colour vision can tell apart; beyond them, markers and dashes differ.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9", "#9A8F00")
MARKERS = "osD^vP*XhpH<"
DASHES = ("-", "--", ":", "-.")
SEQUENTIAL = "cividis"
"""The colour map of numbers without a middle: its lightness rises evenly, so it survives greyscale."""
Style = dict[str, Any]


def line_style(index: int) -> Style:
    """Keyword arguments of ``Axes.plot`` for the line of this number."""
    return {
        "color": COLOURS[index % len(COLOURS)],
        "marker": MARKERS[index % len(MARKERS)],
        "linestyle": DASHES[index // len(COLOURS) % len(DASHES)],
        "markersize": 4,
        "linewidth": 1.4,
    }


def new_figure(
    rows: int, columns: int, size: tuple[float, float], *, sharey: bool | str = True
) -> tuple[Any, list[Any]]:
    """A figure of ``size`` inches and its axes, row by row.

    Raises:
        ImportError: matplotlib is not installed; see ``report.empty_figure``.
    """
    figure = empty_figure(size)
    panels = list(figure.subplots(rows, columns, squeeze=False, sharey=sharey).flat)
    for axes in panels:
        axes.grid(alpha=0.3)
    return figure, panels


def save_figure(figure: Any, path: Path, numbers: Mapping[str, Any]) -> list[Path]:
    """Writes a picture three times: PNG, SVG, and what it shows as JSON, under one name.

    Args:
        figure: of matplotlib.
        path: where to; its suffix does not matter.
        numbers: what is drawn, with units in the keys where there are any.

    Returns:
        The three files.
    """
    import matplotlib

    path.parent.mkdir(parents=True, exist_ok=True)
    files = [path.with_suffix(suffix) for suffix in (".png", ".svg", ".json")]
    figure.savefig(files[0], dpi=120)
    with matplotlib.rc_context({"svg.hashsalt": "hf_adafisher"}):  # the same picture gives the same file
        figure.savefig(files[1], metadata={"Date": None})
    write_json(files[2], dict(numbers))
    return files
