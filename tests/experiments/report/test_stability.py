"""Stability: a sweep over batch sizes from hand-written results to the numbers that are drawn."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hf_adafisher.experiments.comparison.budget import timing_cell
from hf_adafisher.experiments.comparison.cells import expand_cells
from hf_adafisher.experiments.comparison.forecast import forecast
from hf_adafisher.experiments.comparison.protocol import Comparison, create_comparison
from hf_adafisher.experiments.comparison.tasks import TASKS
from hf_adafisher.experiments.drawing import OPTIMIZER_COLOURS
from hf_adafisher.experiments.report import stability as stability_module
from hf_adafisher.experiments.report.results import best_settings, group_by_setting, read_results
from hf_adafisher.experiments.report.stability import draw_stability, read_stability
from hf_adafisher.experiments.report.write_report import stability_sections, write_report
from tests.experiments.comparison.test_compare import CONFIGS, script
from tests.scripts import folder_of, name_of

SIZES, SEEDS = (16, 64, 128), (0, 1)
EXAMPLES = 640
CONFIG = {
    "task": "image",
    "common": {"num_train_epochs": 2},
    "cells": [
        {"optim": "adamw", "per_device_train_batch_size": list(SIZES), "learning_rate": [0.1, 0.2]},
        {"optim": "adamw", "per_device_train_batch_size": 64, "learning_rate": 0.4},
        {"optim": "sgd", "per_device_train_batch_size": list(SIZES), "learning_rate": [1.0, 3.0]},
    ],
    "seeds": list(SEEDS),
}
# Share of the validation images that seed 0 gets right, by optimizer and learning rate, at batch sizes 16, 64, 128.
RIGHT = {
    ("adamw", 0.1): (0.90, 0.86, 0.70),
    ("adamw", 0.2): (0.80, 0.88, 0.92),
    ("adamw", 0.4): (None, 0.99, None),
    ("sgd", 1.0): (0.60, 0.75, 0.55),
    ("sgd", 3.0): (0.85, 0.65, 0.95),
}


def results(optim: str, size: int, rate: float, seed: int) -> dict[str, Any]:
    """What a run would have left. The test split is another one than validation; sgd diverges at 16, 1.0, seed 1."""
    right = RIGHT[optim, rate][SIZES.index(size)] - seed / 32
    if (optim, size, rate, seed) == ("sgd", 16, 1.0, 1):
        return {"status": "diverged", "validation": {"accuracy": 0.99, "loss": None}, "test": {"accuracy": 0.99}}
    return {
        "status": "completed",
        "steps_per_epoch": EXAMPLES // size,
        "step_time": {"mean_ms": milliseconds(optim, size, rate, seed)},
        "train_seconds": 1e6,
        "validation": {"accuracy": right, "loss": 1 - right},
        "test": {"accuracy": right - 0.125, "loss": 1 - right},
    }


def milliseconds(optim: str, size: int, rate: float, seed: int) -> float:
    return (10 if optim == "adamw" else 5) + size / 4 + 10 * rate + seed


@pytest.fixture
def swept(tmp_path: Path) -> Comparison:
    comparison = create_comparison(CONFIG, tmp_path, tmp_path / "out")
    for cell in comparison.cells:
        write(comparison, cell.name, results(*values(cell.settings)))
    return comparison


def values(settings: Any) -> tuple[str, int, float, int]:
    return (
        settings["optim"], settings["per_device_train_batch_size"], settings["learning_rate"], settings["seed"]
    )  # fmt: skip


def write(comparison: Comparison, name: str, result: dict[str, Any]) -> None:
    folder = comparison.output_dir / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(result))


def numbers(comparison: Comparison) -> dict[str, Any]:
    stability = read_stability(group_by_setting(read_results(comparison.cells, comparison.output_dir, comparison.task)))
    assert stability is not None
    return stability.numbers()


def per_cent(optim: str, rate: float, size: int) -> list[float]:
    """Test accuracies of both seeds."""
    return [100 * (RIGHT[optim, rate][SIZES.index(size)] - seed / 32 - 0.125) for seed in SEEDS]


def check(line: dict[str, Any], key: str, expected: dict[float, Sequence[float]]) -> None:
    """Mean and range over the seeds by ``key``; an empty list: no number."""
    assert line[key] == list(expected)
    for index, found in enumerate(expected.values()):
        for name, of in (("mean", statistics.mean), ("low", min), ("high", max)):
            assert line[name][index] == (pytest.approx(of(found)) if found else None)


def test_a_changes_nothing_but_the_batch_size(swept: Comparison) -> None:
    """At 64, the middle size, sgd's best is 1.0, which diverges at 16, and adamw's 0.2 of those run at other sizes."""
    found = numbers(swept)
    assert (found["measure"], found["common batch size"]) == ("test accuracy %", 64)
    check(found["A"]["adamw"], "batch size per device", {size: per_cent("adamw", 0.2, size) for size in SIZES})
    sgd = {size: per_cent("sgd", 1.0, size) if size > 16 else [] for size in SIZES}
    check(found["A"]["sgd"], "batch size per device", sgd)
    best = {"adamw": (0.1, 0.4, 0.2), "sgd": (3.0, 1.0, 3.0)}
    for optim, rates in best.items():
        again = {size: per_cent(optim, rate, size) for size, rate in zip(SIZES, rates, strict=True)}
        check(found["A, tuned again"][optim], "batch size per device", again)


def test_another_optimizer_s_batch_sizes_do_not_count(swept: Comparison) -> None:
    """adamw's best at 64 has no other size, though sgd was run with the same learning rate at all of them."""
    results = read_results(swept.cells, swept.output_dir, swept.task)
    renamed = [
        replace(one, settings={**one.settings, "learning_rate": 1.0}) if one.settings["learning_rate"] == 0.4 else one
        for one in results
    ]
    stability = read_stability(group_by_setting(renamed))
    assert stability is not None and list(stability.families["adamw"].sizes) == [16, 64, 128]
    assert stability.families["adamw"].tuned.others["learning_rate"] == 0.2


