"""E15: command lines take whole names only, and name the nearest one."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from hf_adafisher.experiments.command_line import StrictParser
from hf_adafisher.experiments.figures.command_line import given_arguments
from hf_adafisher.experiments.runs.clm_arguments import parse_clm_arguments
from hf_adafisher.experiments.runs.image_arguments import parse_image_arguments
from tests.scripts import load_command

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("parse", [parse_clm_arguments, parse_image_arguments])
@pytest.mark.parametrize("words", [["--dampin", "0.1"], ["--dampin=0.1"], ["--dampng", "0.1"]])
def test_the_beginning_of_a_name_is_an_error_with_the_nearest_name(parse: Any, words: list[str]) -> None:
    """E15: ``--dampin 0.1`` was taken as ``--damping 0.1``, without a word."""
    with pytest.raises(ValueError, match=r"unknown argument --damp\w+, did you mean '--damping'"):
        parse(words)


def test_a_value_of_another_type_is_a_sentence_too() -> None:
    """E15: the parser's errors are one line, not a page of usage."""
    with pytest.raises(ValueError, match=r"--update_interval.*: invalid int value: 'x'"):
        parse_clm_arguments(["--update_interval", "x"])
    with pytest.raises(ValueError, match="these words belong to no argument: stray"):
        parse_clm_arguments(["stray"])


def test_keys_of_a_file_are_whole_names_too(tmp_path: Path) -> None:
    """E15, for the JSON file that may stand instead of a command line."""
    path = tmp_path / "a.json"
    for content, message in (
        ({"dampin": 0.1}, "unknown key 'dampin', did you mean 'damping'"),
        ([1], "must hold an object"),
    ):
        path.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=message) as error:
            parse_clm_arguments([str(path)])
        assert str(path) in str(error.value)
    path.write_text('{"damping": 0.1, "damping": 0.2}')
    with pytest.raises(ValueError, match="'damping' stands there twice"):
        parse_clm_arguments([str(path)])


def test_an_option_of_a_file_has_two_names(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for name in ("step_size", "adafisher_step_size"):
        path.write_text(json.dumps({name: "paper", "damping": 0.2, "output_dir": str(tmp_path)}))
        assert parse_clm_arguments([str(path)])[2].optimizer_options() == {"damping": 0.2, "step_size": "paper"}
    path.write_text('{"damping": 0.1, "adafisher_damping": 0.2}')
    with pytest.raises(ValueError, match="damping and adafisher_damping are one argument: give adafisher_damping only"):
        parse_clm_arguments([str(path)])
    path.write_text('{"damping": "x"}')
    with pytest.raises(ValueError, match=r"damping.*: invalid float value: 'x'"):
        parse_clm_arguments([str(path)])


@pytest.mark.parametrize(
    ("command", "words", "near"),
    [
        ("compare", ["demo", "--dry_ru"], "--dry_run"),
        ("benchmark", ["--round", "3"], "--rounds"),
        ("list_optimizers", ["--jso"], "--json"),
        ("main", ["figures", "curvature", "a", "--layer", "b"], "--layers"),
    ],
)
def test_the_other_commands(
    command: str, words: list[str], near: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """E15, for commands that are no runs."""
    monkeypatch.setattr(sys, "argv", sys.argv)  # main sets it
    with pytest.raises(SystemExit) as stop:
        load_command(command).main(words)
    assert stop.value.code == 2 and f"did you mean '{near}'" in capsys.readouterr().err


def test_no_script_has_a_parser_of_another_kind() -> None:
    """E15: also one that is written tomorrow."""
    parsers = re.compile(r"\bArgumentParser\(|HfArgumentParser\(")
    found = [
        path.name
        for folder in ("hf_adafisher", "scripts")
        for path in (ROOT / folder).rglob("*.py")
        if parsers.search(path.read_text())
    ]
    assert found == [] and StrictParser(allow_abbrev=True).allow_abbrev is False


def test_figures_know_the_run_s_arguments_by_whole_names() -> None:
    """E15: what a figure refuses is found by the parser of the run."""
    assert given_arguments("clm", ["--eval_strat", "no", "--seed", "3"]) == {"seed": 3}
