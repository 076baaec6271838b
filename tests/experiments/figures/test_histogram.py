"""The histogram of a layer's Fisher diagonal over training, beside Adam's second moment."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hf_adafisher.experiments.figures.histogram import collect, picture
from hf_adafisher.experiments.figures.histogram.collect import (
    HistogramSettings,
    check_second_moment,
    collect_histograms,
    collect_panel,
    count_values,
    fisher_values,
    prepare_pair,
    second_moment,
)
from hf_adafisher.experiments.figures.training_run import (
    DIGITS_LEARNING_RATES,
    StepCallback,
    prepare_run,
)
from tests.experiments.runs.image_runs import TINY
from tests.scripts import load_command

RUN = ["--use_cpu", "--disable_tqdm", "true", "--warmup_steps", "0", "--per_device_train_batch_size", "16"]
LAYER = "cct.layers.0.intermediate"


def settings(folder: Path, **changes: Any) -> HistogramSettings:
    values = {"task": "digits", "layer": LAYER, "steps": 6, "every": 2, "further": [*RUN, *TINY], **changes}
    return HistogramSettings(output=folder / "figure.png", **values)


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def train(*_: Any) -> None:
        raise AssertionError("training began")

    monkeypatch.setattr(collect, "collect_panel", train)


def plain_run(chosen: HistogramSettings, optimizer: str) -> tuple[Any, dict[int, dict[str, Any]]]:
    """Train without the figure; return the model, and the weight's tensors after every step."""
    run = prepare_run(chosen.task, chosen.steps, chosen.output, optimizer, chosen.further)
    seen: dict[int, dict[str, Any]] = {}

    def keep(step: int, model: Any, found: Any) -> None:
        weight = model.get_submodule(LAYER).weight
        seen[step] = {"grad": weight.grad.clone()}
        if hasattr(found, "fisher_diagonal"):
            seen[step]["fisher"] = found.fisher_diagonal(weight).clone()
        else:
            seen[step]["exp_avg_sq"] = found.state[weight]["exp_avg_sq"].clone()

    run.new_trainer([StepCallback(None, keep)]).train()
    return run.model, seen


def test_counts_are_those_of_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collect, "_CHUNK", 50)
    values = torch.randn(40, 5, generator=torch.Generator().manual_seed(0)).mul(3).exp()
    values[0] = torch.tensor([0.0, math.inf, math.nan, -math.inf, 0.0])
    row = count_values(values, 7, 3)
    edges = [10.0 ** (number / 3) for number in range(row.first, row.first + len(row.counts) + 1)]
    kept = values[1:].double().numpy().reshape(-1)
    assert row.counts == np.histogram(kept, edges)[0].tolist()
    assert row.counts[0] > 0 and row.counts[-1] > 0
    assert (row.step, row.zeros, row.not_finite) == (7, 2, 3)
    assert sum(row.counts) + row.zeros + row.not_finite == values.numel()
    ordered = sorted(kept)
    middle = (len(ordered) - 1) / 2
    assert (row.quartiles[0], row.quartiles[4]) == (ordered[0], ordered[-1])
    assert row.quartiles[2] == pytest.approx((ordered[math.floor(middle)] + ordered[math.ceil(middle)]) / 2)
    assert sum(value <= row.quartiles[1] for value in ordered) == pytest.approx(len(ordered) / 4, abs=1)
    assert sum(value <= row.quartiles[3] for value in ordered) == pytest.approx(3 * len(ordered) / 4, abs=1)


def test_a_row_without_positive_values() -> None:
    row = count_values(torch.zeros(3), 1, 10)
    assert (row.counts, row.zeros, row.quartiles) == ([], 3, [])


@pytest.mark.parametrize(
    ("steps", "every", "expected"),
    [(6, 2, [2, 4, 6]), (7, 3, [3, 6, 7]), (3, None, [1, 2, 3]), (1000, None, list(range(20, 1001, 20)))],
)
def test_rows(tmp_path: Path, steps: int, every: int | None, expected: list[int]) -> None:
    assert settings(tmp_path, steps=steps, every=every).row_steps == expected


