"""Stability: the influence of batch size and learning rate on each optimizer, the paper's Figure 6, from a sweep.

Every optimizer is tuned at one batch size, the same for all. From there nothing but the batch size changes (A), or
nothing but the learning rate (B).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from hf_adafisher.experiments.comparison.tasks import Metric, Task, format_number
from hf_adafisher.experiments.outputs import json_ready
from hf_adafisher.experiments.report.pictures import RATE_TITLE
from hf_adafisher.experiments.report.results import EPOCH_SECONDS, SettingResults, best_settings
from hf_adafisher.experiments.report.tables import Table

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
