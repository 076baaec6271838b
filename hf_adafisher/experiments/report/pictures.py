"""The pictures of a comparison."""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_adafisher.experiments.comparison.tasks import Task
from hf_adafisher.experiments.drawing import DASHES, MARKERS, Style, line_style, new_figure, save_figure
from hf_adafisher.experiments.report.results import Row, Setting

logger = logging.getLogger(__name__)

TRAINING_AXIS = "training loss (nats)"
Point = tuple[int, float, float]
Curves = dict[str, list[list[Point]]]
Sweep = dict[str, list[tuple[float, Setting]]]
_Read = Callable[[Task, Mapping[str, Any]], float | None]


def draw_pictures(folder: Path, settings: Sequence[Setting], best: Sequence[Setting]) -> dict[Path, str]:
    """Draws what there is to draw: curves against steps and against seconds (the paper's Figure 5), learning rates.

    The curves are the training loss and what decides (a validation loss or error), of each optimizer at its best
    setting. Beside each PNG stand an SVG and a JSON file with the numbers.

    Returns:
        The PNG files and their captions; empty, with a warning, if matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        logger.warning("matplotlib is not installed, so the report has no pictures: pip install matplotlib")
        return {}
    styles = optimizer_styles(settings)
    axis_title = settings[0].task.axis if settings else ""
    what = axis_title.split(" (")[0].capitalize()
    panels = {TRAINING_AXIS: _all_curves(best, _training_loss), axis_title: _all_curves(best, Task.logged_cost)}
    panels = {title: curves for title, curves in panels.items() if curves}
    pictures = {}
    for name, axis, label in (("curves", 0, "optimizer steps"), ("curves_by_seconds", 1, "training seconds")):
        if panels:
            path = folder / f"{name}.png"
            _draw_curves(path, panels, styles, axis, label, {setting.optim: setting.name for setting in best})
            pictures[path] = _caption(panels, label)
    sweeps = {optim: lines for optim in styles if (lines := _sweep([s for s in settings if s.optim == optim]))}
    if any(len(points) > 1 for lines in sweeps.values() for points in lines.values()):
        path = folder / "learning_rates.png"
        _draw_sweeps(path, sweeps, styles, axis_title)
        pictures[path] = (
            f"{what} at the end against the learning rate; bars span the seeds, a cross at the top is a "
            "setting of which a run diverged, failed, or lies above the frame. The dotted line is the best of all "
            "optimizers. A wide valley forgives a wrong learning rate."
        )
    return pictures


def optimizer_styles(settings: Sequence[Setting]) -> dict[str, Style]:
    """The look of each optimizer, by its name, the same in all pictures of a comparison."""
    optimizers = dict.fromkeys(setting.optim for setting in settings)
    return {optim: line_style(index) for index, optim in enumerate(optimizers)}


def _caption(panels: Mapping[str, Curves], label: str) -> str:
    names = [title.split(" (")[0] for title in panels]
    bands = any(len(runs) > 1 for curves in panels.values() for runs in curves.values())
    parts = [
        f"{' and '.join(reversed(names)).capitalize()} against {label}, each optimizer at its best setting"
        + ("; lines are means over the seeds, the band spans them." if bands else ".")
    ]
    if TRAINING_AXIS in panels:
        parts.append("A point of the training loss is the mean over the steps since the point before, not smoothed.")
        unlogged = sorted(set().union(*panels.values()) - set(panels[TRAINING_AXIS]))
        parts += [f"Runs too short to log one: {', '.join(unlogged)}."] if unlogged else []
    if set(panels) - {TRAINING_AXIS}:
        parts.append("Evaluations during training may use part of the validation split; the tables use what they say.")
    return " ".join(parts)


def _training_loss(task: Task, entry: Mapping[str, Any]) -> float | None:
    """The loss in an entry of Trainer's log, or None if it is an evaluation or the summary at the end."""
    value = entry.get("loss")
    return None if value is None else float(value)


