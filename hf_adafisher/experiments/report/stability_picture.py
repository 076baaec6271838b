"""The picture of a sweep over batch sizes: the paper's Figure 6."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from hf_adafisher.experiments.drawing import Style, new_figure, require_matplotlib, save_figure
from hf_adafisher.experiments.report.pictures import RATE_TITLE, draw_with_range
from hf_adafisher.experiments.report.results import EPOCH_SECONDS
from hf_adafisher.experiments.report.stability import SIZE_TITLE, Stability

STABILITY_PICTURE = "stability.png"
_PLACES = ((6, 6), (6, -7), (-6, 6), (-6, -7))
"""Offsets of a number from its point, in points, so that those of several optimizers are apart."""
_DOTTED: Style = {"linestyle": ":", "linewidth": 1.2}


def draw_stability(folder: Path, stability: Stability, styles: Mapping[str, Style]) -> dict[Path, str]:
    """Draw ``stability.png`` (with an SVG, and the numbers as JSON), four panels.

    A: accuracy or perplexity by batch size, nothing else changed (dotted: at the best learning rate of each size). B:
    by learning rate, at the common batch size. C: A against the seconds of an epoch. D: the seconds of an epoch at the
    common batch size, mean and standard deviation over the runs of B.

    Args:
        folder: Of the picture.
        stability: Of a sweep.
        styles: The style of each optimizer.

    Returns:
        The PNG file and its caption; empty if matplotlib is not installed.
    """
    try:
        require_matplotlib()
    except ImportError:
        return {}
    by_size, retuned, by_rate = stability.lines().values()
    figure, (a, b, c, d) = new_figure(2, 2, (11, 9), sharey=False)
    for axes, panels in ((a, (by_size, retuned)), (b, (by_rate,)), (c, (by_size,))):
        _value_axis(axes, stability, [line for panel in panels for line in panel.values()])
    bad_end = 0 if stability.task.more_is_better else 1
    again = {optim: line for optim, line in retuned.items() if list(line["setting"]) != list(by_size[optim]["setting"])}
    for optim, line in by_size.items():
        style = {**styles[optim], "label": optim}
        draw_with_range(a, SIZE_TITLE, line, style, a.get_ylim()[bad_end])
        if optim in again:
            a.plot(*again[optim][[SIZE_TITLE, "mean"]].to_numpy().T, **_DOTTED, color=style["color"])
        draw_with_range(b, RATE_TITLE, by_rate[optim], style, b.get_ylim()[bad_end])
        _draw_cost(c, line, style, _PLACES[len(c.get_lines()) % len(_PLACES)])
    sizes = sorted({size for line in by_size.values() for size in line[SIZE_TITLE]})
    a.set_xscale("log", base=2)
    a.set(xlabel=SIZE_TITLE, xticks=sizes, xticklabels=[f"{size:g}" for size in sizes])
    a.minorticks_off()
    b.set(xlabel=RATE_TITLE, xscale="log")
    b.xaxis.set_major_formatter("{x:g}")
    c.set(xlabel="seconds per epoch; the numbers are batch sizes")
    c.margins(x=0.12)
    _draw_epochs(d, stability.epochs(), styles)
    at = f"batch size {stability.batch_size}"
    titles = ("A: by batch size", f"B: by learning rate, {at}", "C: by seconds per epoch", f"D: an epoch, {at}")
    for axes, title in zip((a, b, c, d), titles, strict=True):
        axes.set_title(title, fontsize=11)
    handles, labels = a.get_legend_handles_labels()
    shown = dict(zip(labels, handles, strict=True))
    if again:
        shown["learning rate tuned again at each size"] = a.plot([], [], **_DOTTED, color="0.3")[0]
    figure.legend(shown.values(), shown, loc="outside lower center", ncols=min(len(shown), 6), fontsize=9)
    path = folder / STABILITY_PICTURE
    save_figure(figure, path, stability.numbers())
    return {path: _caption(stability)}


def _caption(stability: Stability) -> str:
    missing = f" Nothing ended well there: {', '.join(stability.missing)}." if stability.missing else ""
    return (
        f"Stability. Each optimizer has the settings that are its best at batch size {stability.batch_size} by the "
        f"validation split; shown is the {stability.metric.name}. (A) Only the batch size changes; dotted: the best "
        "learning rate at each size. (B) Only the learning rate changes. (C) The points of A against the seconds of "
        "an epoch (mean step time times steps per epoch). (D) These seconds for each optimizer: mean and standard "
        "deviation over its runs in B. Bars in A to C span the seeds; a cross at the edge is a setting of which a run "
        f"diverged or failed.{missing}"
    )


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


def _draw_cost(axes: Any, line: pd.DataFrame, style: Style, place: tuple[int, int]) -> None:
    points = line[[EPOCH_SECONDS, "mean", SIZE_TITLE]].dropna().to_numpy()
    axes.plot(points[:, 0], points[:, 1], **style)
    for seconds, mean, size in {tuple(points[0]), tuple(points[-1])} if len(points) else ():
        look = {"color": style["color"], "fontsize": 8, "ha": "left" if place[0] > 0 else "right", "va": "center"}
        text = axes.annotate(f"{size:g}", (seconds, mean), xytext=place, textcoords="offset points", **look)
        text.set_in_layout(False)


def _draw_epochs(axes: Any, epochs: pd.DataFrame, styles: Mapping[str, Style]) -> None:
    timed = epochs.dropna(subset=[EPOCH_SECONDS])
    means, spread = timed[EPOCH_SECONDS].to_numpy(), timed["standard deviation"].fillna(0.0).to_numpy()
    colours = [styles[optim]["color"] for optim in timed.index]
    axes.barh(list(timed.index), means, xerr=spread, color=colours, height=0.6, capsize=3, alpha=0.85)
    for position, (mean, deviation) in enumerate(zip(means, spread, strict=True)):
        text = axes.annotate(f" {mean:.2f} s", (mean + deviation, position), va="center", fontsize=9)
        text.set_in_layout(False)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set_xlim(left=0)
    axes.set_xlabel(EPOCH_SECONDS)
