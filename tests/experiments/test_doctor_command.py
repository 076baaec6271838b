"""``hf-adafisher doctor``: the first steps of a run, and nothing else of it."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from hf_adafisher.cli.doctor import main
from tests.experiments.runs.image_runs import QUICK, TINY


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_healthy_run(command: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """With the defaults; the two steps are of a run of four, whose folder is not even made."""
    assert main(["clm", *command, "--steps", "2", "--output_dir", "run"]) == 0
    out = capsys.readouterr().out
    assert 'AdaFisherW(step_size="root") after 2 steps: nothing was found' in out
    assert "learning rate: 0.004" in out and out.count("\n") < 12  # no log lines
    assert not any(tmp_path.iterdir())


def test_findings_are_printed_and_written(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--steps", "2", "--learning_rate", "2e-5", "--json", "found.json"]
    assert main(["clm", *command, *flags]) == 1
    (finding,) = json.loads(Path("found.json").read_text())["findings"]
    assert finding["ailment"] == "learning-rate" and finding["argument"] == "learning_rate"
    assert f"1. [learning-rate] {finding['sentence']}" in capsys.readouterr().out


def test_an_image_run(capsys: pytest.CaptureFixture[str]) -> None:
    """The file of arguments is the run's own; clipping at this norm is what a user could have forgotten."""
    flags = ["--steps", "3", "--step_size", "paper", "--max_grad_norm", "0.01"]
    assert main(["image", *QUICK, *TINY, *flags]) == 1
    out = capsys.readouterr().out
    assert 'AdaFisherW(step_size="paper") after 3 steps' in out and "Clipping rescales every step by 0.0" in out


def test_a_resumed_run(finished: Path, command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """From its own folder, which stays as it is; all of its four steps are done, and two more are asked for."""
    before = sorted(finished.rglob("*"))
    command = [*command[:-1], "6", "--output_dir", str(finished), "--resume_from_checkpoint", "last"]
    assert main(["clm", *command, "--steps", "5"]) == 0
    assert "after 6 steps: nothing was found" in capsys.readouterr().out
    assert sorted(finished.rglob("*")) == before


def test_a_checkpoint_that_has_all_steps(finished: Path, command: list[str], caplog: pytest.LogCaptureFixture) -> None:
    assert main(["clm", *command, "--output_dir", str(finished), "--resume_from_checkpoint", "last"]) == 2
    assert "checkpoint-4 has all steps of the run: there is none left to watch" in caplog.text


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["clm", "--steps", "0"], "steps is 0; it must be a whole number"),
        (["clm", "--learning_rat", "1"], "unknown argument --learning_rat, did you mean '--learning_rate'"),
        (["clm", "nothing.json"], "configuration file 'nothing.json' does not exist"),
        (
            ["image", *QUICK, *TINY, "--optim", "adamw", "--steps", "1"],
            "optim=adamw: the doctor knows adafisher, adafisherw, spectral-adafisher",
        ),
    ],
)
def test_bad_input_is_one_line(flags: list[str], problem: str, caplog: pytest.LogCaptureFixture) -> None:
    assert main(flags) == 2
    errors = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert len(errors) == 1 and problem in errors[0]
