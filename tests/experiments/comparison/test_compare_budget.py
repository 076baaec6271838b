"""Budgets: what is read, how a step time is measured, and how many steps come of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from hf_adafisher.experiments.comparison.budget import Budget, timing_cell, typical_step_seconds, work_period
from hf_adafisher.experiments.comparison.cell_process import available_cores
from hf_adafisher.experiments.comparison.cells import Cell
from hf_adafisher.experiments.comparison.forecast import forecast, format_duration
from hf_adafisher.experiments.comparison.protocol import Comparison
from hf_adafisher.experiments.comparison.stored import load_result
from hf_adafisher.experiments.report.write_report import read_comparison
from tests.scripts import folder_of

Compare = Callable[..., Comparison]
Started = Callable[..., list[str]]
ENTRIES = [{"optim": "adafisherw", "damping": [0.1, 0.2]}, {"optim": "adamw", "learning_rate": [0.1, 0.2]}]


def test_budgets() -> None:
    assert Budget.parse("steps=800") == Budget("steps", 800)
    assert Budget.parse("seconds=0.5") == Budget("seconds", 0.5)
    assert Budget.parse("like=adafisherw:epochs=1.5") == Budget("like", 1.5, "adafisherw")


@pytest.mark.parametrize(
    "text",
    ["", "800", "steps", "steps=", "steps=0", "steps=1.5", "steps=-3", "seconds=nan", "seconds=inf", "hours=1",
     "like=adamw", "like=:epochs=3", "like=adamw:epochs=x", "steps=1e400"],
)  # fmt: skip
def test_what_is_no_budget(text: str) -> None:
    with pytest.raises(ValueError, match=r"like=adafisherw:epochs=5, got "):
        Budget.parse(text)


def test_a_step_time_counts_periodic_work_but_no_interruption_and_no_warm_up() -> None:
    plain, refresh, warm_up = 1.0, 21.0, [500.0] * 10
    steps = [*warm_up, *([refresh] + [plain] * 9) * 3]
    assert typical_step_seconds(steps, 10) == pytest.approx((refresh + 9 * plain) / 10)
    steps[25] += 1000  # another program, once
    assert typical_step_seconds(steps, 10) == pytest.approx(3.0)
    assert typical_step_seconds(steps[:20], 10) == pytest.approx(3.0)
    with pytest.raises(ValueError, match="19 steps are too few"):
        typical_step_seconds(steps[:19], 10)


def test_one_measurement_serves_all_that_cost_the_same() -> None:
    common = {"max_steps": 9, "eval_strategy": "steps", "seed": 1, "n_embd": 8, "update_interval": 50}
    cell = timing_cell(Cell({"optim": "a", "learning_rate": 3, "damping": 1, "rank": 2, "seed": 4}, common))
    assert cell.name == "a,rank=2" and work_period(cell) == 50
    assert cell.common == {
        "n_embd": 8, "update_interval": 50, "max_steps": 160, "timing_only": True, "disable_tqdm": True,
    }  # fmt: skip


@pytest.mark.subprocess
def test_seconds_become_steps(compare: Compare, started: Started, tmp_path: Path) -> None:
    """The fake steps take 0.2 s and 0.3 s on average (one second more at every tenth): 60 s are 300 and 200 of them."""
    comparison = compare(ENTRIES, budget="seconds=60", seeds=[0])
    assert comparison.run() == []
    assert sorted(started("out/step_times")) == [f"{name} {available_cores()}" for name in ("adafisherw", "adamw")]
    planned = {cell.name: (cell.common["max_steps"], cell.planned_seconds) for cell in comparison.plan()}
    assert planned == {
        "adafisherw,damping=0.1,seed=0": (200, 60),
        "adafisherw,damping=0.2,seed=0": (200, 60),
        "adamw,learning_rate=0.1,seed=0": (300, 60),
        "adamw,learning_rate=0.2,seed=0": (300, 60),
    }
    assert all(load_result(folder_of(tmp_path / "out", name))["steps"] == steps for name, (steps, _) in planned.items())
    assert comparison.run() == [] and len(started()) == 4 and len(started("out/step_times")) == 2


@pytest.mark.subprocess
def test_the_epochs_of_one_are_the_seconds_of_all(compare: Compare, started: Started) -> None:
    """25 steps an epoch, 0.3 s each: two epochs are 15 s, for adamw 75 steps. The one that counts may be left out."""
    comparison = compare(ENTRIES, budget="like=adafisherw:epochs=2", optimizers=["adamw"])
    assert comparison.measure() == []
    assert {name.split()[0] for name in started("out/step_times")} == {"adafisherw", "adamw"}
    assert [cell.common["max_steps"] for cell in comparison.plan()] == [75, 75]
    assert comparison.plan()[0].planned_seconds == pytest.approx(15)
    both = compare(ENTRIES, budget="like=adafisherw:epochs=2")
    assert [cell.common["max_steps"] for cell in both.plan()] == [50, 50, 75, 75]


@pytest.mark.subprocess
def test_a_budget_of_steps_needs_no_measurement(compare: Compare, started: Started) -> None:
    config = {"common": {"max_steps": 3, "num_train_epochs": 2}}
    comparison = compare(ENTRIES, budget="steps=30", config=config)
    assert comparison.run() == [] and started("out/step_times") == []
    assert all(cell.common == {"max_steps": 30} for cell in comparison.plan())
    assert compare(ENTRIES, config=config).plan()[0].common == config["common"]


@pytest.mark.subprocess
def test_measurements_run_side_by_side_as_the_cells_do(compare: Compare, started: Started) -> None:
    comparison = compare(ENTRIES, budget="seconds=6", jobs=3)
    comparison.measure()
    names = sorted(name.split()[0] for name in started("out/step_times"))
    assert names == [f"{optim}{copy}" for optim in ("adafisherw", "adamw") for copy in ("", ",copy=2", ",copy=3")]
    assert {cell.common["max_steps"] for cell in comparison.plan()} == {20, 30}


@pytest.mark.subprocess
def test_other_threads_than_measured_are_said(compare: Compare, caplog: pytest.LogCaptureFixture) -> None:
    compare(ENTRIES, budget="seconds=6").measure()
    comparison = compare(ENTRIES, budget="seconds=6")
    comparison.plan()
    assert not caplog.records
    path = folder_of(comparison.output_dir / "step_times", "adamw") / "results.json"
    path.write_text(path.read_text().replace('"torch_threads": ', '"torch_threads": 7'))
    comparison.plan()
    assert "the step time of adamw was measured with 7" in caplog.text


@pytest.mark.subprocess
def test_an_optimizer_that_cannot_be_timed_does_not_stop_the_others(compare: Compare, started: Started) -> None:
    comparison = compare([{"optim": "broken", "learning_rate": [1, 2]}, ENTRIES[1]], budget="seconds=6")
    assert "broken: failed with exit status 1" in comparison.run()[0]
    results = {result.cell: result for result in read_comparison(comparison)}
    for rate in (1, 2):
        result = results[f"broken,learning_rate={rate}"]
        assert (result.status, result.reason) == ("failed", "step time: ValueError: lr is negative")
    assert len(started()) == 2 and comparison.run() == [] and len(started("out/step_times")) == 2


@pytest.mark.subprocess
def test_epochs_of_an_optimizer_that_cannot_be_timed_are_no_budget(compare: Compare, started: Started) -> None:
    comparison = compare([{"optim": "broken"}, ENTRIES[1]], budget="like=broken:epochs=2", optimizers=["adamw"])
    assert comparison.unplanned() == dict.fromkeys([cell.name for cell in comparison.cells], "step time not measured")
    assert len(comparison.run()) == 1 and comparison.plan() == [] and started() == []
    results = read_comparison(comparison)
    assert [result.cell for result in results] == [cell.name for cell in comparison.cells]
    assert {(result.status, result.reason) for result in results} == {
        ("failed", "step time: ValueError: lr is negative")
    }


@pytest.mark.subprocess
def test_a_dry_run_says_how_many_and_how_long(compare: Compare) -> None:
    assert format_duration(89) == "89 s" and format_duration(600) == "10 min" and format_duration(7200) == "2.0 h"
    unknown = forecast(compare(ENTRIES, budget="steps=100"))
    assert "4 cells, 0 of them finished" in unknown and "unknown until step times are measured" in unknown
    config = {"step_seconds": {"adafisherw": 3.0, "adamw": 1.0}, "overhead_seconds": 50}
    preset = compare(ENTRIES, budget="steps=100", config=config, jobs=2)
    assert "about 8 min for the 4 cells left" in forecast(preset)  # (2 * 300 + 2 * 100 + 4 * 50) / 2 = 500 s
    assert "by the configuration's step times" in forecast(preset) and "50 s a cell" in forecast(preset)
    assert "about 20 s for the 4 cells left" in forecast(compare(ENTRIES, budget="seconds=5"))
    assert "unknown" in forecast(compare(ENTRIES, budget="like=adamw:epochs=2"))
    like = compare(ENTRIES, budget="like=adamw:epochs=4")
    like.measure()
    assert "about 80 s for the 4 cells left (training by measured step times" in forecast(like)  # 4 * 25 * 0.2 s each
    like.run()
    assert "4 cells, 4 of them finished" in forecast(like)


@pytest.mark.subprocess
def test_finished_cells_are_better_than_the_configuration(compare: Compare) -> None:
    config = {"step_seconds": {"adafisherw": 3000.0, "adamw": 1000.0}}
    compare([{**ENTRIES[1], "learning_rate": 0.1}], budget="steps=1000", config=config).run()
    text = forecast(compare(ENTRIES[1:], budget="steps=1000", config=config))
    assert "2 cells, 1 of them finished" in text and "about 12 s for the 1 cells left (training by finished" in text
