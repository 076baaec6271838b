"""fp16: a loss scaler multiplies the loss, and skips the steps whose gradients overflowed.

accelerate refuses fp16 on a CPU, so its scaler is put in place by hand; everything behind it is the real thing.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import Trainer, TrainingArguments

from hf_adafisher import (
    AdaFisherCallback,
    AdaFisherTrainer,
    AdaFisherW,
    OptimizerFactory,
    create_optimizer,
)
from tests.cases import mlp
from tests.model_zoo import family
from tests.training_helper import FORMS, built, make_trainer, of_form, optimizer_of

RECORD = family("gpt2")
GOOD = RECORD.dataset(8, seq=8)
BAD = RECORD.dataset(3, seq=8, seed=1)
WITH_OVERFLOWS = [BAD[0], *GOOD[:3], BAD[1], BAD[2], *GOOD[3:]]
OPTIONS: dict[str, Any] = {
    "logging_strategy": "no",
    "per_device_train_batch_size": 1,
    "lr_scheduler_type": "constant",
    "train_sampling_strategy": "sequential",
    "max_grad_norm": 0.0,  # accelerate unscales before it clips only where it set the scaler up itself
}
OURS: dict[str, Any] = {"learning_rate": 0.02, "update_interval": 3, "damping": 0.1}


def overflow(model: nn.Module, where: str) -> None:
    """Make the gradients of the rows in `BAD` infinite: those of one weight, or all behind one layer's output."""
    bad = {tuple(row["input_ids"].tolist()) for row in BAD}
    seen: dict[str, bool] = {}

    def look(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        seen["bad"] = tuple(kwargs["input_ids"][0].tolist()) in bad

    def spoil(grad: Tensor) -> Tensor:
        return grad * math.inf if seen["bad"] else grad

    model.register_forward_pre_hook(look, with_kwargs=True)
    block = model.transformer.h[0]  # type: ignore[union-attr, index]
    if where == "weight":
        block.mlp.c_fc.weight.register_hook(spoil)  # type: ignore[union-attr]
    else:

        def spoil_output(module: nn.Module, args: Any, output: Tensor) -> None:
            output.register_hook(spoil)

        block.mlp.register_forward_hook(spoil_output)  # type: ignore[union-attr, arg-type]


def put_scaler(trainer: Trainer) -> None:
    """What accelerate does with mixed_precision="fp16" where the device allows it."""
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)


def train(folder: Path, data: list[Any], steps: int, *, scaled: bool, where: str, by: str = "ours paper") -> Trainer:
    model = RECORD.build()
    overflow(model, where)
    maker, _, form = by.partition(" ")
    if maker != "ours":
        chosen: dict[str, Any] = of_form(form, lr=0.02, update_interval=3, damping=0.1)
        chosen["name"] = chosen.pop("optim")
        given: dict[str, Any] = {"optimizer_cls_and_kwargs": (OptimizerFactory, chosen)}
        if maker == "optimizers=":
            given = {"optimizers": (create_optimizer(model=model, **chosen), None)}
        kind = Trainer if maker == "stock" else AdaFisherTrainer
        callbacks = [AdaFisherCallback()] if by == "stock paper" else []
        arguments: Any = (kind, TrainingArguments)
        options = {"callbacks": callbacks, **given}
    else:
        arguments = ()
        options = of_form(form, **OURS)
    options |= {"model": model, "train_dataset": data, "max_steps": steps}
    trainer = make_trainer(folder, RECORD, *arguments, **options, **OPTIONS)
    if scaled:
        put_scaler(trainer)
    trainer.train()
    return trainer


