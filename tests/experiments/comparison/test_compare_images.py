"""Comparisons by what their task measures: images by accuracy, texts by loss; published numbers; --set."""

from __future__ import annotations

import csv
import json
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hf_adafisher.experiments.comparison.cells import expand_cells, set_arguments, use_local_data
from hf_adafisher.experiments.comparison.protocol import Comparison
from hf_adafisher.experiments.comparison.published import read_published_results
from hf_adafisher.experiments.comparison.stored import load_result
from hf_adafisher.experiments.comparison.tasks import TASKS
from hf_adafisher.experiments.report import pictures
from hf_adafisher.experiments.report.results import CellResult, best_settings, group_by_setting, read_results
from hf_adafisher.experiments.report.write_report import write_report
from hf_adafisher.models import available_architectures
from hf_adafisher.optimizers.factory.create import available_optimizers
from tests.experiments.comparison.test_compare import CONFIGS, PRESETS, script

Compare = Callable[..., Comparison]
IMAGE = TASKS["image"]
ENTRIES = [
    {"optim": "adamw", "learning_rate": [0.1, 0.25, 2.0]},
    {"optim": "adafisher", "learning_rate": [0.1, 0.25, 0.5]},
]
PAPER = {"source": "Table 9 & <co>", "measure": "test accuracy %", "values": {"adafisher": 96.2, "kfac": 95.0}}


@pytest.fixture
def finished(compare: Compare) -> Comparison:
    comparison = compare(ENTRIES, seeds=[0, 1], budget="seconds=30", jobs=2, config={"task": "image", "paper": PAPER})
    comparison.run()
    return comparison


def preset(name: str) -> dict[str, Any]:
    return json.loads((CONFIGS / f"{name}.json").read_text())


def row(lr: float, accuracy: float | None, loss: float | None, seed: int = 0, status: str = "completed") -> CellResult:
    values = {"validation accuracy %": accuracy, "validation loss": loss}
    return CellResult(f"a{lr}{seed}", {"optim": "a", "lr": lr, "seed": seed}, status, "", values, [], IMAGE)


def best(rows: list[CellResult]) -> float:
    (setting,) = best_settings(group_by_setting(rows))
    return setting.others["lr"]


def test_accuracy_decides_and_equal_ones_are_decided_by_the_loss() -> None:
    worse = [row(1, 90.0, 0.1), row(2, 91.0, 9.0)]
    assert best(worse) == 2
    assert best([*worse, row(3, 91.0, 8.0)]) == 3 and best([row(3, 91.0, 8.0), *worse]) == 3
    # Of 180 images 150, 151 and 152 are right, and three times 151: the same mean, but not in binary numbers.
    uneven = [row(1, 100 * (right / 180), 0.2, seed) for seed, right in enumerate((150, 151, 152))]
    even = [row(2, 100 * (151 / 180), loss, seed) for seed, loss in enumerate((0.1, 0.2, 0.2))]
    assert group_by_setting(uneven)[0].cost < group_by_setting(even)[0].cost
    assert best([*uneven, *even]) == 2 and best([*even, *uneven]) == 2
    assert best([*worse, row(4, 99.0, None, status="diverged"), row(5, None, None)]) == 2


