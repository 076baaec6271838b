"""Means over layers and seeds, and the controls: exact diagonals and squared gradients, averaged as AdaFisher does."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_adafisher import AdaFisherW
from hf_adafisher.experiments.fisher_accuracy import evaluation
from hf_adafisher.experiments.fisher_accuracy.agreement import (
    AGAINST_WINDOW,
    CONTROLS,
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
from hf_adafisher.experiments.fisher_accuracy.estimates import ExactAverage, RunObserver
from hf_adafisher.experiments.fisher_accuracy.evaluation import (
    FisherSettings,
    compare_fisher,
    compare_run,
    prepare_seed,
)
from hf_adafisher.experiments.fisher_accuracy.exact_fisher import ExactFisher, exact_fisher
from hf_adafisher.experiments.fisher_accuracy.picture import CONTROL_COLUMNS, MEAN, agreement_table, draw_agreement
from tests.experiments.runs.image_runs import TINY

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


RUN = ["--use_cpu", "--disable_tqdm", "true", "--warmup_steps", "0", "--per_device_train_batch_size", "16", *TINY]
DECAY, INTERVAL, STEPS = 0.7, 2, 5


class Net(nn.Module):
    """Called as Trainer does, by names; its dropout is no part of an exact diagonal."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.drop, self.second = nn.Linear(5, 4), nn.Dropout(0.4), nn.Linear(4, 3)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.second(self.drop(self.first(x).tanh()))


class Looking(Net):
    """Looks at its numbers, which vmap does not let it."""

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        return super().forward(x if x.sum().item() > -1e9 else -x)


def micro_batches(step: int) -> list[dict[str, Tensor]]:
    """Two of unequal sizes."""
    generator = torch.Generator().manual_seed(step)
    sizes = (3, 2)
    return [
        {
            "x": torch.randn(n, 5, generator=generator).double(),
            "labels": torch.randint(3, (n,), generator=generator),
        }
        for n in sizes
    ]


def run_beside(model: nn.Module, observer: RunObserver, *, spoilt: int | None = None) -> list[dict[str, Any]]:
    """Trains; what the steps on which AdaFisher refreshed saw: weights before, examples, gradients of the mean."""
    seen = []
    options: dict[str, Any] = {"lr": 0.1, "ema_decay": DECAY, "update_interval": INTERVAL}
    with AdaFisherW(model, **options) as optimizer:
        for step in range(1, STEPS + 1):
            due, weights = optimizer.refresh_due, {k: v.clone() for k, v in model.state_dict().items()}
            optimizer.zero_grad()
            batches = micro_batches(step)
            for batch in batches:
                loss = F.cross_entropy(model(**batch), batch["labels"], reduction="sum") / 5
                (loss * torch.inf if step == spoilt else loss).backward()
            if step == spoilt:
                optimizer.zero_grad()
            gradients = {
                name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()
            }
            optimizer.step()
            observer.after_step(step, model, optimizer)
            if due and step != spoilt:
                seen.append({"weights": weights, "batches": batches, "gradients": gradients, "step": step})
    return seen


def averaged(samples: list[Tensor]) -> Tensor:
    """Each a share of ``DECAY`` of the one after it, the shares adding up to 1."""
    shares = [DECAY ** (len(samples) - 1 - i) for i in range(len(samples))]
    return sum(share * sample for share, sample in zip(shares, samples, strict=True)) / sum(shares)  # type: ignore[return-value]


def squares_of_examples(net: nn.Module, seen: dict[str, Any], name: str) -> Tensor:
    """The mean over a step's examples of the squared gradient, with its weights and without dropout."""
    net.load_state_dict(seen["weights"])
    net.eval()
    squares = []
    for batch in seen["batches"]:
        for x, label in zip(batch["x"], batch["labels"], strict=True):
            loss = F.cross_entropy(net(x[None]), label[None])
            squares.append(torch.autograd.grad(loss, net.get_parameter(name))[0] ** 2)
    return torch.stack(squares).mean(0)


def test_controls_average_what_adafisher_does_over_its_steps() -> None:
    model = Net().double()
    observer = RunObserver(model, DECAY, 0.999, 64)
    seen = run_beside(model, observer)
    observer.close()
    assert [step["step"] for step in seen] == [1, 3, 5]
    exact, moments = observer.window.diagonals(), observer.window_moments.moments()
    assert exact.keys() == moments.keys() == {id(p) for p in model.parameters()}
    for name, p in model.named_parameters():
        torch.testing.assert_close(exact[id(p)], averaged([squares_of_examples(Net().double(), s, name) for s in seen]))
        torch.testing.assert_close(moments[id(p)], averaged([s["gradients"][name] ** 2 for s in seen]))


def test_a_refresh_that_adafisher_drops_is_in_no_average() -> None:
    """Its gradients are infinite; the refresh stays due, and is made up for on the next step."""
    model = Net().double()
    observer = RunObserver(model, DECAY, 0.999, 64)
    seen = run_beside(model, observer, spoilt=1)
    observer.close()
    assert [step["step"] for step in seen] == [2, 3, 5]
    exact, moments = observer.window.diagonals(), observer.window_moments.moments()
    for name, p in model.named_parameters():
        torch.testing.assert_close(exact[id(p)], averaged([squares_of_examples(Net().double(), s, name) for s in seen]))
        torch.testing.assert_close(moments[id(p)], averaged([s["gradients"][name] ** 2 for s in seen]))


