"""Trials choose, other seeds claim: hand-written results to the tables of a comparison with tuning seeds."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from hf_adafisher.experiments.comparison.configuration import PRESETS
from hf_adafisher.experiments.comparison.identity import write_record
from hf_adafisher.experiments.comparison.protocol import create_comparison
from hf_adafisher.experiments.outputs import write_json
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


@pytest.mark.parametrize(
    ("optim", "settings", "expected"),
    [
        ("adafisherw", {}, True),
        ("adafisherw", {"learning_rate": 0.004, "beta": 0.9, "lr_scheduler_type": "cosine"}, True),
        ("adafisherw", {"learning_rate": 0.004, "beta": 0.95}, False),
        ("adafisherw", {"learning_rate": 0.008}, False),
        ("adafisherw", {"step_size": "paper"}, False),
        ("spectral-adafisher", {"learning_rate": 3e-4}, True),  # its rate for fine-tuning
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
    for seeds, left in (([5, 6], ()), ([0, 5], (0,))):
        given = create_comparison(CONFIG, tmp_path, tmp_path, seeds=seeds)
        assert given.tuning_seeds == create_comparison(given.config, tmp_path, tmp_path).tuning_seeds == left
    preset = json.loads((PRESETS / "lm-scratch.json").read_text())
    only = create_comparison(preset, tmp_path, tmp_path, optimizers=["muon"])
    assert only.tuning_seeds == (0,)


def test_the_report_of_a_comparison_with_tuning_seeds(tmp_path: Path) -> None:
    """CPU time in the table of claims and in cells.csv, the range of the load, curves and tables of the right runs."""
    comparison = create_comparison(CONFIG, tmp_path, tmp_path)
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