def test_values_are_the_optimizers_and_training_does_not_change(tmp_path: Path) -> None:
    chosen = settings(tmp_path, optimizers=["adafisherw:update_interval=2", "adamw:learning_rate=0.01"])
    pair = prepare_pair(chosen)
    panels = [collect_panel(chosen, run, values) for run, values in pair]
    assert chosen.optimizers is not None
    for panel, (run, _), optimizer in zip(panels, pair, chosen.optimizers, strict=True):
        model, seen = plain_run(chosen, optimizer)
        for name, p in model.named_parameters():
            assert torch.equal(p, run.model.get_parameter(name)), name
        average = torch.zeros_like(seen[1]["grad"], dtype=torch.float64)
        dense = {}
        for step, tensors in seen.items():
            average = 0.999 * average + 0.001 * tensors["grad"].double() ** 2
            if "fisher" in tensors:
                dense[step] = tensors["fisher"].double()
            else:
                dense[step] = tensors["exp_avg_sq"].double() / (1 - 0.999**step)
                torch.testing.assert_close(dense[step], average / (1 - 0.999**step), rtol=1e-4, atol=1e-20)
        edges = 10.0 ** np.array(panel["log10_edges"])
        assert [row["step"] for row in panel["rows"]] == [2, 4, 6]
        for row in panel["rows"]:
            numbers = dense[row["step"]].numpy().reshape(-1)
            assert row["counts"] == np.histogram(numbers, edges)[0].tolist()
            assert sum(row["counts"]) + row["zeros"] == numbers.size == 16 * 16
            np.testing.assert_allclose(row["quartiles"], np.quantile(numbers[numbers > 0], [0, 0.25, 0.5, 0.75, 1]))
    assert panels[0]["log10_edges"][0] >= math.log10(3e-3) - 0.05 - 1e-6  # damping
    assert 10 ** panels[0]["log10_edges"][-2] <= 1.003 * (1 + 1e-6)


def test_defaults_fit_the_network(tmp_path: Path) -> None:
    (first, _), (second, _) = prepare_pair(settings(tmp_path))
    assert (first.training_args.optim, second.training_args.optim) == ("adafisherw", "adamw")
    assert second.training_args.learning_rate == DIGITS_LEARNING_RATES["adamw"]


@pytest.mark.parametrize("name", ["adam", "lamb", "adamw_torch", "schedule_free_adamw"])
def test_second_moments_are_found(tmp_path: Path, name: str) -> None:
    run = prepare_run("digits", 1, tmp_path / "a.png", name, [*RUN, *TINY])
    state = torch.random.get_rng_state()
    check_second_moment(run)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("name", ["sgd", "soap", "adafactor", "adahessian", "kfac"])
