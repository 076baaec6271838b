"""Differences between optimizers, seed by seed, with confidence intervals."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import stats

from hf_adafisher.experiments.comparison.tasks import Metric
from hf_adafisher.experiments.report.results import SettingResults
from hf_adafisher.experiments.report.tables import Table

CONFIDENCE = 0.95
LEAST_SEEDS = 3
"""Fewer seeds in common are not compared: an interval of two means next to nothing."""


def paired_interval(first: Sequence[float], second: Sequence[float], rivals: int = 1) -> tuple[float, float, float]:
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
        return mean, mean, mean
    confidence = 1 - (1 - CONFIDENCE) / rivals
    low, high = stats.t.interval(confidence, len(differences) - 1, loc=mean, scale=error)
    return mean, float(low), float(high)


def paired_table(best: Sequence[SettingResults], reference: str = "adamw") -> Table:
    """Tabulate differences of each optimizer's best setting to the best one's and to ``reference``'s, where it ran.

    Only seeds that both have count, and only pairs with ``LEAST_SEEDS`` of them. Marked rows are those whose interval
    does not contain 0.

    Args:
        best: Best setting of each optimizer, the best first.
        reference: An optimizer that all are compared with.
    """
    pairs = [(setting, other) for other in best if other.optim == reference for setting in best if setting is not other]
    pairs += [(setting, best[0]) for setting in best[1:] if reference not in (setting.optim, best[0].optim)]
    rows: list[list[str]] = []
    clear = set()
    for setting, other in pairs:
        seeds = _common(setting, other)
        if len(seeds) >= LEAST_SEEDS:
            texts = [_difference(setting, other, metric) for metric in _metrics(setting)]
            if any(excludes for _, excludes in texts):
                clear.add(len(rows))
            rows.append([f"{setting.optim} - {other.optim}", str(len(seeds)), *(text for text, _ in texts)])
    names = [metric.name for metric in _metrics(best[0])] if best else []
    return Table(["difference", "seeds", *names], rows, frozenset(clear))


def _metrics(setting: SettingResults) -> list[Metric]:
    """The metric that selects settings, and the same of the test data."""
    selection = setting.task.metric(setting.task.selection_metric)
    test = [m for m in setting.task.metrics if m.split == "test" and m.key == selection.key]
    return [selection, *test]


def _common(first: SettingResults, second: SettingResults) -> list[int]:
    """Seeds that both settings ran with."""
    seeds = [{cell.settings.get("seed") for cell in setting.cells} for setting in (first, second)]
    return sorted(seed for seed in seeds[0] & seeds[1] if seed is not None)


def _difference(first: SettingResults, second: SettingResults, metric: Metric) -> tuple[str, bool]:
    """The difference as text, and whether its interval leaves out 0."""
    seeds = _common(first, second)
    values = [
        [
            next(cell for cell in setting.cells if cell.settings.get("seed") == seed).values[metric.name]
            for seed in seeds
        ]
        for setting in (first, second)
    ]
    if any(value is None for side in values for value in side):
        return "-", False
    mean, low, high = paired_interval(*values)  # type: ignore[arg-type]
    digits = max(metric.digits, 2)
    return f"{mean:+.{digits}f} ({low:+.{digits}f} to {high:+.{digits}f})", low > 0 or high < 0
