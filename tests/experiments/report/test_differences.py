"""Differences from a reference: their numbers against loops over seeds, their texts, and bad input."""

from __future__ import annotations

import gzip
import json
import statistics
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

from hf_adafisher.experiments.report.differences import draw_differences, paired_differences, read_differences
from hf_adafisher.experiments.report.results import CellResult, group_by_setting
from tests.scripts import load_command

ROOT = Path(__file__).parents[3]
LOSSES = {"adamw": (4.0, 4.25, 4.5, 5.0), "muon": (3.5, 3.875, 4.0, 4.25), "sgd": (4.25, 4.25, 4.25, 5.25)}
SEEDS = (20, 21, 22, 23)


def comparison(folder: Path, shift: float = 0.0) -> Path:
    """Runs of three optimizers; seed 0, which chooses, and a second setting with fewer seeds must not count."""
    rows = ["cell,folder,optim,learning_rate,seed,status,validation loss,test loss"]
    for optim, losses in LOSSES.items():
        values = [(seed, 0.1, loss + shift * (optim == "muon")) for seed, loss in zip(SEEDS, losses, strict=True)]
        values += [(0, 0.1, 99.0), (20, 0.2, 1.0)]
        rows += [f"c,f,{optim},{rate},{seed},completed,{loss},{loss}" for seed, rate, loss in values]
    folder.mkdir()
    (folder / "cells.csv").write_text("\n".join(rows) + "\n")
    header = {"configuration": {"tuning_seeds": [0]}, "command": ""}
    (folder / "runs.jsonl.gz").write_bytes(gzip.compress((json.dumps(header) + "\n").encode()))
    return folder


def test_differences_are_paired_by_seed_and_their_intervals_hold_together(tmp_path: Path) -> None:
    found = read_differences(comparison(tmp_path / "a"), "adamw", None, "test loss")
    assert [bar.name for bar in found.bars] == ["muon", "sgd"]
    for bar in found.bars:
        each = [a - b for a, b in zip(LOSSES[bar.name], LOSSES["adamw"], strict=True)]
        mean, error = statistics.mean(each), statistics.stdev(each) / 4**0.5
        reach = stats.t.ppf(1 - 0.05 / 2 / 2, 3) * error  # two rivals
        assert (bar.mean, bar.low, bar.high) == pytest.approx((mean, mean - reach, mean + reach)) and bar.seeds == 4


def test_an_optimizer_with_a_seed_that_diverged_has_no_bar(tmp_path: Path) -> None:
    """The seeds that are left would flatter it; the tables have none either."""
    folder = comparison(tmp_path / "a")
    text = (folder / "cells.csv").read_text()
    lost = next(line for line in text.splitlines() if f",muon,0.1,{SEEDS[1]}," in line)
    (folder / "cells.csv").write_text(text.replace(lost, lost.replace("completed", "diverged")))
    assert [bar.name for bar in read_differences(folder, "adamw", None, "test loss").bars] == ["sgd"]
    cells = [
        CellResult(
            "c", {"optim": optim, "seed": seed}, "completed", "", {"validation loss": loss, "test loss": loss}, []
        )
        for optim, losses in {"adamw": (5.0, 5.1, 5.0), "muon": (1.0, None, 1.0, 1.1), "lion": (5.2, 5.2, 5.3)}.items()
        for seed, loss in enumerate(losses)
    ]
    found = paired_differences(group_by_setting(cells))
    assert found is not None and [bar.name for bar in found.bars] == ["lion"]