def _all_curves(best: Sequence[Setting], read: _Read) -> Curves:
    return {setting.optim: runs for setting in best if (runs := _curves(setting, read))}


def _curves(setting: Setting, read: _Read = Task.logged_cost) -> list[list[Point]]:
    """Per seed with any: (step, training seconds, loss or error) at the steps that all these seeds have."""
    runs = [points for row in setting.rows if (points := _points(row, read))]
    steps = sorted(set.intersection(*map(set, runs))) if runs else []
    return [[points[step] for step in steps] for points in runs] if steps else []


def _points(row: Row, read: _Read) -> dict[int, Point]:
    return {
        entry["step"]: (entry["step"], entry.get("train_seconds", math.nan), value)
        for entry in row.history
        if (value := read(row.task, entry)) is not None
    }


def _draw_curves(
    path: Path,
    panels: Mapping[str, Curves],
    styles: Mapping[str, Style],
    axis: int,
    label: str,
    settings: Mapping[str, str],
) -> None:
    """A panel for each of ``panels`` (curves by optimizer, by the title of their axis), side by side."""
    figure, all_axes = new_figure(1, len(panels), (5.6 * len(panels) + 0.4, 5.2), sharey=False)
    numbers: dict[str, Any] = {}
    for axes, (title, curves) in zip(all_axes, panels.items(), strict=True):
        lines = {optim: _mean_curve(runs) for optim, runs in curves.items()}
        for optim, line in lines.items():
            _draw_line(axes, line[("steps", "seconds")[axis]], line, {**styles[optim], "label": optim})
        ends = [value for line in lines.values() for value in (line["mean"][0], min(line["mean"]))]
        bottom, top = min(ends), max(ends)
        room = 0.05 * (top - bottom) or 0.5
        axes.set(xlabel=label, ylabel=title, xlim=(0, None), ylim=(bottom - room, top + room))
        numbers[title] = {
            optim: {"setting": settings[optim], "seeds": len(curves[optim]), **line} for optim, line in lines.items()
        }
    shown = {optim: line for axes in all_axes for line, optim in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(shown.values(), shown, loc="outside lower center", ncols=min(len(shown), 6), fontsize=9)
    save_figure(figure, path, {"picture": f"against {label}; low and high span the seeds", "panels": numbers})


def _mean_curve(runs: Sequence[Sequence[Point]]) -> dict[str, list[float]]:
    columns = list(zip(*runs, strict=True))
    values = [[point[2] for point in column] for column in columns]
    return {
        "steps": [column[0][0] for column in columns],
        "seconds": [statistics.fmean(point[1] for point in column) for column in columns],
        "mean": [statistics.fmean(column) for column in values],
        "low": [min(column) for column in values],
        "high": [max(column) for column in values],
    }


def _draw_line(axes: Any, x: Sequence[float], line: Mapping[str, Sequence[float]], style: Style) -> None:
    every = max(math.ceil(len(x) / 10), 1)  # so many marks that the line between them can be seen
    axes.plot(x, line["mean"], markevery=every, **style)
    if line["low"] != line["high"]:
        axes.fill_between(x, line["low"], line["high"], color=style["color"], alpha=0.15, linewidth=0)


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
    numbers = {
        optim: {label or "all": _sweep_numbers(line) for label, line in s.items()} for optim, s in sweeps.items()
    }
    save_figure(figure, path, {"picture": f"{axis_title}; low and high span the seeds", "optimizers": numbers})


def _sweep_numbers(points: Sequence[tuple[float, Setting]]) -> dict[str, list[float]]:
    """What a line of ``learning_rates.png`` shows: cost (infinite if a run did not end well) by learning rate."""
    costs = [[row.cost for row in setting.rows] for _, setting in points]
    return {
        "learning rate": [rate for rate, _ in points],
        "mean": [setting.cost for _, setting in points],
        "low": [min(values) for values in costs],
        "high": [max(values) for values in costs],
    }


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