@pytest.mark.parametrize("where", ["weight", "output"])
@pytest.mark.parametrize(
    "by",
    [
        "ours paper",
        "ours root",
        "ours spectral",
        "stock paper",
        "stock root",
        "stock spectral",
        "optimizers= paper",
        "optimizer_cls_and_kwargs= paper",
    ],
)
def test_d19_skipped_steps_neither_advance_nor_poison_anything(where: str, by: str, tmp_path: Path) -> None:
    """Three overflows, two of them on steps that are due: the run equals one that never saw their batches.

    Without hooks a stock Trainer needs no callback for it. The scale is a power of two at all times, so that
    equal means bitwise.
    """
    scaled = train(tmp_path / "a", WITH_OVERFLOWS, len(WITH_OVERFLOWS), scaled=True, where=where, by=by)
    plain = train(tmp_path / "b", GOOD, len(GOOD), scaled=False, where=where, by=by)
    assert scaled.state.global_step == len(WITH_OVERFLOWS)
    assert optimizer_of(scaled).param_groups[0]["steps"] == len(GOOD)
    assert_close(scaled.model.state_dict(), plain.model.state_dict(), rtol=0, atol=0)
    mine, theirs = (optimizer_of(run).state_dict() for run in (scaled, plain))
    assert_close(mine["state"], theirs["state"], rtol=0, atol=0)
    assert mine["param_groups"] == theirs["param_groups"]
    assert mine["param_groups"][0]["refreshes"] == (3 if by.endswith("paper") else len(GOOD))
    assert mine["param_groups"][0]["dropped_refreshes"] == 0


@pytest.mark.parametrize("form", ["root", "spectral"])
def test_without_hooks_the_scale_of_the_loss_cancels(form: str) -> None:
    """To the bit, since it is a power of two: a loop may leave the gradients scaled."""
    ends = []
    for scale in (1.0, 2.0**16):
        torch.manual_seed(0)
        model = mlp(4, 6, 3)
        optimizer = built(form, model, lr=0.1)
        for _ in range(5):
            optimizer.zero_grad()
            (model(torch.randn(5, 4)).square().mean() * scale).backward()
            optimizer.step()
        ends.append(model.state_dict())
    assert_close(ends[0], ends[1], rtol=0, atol=0)


def test_an_overflow_on_a_due_step_leaves_the_refresh_due(tmp_path: Path) -> None:
    trainer = train(tmp_path, [BAD[0]], 1, scaled=True, where="output")
    optimizer = optimizer_of(trainer)
    assert optimizer.param_groups[0]["steps"] == 0 and optimizer.refresh_due and not optimizer.state
    assert not optimizer._statistics.recorder._pending


def test_factors_do_not_know_the_number_of_tokens_in_a_batch(tmp_path: Path) -> None:
    """Raw factors of a batch repeated four times equal those of the batch: they are of each token's own loss."""
    states = []
    for repeat in (1, 4):
        options = {"max_steps": 1, "per_device_train_batch_size": 2 * repeat, "train_dataset": GOOD[:2] * repeat}
        options["step_size"] = "paper"
        trainer = make_trainer(tmp_path, RECORD, **(OPTIONS | options))
        trainer.train()
        states.append([state["output_grad_factor"] for state in optimizer_of(trainer).state.values()])
    for left, right in zip(*states, strict=True):
        assert_close(left, right, rtol=1e-4, atol=1e-5 * float(left.abs().max()))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("reset", ["optimizer", "model"])
def test_a_scaler_in_an_accelerate_loop(reset: str, form: str) -> None:
    """`optimizer.zero_grad()` drops a skipped step's statistics by itself; with `model.zero_grad()` the loop does."""
    results = []
    for skips in ([1, 2], []):
        torch.manual_seed(0)
        model = mlp(4, 6, 3)
        accelerator = Accelerator(cpu=True)
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        raw = built(form, model, lr=0.1, update_interval=2)
        model, optimizer = accelerator.prepare(model, raw)
        generator = torch.Generator().manual_seed(0)
        for step in range(7):
            x = torch.randn(5, 4, generator=generator)
            if step in (1, 2):
                if step not in skips:
                    continue
                x = x * math.inf
            if form == "paper":
                raw.gradient_scale = accelerator.scaler.get_scale()
            accelerator.backward(model(x).square().mean())
            optimizer.step()
            if reset == "optimizer":
                optimizer.zero_grad()
            else:
                model.zero_grad()
                if optimizer.step_was_skipped and form == "paper":
                    raw.discard_statistics()
        results.append((model.state_dict(), raw.state_dict()))
    assert_close(results[0][0], results[1][0], rtol=0, atol=0)
    assert_close(results[0][1]["state"], results[1][1]["state"], rtol=0, atol=0)
    assert results[0][1]["param_groups"] == results[1][1]["param_groups"]


@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan])
def test_gradient_scale_is_checked(value: float) -> None:
    optimizer = AdaFisherW(mlp(2, 2))
    with pytest.raises(ValueError, match="gradient_scale must be finite and > 0"):
        optimizer.gradient_scale = value