@pytest.mark.subprocess
def test_the_table_of_the_best_has_what_images_are_measured_by(finished: Comparison) -> None:
    """The fake accuracies: 0.875 - |lr - 0.3| - 1/8 for adamw - seed / 64; by its loss, 0.1 would be the best rate."""
    printed = write_report(finished)
    text = (finished.output_dir / "report.md").read_text()
    header, _, first, second = text[text.index("| optimizer |") :].splitlines()[:4]
    table = dict(zip(*([cell.strip() for cell in line.split("|")[1:-1]] for line in (header, first)), strict=True))
    accuracy = [100 * (0.875 - 0.05 - seed / 64) for seed in (0, 1)]
    loss = [4 + 0.15**2 + seed / 8 for seed in (0, 1)]
    assert table == {
        "optimizer": "adafisher",
        "setting": "learning_rate=0.25",
        "seeds": "2",
        "validation accuracy %": f"{statistics.mean(accuracy):.2f} ± {statistics.stdev(accuracy):.2f}",
        "validation loss": f"{statistics.mean(loss):.4f} ± {statistics.stdev(loss):.4f}",
        "test accuracy %": f"{statistics.mean(accuracy):.2f} ± {statistics.stdev(accuracy):.2f}",
        "test top-5 %": f"{75 + statistics.mean(accuracy) / 4:.2f} ± {statistics.stdev(accuracy) / 4:.2f}",
        "test loss": f"{statistics.mean(loss):.4f} ± {statistics.stdev(loss):.4f}",
        "paper: test accuracy %": "96.20",
        "steps": "100",
        "planned s": "30.0",
        "used s": "30.0",
        "ms per step": "12",
        "optimizer bytes": "1,048,576",
    }
    assert second.startswith("| adamw | learning_rate=0.25 | 2 | 69.22 ±")
    assert "| - |" in second  # the paper has no number for it
    assert "highest mean validation accuracy" in text and "over all images of each split" in text
    assert "perplexity" not in text and "2 of 12 runs diverged" in printed


