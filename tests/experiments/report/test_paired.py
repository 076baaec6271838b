"""Paired differences against scipy's paired t-test and by hand."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from hf_adafisher.experiments.comparison.tasks import TASKS
from hf_adafisher.experiments.report.paired import paired_interval, paired_table, summary_table
from hf_adafisher.experiments.report.results import CellResult, SettingResults


def setting(optim: str, losses: dict[int, float | None], tuning: bool = False, **settings: object) -> SettingResults:
    """One setting of an optimizer with these validation losses by seed; the test loss is one more."""
    cells = [
        CellResult(
            f"{optim},{seed}",
            {"optim": optim, **settings, "seed": seed},
            "completed",
            "",
            {
                "validation loss": loss,
                "test loss": None if loss is None else loss + 1.0,
                "optimizer bytes": 3 * 2**19,
                "CPU ms per step": 200.0 + seed,
            },
            [],
            TASKS["clm"],
        )
        for seed, loss in losses.items()
    ]
    return SettingResults(cells, tuning)


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
    assert table.columns[:4] == ["difference", "seeds", "validation loss", "test loss"]
    assert table.columns[4:] == ["ratio of perplexities (test)"]
    assert table.rows[2][4] == "1.492 (1.492 to 1.492)"  # exp(0.4)
    assert table.rows[2][2] == "+0.4000 (+0.4000 to +0.4000)" == table.rows[2][3]
    assert table.bold == {2}  # the others vary too much with three seeds
    assert table.rows[1][2].startswith("-0.0333 (-0.")


def test_too_few_seeds_in_common_and_missing_values() -> None:
    assert not paired_table([setting("a", {1: 1.0, 2: 1.0, 3: 2.0}), setting("adamw", {2: 1.0, 3: 1.0, 4: 1.0})]).rows
    rows = paired_table([setting("a", {1: 1.0, 2: 1.0, 3: 2.0}), setting("adamw", {1: None, 2: 1.0, 3: 1.0})]).rows
    assert [row[2:] for row in rows] == [["-", "-", "-"]]
    assert not paired_table([]).rows


def test_intervals_of_one_reference_hold_together() -> None:
    """Bonferroni: with three rivals each is scipy's at 1 - 0.05 / 3; the best has as many, AdamW among them."""
    draw = np.random.default_rng(1)
    losses = {name: dict(enumerate(draw.normal(5.0, 0.1, 5))) for name in ("a", "b", "c", "adamw")}
    table = paired_table([setting(name, values) for name, values in losses.items()])
    assert [row[0] for row in table.rows] == ["a - adamw", "b - adamw", "c - adamw", "b - a", "c - a"]
    for row in table.rows:
        first, second = ([*losses[name].values()] for name in row[0].split(" - "))
        low, high = stats.ttest_rel(first, second).confidence_interval(1 - 0.05 / 3)
        mean = np.mean(np.subtract(first, second))
        assert row[2] == f"{mean:+.4f} ({low:+.4f} to {high:+.4f})"
        assert row[4] == f"{np.exp(mean):.3f} ({np.exp(low):.3f} to {np.exp(high):.3f})"


def test_the_test_metric_decides_what_stands_out() -> None:
    """Settings were selected by validation."""
    better = setting("a", {1: 1.0, 2: 1.1, 3: 1.0})
    for cell, loss in zip(better.cells, (9.0, 0.0, 4.0), strict=True):
        cell.values["test loss"] = loss  # type: ignore[index]
    assert paired_table([better, setting("adamw", {1: 2.0, 2: 2.1, 3: 2.0})]).bold == frozenset()


def test_trials_are_not_compared_and_two_settings_of_one_optimizer_are_two_rows() -> None:
    tuned, default = ({seed: loss + seed / 10 for seed in (1, 2, 3)} for loss in (4.0, 4.5))
    claims = [
        setting("lucky", {1: 1.0, 2: 1.0, 3: 1.0}, tuning=True),
        setting("adafisherw", tuned, learning_rate=0.01, beta=0.9),
        setting("adafisherw", default, learning_rate=0.004, beta=0.9),
        setting("adafisherw", {1: 5.0, 2: 5.2, 3: 5.4}, step_size="paper"),
        setting("adamw", {1: 5.0, 2: 5.0, 3: 5.0}),
    ]
    assert [row[0] for row in paired_table(claims).rows] == [
        "adafisherw, learning_rate=0.01 - adamw",
        "adafisherw, learning_rate=0.004 - adamw",
        "adafisherw (paper) - adamw",
        "adafisherw, learning_rate=0.004 - adafisherw, learning_rate=0.01",
        "adafisherw (paper) - adafisherw, learning_rate=0.01",
    ]


def test_a_summary_has_the_differences_of_the_paired_table_and_the_cost() -> None:
    claims = [
        setting("a", {1: 4.0, 2: 4.2, 3: 4.1}, learning_rate=0.1),
        setting("adamw", {1: 5.0, 2: 5.1, 3: 5.0}),
        setting("b", {7: 4.5}, tuning=True),
    ]
    table = summary_table(claims)
    paired = paired_table(claims)
    assert table.rows == [
        ["a", "learning_rate=0.1", "3", "5.1000 ± 0.1000", paired.rows[0][3], paired.rows[0][4], "202", "1.50"],
        ["adamw", "defaults", "3", "6.0333 ± 0.0577", "-", "-", "202", "1.50"],
        ["b", "defaults", "1 (tuning)", "5.5000", "-", "-", "207", "1.50"],
    ]
    assert table.columns[3:] == [
        "test loss",
        "minus adamw",
        "ratio of perplexities",
        "CPU ms per step",
        "optimizer MiB",
    ]
    assert table.bold == {0} and paired.bold == {0}
    assert summary_table(claims[:1]).columns[4:] == ["CPU ms per step", "optimizer MiB"]
