"""Figures: their creation, one colour for each optimizer, direct labels, and the files that a picture is saved as."""

from __future__ import annotations

import logging
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_adafisher.experiments.outputs import replacing, write_json

logger = logging.getLogger(__name__)

INK, PAPER, GREY = "#000000", "#ffffff", "#a8b0b8"
"""Colours of text and of the ground, which are matplotlib's, and of lines that are not compared."""
OPTIMIZER_COLOURS = {
    "spectral-adafisher": ("#d55e00", "#f57c1f"),
    "adafisherw": ("#005a9c", "#6fb1ff"),
    "adafisher": ("#9a1fe0", "#a95df4"),
    "adamw": ("#1f2328", "#e6edf3"),
    "muon": ("#0ba38a", "#18e69e"),
    "sgd": ("#f052c8", "#e79ac4"),
    "lamb": ("#6b5300", "#f3d013"),
    "soap": ("#b80048", "#fc2f5c"),
    "adam": ("#3f6fd8", "#8fb4ff"),
    "adahessian": ("#a86400", "#e8a33d"),
    "kfac": ("#7a7a00", "#c4c43a"),
    "shampoo": ("#1f8fb8", "#63cdee"),
    "lars": ("#9c6b4e", "#d3a98c"),
    "lion": ("#c23b22", "#ff7f66"),
    "adafactor": ("#3f8530", "#86c974"),
    "schedule_free_adamw": ("#5f70a0", "#a9b9de"),
    "sophia": ("#a0649a", "#ddb0d2"),
}
"""Colours of every optimizer, on white and on dark. People with any colour vision can tell the first eight apart."""
_SERIES = {
    "#0072b2": "#4aa8e8",
    "#d55e00": "#f57c1f",
    "#009e73": "#2fd6a6",
    "#cc79a7": "#e79ac4",
    INK: "#e6edf3",
    "#c98600": "#f0b53a",
    "#3a9bdc": "#7cc4f5",
    "#857b00": "#c9be3a",
}
COLOURS = tuple(_SERIES)
"""Colours of what is no optimizer, after Okabe and Ito; the fifth is that of text."""
_DARK = {**_SERIES, **dict(OPTIMIZER_COLOURS.values()), PAPER: "#161b22", GREY: "#59626b", "#b0b0b0": "#57606a"}
"""Twins of all colours for a dark page, with that of matplotlib's grid."""
MARKERS = "osD^vP*XhpH<"
DASHES = ("-", "--", ":", "-.")
SEQUENTIAL = "cividis"
"""Colour map of numbers without a middle: its lightness rises evenly, so it survives greyscale."""
OURS = ("spectral-adafisher", "adafisherw", "adafisher")
GREY_LINE: Mapping[str, Any] = {"color": GREY, "linewidth": 0.9, "zorder": 1}
MOST_LINES = 6
"""Largest number of coloured lines in a panel."""
_FONTS = "system-ui, 'DejaVu Sans', sans-serif"
Style = dict[str, Any]


