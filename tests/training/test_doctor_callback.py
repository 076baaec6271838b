"""`DoctorCallback`: what a Trainer knows reaches the diagnosis, and training is as without it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from hf_adafisher import DoctorCallback, OptimizerFactory
from tests.model_zoo import family
from tests.training_helper import FORMS, make_trainer, of_form, optimizer_of

RECORD = family("gpt2")
STEPS = 4


def diagnosed(folder: Path, form: str, kind: type[Trainer] | None = None, **options: Any) -> tuple[Trainer, Any]:
    """A Trainer after training with a callback, and the callback."""
    callback = DoctorCallback(steps=options.pop("watched", STEPS), stop=options.pop("stop", False))
    options = {"max_steps": STEPS, "per_device_train_batch_size": 2, "logging_strategy": "no"} | options
    if kind is Trainer:
        chosen = of_form(form)
        chosen["name"] = chosen.pop("optim")
        options["optimizer_cls_and_kwargs"] = OptimizerFactory, {**chosen, "lr": 0.004}
        trainer = make_trainer(folder, RECORD, Trainer, callbacks=[callback], **options)
    else:
        trainer = make_trainer(folder, RECORD, callbacks=[callback], **of_form(form, **options))
    trainer.train()
    return trainer, callback


class Norms(TrainerCallback):
    """The norm of the gradient as the optimizer gets it."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        grads = [p.grad for p in kwargs["model"].parameters() if p.grad is not None]
        self.seen.append(nn.utils.get_total_norm(grads).item())


@pytest.mark.parametrize("form", FORMS)
def test_a_healthy_run(form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is clipped at this norm, so that the optimizer's gradients are those before clipping."""
    norms = Norms()
    callback = DoctorCallback(steps=3)
    make_trainer(
        tmp_path,
        RECORD,
        callbacks=[callback, norms],
        **of_form(form, max_steps=5, per_device_train_batch_size=2, max_grad_norm=10.0),
    ).train()
    assert callback.diagnosis is not None and callback.diagnosis.healthy and callback.diagnosis.steps == 3
    known = callback.diagnosis.numbers["gradient_norm"]
    assert known["largest"] == pytest.approx(max(norms.seen[:3]), rel=1e-4)
    assert known["median"] == pytest.approx(sorted(norms.seen[:3])[1], rel=1e-4)
    printed = capsys.readouterr().out
    assert printed.count("after 3 steps: nothing was found") == 1 and str(callback.diagnosis) in printed
    assert json.loads((tmp_path / "diagnosis.json").read_text()) == callback.diagnosis.as_dict() | {"findings": []}


@pytest.mark.parametrize("kind", [None, Trainer])
def test_clipping_is_seen_from_outside(kind: Any, tmp_path: Path) -> None:
    _, callback = diagnosed(tmp_path, "paper", kind, max_grad_norm=0.01)
    finding = next(one for one in callback.diagnosis.findings if one.ailment == "clipping")
    assert finding.numbers["max_grad_norm"] == 0.01 and len(finding.numbers["grad_norms"]) == STEPS
    assert finding.numbers["factor"] > 50
    assert json.loads((tmp_path / "diagnosis.json").read_text())["findings"][0]["sentence"]


def test_gradients_that_are_not_clipped(tmp_path: Path) -> None:
    _, callback = diagnosed(tmp_path, "paper", max_grad_norm=0.0)
    assert "unclipped" in [one.ailment for one in callback.diagnosis.findings]


def test_a_short_run_is_diagnosed_at_its_end(tmp_path: Path) -> None:
    _, callback = diagnosed(tmp_path, "root", watched=100)
    assert callback.diagnosis.steps == STEPS and callback.diagnosis.numbers["gradient_norm"] is not None


def test_it_can_end_the_run(tmp_path: Path) -> None:
    trainer, callback = diagnosed(tmp_path, "root", watched=2, stop=True)
    assert trainer.state.global_step == 2 == callback.diagnosis.steps


@pytest.mark.parametrize("form", ["paper", "root"])
def test_training_is_the_same_and_only_watched_steps_are_logged(form: str, tmp_path: Path) -> None:
    with_it, _ = diagnosed(tmp_path / "a", form, watched=2)
    without = make_trainer(tmp_path / "b", RECORD, **of_form(form, max_steps=STEPS, per_device_train_batch_size=2))
    without.train()
    for name, value in without.model.state_dict().items():
        assert torch.equal(value, with_it.model.state_dict()[name])
    assert [entry["step"] for entry in with_it.state.log_history if "loss" in entry] == [1, 2]


def test_a_second_training_is_diagnosed_anew(tmp_path: Path) -> None:
    trainer, callback = diagnosed(tmp_path, "paper", max_grad_norm=0.01)
    trainer.train()
    assert callback.diagnosis.steps == 2 * STEPS
    finding = next(one for one in callback.diagnosis.findings if one.ailment == "clipping")
    assert len(finding.numbers["grad_norms"]) == STEPS


def spoil(model: nn.Module, after: int) -> None:
    """Make the gradients of one weight infinite from a backward on."""
    calls = [0]

    def hook(grad: Tensor) -> Tensor:
        calls[0] += 1
        return grad * math.inf if calls[0] > after else grad

    model.transformer.h[0].mlp.c_fc.weight.register_hook(hook)  # type: ignore[union-attr, index]


@pytest.mark.parametrize(("form", "good"), [("root", 1), ("paper", 1), ("root", 0)])
def test_skipped_steps_are_counted(form: str, good: int, tmp_path: Path) -> None:
    """accelerate refuses fp16 on a CPU, so that its scaler is put in place by hand."""
    model, callback = RECORD.build(), DoctorCallback(steps=STEPS)
    spoil(model, good)
    options = of_form(form, max_steps=STEPS, per_device_train_batch_size=2, max_grad_norm=0.0)
    trainer = make_trainer(tmp_path, RECORD, model=model, callbacks=[callback], **options)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4)
    trainer.train()
    assert optimizer_of(trainer).param_groups[0]["steps"] == good
    assert callback.diagnosis is not None and callback.diagnosis.numbers["skipped_steps"] == STEPS - good
    assert callback.diagnosis.findings[0].ailment == "skipped-steps"
    assert f"skipped {STEPS - good} of {STEPS} steps" in callback.diagnosis.findings[0].sentence


def test_other_optimizers_are_not_diagnosed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    callback = DoctorCallback()
    trainer = make_trainer(tmp_path, RECORD, callbacks=[callback], optim="adamw", max_steps=2, logging_strategy="no")
    trainer.train()
    assert callback.diagnosis is None and not (tmp_path / "diagnosis.json").exists()
    assert not any("loss" in entry for entry in trainer.state.log_history)
    assert "it knows AdaFisher, AdaFisherW and SpectralAdaFisher, and the optimizer is AdamW" in caplog.text


@pytest.mark.parametrize("steps", [0, -1, 2.0, True])
def test_bad_numbers_of_steps(steps: Any) -> None:
    with pytest.raises(ValueError, match=r"it must be a whole number of steps to watch, at least 1"):
        DoctorCallback(steps=steps)
