"""Paired differences against scipy's paired t-test and by hand."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from hf_adafisher.experiments.comparison.tasks import TASKS
from hf_adafisher.experiments.report.paired import paired_interval, paired_table
from hf_adafisher.experiments.report.results import CellResult, SettingResults


def setting(optim: str, losses: dict[int, float | None]) -> SettingResults:
    """One setting of an optimizer with these validation losses by seed; the test loss is one more."""
    cells = [
        CellResult(
            f"{optim},{seed}",
            {"optim": optim, "seed": seed},
            "completed",
            "",
            {"validation loss": loss, "test loss": None if loss is None else loss + 1.0},
            [],
            TASKS["clm"],
        )
        for seed, loss in losses.items()
    ]
    return SettingResults(cells)


def test_interval_is_that_of_scipys_paired_test() -> None:
    draw = np.random.default_rng(0)
    first, second = draw.normal(size=7), draw.normal(size=7)
    expected = stats.ttest_rel(first, second)
    low, high = expected.confidence_interval(0.95)
    assert paired_interval(first, second) == pytest.approx((np.mean(first - second), low, high))


def test_interval_of_three_by_hand() -> None:
    """Differences 1, 2, 3: mean 2, standard error 1 / sqrt(3), quantile of t with two degrees of freedom 4.3027."""
    low, high = 2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5
    assert paired_interval([2.0, 3.0, 4.0], [1.0, 1.0, 1.0]) == pytest.approx((2.0, low, high))


def test_equal_differences_have_an_interval_without_width() -> None:
    assert paired_interval([2.0, 3.0], [1.0, 2.0]) == (1.0, 1.0, 1.0)


def test_pairs_of_a_table() -> None:
    """All against AdamW, the others against the best; seeds in common alone; clear differences stand out."""
    best = [
        setting("spectral-adafisher", {1: 5.0, 2: 5.1, 3: 5.0}),
        setting("adafisherw", {3: 5.4, 2: 5.5, 1: 5.4, 9: 99.0}),
        setting("adamw", {1: 5.6, 2: 5.3, 3: 5.5, 4: 0.0}),
    ]
    table = paired_table(best)
    assert [row[:2] for row in table.rows] == [
        ["spectral-adafisher - adamw", "3"],
        ["adafisherw - adamw", "3"],
        ["adafisherw - spectral-adafisher", "3"],
    ]
    assert table.columns == ["difference", "seeds", "validation loss", "test loss"]
    assert table.rows[2][2] == "+0.4000 (+0.4000 to +0.4000)" == table.rows[2][3]
    assert table.bold == {2}  # the others vary too much with three seeds
    assert table.rows[1][2].startswith("-0.0333 (-0.")


def test_too_few_seeds_in_common_and_missing_values() -> None:
    assert not paired_table([setting("a", {1: 1.0, 2: 1.0, 3: 2.0}), setting("adamw", {2: 1.0, 3: 1.0, 4: 1.0})]).rows
    rows = paired_table([setting("a", {1: 1.0, 2: 1.0, 3: 2.0}), setting("adamw", {1: None, 2: 1.0, 3: 1.0})]).rows
    assert [row[2:] for row in rows] == [["-", "-"]]
    assert not paired_table([]).rows
