"""What the pages say about their pictures stands in the numbers beside them, and these are those of the archives."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from hf_adafisher.cli.main import main
from tests.scripts import as_command
from tests.test_readme import CALLS

ROOT = Path(__file__).parents[1]
FIGURES = ROOT / "docs" / "figures"
TEXT = " ".join((ROOT / "docs" / "results.md").read_text(encoding="utf-8").split())


def numbers(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((FIGURES / f"{name}.json").read_text(encoding="utf-8"))
    return found


@pytest.mark.parametrize("name", ["factors", "factors_layers", "histogram", "curvature"])
def test_the_commands_behind_the_numbers_are_the_readmes(name: str) -> None:
    for command in numbers(name)["command"].split("; "):
        assert f"`{as_command(command)}`" in TEXT


def test_energy_on_the_diagonals() -> None:
    """Of a layer with one output, S is a number, which the page leaves out, as it does the classifier's."""
    study = numbers("factors_layers")
    assert study["step"] == 200
    shares: dict[str, list[float]] = {"H": [], "linear S": [], "conv S": []}
    for layer in study["layers"]:
        shares["H"].append(layer["factors"]["H"]["energy_share"])
        if layer["layer"].startswith("cct.layers") or layer["kind"] == "Conv":
            kind = "conv S" if layer["kind"] == "Conv" else "linear S"
            shares[kind].append(layer["factors"]["S"]["energy_share"])
    said = re.search(
        r"(\d+) to (\d+) % of the energy of the input factors at step 200, and of the output-gradient factors "
        r"(\d+) to (\d+) % in the transformer layers and (\d+) to (\d+) % in the convolutions",
        TEXT,
    )
    assert said is not None
    ends = [f"{100 * end:.0f}" for values in shares.values() for end in (min(values), max(values))]
    assert list(said.groups()) == ends


def test_noise_moves_the_leading_eigenvalues_by_little() -> None:
    said = re.search(r"moves the leading eigenvalues by less than ([\d.]+) %", TEXT)
    assert said is not None
    assert max(factor["leading_shift"] for factor in numbers("factors")["factors"]) < float(said[1]) / 100


def drawing_commands() -> dict[str, list[str]]:
    """The words of each command that draws a picture in docs/figures from archives, by the picture."""
    calls = (shlex.split(call, comments=True)[1:] for call in CALLS)
    drawing = [words for words in calls if words[0] == "figures" and words[1] in ("learning-rates", "differences")]
    return {words[-1]: words for words in drawing if words[-1].startswith("docs/figures/")}


@pytest.mark.parametrize("picture", drawing_commands())
def test_the_numbers_of_a_picture_are_those_of_the_archives(
    picture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(ROOT)
    assert main([*drawing_commands()[picture][:-1], str(tmp_path / Path(picture).name)]) == 0
    drawn, committed = (
        json.loads(path.with_suffix(".json").read_text(encoding="utf-8"), parse_float=lambda x: f"{float(x):.6g}")
        for path in (tmp_path / Path(picture).name, ROOT / picture)
    )
    assert drawn == committed


def test_every_picture_of_archives_has_its_command() -> None:
    names = ("learning_rates", "trend", "width", "forgiveness")
    assert drawing_commands().keys() == {f"docs/figures/{name}.svg" for name in names}
