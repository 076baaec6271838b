"""The benchmark's arithmetic, and its script end to end on tiny sizes. Times are compared as ratios, generously."""

from __future__ import annotations

import gzip
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import Dinov2Config

from hf_adafisher.experiments.benchmark import scaling, step, trainer_step
from hf_adafisher.experiments.benchmark.counts import count_operators, measure_operators
from hf_adafisher.experiments.benchmark.measurement import (
    MODELS,
    SmallTensors,
    Workload,
    _classifier,
    alternate,
    compare_times,
    gpt2,
    peak_extra_bytes,
)
from hf_adafisher.experiments.benchmark.step import measure_step
from hf_adafisher.experiments.comparison.configuration import load_configuration
from tests.scripts import load_command


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch) -> Any:
    tiny = {"width": 64, "depth": 1, "vocabulary": 99, "batch": 1, "length": 8}
    monkeypatch.setitem(MODELS, "gpt2-20m", lambda device: gpt2(device, **tiny))
    return load_command("benchmark").main


def test_times_are_compared_within_rounds() -> None:
    """A round that is slow for both changes no ratio."""
    row = compare_times([2.0, 20.0, 2.0, 200.0], [1.0, 10.0, 1.0, 100.0])
    assert (row["ratio"], row["ratio_q1"], row["ratio_q3"], row["ms"]) == (2.0, 2.0, 2.0, 11.0)


def test_alternate_calls_all_in_every_round_and_drops_the_first() -> None:
    calls: list[str] = []

    def function(name: str) -> Any:
        return lambda: calls.append(name) or float(len(calls))

    times = alternate({"a": function("a"), "b": function("b")}, 2, "test", warm_up=1)
    assert calls == ["a", "b"] * 3
    assert times == {"a": [3.0, 5.0], "b": [4.0, 6.0]}


def test_peak_is_what_is_held_at_once() -> None:
    weight = nn.Parameter(torch.ones(10_000))
    adamw = torch.optim.AdamW([weight], foreach=True)
    weight.grad = torch.ones_like(weight)
    adamw.step()
    assert peak_extra_bytes(adamw.step, "cpu") >= 40_000
    assert 8_000 <= peak_extra_bytes(lambda: torch.ones(1000).add(1).add(1), "cpu") < 9_000


def test_operators_are_counted_by_their_callers() -> None:
    """A foreach operator is one launch, and on the CPU as many leaves as it has tensors; views are no launches."""
    tensors = [torch.ones(3) for _ in range(5)]
    assert count_operators(lambda: torch._foreach_mul_(tensors, 2.0))["launches"] == 1
    assert count_operators(lambda: [t.view(3, 1).mul_(2.0) for t in tensors])["launches"] == 5
    counts = count_operators(lambda: torch.nn.functional.linear(torch.ones(2, 3), torch.ones(4, 3)))
    assert counts["launches"] == 3 < counts["leaf_operators"]  # two tensors of ones, each an empty and a fill


def test_launches_grow_with_foreach_no_more_than_with_its_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "hf_adafisher.experiments.benchmark.counts.gpt2",
        lambda device, depth, **_: gpt2(device, width=16, depth=depth, vocabulary=50, batch=1, length=4),
    )
    counts = measure_operators()["operators"]
    small, large = counts["adamw foreach"]["models"]
    assert large["parameters"] - small["parameters"] == 2 * 12 and small["parameters"] == 4 + 2 * 12
    assert counts["adamw foreach"]["launches_per_parameter"] == counts["adamw fused"]["launches_per_parameter"] == 0
    assert large["launches"] == small["launches"] < 20 < small["leaf_operators"] < large["leaf_operators"]
    ours = counts["adafisherw"]
    assert ours["launches_per_parameter"] == (ours["models"][1]["launches"] - ours["models"][0]["launches"]) / 24


