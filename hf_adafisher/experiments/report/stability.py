"""Stability: the influence of batch size and learning rate on each optimizer, and its picture, the paper's Figure 6.

Every optimizer is tuned at one batch size, the same for all. From there nothing but the batch size changes (A), or
nothing but the learning rate (B).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from hf_adafisher.experiments.comparison.tasks import Metric, Task, format_number
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
from hf_adafisher.experiments.outputs import json_ready
from hf_adafisher.experiments.report.pictures import RATE_TITLE, draw_with_range
from hf_adafisher.experiments.report.results import EPOCH_SECONDS, SettingResults, best_settings
from hf_adafisher.experiments.report.tables import Picture, Table

BATCH_SIZE = "per_device_train_batch_size"
LEARNING_RATE = "learning_rate"
SIZE_TITLE = "batch size per device"
# Metrics shown, by the selection metric: the test split's, as in the paper, if every run has it.
_SHOWN = {
    "validation accuracy %": ("test accuracy %", "validation accuracy %"),
    "validation loss": ("test token perplexity", "token perplexity"),
}


@dataclass(frozen=True)
class Family:
    """One optimizer in a sweep over batch sizes.

    Attributes:
        tuned: Its best setting at the common batch size, of those that were run at the most batch sizes.
        sizes: The tuned setting at every batch size it was run with, by batch size.
        retuned: The best setting at each batch size, by batch size; sizes with diverged or failed runs only are left
            out.
        rates: The tuned setting at every learning rate it was run with; empty if that was never given.
    """

    tuned: SettingResults
    sizes: Mapping[float, SettingResults]
    retuned: Mapping[float, SettingResults]
    rates: Mapping[float, SettingResults]


@dataclass(frozen=True)
class Stability:
    """Results of a sweep over batch sizes.

    Attributes:
        task: Of the comparison.
        metric: The number shown: test accuracy or perplexity, validation's where runs have no other.
        batch_size: The common one, where every optimizer is tuned: the one with the most optimizers, of several the
            middle one.
        families: By optimizer.
        missing: Optimizers without a completed setting at that batch size.
    """

    task: Task
    metric: Metric
    batch_size: int
    families: Mapping[str, Family]
    missing: Sequence[str]

    def line(self, key: str, settings: Mapping[float, SettingResults]) -> pd.DataFrame:
        """Tabulate settings by ``key``: mean and range over the seeds, nan where a seed diverged or failed."""
        rows = []
        for value, setting in settings.items():
            found = setting.values[self.metric.name] if math.isfinite(setting.cost) else pd.Series(dtype=float)
            seconds = setting.values[EPOCH_SECONDS].mean(skipna=False)
            rows.append((value, found.mean(), found.min(), found.max(), seconds, setting.name))
        return pd.DataFrame(rows, columns=[key, "mean", "low", "high", EPOCH_SECONDS, "setting"])

    def lines(self) -> dict[str, dict[str, pd.DataFrame]]:
        """Return the lines of the panels by optimizer."""
        families = self.families.items()
        return {
            "A": {optim: self.line(SIZE_TITLE, family.sizes) for optim, family in families},
            "A, tuned again": {optim: self.line(SIZE_TITLE, family.retuned) for optim, family in families},
            "B": {optim: self.line(RATE_TITLE, family.rates) for optim, family in families},
        }

    def numbers(self) -> dict[str, Any]:
        """Return everything drawn, ready for JSON."""
        lines = {
            panel: {optim: line.to_dict("list") for optim, line in lines.items()}
            for panel, lines in self.lines().items()
        }
        return json_ready({"measure": self.metric.name, "common batch size": self.batch_size, **lines})

    def table(self) -> Table:
        """Tabulate each optimizer at each batch size."""
        name, rows = self.metric.name, []
        for optim, family in self.families.items():
            retuned = self.line(SIZE_TITLE, family.retuned).set_index(SIZE_TITLE)["mean"]
            for _, point in self.line(SIZE_TITLE, family.sizes).iterrows():
                size = point[SIZE_TITLE]
                rate = str(family.retuned[size].others.get(LEARNING_RATE, "-")) if size in family.retuned else "-"
                metrics = [self.metric.format(point["mean"]), rate, self.metric.format(retuned.get(size))]
                rows.append([optim, f"{size:g}", *metrics, format_number(point[EPOCH_SECONDS], 2)])
        columns = ["optimizer", SIZE_TITLE, name, "learning rate tuned at this size", f"{name} with it", EPOCH_SECONDS]
        return Table(columns, rows)


def read_stability(settings: Sequence[SettingResults]) -> Stability | None:
    """Evaluate a sweep over ``per_device_train_batch_size``; None if the settings are no such sweep."""
    swept = [setting for setting in settings if BATCH_SIZE in setting.others]
    completed = [(_size(setting), setting.optim) for setting in swept if math.isfinite(setting.cost)]
    optimizers = pd.DataFrame(completed, columns=["size", "optim"]).groupby("size")["optim"].nunique()
    if len(optimizers) < 2:
        return None
    common = optimizers.index[optimizers == optimizers.max()]
    size = int(common[(len(common) - 1) // 2])
    tuned = {best.optim: best for best in best_settings(_candidates(swept, size))}
    names = list(dict.fromkeys(setting.optim for setting in swept))
    families = {optim: _family(tuned[optim], swept) for optim in names if optim in tuned}
    return Stability(swept[0].task, _metric(swept), size, families, [optim for optim in names if optim not in tuned])


def _candidates(settings: Sequence[SettingResults], size: int) -> list[SettingResults]:
    """Of each optimizer those at this batch size that were run with the most others too, or A would have no line."""
    good = [setting for setting in settings if _size(setting) == size and math.isfinite(setting.cost)]
    rows = [(setting, setting.optim, len(_varied(settings, setting, BATCH_SIZE))) for setting in good]
    table = pd.DataFrame(rows, columns=["setting", "optim", "sizes"])
    return list(table["setting"][table["sizes"] == table.groupby("optim")["sizes"].transform("max")])


def _family(tuned: SettingResults, settings: Sequence[SettingResults]) -> Family:
    own = [setting for setting in settings if setting.optim == tuned.optim]
    groups = {size: [s for s in own if _size(s) == size] for size in sorted({_size(setting) for setting in own})}
    retuned = {float(size): best[0] for size, group in groups.items() if (best := best_settings(group))}
    return Family(tuned, _varied(own, tuned, BATCH_SIZE), retuned, _varied(own, tuned, LEARNING_RATE))


def _varied(settings: Sequence[SettingResults], tuned: SettingResults, key: str) -> dict[float, SettingResults]:
    """Settings that differ from the tuned one in this argument at most, by its value."""

    def rest(setting: SettingResults) -> dict[str, str]:
        others = {name: str(value) for name, value in setting.others.items() if name != key}
        return {"optim": setting.optim, **others}

    same = {float(s.others[key]): s for s in settings if key in s.others and rest(s) == rest(tuned)}
    return dict(sorted(same.items()))


def _size(setting: SettingResults) -> int:
    return int(setting.others[BATCH_SIZE])


def _metric(settings: Sequence[SettingResults]) -> Metric:
    task = settings[0].task
    results = [result for setting in settings if math.isfinite(setting.cost) for result in setting.cells]
    names = [name for name in _SHOWN[task.selection_metric] if all(r.values.get(name) is not None for r in results)]
    return task.metric(names[0] if names else task.selection_metric)


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
