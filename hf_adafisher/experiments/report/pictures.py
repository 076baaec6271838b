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
    MARKERS,
    Style,
    line_style,
    new_figure,
    require_matplotlib,
    save_figure,
)
from hf_adafisher.experiments.report.results import COST, CellResult, SettingResults

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
) -> dict[Path, str]:
    """Draw curves against steps and against seconds (the paper's Figure 5), and sweeps of the learning rate.

    The curves are the training loss and the cost (a validation loss or error), of each optimizer at its best setting.
    Beside each PNG stand an SVG and a JSON file with the numbers. Of the names in ``wanted`` alone; None: all.

    Returns:
        The PNG files and their captions; empty, with a warning, if matplotlib is not installed.
    """
    try:
        require_matplotlib()
    except ImportError:
        logger.warning("matplotlib is not installed, so the report has no pictures: pip install matplotlib")
        return {}
    styles = optimizer_styles(settings)
    cost_label = settings[0].task.cost_label if settings else ""
    panels = {TRAINING_AXIS: _curves(best, _training_loss), cost_label: _curves(best, Task.logged_cost)}
    panels = {title: curves for title, curves in panels.items() if curves}
    pictures = {}
    for name, x, label in (
        ("curves", "steps", "optimizer steps"),
        ("curves_by_seconds", "seconds", "training seconds"),
    ):
        if panels and (wanted is None or f"{name}.png" in wanted):
            path = folder / f"{name}.png"
            _draw_curves(path, panels, styles, x, label)
            pictures[path] = _caption(panels, label)
    sweeps = _sweeps(settings)
    swept = any(len(line) > 1 for lines in sweeps.values() for line in lines.values())
    if swept and (wanted is None or "learning_rates.png" in wanted):
        path = folder / "learning_rates.png"
        _draw_sweeps(path, sweeps, styles, cost_label)
        pictures[path] = (
            f"{cost_label.split(' (')[0].capitalize()} at the end against the learning rate; bars span the seeds, a "
            "cross at the top is a setting of which a run diverged, failed, or lies above the frame. The dotted line "
            "is the best of all optimizers. A wide valley forgives a wrong learning rate."
        )
    return pictures


def optimizer_styles(settings: Sequence[SettingResults]) -> dict[str, Style]:
    """Return the style of each optimizer, by its name, the same in all pictures of a comparison."""
    optimizers = dict.fromkeys(setting.optim for setting in settings)
    return {optim: line_style(index) for index, optim in enumerate(optimizers)}


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


def _draw_curves(path: Path, panels: Mapping[str, Curves], styles: Mapping[str, Style], x: str, label: str) -> None:
    """Draw a panel for each of ``panels`` (curves by optimizer, by the label of their axis), side by side."""
    figure, all_axes = new_figure(1, len(panels), (5.6 * len(panels) + 0.4, 5.2), sharey=False)
    for axes, (title, curves) in zip(all_axes, panels.items(), strict=True):
        for optim, curve in curves.items():
            every = max(math.ceil(len(curve[x]) / 10), 1)  # so many marks that the line between them can be seen
            axes.plot(curve[x], curve["mean"], markevery=every, **styles[optim], label=optim)
            if curve["low"] != curve["high"]:
                colour = styles[optim]["color"]
                axes.fill_between(curve[x], curve["low"], curve["high"], color=colour, alpha=0.15, linewidth=0)
        ends = [value for curve in curves.values() for value in (curve["mean"][0], min(curve["mean"]))]
        bottom, top = min(ends), max(ends)
        room = 0.05 * (top - bottom) or 0.5
        axes.set(xlabel=label, ylabel=title, xlim=(0, None), ylim=(bottom - room, top + room))
    shown = {optim: line for axes in all_axes for line, optim in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(shown.values(), shown, loc="outside lower center", ncols=min(len(shown), 6), fontsize=9)
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


def _draw_sweeps(path: Path, sweeps: Mapping[str, Sweep], styles: Mapping[str, Style], cost_label: str) -> None:
    columns = min(len(sweeps), 4)
    rows = math.ceil(len(sweeps) / columns)
    figure, panels = new_figure(rows, columns, (max(2.9 * columns, 4.5), 2.7 * rows + 0.4))
    costs = pd.concat({optim: pd.concat(lines.values())["mean"] for optim, lines in sweeps.items()})
    costs = costs[np.isfinite(costs)]
    bottom, top = _frame(costs)
    for (optim, lines), axes in zip(sweeps.items(), panels, strict=False):
        axes.set(title=optim, xscale="log", ylim=(bottom, top))
        axes.title.set_fontsize(10)
        axes.axhline(costs.min() if len(costs) else 0.0, color="0.5", linewidth=0.8, linestyle=":")
        for index, (label, line) in enumerate(lines.items()):
            look = {"linestyle": DASHES[index % len(DASHES)], "marker": MARKERS[index % len(MARKERS)]}
            draw_with_range(axes, RATE_TITLE, line, {**styles[optim], **look, "label": label or None}, top)
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