def test_a_bar_is_hollow_where_its_interval_holds_0(tmp_path: Path) -> None:
    found = read_differences(comparison(tmp_path / "a"), "adamw", None, "test loss")
    texts = draw_differences(tmp_path / "b.svg", found)
    muon, sgd = found.bars
    assert muon.high < 0 < sgd.high and sgd.low < 0
    assert f"better: {muon.described}" in texts.alt and f"not told apart: {sgd.described}" in texts.alt
    assert "4 seeds" in texts.caption and "all 2" in texts.caption
    numbers = json.loads((tmp_path / "b.json").read_text())
    assert [bar["mean"] for bar in numbers["bars"]] == [muon.mean, sgd.mean] and numbers["reference"] == "adamw"
    picture = (tmp_path / "b.svg").read_text()
    assert "fill: #0ba38a; stroke: #0ba38a" in picture and "fill: #ffffff; stroke: #f052c8" in picture


def test_variants_of_a_study(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, output = ROOT / "docs/results/step-sizes-variants/variants.json", tmp_path / "v.svg"
    assert load_command("figures").differences([str(source), "--output", str(output)]) == 0
    compared = [row for row in json.loads(source.read_text())["rows"] if "difference" in row]
    rows = [row for row in compared if row["reference"] == "as it is"]
    assert len(rows) < len(compared)  # those from another reference are no bars of this picture
    bars = json.loads(output.with_suffix(".json").read_text())["bars"]
    assert [bar["mean"] for bar in bars] == sorted(row["difference"] for row in rows)
    picture = output.read_text()
    assert all(f">{row['variant']}</text>" in picture for row in rows)
    assert "worse: " in capsys.readouterr().out


def test_a_trend_has_a_line_for_each_optimizer(tmp_path: Path) -> None:
    folders = [str(comparison(tmp_path / name, shift)) for name, shift in (("a", 0.0), ("b", -1.0))]
    output = tmp_path / "t.svg"
    flags = ["--at", "512", "128", "--label", "width", "--output", str(output)]
    assert load_command("figures").differences([*folders, *flags]) == 0
    numbers: dict[str, Any] = json.loads(output.with_suffix(".json").read_text())
    mean = statistics.mean(LOSSES["muon"]) - statistics.mean(LOSSES["adamw"])
    assert numbers["muon"]["size"] == [128, 512] and numbers["muon"]["mean"] == pytest.approx([mean - 1, mean])
    assert numbers["over"] == "width" and ">muon</text>" in output.read_text()


def test_an_optimizer_of_one_size_alone_has_no_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    small, large, other = (comparison(tmp_path / name) for name in "abc")
    for folder, renamed in ((large, {"sgd": "lion"}), (other, {"sgd": "lion", "muon": "soap"})):
        text = (folder / "cells.csv").read_text()
        for old, new in renamed.items():
            text = text.replace(f",{old},", f",{new},")
        (folder / "cells.csv").write_text(text)
    main, output = load_command("figures").differences, tmp_path / "t.svg"
    assert main([str(small), str(large), "--at", "1", "2", "--output", str(output)]) == 0
    assert json.loads(output.with_suffix(".json").read_text()).keys() == {"metric", "reference", "over", "muon"}
    assert main([str(small), str(other), "--at", "1", "2", "--output", str(output)]) == 2
    assert "no optimizer or variant but the reference stands in two of" in caplog.text


def test_bad_input_is_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    main, folder = load_command("figures").differences, str(comparison(tmp_path / "a"))
    (tmp_path / "v.json").write_text('{"metric": "loss", "rows": [{"variant": "a", "difference": "b"}]}')
    for arguments, words in (
        ([folder, "--reference", "lion"], "no run of 'lion'"),
        ([folder, "--seeds", "20", "21"], "no optimizer has 3 seeds in common"),
        ([folder, "--metric", "accuracy"], "or no accuracy"),
        ([str(tmp_path / "v.json")], "'difference' must be a number, got 'b'"),
        ([folder, "--at", "-1"], "sizes must be above 0"),
        ([folder, folder, "--at", "1", "1"], "sizes must differ"),
    ):
        caplog.clear()
        assert main([*arguments, "--output", str(tmp_path / "a.svg")]) == 2
        assert words in caplog.text
    with pytest.raises(SystemExit):
        main([folder, folder])
