"""The picture of learning rates: its numbers are those of cells.csv, and bad input is one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hf_adafisher.experiments.report.rates import read_rates
from tests.scripts import load_command

CELLS = """cell,optim,learning_rate,seed,status,validation loss
a,adamw,0.01,0,completed,3.5
b,adamw,0.002,0,completed,3.25
c,adamw,0.002,7,completed,9.0
d,adamw,0.1,0,diverged,
e,muon,0.02,0,completed,3.0
"""


def comparison(folder: Path, text: str = CELLS) -> Path:
    folder.mkdir()
    (folder / "cells.csv").write_text(text)
    return folder


def test_rates_are_those_of_one_seed_in_order(tmp_path: Path) -> None:
    expected = {"adamw": {"0.002": 3.25, "0.01": 3.5}, "muon": {"0.02": 3.0}}
    assert read_rates(comparison(tmp_path / "a"), 0) == expected
    assert list(read_rates(tmp_path / "a", 0)["adamw"]) == ["0.002", "0.01"]


def test_picture_of_two_comparisons(tmp_path: Path) -> None:
    folders = [str(comparison(tmp_path / name)) for name in ("a", "b")]
    output = tmp_path / "rates.png"
    assert (
        load_command("figures.learning_rates").main([*folders, "--titles", "One", "Two", "--output", str(output)]) == 0
    )
    numbers = json.loads(output.with_suffix(".json").read_text())
    assert numbers["panels"] == {title: read_rates(tmp_path / "a", 0) for title in ("One", "Two")}
    assert output.stat().st_size > 5000 and output.with_suffix(".svg").read_text().count("adamw") >= 2


@pytest.mark.parametrize(
    ("text", "message"),
    [("optim,seed\na,0\n", "has no learning rates"), (CELLS.replace(",0,", ",3,"), r"no finished run with seed 0.*3")],
)
def test_cells_without_rates_are_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_rates(comparison(tmp_path / "a", text), 0)


def test_bad_command_lines_are_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    main = load_command("figures.learning_rates").main
    assert main([str(tmp_path / "missing"), "--output", str(tmp_path / "a.png")]) == 2
    assert "does not exist" in caplog.text
    with pytest.raises(SystemExit):
        main([str(tmp_path), "--titles", "a", "b"])