@pytest.mark.subprocess
def test_every_cell_is_in_the_csv_in_per_cent(finished: Comparison) -> None:
    write_report(finished)
    with (finished.output_dir / "cells.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 12
    for line in lines:
        result = load_result(finished.output_dir / line["folder"])
        for split in ("validation", "test"):
            assert float(line[f"{split} accuracy %"]) == 100 * result[split]["accuracy"]
            assert float(line[f"{split} top-5 %"]) == 100 * result[split]["top5_accuracy"]
            assert line[f"{split} loss"] == ("" if result[split]["loss"] is None else repr(result[split]["loss"]))
    assert not [name for name in lines[0] if "perplexity" in name]


@pytest.mark.subprocess
def test_the_paper_is_named_below_its_column(finished: Comparison) -> None:
    printed = write_report(finished)
    for name, source in (("report.md", "Table 9 &amp; &lt;co&gt;"), ("report.html", "Table 9 &amp; &lt;co&gt;")):
        text = (finished.output_dir / name).read_text()
        column, below = text.index("paper: test accuracy %"), text.index(source)
        assert column < below < text.index("Curves and learning rates")
    assert "Table 9 & <co>" in printed and "| 96.20 |" in printed


def test_what_is_published_depends_on_the_data() -> None:
    values = {"cifar10": {"sgd": 1.0}, "cifar100": {"sgd": 2}}
    config = {"paper": {**PAPER, "by": "dataset", "values": values}, "common": {"dataset": "cifar10"}, "cells": []}
    found = [
        read_published_results(set_arguments(config, [f"dataset={name}"])) for name in ("cifar10", "cifar100", "digits")
    ]
    assert [paper and dict(paper.values) for paper in found] == [{"sgd": 1.0}, {"sgd": 2}, None]
    assert (
        read_published_results(set_arguments(config, ["dataset=null"])) is None and read_published_results({}) is None
    )
    with pytest.raises(ValueError, match='is "by" missing'):
        read_published_results({"paper": {**PAPER, "values": values}})
    with pytest.raises(ValueError, match='a level for each of "by"'):
        read_published_results(config | {"paper": {**PAPER, "by": ["dataset", "dataset"], "values": {"cifar10": 3.0}}})
    for paper in ({**PAPER, "value": {}}, {"source": "a", "values": {}}):
        with pytest.raises(ValueError, match='"paper" needs'):
            read_published_results({"paper": paper})


@pytest.mark.subprocess
@pytest.mark.parametrize(
    ("task", "common", "entries", "words"),
    [
        ("clm", {}, [{}], "per token over the whole text"),
        ("clm", {"max_eval_lines": 500}, [{}, {"seed": 1}], "over the first 500 lines of the text"),
        ("clm", {"max_eval_samples": 500}, [{}], "over the first 500 lines of the text"),
        ("clm", {}, [{"max_eval_lines": [5, 7]}], "over the first max_eval_lines (see each run) lines"),
        ("image", {"max_eval_samples": 500}, [{}], "over at most 500 images of each split"),
        ("image", {"max_eval_lines": 500}, [{}], "over all images of each split"),
    ],
)
def test_the_report_says_what_the_numbers_are_taken_over(
    task: str, common: dict[str, Any], entries: list[dict[str, Any]], words: str, compare: Compare
) -> None:
    cells = [{"optim": "adamw", **entry} for entry in entries]
    comparison = compare(cells, config={"task": task, "common": common})
    comparison.run()
    write_report(comparison)
    text = (comparison.output_dir / "report.md").read_text()
    assert words in text and text.count(" over the ") + text.count(" over all ") + text.count(" over at ") >= 1
    assert (" whole text" in text) == ("whole text" in words)


@pytest.mark.subprocess
def test_pictures_show_the_error(finished: Comparison, monkeypatch: pytest.MonkeyPatch) -> None:
    """In per cent, from what was logged on the way, and at the end against the learning rate."""
    figures = []
    create = pictures.new_figure
    monkeypatch.setattr(pictures, "new_figure", lambda *a, **k: figures.append(create(*a, **k)) or figures[-1])
    settings = group_by_setting(read_results(finished.plan(), finished.output_dir, IMAGE))
    captions = pictures.draw_pictures(finished.output_dir, settings, best_settings(settings))
    assert [path.name for path in captions] == ["curves.svg", "curves_by_seconds.svg", "learning_rates.svg"]
    assert all(path.is_file() and one.caption.startswith("Validation error ") for path, one in captions.items())
    (_, (training, curves)), (_, (_, seconds)), (figure, sweeps) = figures
    assert training.get_ylabel() == "training loss (nats)"
    assert curves.get_ylabel() == seconds.get_ylabel() == "validation error (% of the images)"
    assert (curves.get_xlabel(), seconds.get_xlabel()) == ("optimizer steps", "training seconds")
    assert figure.get_supylabel() == "validation error (% of the images)"
    final = [100 - 100 * (0.875 - 0.05 - seed / 64) for seed in (0, 1)]
    (line,) = [line for line in curves.get_lines() if line.get_label() == "adafisher"]
    first = [100 - (100 - value) / 100 for value in final]  # after one of a hundred steps
    assert list(line.get_ydata()) == pytest.approx([statistics.mean(first), statistics.mean(final)])
    adamw = sweeps[0]
    assert adamw.get_title() == "adamw"
    valley = adamw.containers[0].lines[0]
    rates, errors = valley.get_xdata(), valley.get_ydata()
    expected = {rate: 100 - 100 * (0.75 - abs(rate - 0.3) - 1 / 128) for rate in (0.1, 0.25)}
    assert dict(zip(rates, errors, strict=True)) == pytest.approx(
        {rate: error for rate, error in expected.items() if error <= adamw.get_ylim()[1]}
    )
    assert 0.25 in rates and 2.0 not in rates


@pytest.mark.filterwarnings("error")
def test_equal_accuracies_can_be_drawn(tmp_path: Path) -> None:
    """All right from the first evaluation on: there is no range to fill the frame."""
    history = [{"step": step, "train_seconds": step, "eval_accuracy": 1.0} for step in (1, 2)]
    rows = [
        CellResult(f"a{lr}", {"optim": "a", "learning_rate": lr}, "completed", "", {"validation accuracy %": 100.0,
            "validation loss": 0.1}, history, IMAGE) for lr in (0.1, 0.2)
    ]  # fmt: skip
    settings = group_by_setting(rows)
    assert len(pictures.draw_pictures(tmp_path, settings, best_settings(settings))) == 3


@pytest.mark.subprocess
def test_a_finished_cell_is_told_by_what_decides(compare: Compare, capsys: pytest.CaptureFixture[str]) -> None:
    compare([{"optim": "adamw", "learning_rate": [0.25, 2.0]}], config={"task": "image"}).run()
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert [line for line in lines if line.startswith("adamw")] == [
        "adamw,learning_rate=0.25: validation accuracy 70.00 %, 7 steps, 2 s",
        "adamw,learning_rate=2.0: diverged, 7 steps, 2 s",
    ]


def test_shared_arguments_can_be_set() -> None:
    config = {"common": {"dataset": "a", "flip": 0.5, "keep": 1}, "cells": [{"optim": "x", "damping": 1}]}
    pairs = ["dataset=b", "flip=null", "model_name_or_path=/a=b c", "--mixup=0.2", "skip_broken=true", "files=[1, 2]"]
    common = set_arguments(config, pairs)["common"]
    assert common == {
        "dataset": "b", "keep": 1, "model_name_or_path": "/a=b c", "mixup": 0.2, "skip_broken": True, "files": [1, 2],
    }  # fmt: skip
    assert config["common"] == {"dataset": "a", "flip": 0.5, "keep": 1}
    (cell,) = expand_cells(set_arguments(config, pairs))
    assert " ".join(cell.arguments()).endswith("--mixup 0.2 --skip_broken true --files 1 2 --optim x --damping 1")


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ("damping=2", "have a damping of their own"),
        ("optim=adam", "use --optimizers"),
        ("seed=2", "use --seeds"),
        ("max_steps=2", "use --budget"),
        ("num_train_epochs=2", "use --budget"),
        ("output_dir=x", "use --output_dir"),
        ("flip", "takes key=value, got 'flip'"),
        ("=1", "takes key=value"),
        ('flip={"a": 1}', "no value of an argument"),
    ],
)
def test_what_cannot_be_set(pair: str, message: str) -> None:
    config = {"cells": [{"optim": "x", "damping": 1}], "seeds": [0], "budget": "steps=3"}
    with pytest.raises(ValueError, match=message):
        set_arguments(config, [pair])
    if message in ("use --seeds", "use --budget"):  # without these, it is an argument like any other
        assert set_arguments({"cells": config["cells"]}, [pair])["common"]


