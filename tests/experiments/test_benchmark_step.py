"""The benchmark's arithmetic, and its script end to end on tiny sizes. Times are compared as ratios, generously."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hf_adafisher.experiments import benchmark, benchmark_scaling

SCRIPT = Path(__file__).parents[2] / "scripts" / "benchmark_step.py"


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch) -> Any:
    spec = importlib.util.spec_from_file_location("benchmark_step", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    tiny = {"gpt2-20m": lambda device: benchmark.gpt2(device, width=64, depth=1, vocabulary=99, batch=1, length=8)}
    monkeypatch.setattr(benchmark, "MODELS", tiny)
    return module.main


def test_summary_compares_within_rounds() -> None:
    """A round that is slow for both changes no ratio."""
    row = benchmark.summary([2.0, 20.0, 2.0, 200.0], [1.0, 10.0, 1.0, 100.0])
    assert (row["ratio"], row["ratio_q1"], row["ratio_q3"], row["ms"]) == (2.0, 2.0, 2.0, 11.0)


def test_alternate_calls_all_in_every_round_and_drops_the_first() -> None:
    calls: list[str] = []

    def function(name: str) -> Any:
        return lambda: calls.append(name) or float(len(calls))

    times = benchmark.alternate({"a": function("a"), "b": function("b")}, 2, "test", warm_up=1)
    assert calls == ["a", "b"] * 3
    assert times == {"a": [3.0, 5.0], "b": [4.0, 6.0]}


def test_peak_is_what_is_held_at_once() -> None:
    weight = nn.Parameter(torch.ones(10_000))
    adamw = torch.optim.AdamW([weight], foreach=True)
    weight.grad = torch.ones_like(weight)
    adamw.step()
    assert benchmark.peak_extra_bytes(adamw.step, "cpu") >= 40_000
    assert 8_000 <= benchmark.peak_extra_bytes(lambda: torch.ones(1000).add(1).add(1), "cpu") < 9_000


def test_step_to_json(main: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--rounds", "2", "--json", str(tmp_path / "out" / "step.json")]) == 0
    result = json.loads((tmp_path / "out" / "step.json").read_text())
    assert set(result["rows"]) == {"adafisherw", "adamw fused", "adamw foreach"}
    assert result["rows"]["adamw fused"]["ratio"] == 1.0
    assert 0.5 < result["state_ratio"] < 0.6
    assert "| adafisherw |" in capsys.readouterr().out


def test_scaling_draws_a_picture(main: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    series = {"width": (64, 128), "batch": (1, 2)}
    monkeypatch.setattr(benchmark_scaling, "BASE", {"width": 64, "depth": 1, "vocabulary": 99, "batch": 1})
    monkeypatch.setattr(benchmark_scaling.measure_scaling, "__defaults__", ("cpu", series))
    assert main(["--scaling", "--rounds", "2", "--plot", str(tmp_path / "p.png"), "--json", str(tmp_path / "s")]) == 0
    points = json.loads((tmp_path / "s").read_text())["points"]
    assert points["batch"][1]["activations"] == 2 * points["batch"][0]["activations"] - _shared_positions()
    assert points["width"][1]["parameters"] > points["width"][0]["parameters"]
    assert (tmp_path / "p.png").read_bytes()[:4] == b"\x89PNG"


def _shared_positions() -> int:
    """The table of positions is read and returned once a batch: 128 ids and 128 rows of 64."""
    return 128 + 128 * 64


def test_an_eager_step_is_not_slower_than_twice_the_foreach_adamw() -> None:
    """Generous, since other work on the machine slows down an eager step more than a fused one; memory is exact."""
    result = benchmark.measure_step("gpt2-20m", 3)
    assert result["ratio_to_foreach"] < 2.0
    assert result["state_ratio"] <= 0.51
    assert result["rows"]["adafisherw"]["peak_extra_bytes"] <= result["largest_parameter_bytes"]
    assert result["rows"]["adafisherw"]["peak_extra_bytes_due"] <= result["largest_parameter_bytes"]


@pytest.mark.parametrize("bad", [["--rounds", "1"], ["--plot", "x.png"], ["--model", "nothing"]])
def test_bad_input_is_refused(main: Any, bad: list[str]) -> None:
    with pytest.raises(SystemExit):
        main(bad)
