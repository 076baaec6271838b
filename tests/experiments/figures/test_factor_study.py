"""The factors of a training run: which layer, when, that the training does not notice, and what is drawn."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from hf_adafisher.experiments.figures.factors import picture, study
from hf_adafisher.experiments.figures.factors.full_factors import collect_factors, factor_layers, gershgorin_disks
from hf_adafisher.experiments.figures.factors.study import FactorSettings, choose_layer, measure_layer
from hf_adafisher.experiments.figures.training_run import prepare_run
from hf_adafisher.fisher.diagonals import INPUT, OUTPUT_GRAD
from tests.experiments.figures.factor_networks import Tagger, loss_of, net_and_batch
from tests.experiments.runs.image_runs import QUICK, TINY
from tests.scripts import load_command

TINY_RUN = [*TINY, *QUICK]


def settings(**changes: Any) -> FactorSettings:
    return FactorSettings(**{"task": "digits", "output": Path("figure.png"), **changes})


TINY_TEXT = ["--n_layer", "1", "--n_embd", "16", "--n_head", "2", "--vocab_size", "300", "--block_size", "16"]


def test_layers_that_can_be_named() -> None:
    tagger = Tagger()
    assert list(factor_layers(tagger, 100)) == ["words", "positions", "unused", "head"]
    assert choose_layer(tagger, settings()).name == "head"  # of two full ones, not an Embedding
    assert choose_layer(tagger, settings(layer="words")).by_nature == {INPUT}
    with pytest.raises(ValueError, match="'norm': there is none; layers that can be named: words, positions, unused"):
        choose_layer(tagger, settings(layer="norm"))
    with pytest.raises(
        ValueError, match=r"'unused': both factors are longer than --max_dim 2; .* words, positions, head"
    ):
        choose_layer(tagger, settings(layer="unused", max_dim=2))
    with pytest.raises(ValueError, match="at most 1"):
        choose_layer(nn.Sequential(nn.Linear(2, 2)), settings(max_dim=1))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"steps": []}, "steps are"),
        ({"steps": [0, 4]}, "steps are"),
        ({"steps": [4, 4]}, "steps are"),
        ({"steps": [5, 4]}, "steps are"),
        ({"noise": -1e-3}, "noise is -0.001"),
        ({"noise": math.nan}, "noise is nan"),
        ({"examples": 0}, "examples is 0"),
        ({"max_dim": 0}, "max_dim is 0"),
        ({"disks": 0}, "disks is 0"),
    ],
)
def test_options_out_of_range_are_named(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings(**wrong)


DROPOUT = ["--model_options", "hidden_size=16,conv_width=8,hidden_dropout_prob=0.2,drop_path_rate=0.2"]


@pytest.mark.parametrize("optimizer", ["adafisherw", "kfac"])
def test_the_training_is_bitwise_that_without_the_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str
) -> None:
    """Dropout, augmentation and statistics at every step: whatever the figure could disturb."""
    choice = f"{optimizer}:learning_rate=0.001,update_interval=1"
    further = [*TINY_RUN, *DROPOUT, "--crop_padding", "1", "--flip", "0.5"]
    plain = prepare_run("digits", 4, tmp_path / "a.png", choice, further)
    trainer = plain.new_trainer([])
    trainer.train()

    trainers: list[Any] = []

    def keep(*args: Any) -> Any:
        run = prepare_run(*args)
        create = run.new_trainer
        object.__setattr__(run, "new_trainer", lambda callbacks: trainers.append(create(callbacks)) or trainers[-1])
        return run

    monkeypatch.setattr(study, "prepare_run", keep)
    found = study.study_factors(
        settings(output=tmp_path / "b.png", steps=[1, 2, 4], examples=40, optimizer=choice, further=further)
    )
    assert [factor.step for factor in found.drawn] == [1, 1, 2, 2, 4, 4] and found.examples == 40
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, trainers[0].model.state_dict()[name]), name
    states = [t.optimizer.state_dict()["state"] for t in (trainer, trainers[0])]
    assert states[0].keys() == states[1].keys() and len(states[0]) > 10
    for index, state in states[0].items():
        for key, value in state.items():
            assert torch.equal(value, states[1][index][key]), (index, key)
    losses = [[entry["loss"] for entry in t.state.log_history if "loss" in entry] for t in (trainer, trainers[0])]
    assert losses[0] == losses[1] and len(losses[0]) == 4


def run_script(tmp_path: Path, *arguments: str) -> tuple[int, dict[str, Any], list[Path]]:
    output = tmp_path / "factors.svg"
    status = load_command("figures").factors([*arguments, "--output", str(output)])
    files = sorted(path for path in tmp_path.iterdir() if path.is_file())
    return status, json.loads(output.with_suffix(".json").read_text()) if status == 0 else {}, files


@pytest.mark.slow
def test_the_script_draws_a_convolution(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    layer = "cct.tokenizer.convolutions.1"
    arguments = ["--layer", layer, "--steps", "2", "--examples", "30", "--disks", "9", *TINY_RUN]
    status, numbers, files = run_script(tmp_path, *arguments)
    assert status == 0
    names = [f"factors{kind}.{suffix}" for kind in ("", "_layers") for suffix in ("json", "svg")]
    assert [path.name for path in files] == sorted(names) and all(path.stat().st_size > 1000 for path in files)
    assert [(factor["step"], factor["factor"]) for factor in numbers["factors"]] == [(2, "H"), (2, "S")]
    for factor in numbers["factors"]:
        d = factor["dimension"]
        assert d == {"H": 8 * 9, "S": 16}[factor["factor"]]
        lists = [factor[key] for key in ("eigenvalues", "noisy_eigenvalues", "diagonal")]
        assert [len(values) for values in lists] == [d] * 3
        # The noise leaves the trace alone; the squares of the eigenvalues are the energy.
        assert [sum(values) for values in lists] == pytest.approx([sum(factor["diagonal"])] * 3)
        energy = sum(value**2 for value in factor["diagonal"]) / sum(value**2 for value in factor["eigenvalues"])
        assert factor["energy_share"] == pytest.approx(energy)
        assert factor["eigenvalues_above"] == sum(v > sum(factor["diagonal"]) / d for v in factor["eigenvalues"])
        assert len(factor["disks_drawn"]["radii"]) == 9
        assert factor["noise_sigma"] == pytest.approx(1e-3 * factor["kaiser_line"])
    row = next(row for row in numbers["layers"]["2"] if row["layer"] == layer)
    assert row["factors"]["S"]["energy_share"] == numbers["factors"][1]["energy_share"]
    assert len(numbers["layers"]["2"]) > 8
    printed = capsys.readouterr().out
    assert f"| {layer} | Conv | " in printed and f"| 72 | {row['factors']['H']['energy_share']:.1%} (" in printed


def test_the_script_draws_an_embedding(tmp_path: Path, files: dict[str, str]) -> None:
    texts = [item for split, path in files.items() for item in (f"--{split}_file", path)]
    arguments = ["--task", "clm", "--layer", "transformer.wte", "--steps", "2", "--examples", "8", "--no-all_layers"]
    status, numbers, written = run_script(tmp_path, *arguments, "--optim", "adamw", *TINY_TEXT, *QUICK, *texts)
    assert status == 0 and numbers["title"] == "gpt2 on local files, adamw" and len(written) == 2
    inputs, gradients = numbers["factors"]
    assert inputs["diagonal_by_nature"] and inputs["energy_share"] == 1.0 and inputs["noisy_eigenvalues"] is None
    assert sum(inputs["eigenvalues"]) == pytest.approx(1.0) and not any(inputs["disks_drawn"]["radii"])
    assert gradients["dimension"] == 16 and 0.0 < gradients["energy_share"] < 1.0
    assert [row["layer"] for row in numbers["layers"]["2"]] == ["transformer.wte"] and not numbers["skipped"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layer", "cct.nowhere"], "layers that can be named: cct.tokenizer.convolutions.0, "),
        (["--steps", "3", "2"], "steps are [3, 2]"),
        (["--noise", "-1"], "noise is -1.0"),
        (["--max_steps", "9"], "--max_steps is not free here"),
    ],
)
def test_bad_input_is_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, arguments: list[str], message: str
) -> None:
    status, _, files = run_script(tmp_path, *arguments, *TINY_RUN)
    assert status == 2 and not files
    assert message in caplog.text


def test_disks_and_spectra_are_drawn_as_measured() -> None:
    net, batch = net_and_batch()
    factors = collect_factors(net, [batch], loss_of, max_dim=100)
    drawn = study.draw_factors(7, factors["conv"], 0.01)
    rows = {7: [measure_layer(layer) for layer in factors.values()]}
    figure = picture.layer_figure(study.FactorStudy("a net", "conv", settings(steps=[7], disks=5), 8, drawn, rows, {}))
    left, right = figure.axes[:2]
    centres, radii = gershgorin_disks(factors["conv"].moments[INPUT])
    largest = radii.argsort(descending=True)[:5]
    boxes = [path.get_extents() for collection in left.collections for path in collection.get_paths()]
    found = sorted((box.x0, box.x1, box.y1) for box in boxes)
    expected = sorted(
        (c - r, c + r, r) for c, r in zip(centres[largest].tolist(), radii[largest].tolist(), strict=True)
    )
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert "5 largest disks" in left.get_title()
    line = next(line for line in right.lines if line.get_label() == "eigenvalues")
    np.testing.assert_allclose(line.get_ydata(), np.linalg.eigvalsh(factors["conv"].moments[INPUT])[::-1], rtol=1e-6)
    bars = picture.layers_figure(rows[7], "a net").axes[0].patches
    widths = [bar.get_width() for bar in bars]
    assert widths == [row.dominance[side].energy_share for side in (INPUT, OUTPUT_GRAD) for row in rows[7]]