def test_the_script_sets_arguments_and_reads_images_from_a_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = {"task": "image", "common": {"dataset": "cifar10", "flip": 0.5}, "cells": [{"optim": "adam"}]}
    (tmp_path / "c.json").write_text(json.dumps(config))
    command = ["--config", str(tmp_path / "c.json"), "--budget", "steps=3", "--list_commands"]
    assert script().main([*command, "--local_data", str(tmp_path), "--set", "flip=0", "image_size=8"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    wanted = f"image.py --flip 0 --data_dir {tmp_path} --image_size 8 --max_steps 3 --optim adam "
    assert wanted in line and "--dataset" not in line
    for extra, message in (
        (["--set", "max_steps=2"], "use --budget"),
        (["--set", "flip"], "key=value"),
        (["--local_data", str(tmp_path / "nowhere")], "nowhere does not exist"),
    ):
        assert script().main([*command, *extra]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.subprocess
def test_what_was_set_stands_in_the_report(compare: Compare) -> None:
    config = set_arguments({"task": "image", "common": {"flip": 0.5}, "cells": [{"optim": "adam"}]}, ["cutout=8"])
    comparison = compare(config["cells"], config={"task": "image", "common": config["common"]})
    comparison.run()
    write_report(comparison)
    text = (comparison.output_dir / "report.md").read_text()
    assert "| cutout | 8 |" in text and "| flip | 0.5 |" in text and "| task | image |" in text


def test_local_images_take_the_place_of_the_data_set(tmp_path: Path) -> None:
    config = {"task": "image", "common": {"dataset": "cifar10", "flip": 0.5}, "cells": [{"optim": "adam"}]}
    assert use_local_data(config, tmp_path)["common"] == {"flip": 0.5, "data_dir": str(tmp_path)}
    assert config["common"]["dataset"] == "cifar10"


@pytest.mark.parametrize(
    "name",
    [str(path.relative_to(CONFIGS).with_suffix("")) for path in PRESETS if '"task": "image"' in path.read_text()],
)
def test_every_optimizer_of_a_preset_has_three_learning_rates(name: str) -> None:
    config = preset(name)
    rates: dict[str, set[float]] = {}
    for cell in expand_cells(config):
        rates.setdefault(cell.optim, set()).add(cell.settings["learning_rate"])
    assert all(len(found) >= 3 for found in rates.values())
    assert config["common"].get("model", "resnet18") in available_architectures()
    if name == "digits-small":
        assert set(rates) == set(available_optimizers())


def test_settings_without_published_numbers_are_told_so(compare: Compare, caplog: pytest.LogCaptureFixture) -> None:
    paper = {"source": "here", "measure": "accuracy", "by": "dataset", "values": {"cifar10": {"adamw": 90}}}
    for common, silent in (({"dataset": "cifar10"}, True), ({"dataset": "cifar11"}, False), ({}, False)):
        caplog.clear()
        compare(ENTRIES, config={"task": "image", "paper": paper, "common": common})
        assert (not caplog.records) == silent
    assert "dataset: not given" in caplog.text


@pytest.mark.parametrize("right", [2, 7, 11])
def test_seeds_of_equal_accuracy_are_drawn(right: int, tmp_path: Path) -> None:
    """The mean of three equal numbers is not always that number, in floating point."""
    rows = [row(lr, 100 * (right / 180), 0.5, seed) for lr in (1.0, 2.0) for seed in range(3)]
    renamed = {"lr": "learning_rate"}
    rows = [replace(one, settings={renamed.get(key, key): v for key, v in one.settings.items()}) for one in rows]
    settings = group_by_setting(rows)
    assert tmp_path / "learning_rates.svg" in pictures.draw_pictures(tmp_path, settings, best_settings(settings))


PUBLISHED = ["adam", "adamw", "adafisher", "adafisherw", "sgd", "adahessian", "kfac", "shampoo"]


@pytest.mark.parametrize(
    ("name", "chosen", "expected"),
    [
        ("paper/cifar-cnn", "dataset=cifar10", [94.85, None, 96.25, None, 95.64, 95.44, 95.17, 94.08]),
        ("paper/cifar-cnn", "dataset=cifar100 model=resnet50", [74.65, None, 79.77, None, 78.01, 75.81, 77.40, 78.07]),
        (
            "paper/cifar-transformers",
            "dataset=cifar100 model=swin-t",
            [None, 60.21, None, 66.05, 54.89, 56.86, 34.45, 30.39],
        ),
        ("paper/cifar-transformers", "dataset=cifar10", [None, 83.89, None, 84.94, 78.76, None, 33.08, 35.16]),
        ("paper/transfer-cifar", "dataset=cifar10", [96.45, None, 97.13, None, 96.50, 96.35, 96.45, 96.03]),
        ("paper/imagenet1k-resnet50", "flip=0.5", [67.78, None, 76.95, None, 76.40, None, 70.96, 72.82]),
        ("wikitext2-gpt1-paper", "block_size=256", [None, 175.06, None, 152.72, None, 407.69, None, 1727.75]),
        ("ptb-gpt1-paper", "block_size=256", [None, 44.70, None, 41.15, None, 59.43, None, None]),
    ],
)
def test_published_numbers(name: str, chosen: str, expected: list[float | None]) -> None:
    config = preset(name)
    paper = read_published_results(set_arguments(config, chosen.split()))
    assert [paper.values.get(optim) if paper else None for optim in PUBLISHED] == expected
    if paper is not None:
        assert set(paper.values) <= {entry["optim"] for entry in config["cells"]} and "2405.16397" in paper.source


@pytest.mark.parametrize("path", sorted((CONFIGS / "paper").glob("*cifar*.json")), ids=lambda path: path.stem)
def test_the_paper_has_its_own_optimizer_first(path: Path) -> None:
    """What it claims of every network and data set; a slip of the pen in a table would be likely to break it."""
    config = preset(f"paper/{path.stem}")
    own = config["budget"].removeprefix("like=").split(":")[0]
    network, _ = config["paper"]["by"]
    for model, tables in config["paper"]["values"].items():
        assert set(tables) == {"cifar10", "cifar100"}
        for dataset in tables:
            paper = read_published_results(set_arguments(config, [f"{network}={model}", f"dataset={dataset}"]))
            assert paper is not None and max(paper.values, key=lambda name: paper.values[name]) == own
