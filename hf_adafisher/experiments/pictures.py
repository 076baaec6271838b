"""The pictures of a comparison."""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_adafisher.experiments.drawing import DASHES, MARKERS, Style, line_style, new_figure
from hf_adafisher.experiments.rows import Row, Setting

logger = logging.getLogger(__name__)

Point = tuple[int, float, float]
Sweep = dict[str, list[tuple[float, Setting]]]


def draw_pictures(folder: Path, settings: Sequence[Setting], best: Sequence[Setting]) -> dict[Path, str]:
    """Draws what there is to draw: what decides (a loss or an error) against steps, seconds and learning rate.

    Returns:
        The files and their captions; empty, with a warning, if matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        logger.warning("matplotlib is not installed, so the report has no pictures: pip install matplotlib")
        return {}
    optimizers = list(dict.fromkeys(setting.optim for setting in settings))
    styles = {optim: line_style(index) for index, optim in enumerate(optimizers)}
    axis_title = settings[0].task.axis if settings else ""
    what = axis_title.split(" (")[0].capitalize()
    curves = {setting.optim: points for setting in best if (points := _curves(setting))}
    pictures = {}
    if curves:
        band = "; the band spans the seeds" if any(len(runs) > 1 for runs in curves.values()) else ""
        for name, axis, label in (("curves", 0, "optimizer steps"), ("curves_by_seconds", 1, "training seconds")):
            path = folder / f"{name}.png"
            _draw_curves(path, curves, styles, axis, (label, axis_title))
            pictures[path] = (
                f"{what} against {label}, each optimizer at its best setting{band}. Evaluations during training may "
                "use part of the validation split; the tables use what they say."
            )
    sweeps = {optim: lines for optim in optimizers if (lines := _sweep([s for s in settings if s.optim == optim]))}
    if any(len(points) > 1 for lines in sweeps.values() for points in lines.values()):
        path = folder / "learning_rates.png"
        _draw_sweeps(path, sweeps, styles, axis_title)
        pictures[path] = (
            f"{what} at the end against the learning rate; bars span the seeds, a cross at the top is a "
            "setting of which a run diverged, failed, or lies above the frame. The dotted line is the best of all "
            "optimizers. A wide valley forgives a wrong learning rate."
        )
    return pictures


def _curves(setting: Setting) -> list[list[Point]]:
    """Per seed: (step, training seconds, validation loss or error), as far as all seeds go."""
    runs = [points for row in setting.rows if (points := _evaluations(row))]
    length = min((len(points) for points in runs), default=0)
    return [points[:length] for points in runs]


def _evaluations(row: Row) -> list[Point]:
    return [
        (entry["step"], entry.get("train_seconds", math.nan), cost)
        for entry in row.history
        if (cost := row.task.logged_cost(entry)) is not None
    ]


def _draw_curves(
    path: Path,
    curves: Mapping[str, list[list[Point]]],
    styles: Mapping[str, Style],
    axis: int,
    labels: tuple[str, str],
) -> None:
    figure, (axes,) = new_figure(1, 1, (8, 5))
    ends = []
    for optim, runs in curves.items():
        columns = list(zip(*runs, strict=True))
        x = [statistics.fmean(point[axis] for point in column) for column in columns]
        costs = [[point[2] for point in column] for column in columns]
        mean = [statistics.fmean(values) for values in costs]
        axes.plot(x, mean, label=optim, **styles[optim])
        if len(runs) > 1:
            low, high = [min(values) for values in costs], [max(values) for values in costs]
            axes.fill_between(x, low, high, color=styles[optim]["color"], alpha=0.15, linewidth=0)
        ends += [mean[0], min(mean)]
    bottom, top = min(ends), max(ends)
    room = 0.05 * (top - bottom) or 0.5
    axes.set(xlabel=labels[0], ylabel=labels[1], xlim=(0, None), ylim=(bottom - room, top + room))
    axes.legend(ncols=2 if len(curves) > 5 else 1, fontsize=8)
    figure.savefig(path, dpi=120)


def _sweep(settings: Sequence[Setting]) -> Sweep:
    """Settings of one optimizer by learning rate, a line for each of its other settings."""
    lines: Sweep = {}
    for setting in settings:
        if "learning_rate" in setting.others:
            rest = ", ".join(f"{key}={value}" for key, value in setting.others.items() if key != "learning_rate")
            lines.setdefault(rest, []).append((float(setting.others["learning_rate"]), setting))
    return {label: sorted(points, key=lambda point: point[0]) for label, points in lines.items()}


def _draw_sweeps(path: Path, sweeps: Mapping[str, Sweep], styles: Mapping[str, Style], axis_title: str) -> None:
    columns = min(len(sweeps), 4)
    rows = math.ceil(len(sweeps) / columns)
    figure, panels = new_figure(rows, columns, (max(2.9 * columns, 4.5), 2.7 * rows + 0.4))
    costs = [[s.cost for points in lines.values() for _, s in points if s.cost < math.inf] for lines in sweeps.values()]
    bottom, top = _frame(costs)
    for (optim, lines), axes in zip(sweeps.items(), panels, strict=False):
        axes.set(title=optim, xscale="log", ylim=(bottom, top))
        axes.title.set_fontsize(10)
        axes.axhline(min(map(min, filter(None, costs)), default=0.0), color="0.5", linewidth=0.8, linestyle=":")
        for index, (label, points) in enumerate(lines.items()):
            look = {"linestyle": DASHES[index % len(DASHES)], "marker": MARKERS[index % len(MARKERS)]}
            _draw_sweep(axes, points, top, {**styles[optim], **look, "label": label or None})
        rates = sorted({rate for points in lines.values() for rate, _ in points})
        axes.set_xticks(rates, [f"{rate:g}" for rate in rates], fontsize=8, rotation=45)
        axes.minorticks_off()
        if any(lines):
            axes.legend(fontsize=7).set_in_layout(False)
    for axes in panels[len(sweeps) :]:
        axes.set_visible(False)
    figure.supxlabel("learning rate", fontsize=10)
    figure.supylabel(axis_title, fontsize=10)
    figure.savefig(path, dpi=120)


def _draw_sweep(axes: Any, points: Sequence[tuple[float, Setting]], top: float, style: Style) -> None:
    good = [(rate, setting) for rate, setting in points if setting.cost <= top]
    mean = [setting.cost for _, setting in good]
    seeds = [[row.cost for row in setting.rows] for _, setting in good]
    # The mean of equal numbers may miss them by a rounding error; a bar must not be negative.
    down = [max(value - min(values), 0.0) for value, values in zip(mean, seeds, strict=True)]
    up = [max(max(values) - value, 0.0) for value, values in zip(mean, seeds, strict=True)]
    axes.errorbar([rate for rate, _ in good], mean, yerr=[down, up], capsize=2, **style)
    lost = [rate for rate, setting in points if not setting.cost <= top]
    for line in axes.plot(lost, [top] * len(lost), "x", color=style["color"], clip_on=False, markersize=7):
        line.set_in_layout(False)


def _frame(costs: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Limits that show three quarters of all settings and the best of every optimizer.

    One hopeless setting must not flatten the valleys.
    """
    every = sorted(cost for group in costs for cost in group)
    if not every:
        return 0.0, 1.0
    top = max(every[math.ceil(0.75 * len(every)) - 1], *(min(group) for group in costs if group))
    room = 0.15 * max(top - every[0], 0.02 * abs(every[0])) or 0.5
    return every[0] - room, top + room
