"""What docs/results.md says about its pictures stands in the numbers beside them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.scripts import as_command

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
