"""The command ``hf-adafisher``."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hf_adafisher.cli.main import COMMANDS, FIGURES, describe, main
from hf_adafisher.experiments.comparison.configuration import PRESETS, available_presets
from tests.scripts import folder_of, load_command

ROOT = Path(__file__).parents[2]
FIGURE_WORDS = [["figures", name] for name in FIGURES]
COMMAND_WORDS = [[name] for name in COMMANDS]


@pytest.fixture(autouse=True)
def same_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["hf-adafisher"])  # a command sets it


def test_the_help_names_every_command_with_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    assert dict(lines) == {name: line for name, (_, line) in COMMANDS.items()}
    assert main(["figures", "-h"]) == 0
    out = capsys.readouterr().out
    assert "usage: hf-adafisher figures COMMAND" in out and all(f"  {name} " in out for name in FIGURES)


def test_no_command_and_a_wrong_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2 and "which command?" in capsys.readouterr().err
    assert main(["compar", "demo"]) == 2
    assert "unknown command 'compar', did you mean 'compare'" in capsys.readouterr().err
    assert main(["figures", "factor"]) == 2 and "did you mean 'factors'" in capsys.readouterr().err


@pytest.mark.parametrize("words", [*COMMAND_WORDS, *FIGURE_WORDS], ids=" ".join)
def test_every_command_has_a_help_of_its_own_name(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    try:
        status = main([*words, "--help"])
    except SystemExit as stop:
        status = stop.code  # type: ignore[assignment]
    out = capsys.readouterr().out
    assert status == 0 and out.startswith(f"usage: hf-adafisher {' '.join(words)} ")


@pytest.mark.subprocess
def test_the_list_of_commands_imports_no_transformers() -> None:
    code = "import sys; from hf_adafisher.cli.main import main; main(['--help']); print('transformers' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[-1] == "False"


def test_the_package_names_the_command() -> None:
    (entry,) = re.findall(r'^hf-adafisher = "(.*):main"$', (ROOT / "pyproject.toml").read_text(), re.M)
    assert importlib.import_module(entry).main is main
    assert PRESETS.is_relative_to(ROOT / "hf_adafisher")  # the folder that is packed


def test_describe_aligns_the_lines() -> None:
    text = describe("p", "About.", {"a": ("m:f", "one"), "long-name": ("m:f", "two")})
    assert "  a          one\n  long-name  two" in text


@pytest.mark.subprocess
def test_a_comparison_by_name_and_its_report_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], program: Path
) -> None:
    """A preset, run elsewhere than in a clone, by programs that stand in for the runs."""
    monkeypatch.chdir(tmp_path)
    compare = load_command("compare")
    monkeypatch.setattr(compare, "PROGRAMS", program.parent)
    monkeypatch.setattr(load_command("report"), "PROGRAMS", program.parent)
    assert {"demo", "lm-scratch", "python-docs-small"} <= set(available_presets())
    assert main(["compare", "demo", "--budget", "steps=4"]) == 0
    out = tmp_path / "out" / "demo"
    report = (out / "report.md").read_text()
    assert "hf-adafisher compare demo --budget steps=4" in report
    assert json.loads((out / "configuration.json").read_text())["budget"] == "steps=4"
    (out / "report.md").unlink()
    assert main(["report", str(out)]) == 0
    again = (out / "report.md").read_text()
    assert again.replace(f"hf-adafisher report {out}", "") == report.replace(
        "hf-adafisher compare demo --budget steps=4", ""
    )
    assert folder_of(out, "adafisherw").is_dir()
    assert main(["report", str(tmp_path)]) == 2
    assert "has no configuration.json and no runs.jsonl.gz" in capsys.readouterr().err
