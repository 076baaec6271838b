"""The picture of a sweep over batch sizes: the first two panels of the paper's Figure 6."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from hf_adafisher.experiments.drawing import (
    GREY_LINE,
    MOST_LINES,
    Style,
    coloured_lines,
    label_line_ends,
    name_the_grey,
    new_figure,
    optimizer_styles,
    require_matplotlib,
    save_figure,
)
from hf_adafisher.experiments.report.pictures import RATE_TITLE, draw_with_range
from hf_adafisher.experiments.report.rendering import Picture
from hf_adafisher.experiments.report.stability import SIZE_TITLE, Stability

STABILITY_PICTURE = "stability.svg"
_DOTTED: Style = {"linestyle": ":", "linewidth": 1.2}


def draw_stability(folder: Path, stability: Stability) -> dict[Path, Picture]:
    """Draw ``stability.svg`` (with its numbers as JSON), two panels.

    A: accuracy or perplexity by batch size, nothing else changed (dotted: at the best learning rate of each size). B:
    by learning rate, at the common batch size.

    Args:
        folder: Of the picture.
        stability: Of a sweep.

    Returns:
        The SVG file and its texts; empty if matplotlib is not installed.
    """
    try:
        require_matplotlib()
    except ImportError:
        return {}
    by_size, retuned, by_rate = stability.lines().values()
    figure, (a, b) = new_figure(1, 2, (11.5, 4.8), sharey=False)
    for axes, panels in ((a, (by_size, retuned)), (b, (by_rate,))):
        _value_axis(axes, stability, [line for panel in panels for line in panel.values()])
    ranked = [optim for _, _, optim in _by_rank(stability)]
    coloured, styles = coloured_lines(ranked), optimizer_styles(by_size)
    bad_end = 0 if stability.task.more_is_better else 1
    again = {optim: line for optim, line in retuned.items() if list(line["setting"]) != list(by_size[optim]["setting"])}
    for optim, line in by_size.items():
        style: Style = {**(styles[optim] if optim in coloured else GREY_LINE), "label": optim}
        draw_with_range(a, SIZE_TITLE, line, style, a.get_ylim()[bad_end])
        if optim in again:
            a.plot(*again[optim][[SIZE_TITLE, "mean"]].to_numpy().T, **_DOTTED, color=style["color"])
        draw_with_range(b, RATE_TITLE, by_rate[optim], style, b.get_ylim()[bad_end])
    sizes = sorted({size for line in by_size.values() for size in line[SIZE_TITLE]})
    a.set_xscale("log", base=2)
    a.set(xlabel=SIZE_TITLE, xticks=sizes, xticklabels=[f"{size:g}" for size in sizes])
    a.minorticks_off()
    b.set(xlabel=RATE_TITLE, xscale="log")
    b.xaxis.set_major_formatter("{x:g}")
    titles = ("A: by batch size", f"B: by learning rate, batch size {stability.batch_size}")
    for axes, title in zip((a, b), titles, strict=True):
        axes.set_title(title, fontsize=11)
    if again:
        a.plot([], [], **_DOTTED, color="0.4", label="rate tuned again at each size")
        a.legend(a.get_lines()[-1:], ["rate tuned again at each size"], fontsize=8).set_in_layout(False)
    name_the_grey(figure, [optim for optim in ranked if optim not in coloured])
    for axes, lines, key in ((a, by_size, SIZE_TITLE), (b, by_rate, RATE_TITLE)):
        shown = {optim: lines[optim].dropna(subset=["mean"]) for optim in coloured}
        ends = [(*line[[key, "mean"]].iloc[-1], optim, styles[optim]["color"]) for optim, line in shown.items()
                if len(line)]  # fmt: skip
        label_line_ends(axes, ends)
    path = folder / STABILITY_PICTURE
    save_figure(figure, path, stability.numbers())
    return {path: Picture(_caption(stability), _in_words(stability))}


def _by_rank(stability: Stability) -> list[tuple[float, float, str]]:
    """Best first: a sort key, the mean at the common size, and the optimizer."""
    sign = -1 if stability.task.more_is_better else 1
    lines = {optim: line.set_index(SIZE_TITLE)["mean"] for optim, line in stability.lines()["A"].items()}
    means = {optim: float(line[stability.batch_size]) for optim, line in lines.items()}
    return sorted((sign * mean, mean, optim) for optim, mean in means.items())


def _caption(stability: Stability) -> str:
    missing = f" Nothing ended well there: {', '.join(stability.missing)}." if stability.missing else ""
    return (
        f"Stability. Each optimizer has the settings that are its best at batch size {stability.batch_size} by the "
        f"validation split; shown is the {stability.metric.name}. (A) Only the batch size changes; dotted: the best "
        "learning rate at each size. (B) Only the learning rate changes. Bars span the seeds; a cross at the edge is a "
        f"setting of which a run diverged or failed.{missing}"
    )


def _in_words(stability: Stability) -> str:
    """Say each optimizer's value at the common batch size and at both ends, the best first."""
    lines = stability.lines()["A"]
    parts = []
    for _, mean, optim in _by_rank(stability)[:MOST_LINES]:
        line = lines[optim].dropna(subset=["mean"])
        ends = [f"{row['mean']:.4g} at {row[SIZE_TITLE]:g}" for _, row in line.iloc[[0, -1]].iterrows()]
        parts.append(f"{optim} {mean:.4g} ({' and '.join(dict.fromkeys(ends))})")
    name = stability.metric.name
    return f"Lines of {name}. At batch size {stability.batch_size}, best first: {', '.join(parts)}."


def _value_axis(axes: Any, stability: Stability, lines: Sequence[pd.DataFrame]) -> None:
    """Frame all values of these lines; costs that differ tenfold, or more, are on a logarithmic axis."""
    values = pd.concat([line[["low", "high"]] for line in lines])
    bottom, top = values["low"].min(), values["high"].max()
    bottom, top = (0.0, 1.0) if math.isnan(bottom) else (bottom, top)
    axes.set_ylabel(stability.metric.name)
    if not stability.task.more_is_better and top >= 10 * bottom > 0:
        axes.set(yscale="log", ylim=(bottom / 1.1, top * 1.1))
        axes.yaxis.set_major_formatter("{x:g}")
    else:
        room = 0.05 * (top - bottom) or 0.5
        axes.set_ylim(bottom - room, top + room)
