"""Differences between optimizers, seed by seed, with confidence intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from hf_adafisher.experiments.comparison.tasks import Metric, format_number
from hf_adafisher.experiments.report.results import SettingResults
from hf_adafisher.experiments.report.tables import Table, describe_seeds, with_spread
from hf_adafisher.experiments.report.tuning import distinct_names, is_default

CONFIDENCE = 0.95
OURS = "spectral-adafisher"
"""What rivals are compared with beside the reference."""
LEAST_SEEDS = 3
"""Fewer seeds in common are not compared: an interval of two means next to nothing."""

_RATIO = "ratio of perplexities"


class Interval(NamedTuple):
    """A mean difference and the ends of its interval."""

    mean: float
    low: float
    high: float

    @property
    def leaves_out_0(self) -> bool:
        """True where one side is clearly ahead."""
        return self.low > 0 or self.high < 0

    def text(self, digits: int) -> str:
        """``-0.210 (-0.230 to -0.190)``."""
        return f"{self.mean:+.{digits}f} ({self.low:+.{digits}f} to {self.high:+.{digits}f})"


def paired_interval(first: Sequence[float], second: Sequence[float], rivals: int = 1) -> Interval:
    """Mean of ``first - second`` and its interval by Student's t, which takes differences as normal.

    Args:
        first: Values by seed, at least two.
        second: Values of the same seeds in the same order.
        rivals: Intervals that hold together with 95 % (Bonferroni): each is one of ``1 - 0.05 / rivals``.

    Returns:
        Mean, lower and upper end; all alike where the differences are.
    """
    differences = np.subtract(first, second)
    mean, error = float(differences.mean()), float(stats.sem(differences))
    if error == 0.0:
        return Interval(mean, mean, mean)
    confidence = 1 - (1 - CONFIDENCE) / rivals
    low, high = stats.t.interval(confidence, len(differences) - 1, loc=mean, scale=error)
    return Interval(mean, float(low), float(high))


def paired_table(claims: Sequence[SettingResults], reference: str = "adamw") -> Table:
    """Tabulate differences of all settings to ``reference``'s and to one of ``OURS``; without it to the best one.

    Only seeds that both have count, and only pairs with ``LEAST_SEEDS`` of them; trials are left out. The intervals of
    all pairs with one reference hold together. Marked rows are those whose interval of the test metric (without one:
    of the metric that selects) leaves out 0.

    Args:
        claims: Of ``claimed_settings``, the best first.
        reference: An optimizer that all are compared with.
    """
    shown = [setting for setting in claims if not setting.tuning]
    names = {id(setting): name for setting, name in zip(shown, distinct_names(shown), strict=True)}
    references = _references(shown, reference)
    metrics = shown[0].task.compared_metrics if shown else []
    rows: list[list[str]] = []
    clear, seen = set(), set()
    for other in references:
        rivals = rivals_of(other, shown)
        for setting in rivals:
            if (id(other), id(setting)) in seen:  # the other way round
                continue
            seen.add((id(setting), id(other)))
            found = [_difference(setting, other, metric, len(rivals)) for metric in metrics]
            deciding = next((interval for interval in reversed(found) if interval is not None), None)
            if deciding is not None and deciding.leaves_out_0:
                clear.add(len(rows))
            seeds = str(len(_common(setting, other)))
            rows.append([f"{names[id(setting)]} - {names[id(other)]}", seeds, *map(_text, found, metrics)])
            if metrics[-1].key == "loss":
                rows[-1].append(_ratio(found[-1]))
    ratio = [f"{_RATIO} ({metrics[-1].split})"] if metrics and metrics[-1].key == "loss" else []
    return Table(["difference", "seeds", *(metric.name for metric in metrics), *ratio], rows, frozenset(clear))


def _references(shown: Sequence[SettingResults], reference: str) -> list[SettingResults]:
    """All settings of ``reference``, and the default one of ``OURS``, since a choice by these same seeds flatters.

    Without the default it is the best one.
    """
    found = [] if reference == OURS else [setting for setting in shown if setting.optim == reference]
    ours = [setting for setting in shown if setting.optim == OURS]
    if ours:
        found.append(next((setting for setting in ours if is_default(setting)), ours[0]))
    elif shown and shown[0].optim != reference:
        found.append(shown[0])
    return found


def summary_table(claims: Sequence[SettingResults], reference: str = "adamw") -> Table:
    """Tabulate the test metric of all claims, its difference from the first setting of ``reference``, and the memory.

    Marked rows are better, with an interval that leaves out 0. The best come first, trials last. Times are left out:
    runs of different hours compare with a benchmark in turns only.

    Args:
        claims: At least one, of ``claimed_settings``, the best first.
        reference: An optimizer that all are compared with, as by ``paired_table``; without it there is no difference.
    """
    metric, metric_rises = claims[0].task.compared_metrics[-1], claims[0].task.more_is_better
    other = next((one for one in claims if one.optim == reference and not one.tuning), None)
    rivals = [] if other is None else rivals_of(other, [one for one in claims if not one.tuning])
    compared = {id(rival) for rival in rivals}
    rows: list[list[str]] = []
    clear = set()
    for setting in sorted(claims, key=lambda setting: (setting.tuning, _rank(setting, metric, metric_rises))):
        found = _difference(setting, other, metric, len(rivals)) if other and id(setting) in compared else None
        if found is not None and (found.low > 0 if metric_rises else found.high < 0):
            clear.add(len(rows))
        size = setting.mean("optimizer bytes")
        rows.append([
            setting.optim, _named(setting), describe_seeds(setting),
            with_spread(metric)(setting), _text(found, metric), _ratio(found),
            format_number(None if size is None else size / 2**20, 2),
        ])  # fmt: skip
    columns = ["optimizer", "setting", "seeds", metric.name, f"minus {reference}", _RATIO, "optimizer MiB"]
    kept = [index for index in range(len(columns)) if any(row[index] != "-" for row in rows)]
    kept = [index for index in kept if metric.key == "loss" or columns[index] != _RATIO]
    return Table([columns[i] for i in kept], [[row[i] for i in kept] for row in rows], frozenset(clear))


def _named(setting: SettingResults) -> str:
    return f"{setting.name} (default)" if setting.others and is_default(setting) else setting.name


def _rank(setting: SettingResults, metric: Metric, metric_rises: bool) -> float:
    """Key that sorts the best mean of a metric first, and settings without one last."""
    mean = setting.mean(metric.name)
    return math.inf if mean is None else -mean if metric_rises else mean


def rivals_of(reference: SettingResults, claims: Sequence[SettingResults]) -> list[SettingResults]:
    """Return the settings that have enough seeds in common with one of them."""
    others = [setting for setting in claims if setting is not reference]
    return [setting for setting in others if len(_common(setting, reference)) >= LEAST_SEEDS]


def _common(first: SettingResults, second: SettingResults) -> list[int]:
    """Seeds that both settings ran with."""
    seeds = [setting.by_seed(setting.task.selection_metric).keys() for setting in (first, second)]
    return sorted(seeds[0] & seeds[1])


def _difference(first: SettingResults, second: SettingResults, metric: Metric, rivals: int) -> Interval | None:
    """First minus second; None where a seed has no value."""
    by_seed = [one.by_seed(metric.name) for one in (first, second)]
    pairs = [(by_seed[0][seed], by_seed[1][seed]) for seed in _common(first, second)]
    known = [(one, other) for one, other in pairs if one is not None and other is not None]
    if len(known) < len(pairs):
        return None
    return paired_interval([one for one, _ in known], [other for _, other in known], rivals)


def _text(found: Interval | None, metric: Metric) -> str:
    return "-" if found is None else found.text(max(metric.digits, 2))


def _ratio(found: Interval | None) -> str:
    """Of a difference of losses in nats."""
    if found is None:
        return "-"
    mean, low, high = (math.exp(value) for value in found)
    return f"{mean:.3f} ({low:.3f} to {high:.3f})"