def line_style(index: int) -> Style:
    """Return keyword arguments of ``Axes.plot`` for the ``index``-th line of what is no optimizer."""
    return _style(COLOURS[index % len(COLOURS)], index, DASHES[index // len(COLOURS) % len(DASHES)])


def optimizer_base(label: str) -> str:
    """Return the optimizer's name of a label: ``adafisherw`` of ``adafisherw (paper)`` and ``adafisherw:lr=1``."""
    return re.split(r" \(|[:,]", label, maxsplit=1)[0]


def optimizer_styles(labels: Iterable[str]) -> dict[str, Style]:
    """Return keyword arguments of ``Axes.plot`` by label.

    A name has the same colour and marker in every picture. Further forms of one optimizer, such as
    ``adafisherw (paper)``, have its colour with other dashes. Names that the package does not know share the colours
    of what is no optimizer, by their order.
    """
    labels = list(dict.fromkeys(labels))
    names = list(OPTIMIZER_COLOURS)
    unknown = [base for base in dict.fromkeys(map(optimizer_base, labels)) if base not in names]
    styles = {}
    for label in labels:
        base = optimizer_base(label)
        forms = sorted((other for other in labels if optimizer_base(other) == base), key=len)  # the plain name first
        dashes = DASHES[forms.index(label) % len(DASHES)]
        if base in names:
            styles[label] = _style(OPTIMIZER_COLOURS[base][0], names.index(base), dashes)
        else:
            styles[label] = _style(COLOURS[unknown.index(base) % len(COLOURS)], unknown.index(base), dashes)
    return styles


def _style(colour: str, index: int, dashes: str) -> Style:
    marker = MARKERS[index % len(MARKERS)]
    return {"color": colour, "marker": marker, "linestyle": dashes, "markersize": 4, "linewidth": 1.6}


def coloured_lines(ranked: Sequence[str]) -> list[str]:
    """Choose the labels that a panel shows in colour: six at most, this package's and AdamW always, then the best.

    Args:
        ranked: Labels, the best first.
    """
    first = sorted(ranked, key=lambda label: optimizer_base(label) not in (*OURS, "adamw"))[:MOST_LINES]
    return [label for label in ranked if label in first]


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
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
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


def label_line_ends(axes: Any, ends: Sequence[tuple[float, float, str, str]], size: float = 9.0) -> None:
    """Write names beside the ends of lines, at the right edge of ``axes`` and apart from each other.

    Args:
        axes: With its final limits.
        ends: Abscissa and ordinate of each end, its text and its colour.
        size: Of the letters, in points.
    """
    texts = []
    axes.set(xlim=axes.get_xlim(), ylim=axes.get_ylim())  # limits that are still to come would move the ends
    for x, y, text, colour in ends:
        link = {"arrowstyle": "-", "color": colour, "linewidth": 0.6, "alpha": 0.5, "shrinkA": 0, "shrinkB": 2}
        look = {"color": colour, "fontsize": size, "va": "center", "annotation_clip": False, "arrowprops": link}
        texts.append(axes.annotate(plain_text(text), (x, y), (1.03, 0.5), textcoords="axes fraction", **look))
    axes.figure.draw_without_rendering()  # the height of the axes is known after the layout
    height = axes.get_window_extent().height / axes.figure.dpi * 72
    to_fraction = axes.transData + axes.transAxes.inverted()
    wanted = [min(max(to_fraction.transform((x, y))[1], 0.0), 1.0) for x, y, *_ in ends]
    for text, place in zip(texts, spread_out(wanted, 1.25 * size / height), strict=True):
        text.set_position((1.03, place))


def spread_out(places: Sequence[float], gap: float) -> list[float]:
    """Move places apart, in their order, until neighbours are ``gap`` from each other, as little as needed.

    Groups that would overlap become one around the mean of what its members wanted.
    """
    order = sorted(range(len(places)), key=places.__getitem__)
    groups: list[list[int]] = []

    def start(group: Sequence[int]) -> float:
        return sum(places[i] for i in group) / len(group) - gap * (len(group) - 1) / 2

    for index in order:
        groups.append([index])
        while len(groups) > 1 and start(groups[-2]) + gap * len(groups[-2]) > start(groups[-1]):
            last = groups.pop()
            groups[-1] += last
    return [place for _, place in sorted((i, start(g) + gap * k) for g in groups for k, i in enumerate(g))]


def name_the_grey(figure: Any, names: Sequence[str]) -> None:
    """Name the grey lines in one label below the panels; nothing without any."""
    from matplotlib.lines import Line2D

    if names:
        line = Line2D([], [], color=GREY, linewidth=0.9)
        text = textwrap.fill(", ".join(map(plain_text, names)), int(13 * figure.get_figwidth()))
        figure.legend([line], [text], loc="outside lower center", fontsize=9, frameon=False)


def save_figure(figure: Any, path: Path, numbers: Mapping[str, Any]) -> list[Path]:
    """Save a picture, and its numbers as JSON beside it.

    Args:
        figure: Of matplotlib.
        path: See ``write_picture``.
        numbers: The values drawn, with units in the keys where there are any.

    Returns:
        The two files.

    Raises:
        ValueError: See ``write_picture``.
    """
    write_picture(figure, path)
    write_json(path.with_suffix(".json"), dict(numbers))
    return [path, path.with_suffix(".json")]


def write_picture(figure: Any, path: Path) -> None:
    """Write a picture as SVG or PNG, by the ending of its path.

    An SVG has its text as text and follows the reader's choice of a light or a dark page; the same picture is the same
    bytes.

    Raises:
        ValueError: The path has another ending.
    """
    if path.suffix not in (".svg", ".png"):
        raise ValueError(f"a picture is written as .svg or .png, not as {str(path)!r}")
    import matplotlib

    path.parent.mkdir(parents=True, exist_ok=True)
    as_text = matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "hf_adafisher"})
    with as_text, replacing(path) as partial:
        if path.suffix == ".png":
            figure.savefig(partial, format="png", dpi=120)
        else:
            figure.savefig(partial, format="svg", dpi=96, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
            partial.write_text(_adaptive(partial.read_text(encoding="utf-8")), encoding="utf-8")


def _adaptive(svg: str) -> str:
    """Shorten an SVG of matplotlib, and give it the dark twins of its colours."""
    svg = re.sub(r"\s*<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r'(?<= )(?:d|x|y|transform)="[^"]*"', lambda found: re.sub(r"(\.\d\d)\d+", r"\1", found[0]), svg)
    svg = re.sub(r'(?<=<g) id="[\w.-]*"| transform="rotate\(-0 [^"]*"', "", svg)
    svg = re.sub(r'font-family: [^;"]*; |; stroke-linecap: square', "", svg)
    svg = re.sub(r"(px )'?DejaVu Sans'?[^;\"]*", rf"\g<1>{_FONTS}", svg)
    svg = re.sub(r"\s*\n\s*", "\n", svg)
    rules = [
        f'[style*="{part}: {light}"]{{{part}:{dark}!important}}'
        for light, dark in _DARK.items()
        for part in ("fill", "stroke")
        if f"{part}: {light}" in svg
    ]
    rules.append(f"text:not([style*='fill:']){{fill:{_DARK[INK]}}}")  # matplotlib leaves out that text is black
    style = f"<style>text{{font-family:{_FONTS}}}@media (prefers-color-scheme: dark){{{''.join(rules)}}}</style>"
    return re.sub(r"(<svg [^>]*>)", lambda found: f"{found[1]}\n{style}", svg, count=1)
