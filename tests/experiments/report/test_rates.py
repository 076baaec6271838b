"""The picture of learning rates: its numbers are those of cells.csv, and bad input is one line."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pandas as pd
import pytest

from hf_adafisher.experiments.report.rates import BAND, forgiven_factor, read_cells, read_rates, relative_to_best
from tests.scripts import load_command

CELLS = """cell,optim,learning_rate,optim_args,seed,status,validation loss
a,adamw,0.01,,0,completed,3.5
b,adamw,0.002,,0,completed,3.25
c,adamw,0.002,,7,completed,9.0
d,adamw,0.1,,0,diverged,
e,muon,0.02,adamw_lr=1,0,completed,3.0
f,muon,0.04,adamw_lr=1,0,completed,3.125
g,muon,0.02,adamw_lr=2,0,completed,3.0625
"""


def comparison(folder: Path, text: str = CELLS) -> Path:
    folder.mkdir()
    (folder / "cells.csv").write_text(text)
    return folder


def line(*points: tuple[float, float]) -> pd.DataFrame:
    rows = [(rate, loss, loss, loss, 1) for rate, loss in points]
    return pd.DataFrame(rows, columns=["learning rate", "mean", "low", "high", "seeds"])


def test_rates_are_those_of_the_seeds_in_order(tmp_path: Path) -> None:
    """Of muon's two settings, that of its best run: no line mixes them."""
    found = read_rates(comparison(tmp_path / "a"), [0])
    assert {name: dict(zip(rows["learning rate"], rows["mean"], strict=True)) for name, rows in found.items()} == {
        "adamw": {0.002: 3.25, 0.01: 3.5, 0.1: math.inf},
        "muon": {0.02: 3.0, 0.04: 3.125},
    }
    both = read_rates(tmp_path / "a", [0, 7])["adamw"].iloc[0]
    assert (both["mean"], both["low"], both["high"], both["seeds"]) == (6.125, 3.25, 9.0, 2)


def test_two_forms_of_an_optimizer_are_two_lines(tmp_path: Path) -> None:
    text = "cell,optim,step_size,seed,status,validation loss\n"
    text += "a,adafisherw,paper,0,completed,3\nb,adafisherw,,0,completed,2\n"
    assert list(read_cells(comparison(tmp_path / "a", text))["optimizer"]) == ["adafisherw (paper)", "adafisherw"]


def test_forgiveness_is_measured_from_each_best() -> None:
    """The losses rise by BAND an octave to the right, and twice as fast to the left: 2^1 and 2^0.5 are forgiven."""
    rates = [2.0**power for power in range(-5, 5)]
    moved = relative_to_best(line(*((rate, 4.0 + BAND * max(math.log2(rate), -2 * math.log2(rate))) for rate in rates)))
    assert list(moved["learning rate"]) == [2.0**power for power in range(-3, 4)]  # a factor of 64
    assert moved["mean"].tolist() == pytest.approx([BAND * height for height in (6, 4, 2, 0, 1, 2, 3)])
    factor, bound = forgiven_factor(moved)
    assert factor == pytest.approx(2**1.5) and not bound
    assert forgiven_factor(moved.iloc[2:5])[1]  # the band reaches the last rate that was tried
    wall = relative_to_best(line((0.1, 4.0), (0.2, math.inf), (0.05, 9.0)).sort_values("learning rate"))
    assert forgiven_factor(wall)[0] == pytest.approx(2 ** (BAND / 5))


@pytest.mark.parametrize("relative", [False, True])
def test_picture_of_two_comparisons(tmp_path: Path, relative: bool) -> None:
    folders = [str(comparison(tmp_path / name)) for name in ("a", "b")]
    output = tmp_path / "rates.svg"
    flags = ["--titles", "One", "Two", "--output", str(output), *["--relative"] * relative]
    assert load_command("figures").learning_rates([*folders, *flags]) == 0
    numbers = json.loads(output.with_suffix(".json").read_text())
    assert list(numbers["panels"]) == ["One", "Two"] and numbers["panels"]["One"] == numbers["panels"]["Two"]
    adamw = numbers["panels"]["One"]["adamw"]
    assert adamw["learning rate"] == ([1.0, 5.0] if relative else [0.002, 0.01, 0.1])
    assert adamw["mean"] == ([0.0, 0.25] if relative else [3.25, 3.5, None])
    text = output.read_text()
    assert text.count(">adamw") == 2 and ("2 % of perplexity" in text) is relative


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optim,seed\na,0\n", "has no optimizers, seeds and states"),
        (CELLS.replace(",0,", ",3,"), r"no finished run with seeds.*3"),
        ("cell,optim,seed,status,validation loss\na,sgd,0,completed,3\n", "has no learning rates"),
    ],
)
def test_cells_without_rates_are_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_rates(comparison(tmp_path / "a", text), [0])


def test_bad_command_lines_are_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    main = load_command("figures").learning_rates
    assert main([str(tmp_path / "missing"), "--output", str(tmp_path / "a.png")]) == 2
    assert "does not exist" in caplog.text
    with pytest.raises(SystemExit):
        main([str(tmp_path), "--titles", "a", "b"])