def test_operators_to_json(main: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--count-operators", "--json", str(tmp_path / "operators.json")]) == 0
    counts = json.loads((tmp_path / "operators.json").read_text())["operators"]
    assert set(counts) == {"adafisherw", "adafisherw root", "adamw foreach", "adamw fused"}
    launches = counts["adamw fused"]["models"][0]["launches"]
    assert f"| adamw fused | 28 | {launches} | " in capsys.readouterr().out


def test_step_to_json(main: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--rounds", "2", "--json", str(tmp_path / "out" / "step.json")]) == 0
    result = json.loads((tmp_path / "out" / "step.json").read_text())
    assert set(result["rows"]) == {
        "adafisherw",
        "adafisherw root",
        "spectral-adafisher",
        "adamw fused",
        "adamw foreach",
    }
    assert result["rows"]["adamw fused"]["ratio"] == 1.0
    assert 0.5 < result["state_ratio"] < 0.6
    assert "| adafisherw |" in capsys.readouterr().out


def test_scaling_draws_a_picture(main: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    series = {"width": (64, 128), "batch": (1, 2)}
    monkeypatch.setattr(scaling, "BASE", {"width": 64, "depth": 1, "vocabulary": 99, "batch": 1})
    monkeypatch.setattr(scaling.measure_scaling, "__defaults__", ("cpu", series))
    assert main(["--scaling", "--rounds", "2", "--plot", str(tmp_path / "p.png"), "--json", str(tmp_path / "s")]) == 0
    result = json.loads((tmp_path / "s").read_text())
    points = result["points"]
    assert set(result["fits"]) == {"step_ms", "factor_ms"}
    assert points["batch"][1]["activations"] == 2 * points["batch"][0]["activations"] - _shared_positions()
    assert points["width"][1]["parameters"] > points["width"][0]["parameters"]
    assert (tmp_path / "p.png").read_bytes()[:4] == b"\x89PNG"


def test_growth_is_summed_up_by_the_least_squares_line() -> None:
    points = [{"size": x * 1e6, "ms": y} for x, y in ((1.0, 3.0), (2.0, 5.5), (4.0, 8.0), (7.0, 16.0))]
    x, y = np.array([1.0, 2.0, 4.0, 7.0]), np.array([3.0, 5.5, 8.0, 16.0])
    slope, intercept = np.polyfit(x, y, 1)
    rest = ((y - intercept - slope * x) ** 2).sum()
    fit = scaling.straight_line(points, "size", "ms")
    assert fit["ms_per_million"] == pytest.approx(slope)
    assert fit["intercept_ms"] == pytest.approx(intercept)
    assert fit["r_squared"] == pytest.approx(1 - rest / ((y - y.mean()) ** 2).sum())


def _shared_positions() -> int:
    """The table of positions is read and returned once a batch: 128 ids and 128 rows of 64."""
    return 128 + 128 * 64


@pytest.mark.slow
def test_an_idle_step_of_the_papers_form_takes_less_time_than_the_eager_adamw() -> None:
    """Foreach kernels against foreach kernels, 0.5 to 0.7; the ratio to fused ones depends on the machine's memory.

    Fastest of several rounds, and of five attempts: other work on the machine must not decide.
    """
    ratios = []
    for _ in range(5):
        rows = measure_step("gpt2-20m", 8)["rows"]
        ratios.append(rows["adafisherw"]["fastest_ms"] / rows["adamw foreach"]["fastest_ms"])
        if ratios[-1] < 0.8:
            break
    assert min(ratios) < 0.8, ratios


def test_a_step_of_many_small_tensors_is_no_more_than_a_few_of_adamws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls are all that it costs: a thousand tensors in the place of ten, in CPU time, the best of three tries."""
    monkeypatch.setattr(step, "timer", lambda function, device: lambda: cpu_time(function))
    monkeypatch.setitem(MODELS, "small-tensors", lambda device: Workload(SmallTensors(500), {"x": torch.randn(2, 8)}))
    ratios = [measure_step("small-tensors", 3)["ratio_to_foreach"] for _ in range(3)]
    for name in ("adafisherw", "adafisherw root", "spectral-adafisher"):
        assert min(ratio[name] for ratio in ratios) < 4.0, (name, ratios)


def cpu_time(function: Any) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


@pytest.mark.slow
@pytest.mark.parametrize("model", [name for name in MODELS if name != "small-tensors"])
def test_memory_of_a_step_is_half_of_adamws_and_no_more_than_the_largest_parameter(model: str) -> None:
    result = measure_step(model, 2)
    assert result["state_ratio"] <= 0.51
    assert result["rows"]["adafisherw"]["peak_extra_bytes"] <= result["largest_parameter_bytes"]
    if model in ("gpt2-20m", "llama"):
        assert result["rows"]["adafisherw"]["peak_extra_bytes_due"] <= result["largest_parameter_bytes"]


def test_training_under_trainer_is_timed_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """All take their steps ten at a time, one after the other, and as many as were asked for."""
    order: list[tuple[str, int]] = []

    class Watched(trainer_step.TurnTimer):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            order.append((Path(args.output_dir).name, state.global_step))
            super().on_step_end(args, state, control, **kwargs)

    monkeypatch.setattr(trainer_step, "TurnTimer", Watched)
    rows = trainer_step.measure_trainer(2, width=16, depth=1, vocabulary=50, batch=2, length=4)
    names = ("adamw_torch_fused", "adafisherw", "adafisherw root")
    turns = trainer_step.WARM_UP + 2
    expected = [(name, 10 * turn + step) for turn in range(turns) for name in names for step in range(1, 11)]
    assert order == expected
    assert rows["Trainer step, adamw_torch_fused"]["ratio"] == 1.0
    assert rows["Trainer step, adafisherw"]["ms"] > 0 and rows["Trainer step, adafisherw root"]["ms"] > 0


def test_a_run_that_fails_ends_the_comparison_under_trainer(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any) -> None:
        raise ZeroDivisionError("no step")

    monkeypatch.setattr("hf_adafisher.optimizers.adafisher.AdaFisherW.step", broken)
    with pytest.raises(ZeroDivisionError, match="no step"):
        trainer_step.measure_trainer(2, width=16, depth=1, vocabulary=50, batch=2, length=4)


@pytest.mark.parametrize(("words", "preset"), [([], "lm-scratch"), (["vit-finetune"], "vit-finetune")])
def test_cost_of_a_comparison_counts_no_waiting(
    words: list[str], preset: str, main: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert step._cpu_time(lambda: time.sleep(0.2))() * step.T_COV < 50
    tiny = {"width": 64, "depth": 1, "vocabulary": 50, "batch": 2, "length": 4}
    monkeypatch.setattr(step, "LM_SCRATCH", tiny)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 14, "image_size": 28}
    monkeypatch.setitem(MODELS, "vit-small", lambda device: _classifier(Dinov2Config(**sizes), device, 2, 28))
    assert main(["--comparison-cost", *words, "--rounds", "2", "--json", str(tmp_path / "cost.json")]) == 0
    result = json.loads((tmp_path / "cost.json").read_text())
    rows = result["rows"]
    assert result["preset"] == preset and 0 < result["parameters"] < 100_000
    assert set(rows) == {f"whole iteration, {row}" for row in step.COMPARED[preset]}
    assert rows["whole iteration, adamw"]["ratio"] == 1.0 and all(row["fastest_ms"] > 0 for row in rows.values())


@pytest.mark.parametrize("preset", step.COMPARED)
def test_cost_is_that_of_the_comparisons_model_and_optimizers(preset: str) -> None:
    """The model has as many weights as that of the archived runs, and groups have its rates, layer by layer."""
    config = load_configuration(Path(preset))
    common = config["common"]
    assert {cell["optim"] for cell in config["cells"]} >= {row.split(",")[0] for row in step.COMPARED[preset]}
    work, optimizer = step.compared_optimizer(preset, "adamw", {})
    archive = Path(__file__).parents[3] / "docs" / "results" / preset / "runs.jsonl.gz"
    run = json.loads(gzip.decompress(archive.read_bytes()).splitlines()[1])
    assert sum(p.numel() for p in work.model.parameters()) == run["result"]["model"]["parameters"]
    rates = {group["lr"] for group in optimizer.param_groups}
    if preset == "lm-scratch":
        assert work.model.config.n_head == common["n_head"] and len(rates) == 1
        assert work.batch["input_ids"].shape == (common["per_device_train_batch_size"], common["block_size"])
        return
    side, layers = common["image_size"], work.model.config.num_hidden_layers
    assert work.batch["pixel_values"].shape == (common["per_device_train_batch_size"], 3, side, side)
    (decay,) = {cell["layer_decay"] for cell in config["cells"] if "seeds" in cell}
    assert sorted(rates, reverse=True) == pytest.approx([1e-4 * decay**depth for depth in range(layers + 2)])


@pytest.mark.parametrize(
    "bad",
    [
        ["--rounds", "1"],
        ["--plot", "x.png"],
        ["--model", "nothing"],
        ["--comparison-cost", "--model", "vit"],
        ["--comparison-cost", "vit-finetune", "--device", "cuda"],
        ["--comparison-cost", "--compiled"],
    ],
)
def test_bad_input_is_refused(main: Any, bad: list[str]) -> None:
    with pytest.raises(SystemExit):
        main(bad)
