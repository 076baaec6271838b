"""The controls of the exact Fisher's comparison: exact diagonals and squared gradients, averaged as AdaFisher does."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_adafisher import AdaFisherW
from hf_adafisher.experiments.fisher_accuracy import evaluation
from hf_adafisher.experiments.fisher_accuracy.agreement import AGAINST_WINDOW, CONTROLS, ESTIMATES, TOGETHER
from hf_adafisher.experiments.fisher_accuracy.estimates import ExactAverage, RunObserver
from hf_adafisher.experiments.fisher_accuracy.evaluation import (
    FisherSettings,
    compare_fisher,
    compare_run,
    prepare_seed,
)
from hf_adafisher.experiments.fisher_accuracy.exact_fisher import exact_fisher
from hf_adafisher.experiments.fisher_accuracy.picture import CONTROL_COLUMNS, agreement_table, draw_agreement
from tests.experiments.runs.image_runs import TINY

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
