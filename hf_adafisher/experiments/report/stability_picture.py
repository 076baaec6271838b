"""The picture of a sweep over batch sizes: the paper's Figure 6."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_adafisher.experiments.drawing import Style, new_figure, save_figure
from hf_adafisher.experiments.report.results import EPOCH_SECONDS
from hf_adafisher.experiments.report.stability import SIZE_TITLE, Stability

_Line = Mapping[str, Sequence[Any]]
_RATE_TITLE = "learning rate"
_PLACES = ((6, 6), (6, -7), (-6, 6), (-6, -7))
"""Where a number stands beside its point, in points, so that those of several optimizers are apart."""
_TUNED = "A, tuned again"
_AGAIN = "learning rate tuned again at each size"


def draw_stability(folder: Path, stability: Stability, styles: Mapping[str, Style]) -> dict[Path, str]:
    """Draws ``stability.png`` (with an SVG, and the numbers as JSON), four panels.

    A: accuracy or perplexity by batch size, nothing else changed (dotted: at the best learning rate of each size). B:
    by learning rate, at the common batch size. C: A against the seconds of an epoch. D: the seconds of an epoch at the
    common batch size, mean and standard deviation over the runs of B.

    Args:
        folder: Where to.
        stability: Of a sweep.
        styles: The look of each optimizer.

    Returns:
        The PNG file and its caption; empty if matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return {}
    numbers = stability.numbers()
    figure, (a, b, c, d) = new_figure(2, 2, (11, 9), sharey=False)
    for axes, keys in ((a, ("A and C", _TUNED)), (b, ("B",)), (c, ("A and C",))):
        _value_axis(axes, stability, [line for key in keys for line in numbers[key].values()])
    for optim, line in numbers["A and C"].items():
        style = {**styles[optim], "label": optim}
        _draw_line(a, SIZE_TITLE, line, style, stability.more_is_better)
        _draw_again(a, numbers[_TUNED][optim], line, style)
        _draw_line(b, _RATE_TITLE, numbers["B"][optim], style, stability.more_is_better)
        _draw_cost(c, line, style, _PLACES[len(c.get_lines()) % len(_PLACES)])
    sizes = sorted({size for line in numbers["A and C"].values() for size in line[SIZE_TITLE]})
    a.set_xscale("log", base=2)
    a.set(xlabel=SIZE_TITLE, xticks=sizes, xticklabels=[f"{size:g}" for size in sizes])
    a.minorticks_off()
    b.set(xlabel=_RATE_TITLE, xscale="log")
    b.xaxis.set_major_formatter("{x:g}")
    c.set(xlabel="seconds per epoch; the numbers are batch sizes")
    c.margins(x=0.12)
    _draw_epochs(d, numbers["D"], styles)
    at = f"batch size {stability.batch_size}"
    titles = ("A: by batch size", f"B: by learning rate, {at}", "C: by seconds per epoch", f"D: an epoch, {at}")
    for axes, title in zip((a, b, c, d), titles, strict=True):
        axes.set_title(title, fontsize=11)
    handles, labels = a.get_legend_handles_labels()
    shown = dict(zip(labels, handles, strict=True))
    if any(again["setting"] != numbers["A and C"][optim]["setting"] for optim, again in numbers[_TUNED].items()):
        shown[_AGAIN] = a.plot([], [], linestyle=":", linewidth=1.2, color="0.3")[0]
    figure.legend(shown.values(), shown, loc="outside lower center", ncols=min(len(shown), 6), fontsize=9)
    path = folder / "stability.png"
    save_figure(figure, path, numbers)
    return {path: _caption(stability)}


def _caption(stability: Stability) -> str:
    missing = f" Nothing ended well there: {', '.join(stability.missing)}." if stability.missing else ""
    return (
        f"Stability. Each optimizer has the settings that are its best at batch size {stability.batch_size} by the "
        f"validation split; shown is the {stability.measure.name}. (A) Only the batch size changes; dotted: the best "
        "learning rate at each size. (B) Only the learning rate changes. (C) The points of A against the seconds of "
        "an epoch (mean step time times steps per epoch). (D) These seconds for each optimizer: mean and standard "
        "deviation over its runs in B. Bars in A to C span the seeds; a cross at the edge is a setting of which a run "
        f"diverged or failed.{missing}"
    )