def test_second_optimizers_without_one_are_refused(tmp_path: Path, name: str, no_training: None) -> None:
    with pytest.raises(ValueError, match=f"the second optimizer is '{name}', which has no exp_avg_sq"):
        collect_histograms(settings(tmp_path, optimizers=["adafisher", name]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer": "cct.layers.0.intermediat"}, r"did you mean 'cct.layers.0.intermediate'\?; layers .* classifier"),
        ({"layer": None}, "--layer is missing; layers that can be named: cct.tokenizer.convolutions.0, "),
        ({"layer": "cct"}, "'cct', which has no trainable weight"),
        ({"optimizers": ["adam", "adam"]}, "first optimizer is 'adam'; it must be adafisher or adafisherw"),
        ({"optimizers": ["adafisher"]}, "has 1 names; give two"),
        ({"optimizers": ["adafisher", "adam:seed=3"]}, "adam:seed=3 has seed=3, where adafisher has 42"),
        ({"optimizers": ["adafisher", "adam:image_size=12"]}, "image_size=12, where adafisher has 8"),
        ({"optimizers": ["adafisher", "adam:flip=0.5"]}, "flip=0.5, where adafisher has 0.0"),
        ({"steps": 0}, "--steps is 0; it must be at least 1"),
        ({"every": 7}, r"--every is 7; it must be in 1\.\.6"),
        ({"bins_per_decade": 0}, "--bins_per_decade is 0"),
    ],
)
def test_bad_input_is_named_before_training(
    tmp_path: Path, no_training: None, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        collect_histograms(settings(tmp_path, **changes))


def test_a_layer_without_gradient_is_named(tmp_path: Path) -> None:
    chosen = settings(tmp_path)
    run, _ = prepare_pair(chosen)[0]
    unused = torch.nn.Linear(2, 2)
    run.model.add_module("unused", unused)
    with pytest.raises(ValueError, match="layer 'unused' got no gradient in 2 steps"):
        collect_panel(settings(tmp_path, layer="unused"), run, fisher_values)
    optimizer = torch.optim.Adam(unused.parameters())
    with pytest.raises(RuntimeError, match="no exp_avg_sq"):
        second_moment(optimizer, unused.weight)


def test_script_on_text_with_zeros(
    tmp_path: Path, command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The last position of a window predicts nothing, so its row of the table never has a gradient."""
    titles: list[str] = []
    titled = picture.panel_title
    monkeypatch.setattr(picture, "panel_title", lambda panel: titles.append(titled(panel)) or titles[-1])
    output = tmp_path / "pictures" / "text.svg"
    cut = command.index("--max_steps")
    flags = ["--task", "clm", "--layer", "transformer.wpe", "--steps", "3", "--output", str(output), *command[:cut]]
    assert load_command("figures").fisher_histogram(flags) == 0
    found = json.loads(output.with_suffix(".json").read_text())
    assert {file.suffix for file in output.parent.glob("text.*")} == {".json", ".svg"}
    fisher, moment = found["panels"]
    assert (fisher["optimizer"], moment["optimizer"]) == ("adafisherw", "adamw")
    assert moment["learning_rate"] == 0.001
    assert found["shape"] == [16, 16] and fisher["damping"] == 0.003
    assert [row["zeros"] for row in moment["rows"]] == [16, 16, 16] and not any(r["zeros"] for r in fisher["rows"])
    assert titles[0].endswith("all values drawn") and "zero, not drawn: 6.2% to 6.2% of the values" in titles[1]
    shares = picture.densities(moment, 20)
    np.testing.assert_allclose(shares.sum(1) / 20, 15 / 16)
    half, whole = picture.spread_in_decades(moment["rows"][-1])
    assert 10**half == pytest.approx(moment["rows"][-1]["quartiles"][3] / moment["rows"][-1]["quartiles"][1])
    assert f"adamw, step 3: the middle half of the values spans {half:.2f} decades, all of them {whole:.2f}" in (
        capsys.readouterr().out
    )


def test_script_says_what_is_wrong(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    flags = ["--layer", "nothing", "--steps", "2", "--output", str(tmp_path / "a.png"), *RUN, *TINY]
    assert load_command("figures").fisher_histogram(flags) == 2
    assert "layers that can be named: cct.tokenizer" in caplog.text
    assert not (tmp_path / "a.png").exists()


def test_a_diverged_run_is_said(tmp_path: Path) -> None:
    rows = [{"step": 1, "counts": [3], "zeros": 0, "not_finite": 1, "quartiles": [1.0, 1.1, 1.2, 1.3, 10.0]}]
    panel = {"optimizer": "adam", "learning_rate": 9.0, "diverged_at": 2, "log10_edges": [0.0, 0.1], "rows": rows}
    assert "diverged at step 2" in picture.panel_title(panel)
    assert "not finite, not drawn: 25.0% to 25.0%" in picture.panel_title(panel)
    empty = {**panel, "log10_edges": [0.0], "rows": []}
    with pytest.raises(ValueError, match="no value of adam is finite and above zero"):
        picture.draw_histograms({"panels": [empty], "bins_per_decade": 10}, tmp_path / "a.png")
