"""Figures: their creation, a palette for any colour vision, and the files that a picture is saved as."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_adafisher.experiments.outputs import replacing, write_json

logger = logging.getLogger(__name__)

# Okabe and Ito's colours, which people with any colour vision can tell apart; beyond them, markers and dashes differ.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9", "#9A8F00")
MARKERS = "osD^vP*XhpH<"
DASHES = ("-", "--", ":", "-.")
SEQUENTIAL = "cividis"
"""Colour map of numbers without a middle: its lightness rises evenly, so it survives greyscale."""
Style = dict[str, Any]


def line_style(index: int) -> Style:
    """Return keyword arguments of ``Axes.plot`` for the ``index``-th line."""
    return {
        "color": COLOURS[index % len(COLOURS)],
        "marker": MARKERS[index % len(MARKERS)],
        "linestyle": DASHES[index // len(COLOURS) % len(DASHES)],
        "markersize": 4,
        "linewidth": 1.4,
    }


def plain_text(text: str) -> str:
    """Escape a text of the user's for matplotlib, which takes what stands between two dollar signs for a formula."""
    return text.replace("$", r"\$")


def require_matplotlib() -> None:
    """Check for matplotlib, before the work whose result is to be drawn.

    Raises:
        ImportError: matplotlib is not installed; the message says how to install it.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError(
            'pictures need matplotlib, which is not installed: pip install "hf_adafisher[plots]"'
        ) from error


def empty_figure(size: tuple[float, float]) -> Any:
    """Create a figure of ``size`` inches without axes.

    Raises:
        ImportError: matplotlib is not installed; the message says how to install it.
    """
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)  # no pyplot: that would pick a window system and keep global state
    return figure


def new_figure(
    rows: int, columns: int, size: tuple[float, float], *, sharey: bool | str = True
) -> tuple[Any, list[Any]]:
    """Create a figure of ``size`` inches and its axes, row by row.

    Raises:
        ImportError: matplotlib is not installed; see ``empty_figure``.
    """
    figure = empty_figure(size)
    panels = list(figure.subplots(rows, columns, squeeze=False, sharey=sharey).flat)
    for axes in panels:
        axes.grid(alpha=0.3)
    return figure, panels


def new_panels(path: Path, rows: int = 1, size: tuple[float, float] | None = None) -> list[Any] | None:
    """Create axes one below the other for the picture ``path``; None, with a warning, without matplotlib."""
    try:
        figure = empty_figure(size or (7, 4.5 + 3 * (rows - 1)))
    except ImportError:
        logger.warning(
            "matplotlib is not installed, so %s was not drawn; install it with: pip install matplotlib", path
        )
        return None
    return list(figure.subplots(rows, 1, squeeze=False, sharex=True).flat)


def save_figure(figure: Any, path: Path, numbers: Mapping[str, Any]) -> list[Path]:
    """Save a picture as PNG and SVG, and its numbers as JSON, under one name.

    Args:
        figure: Of matplotlib.
        path: Target; its suffix does not matter.
        numbers: The values drawn, with units in the keys where there are any.

    Returns:
        The three files.
    """
    import matplotlib

    path.parent.mkdir(parents=True, exist_ok=True)
    files = [path.with_suffix(suffix) for suffix in (".png", ".svg", ".json")]
    with replacing(files[0]) as partial:
        figure.savefig(partial, dpi=120)
    same_file = matplotlib.rc_context({"svg.hashsalt": "hf_adafisher"})  # the same picture gives the same file
    with same_file, replacing(files[1]) as partial:
        figure.savefig(partial, metadata={"Date": None})
    write_json(files[2], dict(numbers))
    return files