def test_b_changes_nothing_but_the_learning_rate(swept: Comparison) -> None:
    found = numbers(swept)["B"]
    for optim, rates in (("adamw", (0.1, 0.2, 0.4)), ("sgd", (1.0, 3.0))):
        check(found[optim], "learning rate", {rate: per_cent(optim, rate, 64) for rate in rates})


def test_the_table_has_the_seconds_of_an_epoch_step_time_times_steps(swept: Comparison) -> None:
    found = numbers(swept)["A"]
    for size, seconds in zip(SIZES, found["adamw"]["seconds per epoch"], strict=True):
        runs = [milliseconds("adamw", size, 0.2, seed) / 1000 * (EXAMPLES / size) for seed in SEEDS]
        assert seconds == pytest.approx(statistics.mean(runs))
    assert found["sgd"]["seconds per epoch"][0] is None  # a seed of it diverged at once


def test_what_is_drawn_are_these_numbers(swept: Comparison, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = []
    create = stability_module.new_figure
    monkeypatch.setattr(stability_module, "new_figure", lambda *a, **k: figures.append(create(*a, **k)) or figures[-1])
    settings = group_by_setting(read_results(swept.cells, swept.output_dir, swept.task))
    stability = read_stability(settings)
    assert stability is not None
    ((path, texts),) = draw_stability(tmp_path, stability).items()
    ((_, (a, b)),) = figures
    found = stability.numbers()
    assert path == tmp_path / "stability.svg" and "batch size 64" in texts.caption and path.is_file()
    ends = {optim: [found["A"][optim]["mean"][index] for index in (1, 2)] for optim in ("adamw", "sgd")}
    assert f"adamw {ends['adamw'][0]:.4g} (" in texts.alt and texts.alt.index("adamw") < texts.alt.index("sgd")
    assert f"sgd {ends['sgd'][0]:.4g} ({ends['sgd'][0]:.4g} at 64 and {ends['sgd'][1]:.4g} at 128)" in texts.alt
    assert json.loads(path.with_suffix(".json").read_text()) == found
    for axes, panel, key in ((a, "A", "batch size per device"), (b, "B", "learning rate")):
        for container, (optim, line) in zip(axes.containers, found[panel].items(), strict=True):
            x, y = container.lines[0].get_data()
            low, high = axes.get_ylim()
            kept = [i for i, mean in enumerate(line["mean"]) if mean is not None]
            assert all(low < line["low"][i] <= line["high"][i] < high for i in kept)  # nothing is cut off
            assert container.get_label() == optim
            assert [list(x), list(y)] == [[line[key][i] for i in kept], [line["mean"][i] for i in kept]]
            bars = [segment[:, 1] for segment in container.lines[2][0].get_segments()]
            assert [list(bar) for bar in bars] == [pytest.approx([line["low"][i], line["high"][i]]) for i in kept]
            lost = [line[key][i] for i in range(len(line[key])) if i not in kept]
            crosses = [one for one in axes.get_lines() if one.get_marker() == "x" and one.get_color() == colour(optim)]
            assert [x for one in crosses for x in one.get_xdata()] == lost
            assert {y for one in crosses for y in one.get_ydata()} <= {low}  # of an accuracy the bad end is below
    dotted = {line.get_color(): list(line.get_ydata()) for line in a.get_lines() if line.get_linestyle() == ":"}
    assert dotted[colour("adamw")] == found["A, tuned again"]["adamw"]["mean"]
    assert a.get_ylabel() == b.get_ylabel() == "test accuracy %"
    assert {text.get_text() for axes in (a, b) for text in axes.texts} == {"adamw", "sgd"}


def colour(optim: str) -> str:
    return OPTIMIZER_COLOURS[optim][0]


def test_the_report_has_the_picture_and_its_table(swept: Comparison) -> None:
    printed = write_report(swept)
    text = (swept.output_dir / "report.md").read_text()
    assert str(swept.output_dir / "stability.svg") in printed and text.count("(stability.svg)") == 1
    assert "| sgd | 16 | - | 3.0 | 70.94 | - |" in text  # diverged; with 3.0 the mean of 72.5 and 69.375
    assert "| adamw | 128 | 77.94 | 0.2 | 77.94 | 0.22 |" in text  # 44 and 45 ms, 5 steps
    assert "_batch_size=64, learning_rate=0.4" in text[text.index("| optimizer |") :].splitlines()[2]


def test_a_sweep_without_learning_rates_and_step_times_has_a_picture(tmp_path: Path) -> None:
    """Panel B has no line."""
    entry = {"optim": "sgd", "per_device_train_batch_size": list(SIZES)}
    comparison = create_comparison({**CONFIG, "cells": [entry]}, tmp_path, tmp_path / "out")
    for cell in comparison.cells:
        right = {"accuracy": cell.settings["per_device_train_batch_size"] / 256}
        write(comparison, cell.name, {"status": "completed", "validation": right, "test": right})
    assert f"{tmp_path / 'out' / 'stability.svg'}" in write_report(comparison)
    found = json.loads((tmp_path / "out" / "stability.json").read_text())
    assert found["A"]["sgd"]["mean"] == [6.25, 25.0, 50.0] and found["B"]["sgd"]["mean"] == []
    assert "| sgd | 64 | 25.00 | - | 25.00 | - |" in (tmp_path / "out" / "report.md").read_text()


def test_other_comparisons_have_no_stability(swept: Comparison) -> None:
    """One batch size, or another argument swept: nothing is drawn."""
    rows = read_results(swept.cells, swept.output_dir, swept.task)
    one = [row for row in rows if row.settings["per_device_train_batch_size"] == 64]
    shared = [
        replace(row, settings={k: v for k, v in row.settings.items() if k != "per_device_train_batch_size"})
        for row in one
    ]
    assert read_stability(group_by_setting(rows)) is not None
    assert read_stability(group_by_setting(one)) is read_stability(group_by_setting(shared)) is None
    assert stability_sections(swept.output_dir, group_by_setting(one)) == []


def test_the_best_of_each_optimizer_is_a_batch_size_with_a_learning_rate(swept: Comparison) -> None:
    """The best means are 99 and 95 % less a 64th; nothing is averaged over batch sizes."""
    settings = group_by_setting(read_results(swept.cells, swept.output_dir, swept.task))
    assert len(settings) == 6 + 1 + 6 and {len(setting.cells) for setting in settings} == {2}
    assert [(best.optim, best.name) for best in best_settings(settings)] == [
        ("adamw", "per_device_train_batch_size=64, learning_rate=0.4"),
        ("sgd", "per_device_train_batch_size=128, learning_rate=3.0"),
    ]


def test_without_test_accuracies_validation_is_shown_and_a_text_has_its_perplexity(swept: Comparison) -> None:
    for cell in swept.cells:
        result = results(*values(cell.settings))
        write(swept, cell.name, {**result, "test": None})
    found = numbers(swept)
    assert found["measure"] == "validation accuracy %"
    assert found["A"]["adamw"]["high"] == pytest.approx([80, 88, 92])
    for cell in swept.cells:
        loss = sum(map(ord, cell.name)) % 7 / 7 + 1
        split = {"loss": loss, "token_perplexity": 3 * loss}
        write(swept, cell.name, {"status": "completed", "validation": split, "test": split})
    rows = read_results(swept.cells, swept.output_dir, TASKS["clm"])
    texts = read_stability(group_by_setting(rows))
    assert texts is not None and texts.metric.name == "test token perplexity" and not texts.task.more_is_better
    best = min(statistics.mean(row.values["validation loss"] or 0 for row in setting.cells)
               for setting in group_by_setting(rows)
               if setting.optim == "sgd" and setting.others["per_device_train_batch_size"] == 64)  # fmt: skip
    assert texts.numbers()["A"]["sgd"]["mean"][1] == pytest.approx(3 * best)


def test_the_common_size_is_one_where_all_optimizers_have_a_result(swept: Comparison) -> None:
    for seed in SEEDS:
        for rate in (1.0, 3.0):
            write(swept, f"sgd,per_device_train_batch_size=64,learning_rate={rate},seed={seed}", {"status": "failed"})
    found = numbers(swept)
    assert found["common batch size"] == 16 and list(found["A"]) == ["adamw", "sgd"]
    assert found["A"]["sgd"]["mean"][1] is None
    settings = group_by_setting(read_results(swept.cells, swept.output_dir, swept.task))
    only = [one for one in settings if one.optim != "sgd" or one.others["per_device_train_batch_size"] == 64]
    stability = read_stability(only)
    assert stability is not None and stability.missing == ["sgd"] and list(stability.families) == ["adamw"]


@pytest.mark.subprocess
def test_step_times_are_measured_for_each_batch_size(compare: Callable[..., Comparison]) -> None:
    entries = [{"optim": "adamw", "per_device_train_batch_size": [16, 32], "learning_rate": [0.1, 0.2]}]
    comparison = compare(entries, budget="seconds=6")
    assert comparison.run() == []
    names = sorted(map(name_of, (path for path in (comparison.output_dir / "step_times").iterdir() if path.is_dir())))
    assert names == [f"adamw,per_device_train_batch_size={size}" for size in (16, 32)]
    slower = folder_of(comparison.output_dir / "step_times", names[1]) / "results.json"
    timing = json.loads(slower.read_text())
    slower.write_text(json.dumps({**timing, "step_seconds": [2 * value for value in timing["step_seconds"]]}))
    steps = {values({"seed": 0, **cell.settings})[1]: cell.common["max_steps"] for cell in comparison.plan()}
    assert steps == {16: 30, 32: 15}  # of 0.2 s and of 0.4 s


@pytest.mark.parametrize("key", ["per_device_train_batch_size", "gradient_accumulation_steps"])
def test_the_epochs_of_several_batch_sizes_are_no_budget(key: str, compare: Callable[..., Comparison]) -> None:
    swept = {"optim": "adamw", key: [2, 4]}
    fixed = {"optim": "sgd", key: 2}
    with pytest.raises(ValueError, match=f"epochs of adamw needs one {key}, and its cells have 2, 4: give a budget of"):
        compare([swept, fixed], budget="like=adamw:epochs=2")
    with pytest.raises(ValueError, match="its cells have 2, the shared one"):
        compare([fixed, {"optim": "sgd", "x": 1}], budget="like=sgd:epochs=2")
    comparison = compare([swept, fixed], budget="like=sgd:epochs=2")  # which is that of a batch size all the same
    assert comparison.reference is not None and timing_cell(comparison.reference).name == f"sgd,{key}=2"


@pytest.mark.subprocess
def test_a_dry_run_knows_epochs(tmp_path: Path, compare: Callable[..., Comparison]) -> None:
    """2 epochs of 640 images: 80 steps of 16 and 2 * 7 of 100; 0.5 s and 2 s each, and 10 s a cell."""
    entries = [{"optim": "adamw", "per_device_train_batch_size": [16, 100], "learning_rate": [0.1, 0.2]}]
    config: dict[str, Any] = {"common": {"num_train_epochs": 2}, "overhead_seconds": 10}
    assert "unknown until step times are measured" in forecast(compare(entries, config=config))
    times = {f"adamw,per_device_train_batch_size={size}": seconds for size, seconds in ((16, 0.5), (100, 2.0))}
    config |= {"train_examples": 640, "step_seconds": times}
    total = 2 * (80 * 0.5 + 14 * 2.0) + 4 * 10
    assert f"about {total / 60:.0f} min for the 4 cells left" in forecast(compare(entries, config=config))
    assert "about 88 s for the 4 cells left" in forecast(compare(entries, config=config, jobs=2))
    shared = {**config, "step_seconds": {"adamw": 1.0}}  # for all batch sizes
    assert f"about {(2 * (80 + 14) + 40) / 60:.0f} min" in forecast(compare(entries, config=shared))
    without = compare(entries, config={"common": config["common"]})
    without.measure()  # 0.2 s, and 25 steps an epoch say the fake runs
    assert f"about {4 * 2 * 25 * 0.2:.0f} s for the 4 cells left" in forecast(without)


def test_the_preset_of_the_paper_s_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = CONFIGS / "digits-stability.json"
    cells = expand_cells(json.loads(path.read_text()))
    assert {values(cell.settings)[1] for cell in cells} == {16, 32, 64, 128, 256}
    assert {"adafisherw", "adamw", "sgd"} <= {cell.optim for cell in cells}
    assert script().main(["--config", str(path), "--dry_run", "--jobs", "2"]) == 0
    text = capsys.readouterr().out
    assert f"{len(cells)} cells, 0 of them finished, 2 at a time" in text
    assert "min for the" in text and "unknown" not in text