def _value_axis(axes: Any, stability: Stability, lines: Sequence[_Line]) -> None:
    """All that these lines have is in the frame; costs that differ tenfold, or more, are on a logarithmic axis."""
    values = [value for line in lines for key in ("low", "high") for value in line[key] if value is not None]
    bottom, top = min(values, default=0.0), max(values, default=1.0)
    axes.set_ylabel(stability.measure.name)
    if not stability.more_is_better and top >= 10 * bottom > 0:
        axes.set(yscale="log", ylim=(bottom / 1.1, top * 1.1))
        axes.yaxis.set_major_formatter("{x:g}")
    else:
        room = 0.05 * (top - bottom) or 0.5
        axes.set_ylim(bottom - room, top + room)


def _draw_line(axes: Any, key: str, line: _Line, style: Style, more_is_better: bool) -> None:
    """Mean and range over the seeds; a cross at the bad edge where there is none."""
    good = [index for index, mean in enumerate(line["mean"]) if mean is not None]
    x, mean, low, high = ([line[name][index] for index in good] for name in (key, "mean", "low", "high"))
    # The mean of equal numbers may miss them by a rounding error; a bar must not be negative.
    down = [max(m - v, 0.0) for m, v in zip(mean, low, strict=True)]
    up = [max(v - m, 0.0) for m, v in zip(mean, high, strict=True)]
    axes.errorbar(x, mean, yerr=[down, up], capsize=2, **style)
    lost = [value for value, found in zip(line[key], line["mean"], strict=True) if found is None]
    edge = axes.get_ylim()[0 if more_is_better else 1]
    for cross in axes.plot(lost, [edge] * len(lost), "x", color=style["color"], clip_on=False, markersize=7):
        cross.set_in_layout(False)


def _draw_again(axes: Any, again: _Line, line: _Line, style: Style) -> None:
    if again["setting"] != line["setting"]:
        axes.plot(again[SIZE_TITLE], again["mean"], linestyle=":", linewidth=1.2, color=style["color"])


def _draw_cost(axes: Any, line: _Line, style: Style, place: tuple[int, int]) -> None:
    points = [
        (seconds, mean, size)
        for seconds, mean, size in zip(line[EPOCH_SECONDS], line["mean"], line[SIZE_TITLE], strict=True)
        if seconds is not None and mean is not None
    ]
    axes.plot([point[0] for point in points], [point[1] for point in points], **style)
    for seconds, mean, size in {points[0], points[-1]} if points else ():
        look = {"color": style["color"], "fontsize": 8, "ha": "left" if place[0] > 0 else "right", "va": "center"}
        text = axes.annotate(f"{size:g}", (seconds, mean), xytext=place, textcoords="offset points", **look)
        text.set_in_layout(False)


def _draw_epochs(axes: Any, epochs: Mapping[str, Mapping[str, float | None]], styles: Mapping[str, Style]) -> None:
    timed = {optim: found for optim, found in epochs.items() if found[EPOCH_SECONDS] is not None}
    means = [found[EPOCH_SECONDS] for found in timed.values()]
    spread = [found["standard deviation"] or 0.0 for found in timed.values()]
    colours = [styles[optim]["color"] for optim in timed]
    axes.barh(list(timed), means, xerr=spread, color=colours, height=0.6, capsize=3, alpha=0.85)
    for position, (mean, deviation) in enumerate(zip(means, spread, strict=True)):
        text = axes.annotate(f" {mean:.2f} s", ((mean or 0.0) + deviation, position), va="center", fontsize=9)
        text.set_in_layout(False)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set_xlim(left=0)
    axes.set_xlabel(EPOCH_SECONDS)
