"""Means over layers and seeds when a number or a layer is missing: they say over how many they are."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from hf_adafisher.experiments.fisher_accuracy import evaluation
from hf_adafisher.experiments.fisher_accuracy.agreement import (
    ESTIMATES,
    HALVES,
    TOGETHER,
    LayerAgreement,
    average,
    compare_layers,
    layers_in_mean,
    mean_of,
    over_seeds,
)
from hf_adafisher.experiments.fisher_accuracy.evaluation import FisherSettings, compare_fisher
from hf_adafisher.experiments.fisher_accuracy.exact_fisher import ExactFisher
from hf_adafisher.experiments.fisher_accuracy.picture import MEAN, agreement_table, draw_agreement

NAMES = (*ESTIMATES, HALVES)


def row(layer: str, number: float, values: int = 10, names: tuple[str, ...] = NAMES) -> LayerAgreement:
    return LayerAgreement(
        layer, values, {name: {"spearman": number, "log_pearson": number, "log_scale": number} for name in names}
    )


def test_a_layer_that_is_missing_in_one_seed_is_the_mean_of_the_others() -> None:
    seeds = [
        [row("a", 0.4), row(TOGETHER, 0.1, 10)],
        [row("a", 0.6), row("b", 0.9), row(TOGETHER, 0.3, 20)],
        [row("b", 0.7), row("a", 0.8), row(TOGETHER, 0.5, 20)],
    ]
    rows = average(seeds)
    assert [(r.layer, r.seeds, r.values) for r in rows] == [("a", 3, 10), ("b", 2, 10), (TOGETHER, 3, 10)]
    a, b, together = (r.measures["kfac"]["spearman"] for r in rows)
    assert a == {"mean": pytest.approx(0.6), "sd": pytest.approx(0.2), "seeds": 3}
    assert b == {"mean": pytest.approx(0.8), "sd": pytest.approx(math.sqrt(0.02)), "seeds": 2}
    assert together["mean"] == pytest.approx(0.3)


def test_numbers_that_are_nan_or_missing_are_counted_out() -> None:
    found = [row("a", 0.5), row("a", math.nan), row("a", 0.9, names=("fisher", HALVES)), row("a", math.nan)]
    spreads = over_seeds([r.measures for r in found])
    assert spreads["fisher"]["spearman"]["seeds"] == 2
    assert spreads["fisher"]["spearman"]["mean"] == pytest.approx(0.7)
    assert spreads["kfac"]["spearman"] == {"mean": 0.5, "sd": None, "seeds": 1}
    nothing = over_seeds([r.measures for r in found[1::2]])["fisher"]["spearman"]
    assert nothing["seeds"] == 0 and nothing["sd"] is None and math.isnan(nothing["mean"] or 0.0)


def test_a_constant_layer_is_in_no_mean_and_counted_out() -> None:
    """All of its Fisher's values are equal, so it has no ranks."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": nn.Linear(4, 3), "b": nn.Linear(3, 2)})
    weights = {name: model[name].weight for name in "ab"}
    truth = {name: torch.rand_like(p) for name, p in model.named_parameters()}
    exact = ExactFisher(truth, (truth, truth), 1, 1, False)
    estimates = {name: {id(p): truth[f"{key}.weight"] for key, p in weights.items()} for name in ESTIMATES}
    estimates["fisher"] = {id(weights["a"]): torch.ones(3, 4), id(weights["b"]): truth["b.weight"]}
    rows = compare_layers(model, exact, estimates)
    assert math.isnan(rows[0].measures["fisher"]["spearman"]) and rows[0].complete
    mean, layers = mean_of(rows), layers_in_mean(rows)
    assert (mean["fisher"]["spearman"], layers["fisher"]["spearman"]) == (pytest.approx(1.0), 1)
    assert (mean["kfac"]["spearman"], layers["kfac"]["spearman"]) == (pytest.approx(1.0), 2)
    assert layers["fisher"]["log_scale"] == 2  # a constant has a scale