def test_one_example_once_is_what_adafisher_has_exactly() -> None:
    model = Net().double()
    model.drop.p = 0.0
    observer = RunObserver(model, DECAY, 0.999, 64)
    with AdaFisherW(model, lr=0.1, ema_decay=DECAY, update_interval=10) as optimizer:
        batch = {key: value[:1] for key, value in micro_batches(1)[0].items()}
        F.cross_entropy(model(**batch), batch["labels"]).backward()
        optimizer.step()
        observer.after_step(1, model, optimizer)
        for name, p in model.named_parameters():
            expected = optimizer.fisher_diagonal(p, normalized=False)
            torch.testing.assert_close(observer.window.diagonals()[id(p)], expected, msg=name)
    observer.close()


def test_one_message_about_a_model_that_vmap_cannot_run(caplog: pytest.LogCaptureFixture) -> None:
    model, plain = Looking().double(), Net().double()
    diagonals = []
    for net in (model, plain):
        observer = RunObserver(net, DECAY, 0.999, 64)
        torch.manual_seed(1)  # dropout
        run_beside(net, observer)
        observer.close()
        diagonals.append(list(observer.window.diagonals().values()))
    assert sum("one by one" in record.message for record in caplog.records) == 1
    torch.testing.assert_close(*diagonals)
    caplog.clear()
    batch = micro_batches(1)[0]
    known, alone = exact_fisher(plain, [batch]), exact_fisher(plain, [batch], one_by_one=True)
    assert alone.looped and not known.looped and not caplog.records
    torch.testing.assert_close(alone.diagonals, known.diagonals)


def settings(folder: Path, *further: str, **changes: Any) -> FisherSettings:
    values: dict[str, Any] = {"task": "digits", "steps": 12, "examples": 12, "further": [*RUN, *further], **changes}
    return FisherSettings(output=folder / "figure.png", **values)


def test_labels_without_an_exact_diagonal_leave_the_control_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        found = compare_fisher(settings(tmp_path, "--label_smoothing_factor", "0.1"))
    assert sum("left out" in record.message for record in caplog.records) == 1
    present = set(CONTROLS) - {"exact_window"}
    assert {row["layer"]: set(row["measures"]) & {*CONTROLS, *AGAINST_WINDOW} for row in found["layers"]}[
        TOGETHER
    ] == present
    table = agreement_table(found, "spearman", CONTROL_COLUMNS)
    assert list(table.columns[2:]) == [label for name, label in CONTROLS.items() if name in present]
    assert len(draw_agreement(found, tmp_path / "a.svg")) == 2


@pytest.mark.parametrize("step", [1, 2])
@pytest.mark.parametrize("spoil", ["mixed", "none", "by position"])
def test_one_step_without_class_numbers_ends_the_average(
    step: int, spoil: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = Net().double()
    average = ExactAverage(model, DECAY)
    for number in (1, 2, 3):
        batch: dict[str, Any] = micro_batches(number)[0]
        if number == step and spoil != "by position":
            batch["labels"] = F.one_hot(batch["labels"], 3).double() if spoil == "mixed" else None
        by_position = spoil == "by position" and number == step
        average.add(model, (batch.pop("x"),) if by_position else (), batch)
        average.refresh()
        assert bool(average.diagonals()) == (number < step)
    assert len(caplog.records) == 1 and "no class numbers" in caplog.text


def test_the_comparison_has_all_controls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dampings = []
    plain = evaluation.RunObserver

    def watched(*args: Any) -> RunObserver:
        observer = plain(*args)
        diagonals = observer.factors.diagonals
        monkeypatch.setattr(
            observer.factors, "diagonals", lambda damping: dampings.append(damping) or diagonals(damping)
        )
        return observer

    monkeypatch.setattr(evaluation, "RunObserver", watched)
    chosen = settings(tmp_path, kfac_damping=0.02)
    rows, _ = compare_run(chosen, prepare_seed(chosen, 0))
    assert dampings == pytest.approx([0.02, 0.0002, 2.0])
    for row in rows:
        assert {"exact_window", "second_moment_window", "product_unscaled", *AGAINST_WINDOW} <= row.measures.keys()
        scaled, unscaled = row.measures["product"], row.measures["product_unscaled"]
        if row.layer == TOGETHER:
            assert scaled["spearman"] != unscaled["spearman"]
        else:  # one factor a layer; float32 may tie two values that are not
            assert unscaled["spearman"] == pytest.approx(scaled["spearman"], abs=1e-3)
            # As many terms of the sum over a layer's positions as these images have tokens.
            positions = {"cct.layers.0.intermediate": 4, "classifier": 1}.get(row.layer)
            if positions is not None:
                assert 10 ** (scaled["log_scale"] - unscaled["log_scale"]) == pytest.approx(positions, rel=1e-4)
        assert ("kfac_weaker" in row.measures) == ("kfac_stronger" in row.measures) == ("kfac" in row.measures)
    assert {*ESTIMATES, *CONTROLS, *AGAINST_WINDOW} < rows[-1].measures.keys()
