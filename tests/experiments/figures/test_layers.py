"""The picture of a curvature record: its arithmetic, its files, and a run of the whole way."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hf_adafisher import CurvatureCallback
from hf_adafisher.experiments.figures.layers import CurvatureRecord, common_prefix, draw_record, load_record
from hf_adafisher.experiments.figures.training_run import prepare_run
from hf_adafisher.optimizers.diagnostics.layer_curvature import NUMBERS
from hf_adafisher.training.curvature_callback import CURVATURE_FILE
from tests.experiments.runs.image_runs import TINY
from tests.scripts import load_command


def numbers(gain: float | None, median: float = 0.1) -> dict[str, float | None]:
    return {
        "fisher_min": 0.01,
        "fisher_median": median,
        "fisher_max": 1.0,
        "condition_number": 100.0,
        "floor_share": 0.25,
        "update_rms": 1e-3,
        "step_gain": gain,
    }


def write_record(folder: Path, gains: list[dict[str, float | None]], tail: str = "") -> Path:
    """A record with one refresh every ten steps; each refresh gives some layers' gain."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        {
            "step": 1 + 10 * index,
            "epoch": float(index),
            "refresh": index + 1,
            "record_seconds": 0.02,
            "interval_seconds": 4.0,
            "layers": {name: numbers(gain) for name, gain in found.items()},
        }
        for index, found in enumerate(gains)
    ]
    (folder / CURVATURE_FILE).write_text("".join(json.dumps(line) + "\n" for line in lines) + tail)
    return folder


GAINS: list[dict[str, float | None]] = [
    {"net.a.weight": 8.0, "net.a.bias": 2.0, "net.b.weight": 4.0},
    {"net.a.weight": 2.0, "net.a.bias": 2.0, "net.b.weight": 8.0, "net.late": 16.0},
    {"net.a.weight": 2.0, "net.a.bias": None, "net.b.weight": 4.0, "net.late": 64.0},
]


def test_a_step_is_relative_to_the_layer_in_the_middle(tmp_path: Path) -> None:
    record = load_record(write_record(tmp_path, GAINS, tail='{"step": 31, "lay'))
    assert record.layers == ["net.a.weight", "net.a.bias", "net.b.weight", "net.late"] and record.steps == [1, 11, 21]
    # Medians: of 8, 2, 4; of 2, 2, 8, 16; of 2, 4, 64.
    nan = math.nan
    expected = [[2, 2 / 5, 2 / 4], [2 / 4, 2 / 5, nan], [1, 8 / 5, 1], [nan, 16 / 5, 16]]
    np.testing.assert_allclose(record.relative_step, expected)
    assert record.cost == pytest.approx(0.06 / 12)
    ranking = record.ranking()  # over the later two of three refreshes
    assert [name for name, _ in ranking] == ["net.late", "net.b.weight", "net.a.weight", "net.a.bias"]
    assert [value for _, value in ranking] == pytest.approx(
        [math.sqrt(3.2 * 16), math.sqrt(1.6), math.sqrt(0.4 * 0.5), 0.4]
    )
    assert record.tables.keys() == set(NUMBERS)
    assert np.isnan(record.tables["fisher_median"][3, 0]) and record.tables["fisher_median"][3, 1] == 0.1


def test_chosen_layers_stay_relative_to_the_whole_model(tmp_path: Path) -> None:
    record = load_record(write_record(tmp_path, GAINS) / CURVATURE_FILE)
    chosen = record.select("*.weight")
    assert chosen.layers == ["net.a.weight", "net.b.weight"]
    np.testing.assert_array_equal(chosen.relative_step, record.relative_step[[0, 2]])
    with pytest.raises(ValueError, match=r"4, such as net\.a\.weight"):
        record.select("nothing*")


