"""Trials choose, other seeds claim; paired differences against scipy's paired t-test and by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from hf_adafisher.experiments.comparison.configuration import PRESETS
from hf_adafisher.experiments.comparison.identity import write_record
from hf_adafisher.experiments.comparison.protocol import Comparison, create_comparison
from hf_adafisher.experiments.comparison.tasks import TASKS
from hf_adafisher.experiments.outputs import write_json
from hf_adafisher.experiments.report.paired import paired_interval, paired_table, summary_table
from hf_adafisher.experiments.report.results import CellResult, SettingResults, group_by_setting
from hf_adafisher.experiments.report.tuning import (
    best_of_each,
    claimed_settings,
    distinct_names,
    is_default,
    tuning_table,
)
from hf_adafisher.experiments.report.write_report import write_report

RATES = (0.001, 0.002, 0.004, 0.008)


def run(optim: str, seed: int, loss: float | None, **settings: Any) -> CellResult:
    status = "diverged" if loss is None else "completed"
    name = f"{optim},{settings},{seed}"
    return CellResult(name, {"optim": optim, **settings, "seed": seed}, status, "", {"validation loss": loss}, [])


def trials(optim: str, losses: tuple[float | None, ...], **settings: Any) -> list[CellResult]:
    pairs = zip(RATES, losses, strict=False)
    return [run(optim, 0, loss, learning_rate=rate, **settings) for rate, loss in pairs]


def grouped() -> list[SettingResults]:
    """AdamW frozen at its best; AdafisherW at its default alone, which is not; its paper form and Lion: trials only."""
    runs = [
        *trials("adamw", (5.9, 5.2, 5.4, None)),
        *trials("adafisherw", (5.5, 5.4, 5.3, 5.1), beta=0.9),
        *trials("adafisherw", (5.8, 5.7), step_size="paper"),
        *trials("lion", (None,)),
    ]
    for seed in (20, 21):
        runs.append(run("adamw", seed, 6.0 + seed / 10, learning_rate=2e-3))
        runs.append(run("adafisherw", seed, 5.0 + seed / 10, beta="0.90", learning_rate=0.004))
    return group_by_setting(runs)


def test_claims_are_made_of_other_seeds_alone() -> None:
    claims = claimed_settings(grouped(), [0])
    found = [(one.optim, one.name, [cell.settings["seed"] for cell in one.cells], one.tuning) for one in claims]
    assert found == [
        ("adafisherw (paper)", "learning_rate=0.002", [0], True),
        ("adafisherw", "beta=0.90, learning_rate=0.004", [20, 21], False),
        ("adamw", "learning_rate=0.002", [20, 21], False),
    ]
    assert claims[1].mean("validation loss") == pytest.approx(5.0 + 2.05)
    without = {one.optim: one for one in claimed_settings(grouped())}
    assert len(without["adamw"].cells) == 3 and not without["adamw"].tuning  # seed 0 too: there are no tuning seeds


def test_where_no_seed_chooses_every_setting_is_a_claim() -> None:
    """That is what ``"tuning_seeds": []`` says; an absent key says that the best setting of each optimizer counts."""
    every = claimed_settings(grouped(), [])
    ranks = [one.rank for one in every]
    assert len(every) == len(grouped()) and ranks == sorted(ranks) and not any(one.tuning for one in every)
    assert len(claimed_settings(grouped())) == 3


def test_a_frozen_setting_that_diverges_is_not_left_out() -> None:
    runs = [*trials("adamw", (5.0,)), run("adamw", 20, None, learning_rate=0.001)]
    (claim,) = claimed_settings(group_by_setting(runs), [0])
    assert claim.cost == math.inf and not claim.tuning


def test_the_table_of_trials() -> None:
    table = tuning_table(grouped(), [0])
    assert table.columns == ["optimizer", "trials", "best trial", "validation loss", "its learning rate", "frozen"]
    assert table.rows == [
        ["adamw", "4 (1 diverged or failed)", "learning_rate=0.002", "5.2000", "inside of 4", "learning_rate=0.002"],
        ["adafisherw", "4", "learning_rate=0.008, beta=0.9", "5.1000", "highest of 4: edge",
         "beta=0.90, learning_rate=0.004 (default)"],
        ["adafisherw (paper)", "2", "learning_rate=0.002", "5.7000", "highest of 2: edge", "none yet"],
        ["lion", "1 (1 diverged or failed)", "-", "-", "-", "none yet"],
    ]  # fmt: skip
    worse = [*grouped(), SettingResults([run("adamw", 20, 5.0, learning_rate=0.001)])]
    assert tuning_table(worse, [0]).rows[0][-1] == "learning_rate=0.001 (not the best trial); learning_rate=0.002"
    shorter = [*grouped(), SettingResults([run("adamw", 20, 5.0, learning_rate=0.002, max_steps=9)])]
    said = "learning_rate=0.002, max_steps=9 (the best trial at another number of steps)"
    assert said in tuning_table(shorter, [0]).rows[0][-1].split("; ")
    other = [SettingResults([run("adamw", 0, 5.0, learning_rate=0.002, max_steps=9)]), *grouped()]
    frozen = "learning_rate=0.002 (the best trial at another number of steps)"
    assert tuning_table(other, [0]).rows[0][-1] == frozen


def test_the_place_of_a_rate_is_among_trials_with_the_same_other_arguments() -> None:
    runs = [run("muon", 0, 5.0 - rate, learning_rate=rate, momentum=0.9) for rate in (0.1, 0.2, 0.3)]
    alone = [run("muon", 0, 4.0, learning_rate=0.2, momentum=0.8)]
    assert tuning_table(group_by_setting([*runs, *alone]), [0]).rows[0][4] == "the only one"
    beside = run("muon", 0, 4.1, learning_rate=0.1, momentum=0.8)
    assert tuning_table(group_by_setting([*runs, *alone, beside]), [0]).rows[0][4] == "highest of 2: edge"


@pytest.mark.parametrize(
    ("optim", "settings", "expected"),
    [
        ("adafisherw", {}, True),
        (
            "adafisherw",
            {"learning_rate": 0.004, "beta": 0.9, "lr_scheduler_type": "cosine", "warmup_steps": 0.25},
            True,
        ),
        ("adafisherw", {"learning_rate": 0.004, "beta": 0.95}, False),
        ("adafisherw", {"learning_rate": 0.008}, False),
        ("adafisherw", {"step_size": "paper"}, False),
        ("spectral-adafisher", {"learning_rate": 1.5e-4}, True),  # its rate for fine-tuning
        ("muon", {"optim_args": "momentum=0.9"}, False),
    ],
)
def test_what_a_default_is(optim: str, settings: dict[str, Any], expected: bool) -> None:
    assert is_default(SettingResults([run(optim, 0, 1.0, **settings)])) is expected


def test_several_settings_of_one_optimizer_have_names_of_their_own_and_one_place_in_pictures() -> None:
    settings = group_by_setting([
        run("a", 1, 1.0, lr=1, beta=0.9), run("b", 1, 1.5), run("a", 1, 2.0, lr=2, beta=0.9), run("a", 1, 3.0, lr=2),
    ])  # fmt: skip
    assert distinct_names(settings) == ["a, lr=1, beta=0.9", "b", "a, lr=2, beta=0.9", "a, lr=2, beta=-"]
    assert [(one.optim, one.cost) for one in best_of_each(settings)] == [("a", 1.0), ("b", 1.5)]


CONFIG = {
    "cells": [{"optim": "adamw", "learning_rate": [0.001, 0.002]}, {"optim": "adamw", "seeds": [20, 21]}],
    "seeds": [0],
    "tuning_seeds": [0],
}


def test_a_tuning_seed_must_be_one_of_the_comparison(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'tuning_seeds' has 3, which is no seed .*\(its seeds: 0, 20, 21\)"):
        create_comparison({**CONFIG, "tuning_seeds": [0, 3]}, tmp_path, tmp_path)
    assert create_comparison(CONFIG, tmp_path, tmp_path).tuning_seeds == (0,)
    for seeds, left in (([5, 6], None), ([0, 5], (0,))):
        given = create_comparison(CONFIG, tmp_path, tmp_path, seeds=seeds)
        assert given.tuning_seeds == create_comparison(given.config, tmp_path, tmp_path).tuning_seeds == left
    preset = json.loads((PRESETS / "lm-scratch.json").read_text())
    only = create_comparison(preset, tmp_path, tmp_path, optimizers=["muon"])
    assert only.tuning_seeds == (0,)
    frozen = create_comparison({**CONFIG, "tuning_seeds": []}, tmp_path, tmp_path, seeds=[20])
    assert frozen.tuning_seeds == ()


def finished_comparison(config: dict[str, Any], tmp_path: Path) -> Comparison:
    comparison = create_comparison(config, tmp_path, tmp_path)
    for cell in comparison.cells:
        seed = cell.settings["seed"]
        loss = cell.settings.get("learning_rate", 0.5) + seed
        comparison.folder(cell).mkdir()
        write_record(cell, comparison.folder(cell))
        write_json(
            comparison.folder(cell) / "results.json",
            {
                "status": "completed", "steps": 10, "validation": {"loss": loss}, "test": {"loss": loss},
                "step_time": {"mean_ms": 30.0, "mean_cpu_ms": 20.0 + seed}, "hardware": {"load_average": 1 + seed / 8},
            },
        )  # fmt: skip
    return comparison


def test_the_report_of_settings_that_were_frozen_elsewhere(tmp_path: Path) -> None:
    write_report(finished_comparison({**CONFIG, "tuning_seeds": []}, tmp_path))
    text = (tmp_path / "report.md").read_text()
    assert "## Every setting\n\nEvery setting as it was given" in text and "flatter themselves" not in text
    assert text.count("\n| adamw | ") == 3 and "stand out.\n\n| run |" not in text and "| **adamw" not in text


def test_the_report_of_a_comparison_with_tuning_seeds(tmp_path: Path) -> None:
    """CPU time in the table of claims and in cells.csv, the range of the load, curves and tables of the right runs."""
    comparison = finished_comparison(CONFIG, tmp_path)
    printed = write_report(comparison)
    text = (tmp_path / "report.md").read_text()
    assert "| adamw | defaults | 2 | 21.0000 ± 0.7071 | 21.0000 ± 0.7071 | 10 | 30 | 40 |" in printed
    assert "| adamw | 2 | learning\\_rate=0.001" not in text  # an underscore within a word is no markup
    assert "| adamw | 2 | learning_rate=0.001 | 0.0010 | lowest of 2: edge | defaults (default) |" in text
    assert "| load average (range) | 1.00 to 3.62 |" in text and "| tuning seeds | 0 |" in text
    assert "runs with seed 0 only choose" in text and "flatter themselves" not in text
    assert ",CPU ms per step," in (tmp_path / "cells.csv").read_text().splitlines()[0]
    rates = json.loads((tmp_path / "learning_rates.json").read_text())["optimizers"]["adamw"]["all"]
    assert rates["learning rate"] == [0.001, 0.002] and rates["mean"] == [0.001, 0.002]


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


def test_the_second_reference_is_named_in_advance() -> None:
    """Not the best one, which was found by these seeds."""
    names = ("muon", "spectral-adafisher", "soap", "adamw")
    claims = [setting(name, dict(enumerate((place, place + 0.1, place)))) for place, name in enumerate(names)]
    assert [row[0] for row in paired_table(claims).rows][3:] == [
        "muon - spectral-adafisher",
        "soap - spectral-adafisher",
    ]


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


def test_differences_are_from_the_settings_of_the_reference_and_the_default_of_ours() -> None:
    ours = [
        setting("spectral-adafisher", {1: 4.0, 2: 4.2, 3: 4.1}, beta=0.8),
        setting("spectral-adafisher", {1: 4.3, 2: 4.2, 3: 4.4}, beta=0.9),
    ]
    others = [
        setting("adamw", {1: 5.0, 2: 5.1, 3: 5.0}, beta=0.8),
        setting("adamw", {1: 6.0, 2: 6.1, 3: 6.0}, beta=0.9),
    ]
    tuned, default = (f"spectral-adafisher, beta={beta}" for beta in (0.8, 0.9))
    best, other = (f"adamw, beta={beta}" for beta in (0.8, 0.9))
    from_ours = [f"{tuned} - {default}", f"{best} - {default}", f"{other} - {default}"]
    found = [row[0] for row in paired_table([*ours, *others]).rows]
    from_adamw = [f"{one} - {adamw}" for adamw in (best, other) for one in (tuned, default)]
    assert found == [*from_adamw[:2], f"{other} - {best}", *from_adamw[2:], from_ours[0]]
    assert [row[0] for row in paired_table([*ours, *others], "spectral-adafisher").rows] == from_ours
    assert [row[0] for row in paired_table([ours[0], *others], "spectral-adafisher").rows] == [
        f"{best} - spectral-adafisher",
        f"{other} - spectral-adafisher",
    ]


def test_a_summary_has_the_differences_of_the_paired_table_and_the_memory() -> None:
    claims = [
        setting("a", {1: 4.0, 2: 4.2, 3: 4.1}, learning_rate=0.1),
        setting("adamw", {1: 5.0, 2: 5.1, 3: 5.0}),
        setting("b", {7: 4.5}, tuning=True),
    ]
    table = summary_table(claims)
    paired = paired_table(claims)
    assert table.rows == [
        ["a", "learning_rate=0.1", "3", "5.1000 ± 0.1000", paired.rows[0][3], paired.rows[0][4], "1.50"],
        ["adamw", "defaults", "3", "6.0333 ± 0.0577", "-", "-", "1.50"],
        ["b", "defaults", "1 (tuning)", "5.5000", "-", "-", "1.50"],
    ]
    assert table.columns[3:] == ["test loss", "minus adamw", "ratio of perplexities", "optimizer MiB"]
    assert table.bold == {0} and paired.bold == {0}
    assert summary_table(claims[:1]).columns[4:] == ["optimizer MiB"]
    worse = setting("c", {1: 6.0, 2: 6.1, 3: 6.0})
    table = summary_table([claims[2], claims[0], claims[1], worse])
    assert [row[0] for row in table.rows] == ["a", "adamw", "c", "b"] and table.bold == {0}
    lost = setting("lost", {1: 1.0, 2: None, 3: 1.0})
    assert [(row[0], row[3]) for row in summary_table([lost, worse]).rows] == [("c", "7.0333 ± 0.0577"), ("lost", "-")]
    default = setting("adafisherw", {1: 4.0}, learning_rate=0.004)
    assert summary_table([default]).rows[0][1] == "learning_rate=0.004 (default)"