@pytest.fixture
def gaps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A comparison of two seeds: b's F~ is constant in one of them, and c is missing in the other."""
    second = [row("a", 0.6), row("b", 0.8), row("c", 0.2, 20), row(TOGETHER, 0.6)]
    for measure in second[1].measures["fisher"]:
        second[1].measures["fisher"][measure] = math.nan
    results = iter([[row("a", 0.4), row("b", 0.2), row(TOGETHER, 0.4)], second])
    common = {
        "model": {"type": "net"},
        "corpus": {"name": "text"},
        "optimizer": "adafisher",
        "steps": 1,
        "seeds": [0, 1],
    }
    common |= {"kind": "true", "examples": 9, "kfac_damping": 0.01}
    monkeypatch.setattr(evaluation, "prepare_seed", lambda *_: None)
    monkeypatch.setattr(evaluation, "compare_run", lambda *_: (next(results), SimpleNamespace()))
    monkeypatch.setattr(evaluation, "describe_comparison", lambda *_: common)
    return compare_fisher(FisherSettings("digits", tmp_path / "a.png", seeds=(0, 1)))


def test_the_table_says_over_how_many(gaps: dict[str, Any]) -> None:
    assert gaps["complete_layers"] == 3
    fisher, kfac = gaps["mean"]["fisher"]["spearman"], gaps["mean"]["kfac"]["spearman"]
    # First seed: (0.4 + 0.2) / 2; second: a and c weigh 10 and 20.
    assert (fisher["mean"], fisher["seeds"], fisher["layers"]) == (pytest.approx((0.3 + 1 / 3) / 2), 2, 2)
    assert (kfac["mean"], kfac["layers"]) == (pytest.approx((0.3 + 0.45) / 2), 2)
    assert gaps["mean"]["fisher"]["scale_spread"]["layers"] == 2
    cells = {cells[0]: cells[2:] for cells in agreement_table(gaps, "spearman").rows}
    assert list(cells) == ["a", "b", "c", TOGETHER, MEAN]
    assert cells["a"][0] == "0.50" and cells["b"] == ["0.20 (1 of 2 seeds)", "0.50", "0.50", "0.50", "0.50"]
    assert cells["c"] == ["0.20 (1 of 2 seeds)"] * 5
    assert cells[MEAN][0] == "0.32 ± 0.02 (2 of 3 layers)"


def test_the_picture_marks_what_not_all_seeds_have(
    gaps: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures: list[Any] = []
    save = "hf_adafisher.experiments.fisher_accuracy.picture.save_figure"
    monkeypatch.setattr(save, lambda figure, *_: pictures.append(figure) or [])
    draw_agreement(gaps, tmp_path / "a.png")
    (axes,) = pictures[0].axes
    assert "hollow: not all" in axes.get_title()
    hollow = [line for line in axes.lines if line.get_markerfacecolor() == "none"]
    shown = sorted((round(x, 3), round(y)) for line in hollow for x, y in zip(*line.get_data(), strict=True))
    # b (third from below) for F~ alone, c (second) for all four.
    assert shown == [(0.2, 2)] * 4 + [(0.2, 3)]
    whole = [line for line in axes.lines if line.get_label() == ESTIMATES["fisher"]]
    assert [round(float(x), 3) for x in whole[0].get_xdata()] == [0.5, 0.5]  # a and all together


def test_a_number_that_nobody_has_is_null_in_json(gaps: dict[str, Any], tmp_path: Path) -> None:
    for name in ("mean", "sd"):
        gaps["layers"][0]["measures"]["fisher"]["spearman"][name] = math.nan
    gaps["layers"][0]["measures"]["fisher"]["spearman"]["seeds"] = 0
    written = draw_agreement(gaps, tmp_path / "b.png")[-1]
    again = json.loads(written.read_text())
    assert again["layers"][0]["measures"]["fisher"]["spearman"] == {"mean": None, "sd": None, "seeds": 0}
    assert agreement_table(again, "spearman").rows[0][2] == "-"
