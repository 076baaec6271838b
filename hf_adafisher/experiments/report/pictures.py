"""Pictures of a comparison: curves of the best settings, and cost against the learning rate."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Container, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from hf_adafisher.experiments.comparison.tasks import Task
from hf_adafisher.experiments.drawing import (
    DASHES,
    GREY_LINE,
    MARKERS,
    MOST_LINES,
    Style,
    coloured_lines,
    label_line_ends,
    name_the_grey,
    new_figure,
    optimizer_styles,
    plain_text,
    require_matplotlib,
    save_figure,
)
from hf_adafisher.experiments.report.differences import draw_differences, paired_differences
from hf_adafisher.experiments.report.results import COST, CellResult, SettingResults
from hf_adafisher.experiments.report.tables import Picture

logger = logging.getLogger(__name__)

TRAINING_AXIS = "training loss (nats)"
RATE_TITLE = "learning rate"
Curve = dict[str, Any]
Curves = dict[str, Curve]
Sweep = dict[str, pd.DataFrame]
"""Lines of one optimizer, by the arguments beside the learning rate."""
_Read = Callable[[Task, Mapping[str, Any]], float | None]


def draw_pictures(
    folder: Path,
    settings: Sequence[SettingResults],
    best: Sequence[SettingResults],
    wanted: Container[str] | None = None,
) -> dict[Path, Picture]:
    """Draw differences from AdamW, curves against steps and seconds (the paper's Figure 5), and learning rates.

    The curves are the training loss and the cost (a validation loss or error), of each optimizer at its best setting.
    Beside each SVG stands a JSON file with the numbers. Of the names in ``wanted`` alone; None: all.

    Returns:
        The SVG files and their texts; empty, with a warning, if matplotlib is not installed.
    """
    try:
        require_matplotlib()
    except ImportError:
        logger.warning("matplotlib is not installed, so the report has no pictures: pip install matplotlib")
        return {}

    def is_wanted(name: str) -> bool:
        return wanted is None or name in wanted

    cost_label = settings[0].task.cost_label if settings else ""
    pictures = {}
    differences = paired_differences(best)
    if differences is not None and is_wanted("differences.svg"):
        path = folder / "differences.svg"
        pictures[path] = draw_differences(path, differences)
    panels = {TRAINING_AXIS: _curves(best, _training_loss), cost_label: _curves(best, Task.logged_cost)}
    panels = {title: curves for title, curves in panels.items() if curves}
    for name, x, label in (
        ("curves.svg", "steps", "optimizer steps"),
        ("curves_by_seconds.svg", "seconds", "training seconds"),
    ):
        if panels and is_wanted(name):
            _draw_curves(folder / name, panels, [setting.optim for setting in best], x, label)
            pictures[folder / name] = Picture(_caption(panels, label), _curves_in_words(panels, label))
    sweeps = _sweeps(settings)
    swept = any(len(line) > 1 for lines in sweeps.values() for line in lines.values())
    if swept and is_wanted("learning_rates.svg"):
        path = folder / "learning_rates.svg"
        _draw_sweeps(path, sweeps, cost_label)
        caption = (
            f"{cost_label.split(' (')[0].capitalize()} at the end against the learning rate; bars span the seeds, a "
            "cross at the top is a setting of which a run diverged, failed, or lies above the frame. The dotted line "
            "is the best of all optimizers. A wide valley forgives a wrong learning rate."
        )
        pictures[path] = Picture(caption, _sweeps_in_words(sweeps, cost_label))
    return pictures


def draw_with_range(axes: Any, x: str, line: pd.DataFrame, style: Style, edge: float) -> None:
    """Draw means, and bars from "low" to "high".

    Args:
        axes: With its final limits.
        x: Column of ``line``.
        line: One point a row; a mean that is missing, or outside the limits, is a cross.
        style: Of the line.
        edge: Ordinate of the crosses.
    """
    inside = line["mean"].between(*axes.get_ylim())
    abscissae, mean, low, high = line.loc[inside, [x, "mean", "low", "high"]].to_numpy().T
    # The mean of equal numbers may miss them by a rounding error; a bar must not be negative.
    axes.errorbar(abscissae, mean, yerr=np.maximum([mean - low, high - mean], 0.0), capsize=2, **style)
    lost = line.loc[~inside, x].to_numpy()
    for crosses in axes.plot(lost, [edge] * len(lost), "x", color=style["color"], clip_on=False, markersize=7):
        crosses.set_in_layout(False)


def _caption(panels: Mapping[str, Curves], label: str) -> str:
    names = [title.split(" (")[0] for title in panels]
    bands = any(curve["seeds"] > 1 for curves in panels.values() for curve in curves.values())
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


def _curves(best: Sequence[SettingResults], read: _Read) -> Curves:
    return {setting.optim: curve for setting in best if (curve := _curve(setting, read))}


def _curve(setting: SettingResults, read: _Read) -> Curve:
    """Mean and range over the seeds with any point, at the steps that all of them have; empty without a step."""
    runs = [points for result in setting.cells if len(points := _logged(result, read))]
    if not runs:
        return {}
    steps = pd.concat(runs).groupby("steps")
    value = steps["value"]
    curve = pd.DataFrame(
        {"seconds": steps["seconds"].mean(), "mean": value.mean(), "low": value.min(), "high": value.max()}
    )
    curve = curve[value.size() == len(runs)].reset_index()
    return {"setting": setting.name, "seeds": len(runs), **curve.to_dict("list")} if len(curve) else {}


def _logged(result: CellResult, read: _Read) -> pd.DataFrame:
    points = [
        (entry["step"], entry.get("train_seconds", math.nan), value)
        for entry in result.history
        if (value := read(result.task, entry)) is not None
    ]
    return pd.DataFrame(points, columns=["steps", "seconds", "value"]).drop_duplicates("steps", keep="last")


def _curves_in_words(panels: Mapping[str, Curves], label: str) -> str:
    """Say from where to where the last panel's curves go, the lowest end first."""
    title, curves = list(panels.items())[-1]
    ends = sorted((curve["mean"][-1], curve["mean"][0], optim) for optim, curve in curves.items())
    shown = [f"{optim} {last:.4g} (from {first:.4g})" for last, first, optim in ends[:MOST_LINES]]
    worst = f"; the highest end is that of {ends[-1][2]}, {ends[-1][0]:.4g}" if len(ends) > MOST_LINES else ""
    return f"Line chart of {title} against {label}. Ends, lowest first: {', '.join(shown)}{worst}."


def _draw_curves(path: Path, panels: Mapping[str, Curves], ranked: Sequence[str], x: str, label: str) -> None:
    """Draw a panel for each of ``panels`` (curves by optimizer, by the label of their axis), side by side."""
    figure, all_axes = new_figure(1, len(panels), (5.6 * len(panels) + 0.4, 4.6), sharey=False)
    coloured, styles = coloured_lines(ranked), optimizer_styles(ranked)
    for axes, (title, curves) in zip(all_axes, panels.items(), strict=True):
        for optim, curve in curves.items():
            every = max(math.ceil(len(curve[x]) / 10), 1)  # so many marks that the line between them can be seen
            style = {**styles[optim], "markevery": every} if optim in coloured else GREY_LINE
            axes.plot(curve[x], curve["mean"], **style, label=plain_text(optim))
            if optim in coloured and curve["low"] != curve["high"]:
                axes.fill_between(curve[x], curve["low"], curve["high"], color=style["color"], alpha=0.15, linewidth=0)
        framed = [curve for optim, curve in curves.items() if optim in coloured] or list(curves.values())
        ends = [value for curve in framed for value in (curve["mean"][0], min(curve["mean"]))]
        bottom, top = min(ends), max(ends)
        room = 0.05 * (top - bottom) or 0.5
        axes.set(xlabel=label, ylabel=title, xlim=(0, None), ylim=(bottom - room, top + room))
    name_the_grey(figure, [optim for optim in ranked if optim not in coloured])
    for axes, curves in zip(all_axes, panels.values(), strict=True):
        named = [optim for optim in coloured if optim in curves]
        ends = [(curves[optim][x][-1], curves[optim]["mean"][-1], optim, styles[optim]["color"]) for optim in named]
        label_line_ends(axes, ends)
    save_figure(figure, path, {"picture": f"against {label}; low and high span the seeds", "panels": panels})


def _sweeps(settings: Sequence[SettingResults]) -> dict[str, Sweep]:
    """Cost by learning rate (infinite if a run diverged or failed), a line for each of the other arguments."""
    lines: dict[str, dict[str, list[dict[str, float]]]] = {}
    for setting in settings:
        others = setting.others
        rate = others.pop("learning_rate", None)
        if rate is not None:
            label = ", ".join(f"{key}={value}" for key, value in others.items())
            costs = setting.values[COST]
            point = {RATE_TITLE: float(rate), "mean": setting.cost, "low": costs.min(), "high": costs.max()}
            lines.setdefault(setting.optim, {}).setdefault(label, []).append(point)
    return {
        optim: {label: pd.DataFrame(points).sort_values(RATE_TITLE) for label, points in by_label.items()}
        for optim, by_label in lines.items()
    }


def _sweeps_in_words(sweeps: Mapping[str, Sweep], cost_label: str) -> str:
    """Say each optimizer's lowest cost, at which rate, and the highest of the rates that ended well."""
    found = []
    for optim, lines in sweeps.items():
        points = pd.concat(lines.values())
        points = points[np.isfinite(points["mean"])].sort_values("mean")
        if len(points):
            lowest = points.iloc[0]
            found.append((lowest["mean"], f"{optim} {lowest['mean']:.4g} at {lowest[RATE_TITLE]:g}"
                          f" (highest {points['mean'].iloc[-1]:.4g})"))  # fmt: skip
    shown = [text for _, text in sorted(found)[:MOST_LINES]]
    return f"A panel for each optimizer: {cost_label} against the learning rate. Lowest of each: {', '.join(shown)}."


def _draw_sweeps(path: Path, sweeps: Mapping[str, Sweep], cost_label: str) -> None:
    columns = min(len(sweeps), 4)
    rows = math.ceil(len(sweeps) / columns)
    figure, panels = new_figure(rows, columns, (max(2.9 * columns, 4.5), 2.7 * rows + 0.4))
    styles = optimizer_styles(sweeps)
    costs = pd.concat({optim: pd.concat(lines.values())["mean"] for optim, lines in sweeps.items()})
    costs = costs[np.isfinite(costs)]
    bottom, top = _frame(costs)
    for (optim, lines), axes in zip(sweeps.items(), panels, strict=False):
        axes.set(title=plain_text(optim), xscale="log", ylim=(bottom, top))
        axes.title.set_fontsize(10)
        axes.axhline(costs.min() if len(costs) else 0.0, color="0.5", linewidth=0.8, linestyle=":")
        ranked = sorted(lines, key=lambda label: float(lines[label]["mean"].min()))
        for label in ranked[MOST_LINES:]:
            axes.plot(lines[label][RATE_TITLE], lines[label]["mean"], **GREY_LINE)
        for index, label in enumerate(ranked[:MOST_LINES]):
            look = {"linestyle": DASHES[index % len(DASHES)], "marker": MARKERS[index % len(MARKERS)]}
            named = {"label": plain_text(label) or None}
            draw_with_range(axes, RATE_TITLE, lines[label], {**styles[optim], **look, **named}, top)
        rates = sorted({rate for line in lines.values() for rate in line[RATE_TITLE]})
        axes.set_xticks(rates, [f"{rate:g}" for rate in rates], fontsize=8, rotation=45)
        axes.minorticks_off()
        if any(lines):
            axes.legend(fontsize=7).set_in_layout(False)
    for axes in panels[len(sweeps) :]:
        axes.set_visible(False)
    figure.supxlabel(RATE_TITLE, fontsize=10)
    figure.supylabel(cost_label, fontsize=10)
    numbers = {
        optim: {label or "all": line.to_dict("list") for label, line in lines.items()}
        for optim, lines in sweeps.items()
    }
    save_figure(figure, path, {"picture": f"{cost_label}; low and high span the seeds", "optimizers": numbers})


def _frame(costs: pd.Series) -> tuple[float, float]:
    """Limits that show three quarters of all settings and the best of every optimizer (the index).

    One hopeless setting must not flatten the valleys.
    """
    if costs.empty:
        return 0.0, 1.0
    best = costs.min()
    top = max(np.quantile(costs, 0.75, method="inverted_cdf"), costs.groupby(level=0).min().max())
    room = 0.15 * max(top - best, 0.02 * abs(best)) or 0.5
    return best - room, top + room
