"""How much batch size and learning rate matter to each optimizer, in numbers: the paper's Figure 6, from a sweep.

Every optimizer is tuned at one batch size, the same for all. From there nothing but the batch size changes (A, C), or
nothing but the learning rate (B).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hf_adafisher.experiments.comparison.tasks import Measure, Task
from hf_adafisher.experiments.report.results import EPOCH_SECONDS, Setting, best_settings
from hf_adafisher.experiments.report.tables import Table

BATCH_SIZE = "per_device_train_batch_size"
LEARNING_RATE = "learning_rate"
SIZE_TITLE = "batch size per device"
# What is shown, by what decides: the test split's, as in the paper, if every run has it. Settings are chosen by the
# validation split's.
_SHOWN = {
    "validation accuracy %": ("test accuracy %", "validation accuracy %"),
    "validation loss": ("test token perplexity", "token perplexity"),
}


@dataclass(frozen=True)
class Family:
    """One optimizer in a sweep over batch sizes.

    Attributes:
        tuned: Its best setting at the common batch size, of those that were run at the most batch sizes.
        sizes: The same at every batch size it was run with, by batch size.
        retuned: The best setting at each batch size, by batch size; without sizes at which nothing ended well.
        rates: The tuned setting at every learning rate it was run with; empty if that was never given.
    """

    tuned: Setting
    sizes: Mapping[float, Setting]
    retuned: Mapping[float, Setting]
    rates: Mapping[float, Setting]

    def epoch_seconds(self) -> list[float]:
        """Seconds per epoch of the runs at the common batch size: all learning rates and seeds that ended well."""
        settings = list(self.rates.values()) or [self.tuned]
        return [value for setting in settings if math.isfinite(setting.cost) for value in setting.values(EPOCH_SECONDS)]


@dataclass(frozen=True)
class Stability:
    """What a sweep over batch sizes came to.

    Attributes:
        task: What was measured.
        measure: The number that is shown: test accuracy or perplexity, validation's where runs have no other.
        batch_size: The common one, where every optimizer is tuned: the one with the most optimizers, of several the
            middle one.
        families: By optimizer.
        missing: Optimizers of which nothing ended well at that batch size.
    """

    task: Task
    measure: Measure
    batch_size: int
    families: Mapping[str, Family]
    missing: Sequence[str]

    @property
    def more_is_better(self) -> bool:
        """Whether the number is one like an accuracy."""
        return self.task.cost(1.0) < self.task.cost(0.0)

    def line(self, key: str, settings: Mapping[float, Setting]) -> dict[str, list[Any]]:
        """What A, B and C show of one optimizer: the number by ``key``, None where a seed diverged or failed."""
        values = [s.values(self.measure.name) if math.isfinite(s.cost) else [] for s in settings.values()]
        return {
            key: list(settings),
            "mean": [statistics.fmean(found) if found else None for found in values],
            "low": [min(found, default=None) for found in values],
            "high": [max(found, default=None) for found in values],
            EPOCH_SECONDS: [setting.mean(EPOCH_SECONDS) for setting in settings.values()],
            "setting": [setting.name for setting in settings.values()],
        }

    def numbers(self) -> dict[str, Any]:
        """Everything that is drawn."""
        families = self.families.items()
        return {
            "measure": self.measure.name,
            "common batch size": self.batch_size,
            "A and C": {optim: self.line(SIZE_TITLE, family.sizes) for optim, family in families},
            "A, tuned again": {optim: self.line(SIZE_TITLE, family.retuned) for optim, family in families},
            "B": {optim: self.line("learning rate", family.rates) for optim, family in families},
            "D": {optim: _spread(family.epoch_seconds()) for optim, family in families},
        }

    def table(self) -> Table:
        """One row an optimizer and batch size."""
        name, rows = self.measure.name, []
        columns = ["optimizer", SIZE_TITLE, name, "learning rate tuned at this size", f"{name} with it", EPOCH_SECONDS]
        for optim, family in self.families.items():
            line, again = self.line(SIZE_TITLE, family.sizes), self.line(SIZE_TITLE, family.retuned)
            retuned = dict(zip(family.retuned, again["mean"], strict=True))
            for size, mean, seconds in zip(family.sizes, line["mean"], line[EPOCH_SECONDS], strict=True):
                best = family.retuned.get(size)
                rate = "-" if best is None else str(best.others.get(LEARNING_RATE, "-"))
                shown = [self.measure.shown(mean), rate, self.measure.shown(retuned.get(size))]
                rows.append([optim, f"{size:g}", *shown, "-" if seconds is None else f"{seconds:.2f}"])
        return Table(columns, rows)


def read_stability(settings: Sequence[Setting]) -> Stability | None:
    """The numbers of a sweep over ``per_device_train_batch_size``; None if the settings are no such sweep."""
    swept = [setting for setting in settings if BATCH_SIZE in setting.others]
    found: dict[int, set[str]] = {}
    for setting in swept:
        if math.isfinite(setting.cost):
            found.setdefault(_size(setting), set()).add(setting.optim)
    if len(found) < 2:
        return None
    most = max(map(len, found.values()))
    common = sorted(size for size, optimizers in found.items() if len(optimizers) == most)
    size = common[(len(common) - 1) // 2]
    tuned = {best.optim: best for best in best_settings(_candidates(swept, size))}
    optimizers = list(dict.fromkeys(setting.optim for setting in swept))
    families = {optim: _family(tuned[optim], swept) for optim in optimizers if optim in tuned}
    missing = [optim for optim in optimizers if optim not in tuned]
    return Stability(swept[0].task, _measure(swept), size, families, missing)


def _candidates(settings: Sequence[Setting], size: int) -> list[Setting]:
    """Of each optimizer those at this batch size that were run with the most others too, or A would have no line."""
    good = [setting for setting in settings if _size(setting) == size and math.isfinite(setting.cost)]
    runs = {id(one): len(_varied([s for s in settings if s.optim == one.optim], one, BATCH_SIZE)) for one in good}
    most = {optim: max(runs[id(s)] for s in good if s.optim == optim) for optim in {s.optim for s in good}}
    return [setting for setting in good if runs[id(setting)] == most[setting.optim]]


def _family(tuned: Setting, settings: Sequence[Setting]) -> Family:
    own = [setting for setting in settings if setting.optim == tuned.optim]
    groups = {size: [s for s in own if _size(s) == size] for size in sorted({_size(setting) for setting in own})}
    retuned = {float(size): best[0] for size, group in groups.items() if (best := best_settings(group))}
    return Family(tuned, _varied(own, tuned, BATCH_SIZE), retuned, _varied(own, tuned, LEARNING_RATE))


def _varied(settings: Sequence[Setting], tuned: Setting, key: str) -> dict[float, Setting]:
    """The settings that differ from the tuned one in this argument at most, by its value."""

    def rest(setting: Setting) -> dict[str, str]:
        return {name: str(value) for name, value in setting.others.items() if name != key}

    same = [setting for setting in settings if key in setting.others and rest(setting) == rest(tuned)]
    return {float(s.others[key]): s for s in sorted(same, key=lambda setting: float(setting.others[key]))}


def _size(setting: Setting) -> int:
    return int(setting.others[BATCH_SIZE])


def _measure(settings: Sequence[Setting]) -> Measure:
    task = settings[0].task
    rows = [row for setting in settings if math.isfinite(setting.cost) for row in setting.rows]
    names = [name for name in _SHOWN[task.decides] if all(row.values.get(name) is not None for row in rows)]
    return task.measure(names[0] if names else task.decides)


def _spread(seconds: Sequence[float]) -> dict[str, float | None]:
    return {
        EPOCH_SECONDS: statistics.fmean(seconds) if seconds else None,
        "standard deviation": statistics.stdev(seconds) if len(seconds) > 1 else None,
        "runs": len(seconds),
    }