def test_the_script_draws_prints_and_keeps_the_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_record(tmp_path / "run", GAINS)
    assert load_command("figures").curvature([str(run)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert "4 layers, 3 refreshes up to step 21" in said
    up, down = (
        said.index(next(line for line in said if "sped up" in line)),
        said.index(next(line for line in said if "held back" in line)),
    )
    assert said[up + 1].split() == ["7.16", "net.late"] and said[down + 1].split() == ["0.4", "net.a.bias"]
    assert "recording took 0.5 % of the run's time" in said
    assert (run / "curvature.svg").stat().st_size > 10_000
    drawn = json.loads((run / "curvature.json").read_text())
    assert drawn["layers"][3] == "net.late" and drawn["step_gain"][3] == [None, 16.0, 64.0]
    assert drawn["ranking"][0]["layer"] == "net.late" and drawn["steps"] == [1, 11, 21]
    output = tmp_path / "elsewhere" / "weights.svg"
    assert load_command("figures").curvature([str(run), "--layers", "*.weight", "--output", str(output)]) == 0
    assert json.loads(output.with_suffix(".json").read_text())["layers"] == ["net.a.weight", "net.b.weight"]


@pytest.mark.parametrize(
    ("make", "flags", "words"),
    [
        (lambda folder: folder.mkdir(), (), "callbacks=[CurvatureCallback()]"),
        (lambda folder: write_record(folder, []), (), "has not refreshed"),
        (lambda folder: write_record(folder, GAINS), ("--layers", "x"), "no layer fits"),
    ],
)
def test_nothing_to_draw_is_one_line_and_status_2(
    make: Any, flags: tuple[str, ...], words: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make(tmp_path / "run")
    assert load_command("figures").curvature([str(tmp_path / "run"), *flags]) == 2
    assert words in caplog.text and len(caplog.records) == 1


@pytest.mark.parametrize(
    ("names", "prefix"),
    [
        (["net.a.weight", "net.a.bias"], "net.a."),
        (["net.a.weight", "net.ab.weight", "net.late"], "net."),
        (["one.weight", "two.weight"], ""),
        (["net.a.weight"], ""),
    ],
)
def test_a_common_prefix_ends_with_a_whole_module(names: list[str], prefix: str) -> None:
    assert common_prefix(names) == prefix


def many(layers: int, refreshes: int) -> list[dict[str, float | None]]:
    generator = np.random.default_rng(0)
    names = [f"model.block.{index // 4}.a_rather_long_name_of_part_{index % 4}.weight" for index in range(layers)]
    return [dict(zip(names, 10 ** generator.normal(size=layers), strict=True)) for _ in range(refreshes)]


@pytest.mark.parametrize(("layers", "differs"), [(1, True), (8, False), (300, True)])
def test_every_label_of_a_long_model_has_its_place(layers: int, differs: bool, tmp_path: Path) -> None:
    """No more names than fit, none of them over another, none outside the picture; no map of one value alone."""
    record: CurvatureRecord = load_record(write_record(tmp_path, many(layers, 5)))
    record.tables["condition_number"][:] = 334.0 * np.linspace(1.0, 1.0 + differs, 5)
    figure = draw_record(record, "model.")
    figure.draw_without_rendering()
    maps, bars = figure.axes[: 3 + differs], figure.axes[3 + differs]
    assert ("max F / min F is 334 in all" in figure.get_suptitle()) is not differs
    for axes in (maps[0], bars):
        boxes = [label.get_window_extent() for label in axes.get_yticklabels()]
        assert 0 < len(boxes) <= 60 and len(boxes) == min(layers, 60 if axes is maps[0] else 24)
        tops = sorted((box.y0, box.y1) for box in boxes)
        assert all(lower[1] <= upper[0] + 1 for lower, upper in itertools.pairwise(tops))
        assert all(figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 for box in boxes)
    titles = [axes.title.get_window_extent() for axes in [*maps, bars]]
    assert all(left.x1 < right.x0 for left, right in itertools.pairwise(titles))
    for axes in maps:
        (mesh,) = axes.collections
        assert mesh.get_array().size == layers * 5


@pytest.mark.slow
def test_from_a_run_of_a_training_script_to_its_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quick = [
        "--step_size",
        "paper",
        "--update_interval",
        "3",
        "--use_cpu",
        "--disable_tqdm",
        "true",
        "--per_device_train_batch_size",
        "16",
    ]
    run = prepare_run("digits", 7, tmp_path / "cct.png", None, [*quick, *TINY])
    run.new_trainer([CurvatureCallback()]).train()
    assert load_command("figures").curvature([str(run.output_dir)]) == 0
    record = load_record(run.output_dir)
    assert record.steps == [1, 4, 7]
    trained = [name for name, p in run.model.named_parameters() if p.requires_grad]
    assert record.layers == trained
    assert np.isfinite(record.relative_step).mean() > 0.9
    assert f"{len(trained)} layers, 3 refreshes up to step 7" in capsys.readouterr().out
