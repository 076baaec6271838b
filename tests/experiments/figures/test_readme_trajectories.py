"""The numbers of the trajectories in docs/results.md, against the file beside the picture."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.scripts import as_command

ROOT = Path(__file__).parents[3]
FIGURES = ROOT / "docs" / "figures"
TEXT = " ".join((ROOT / "docs" / "results.md").read_text(encoding="utf-8").split())


@pytest.fixture(scope="module")
def numbers() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((FIGURES / "trajectories.json").read_text(encoding="utf-8"))
    return found


def test_the_command_is_the_readmes_and_the_picture_small(numbers: dict[str, Any]) -> None:
    assert f"`{as_command(numbers['command'])}`" in TEXT
    assert list(numbers["optimizers"]) == ["adafisher", "adam", "sgd"]
    assert (FIGURES / "trajectories.png").stat().st_size < 200_000


def test_shares_outside_and_losses_at_the_ends(numbers: dict[str, Any]) -> None:
    said = re.search(
        r"(\d+) to (\d+) % of each path's variance lies outside of it, .* at the ends of AdaFisher, Adam and SGD "
        r"([\d.]+), ([\d.]+) and ([\d.]+), where the weights themselves have ([\d.]+), ([\d.]+) and ([\d.]+) "
        r"\(from ([\d.]+);",
        TEXT,
    )
    assert said is not None
    paths = numbers["optimizers"].values()
    outside = [path["variance_outside_of_plane"] for path in paths]
    ends = [f"{path[key][-1]:.2f}" for key in ("loss_in_plane", "loss_of_snapshot") for path in paths]
    starts = {f"{path[key][0]:.2f}" for key in ("loss_in_plane", "loss_of_snapshot") for path in paths}
    assert list(said.groups())[:-1] == [f"{100 * min(outside):.0f}", f"{100 * max(outside):.0f}", *ends]
    assert {said[9]} == starts


def test_every_path_goes_down_from_the_start(numbers: dict[str, Any]) -> None:
    assert numbers["plane"]["centre"] == "start of all optimizers"
    for path in numbers["optimizers"].values():
        assert (path["x"][0], path["y"][0]) == (0, 0)
        assert (np.diff(path["loss_in_plane"]) <= 0).all()


def test_adafisher_and_sgd_run_beside_each_other_in_the_plane_alone(numbers: dict[str, Any]) -> None:
    """Both leave the plane further than their ends in it are apart."""
    one, other = (numbers["optimizers"][name] for name in ("adafisher", "sgd"))
    apart = np.hypot(one["x"][-1] - other["x"][-1], one["y"][-1] - other["y"][-1])
    assert min(path["distance_from_plane"][-1] for path in (one, other)) > 5 * apart
