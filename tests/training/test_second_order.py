"""AdaHessian and Sophia under the Trainer: the gradients' graph is there when it is needed, and only then."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close
from transformers import Trainer

from hf_adafisher import AdaFisherTrainer, OptimizerFactory
from tests.model_zoo import family
from tests.training_helper import make_trainer, optimizer_of

RECORD = family("gpt2")
BOTH = pytest.mark.parametrize("name", ["adahessian", "sophia"])


def trainer(name: str, folder: Path, **options: Any) -> AdaFisherTrainer:
    """All four examples in every step, in float64."""
    settings: dict[str, Any] = {"max_steps": 6, "logging_steps": 1, "weight_decay": 0.1, "optim": name}
    settings |= {"per_device_train_batch_size": 4, "train_dataset": RECORD.dataset(4)}
    return make_trainer(folder, RECORD, model=RECORD.build().double(), **(settings | options))


def trained(name: str, folder: Path, **options: Any) -> dict[str, torch.Tensor]:
    run = trainer(name, folder, **options)
    run.train()
    return dict(run.model.state_dict())


@BOTH
def test_accumulation_makes_no_difference(name: str, tmp_path: Path) -> None:
    """Nor does activation checkpointing that is not reentrant."""
    whole = trained(name, tmp_path)
    start = RECORD.build().double().state_dict()
    assert all(not torch.equal(whole[key], start[key]) for key in start)
    assert_close(trained(name, tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=4), whole)
    assert_close(trained(name, tmp_path, activation_checkpointing=True), whole)


@BOTH
def test_clipping_reaches_the_gradient_but_not_the_hessian(name: str, tmp_path: Path) -> None:
    runs = []
    for norm in (0.0, 1e-3):
        run = trainer(name, tmp_path, max_steps=1, max_grad_norm=norm)  # seeds the random vectors
        run.train()
        runs.append([optimizer_of(run).state[p] for p in run.model.parameters()])
    free, clipped = runs
    momentum = "exp_avg" if name == "adahessian" else "momentum"
    assert_close([state["hessian"] for state in clipped], [state["hessian"] for state in free])
    assert sum(float(state[momentum].norm()) for state in clipped) < 0.1 * sum(
        float(state[momentum].norm()) for state in free
    )


def test_only_the_steps_that_estimate_keep_the_graph_and_the_accelerator_stays_as_it_was(tmp_path: Path) -> None:
    run = trainer("sophia", tmp_path, optim_args="update_period=3", gradient_accumulation_steps=2)
    asked_for = []
    backward = run.accelerator.backward

    def watched(loss: torch.Tensor, **kwargs: Any) -> None:
        asked_for.append(kwargs.get("create_graph", False))
        backward(loss, **kwargs)

    run.accelerator.backward = watched
    run.train()
    assert asked_for == [True, False, False, True, False, False]  # an epoch has one batch: nothing to accumulate
    assert run.accelerator.backward is watched
    untouched = trainer("adahessian", tmp_path, max_steps=1)
    untouched.train()
    assert "backward" not in vars(untouched.accelerator)


def test_the_trainer_switches_attention_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = trainer("adahessian", tmp_path, max_steps=2)
    run.train()
    assert run.model.config._attn_implementation == "eager"
    assert caplog.text.count("adahessian needs second derivatives") == 1


def test_an_error_in_a_step_leaves_the_accelerator_as_it_was(tmp_path: Path) -> None:
    run = trainer("adahessian", tmp_path)
    run.train_dataset[0]["labels"] = torch.zeros(3)  # does not stack
    with pytest.raises(RuntimeError):
        run.train()
    run = trainer("adahessian", tmp_path)
    run.compute_loss = lambda *args, **kwargs: 1 / 0
    with pytest.raises(ZeroDivisionError):
        run.train()
    assert "backward" not in vars(run.accelerator)


@BOTH
def test_a_stock_trainer_is_told_what_it_lacks(name: str, tmp_path: Path) -> None:
    factory = (OptimizerFactory, {"name": name, "lr": 0.1})
    run = make_trainer(tmp_path, RECORD, Trainer, max_steps=1, optimizer_cls_and_kwargs=factory)
    with pytest.raises(RuntimeError, match=r"or train with AdaFisherTrainer, which does \(a stock Trainer cannot\)"):
        run.train()


@BOTH
def test_several_gpus_in_one_process_are_refused(name: str, tmp_path: Path) -> None:
    run = trainer(name, tmp_path)
    run.args._n_gpu = 2
    with pytest.raises(ValueError, match=rf"{name} does not support DataParallel \(2 GPUs in one process\)"):
        run.create_optimizer()
