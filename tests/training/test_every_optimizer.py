"""Every optimizer under the Trainer: it trains three architectures, moves everything, and resumes to the bit."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import Trainer

from hf_adafisher import AdaFisherTrainer, AdaFisherTrainingArguments, available_optimizers
from hf_adafisher.optimizers.factory.catalog import optimizer_record
from tests.model_zoo import Family, family
from tests.training_helper import logged_losses, make_trainer, optimizer_of

STEPS, MIDDLE = 20, 13
LEARNING_RATES = {"sgd": 0.05, "adam": 3e-3, "adamw": 3e-3, "lion": 1e-3}
"""Where the record's own is meant for longer runs."""
PAPER: dict[str, Any] = {"step_size": "paper", "learning_rate": 0.02, "damping": 1e-2, "update_interval": 5}
OTHER_FORMS = {f"{name} (paper)": {"optim": name, **PAPER} for name in ("adafisher", "adafisherw")}
"""Training arguments of what has no name of its own."""


def trainer(name: str, record: Family, folder: Path, seed: int = 0, **options: Any) -> AdaFisherTrainer:
    """Four examples, all of them in every step, in two micro-batches."""
    settings = {
        "optim": name,
        "learning_rate": LEARNING_RATES.get(name),
        "weight_decay": 0.01,
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "logging_steps": 1,
        "train_dataset": record.dataset(4),
        **OTHER_FORMS.get(name, {}),
        **options,
    }
    return make_trainer(folder, record, seed=seed, **settings)


def states(run: AdaFisherTrainer) -> tuple[list[dict[str, Any]], list[Any]]:
    """The optimizer's groups, which hold counters and words, and its tensors, which may be in lists."""
    saved = optimizer_of(run).state_dict()
    return saved["param_groups"], [saved["state"][key] for key in sorted(saved["state"])]


def assert_equal(first: Any, second: Any) -> None:
    """Equal to the bit, in whatever containers."""
    if isinstance(first, Tensor):
        assert_close(first, second, rtol=0, atol=0)
    elif isinstance(first, dict):
        assert first.keys() == second.keys()
        assert_equal(list(first.values()), list(second.values()))
    elif isinstance(first, (list, tuple)):
        assert len(first) == len(second)
        for one, other in zip(first, second, strict=True):
            assert_equal(one, other)
    else:
        assert first == second


@pytest.mark.parametrize("model", ["gpt2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("vit", "resnet"))])
@pytest.mark.parametrize("name", [*available_optimizers(), *OTHER_FORMS])
def test_it_trains_moves_every_parameter_and_resumes_exactly(name: str, model: str, tmp_path: Path) -> None:
    record = family(model)
    whole = trainer(name, record, tmp_path / "whole", save_strategy="steps", save_steps=MIDDLE)
    before = {key: p.detach().clone() for key, p in whole.model.named_parameters()}
    whole.train()
    losses = logged_losses(whole)
    assert len(losses) == STEPS and losses[-1] < 0.97 * losses[0]
    assert not [key for key, p in whole.model.named_parameters() if torch.equal(p, before[key])]

    assert optimizer_record(whole.args.optim).resumable
    resumed = trainer(name, record, tmp_path / "resumed", seed=1)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{MIDDLE}"))
    assert_equal(dict(resumed.model.state_dict()), dict(whole.model.state_dict()))
    assert_equal(states(resumed), states(whole))


def test_the_model_card_shows_the_optimizers_own_betas(tmp_path: Path) -> None:
    """Trainer's card fills in the arguments of Adam, which schedule-free has no part in."""
    options = {"adam_beta1": 0.5, "optim_args": "betas=(0.8, 0.95),eps=1e-6", "max_steps": 1}
    run = trainer("schedule_free_adamw", family("gpt2"), tmp_path, **options)
    run.train()
    run.create_model_card()
    assert "schedule_free_adamw with betas=(0.8,0.95) and epsilon=1e-06" in (tmp_path / "README.md").read_text()
    assert (run.args.adam_beta1, run.args.adam_epsilon) == (0.5, 1e-8)


def test_the_model_card_shows_all_options_of_kfac(tmp_path: Path) -> None:
    run = trainer("kfac", family("gpt2"), tmp_path, optim_args="kl_clip=none", max_steps=1)
    run.train()
    run.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert "update_interval=10, inverse_interval=100, weight_decay=0.01, kl_clip=None, max_factor_dim=8192" in card
    assert "Trained with" not in card and run.args.optim_args == "kl_clip=none"


@pytest.mark.parametrize(("first", "then"), [("lars", "adamw"), ("adahessian", "adamw_torch"), ("adafisherw", "sgd")])
def test_a_default_learning_rate_that_went_along_to_another_optimizer_is_pointed_out(
    first: str, then: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    arguments = AdaFisherTrainingArguments(str(tmp_path), optim=first, use_cpu=True, report_to="none")
    replaced = dataclasses.replace(arguments, optim=then)
    assert replaced.learning_rate == optimizer_record(first).learning_rate.value
    AdaFisherTrainer(family("gpt2").build(), replaced).create_optimizer()
    assert (
        caplog.text.count(f"optim={then} runs with learning_rate={replaced.learning_rate}, the default of other") == 1
    )


@pytest.mark.parametrize(("name", "chosen"), [("sgd", "0.1"), ("adamw", "0.003"), ("lion", "0.0001")])
def test_a_learning_rate_that_was_chosen_is_not(
    name: str, chosen: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Also where it is the default of another."""
    assert any(optimizer_record(other).learning_rate.value == float(chosen) for other in available_optimizers())
    trainer(name, family("gpt2"), tmp_path, learning_rate=float(chosen)).create_optimizer()
    assert "the default of other" not in caplog.text


def test_kfac_is_told_the_terms_of_the_loss_and_logs_its_curvature(tmp_path: Path) -> None:
    """So it does not matter how a batch is split; GPT-2's positions, looked up once a batch, are left out."""
    runs = []
    for batch, accumulation in ((4, 1), (1, 4)):
        options = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation, "max_steps": 4}
        run = trainer("kfac", family("gpt2"), tmp_path, optim_args="update_interval=1,inverse_interval=1", **options)
        run.model.double().transformer.wpe.weight.requires_grad_(False)
        run.train()
        optimizer = optimizer_of(run)
        assert optimizer.loss_terms == 4 * 12 and optimizer.gradient_scale == 1 / 48
        runs.append(run)
    assert_close(dict(runs[0].model.state_dict()), dict(runs[1].model.state_dict()), rtol=1e-5, atol=1e-6)
    logs = [entry for entry in runs[0].state.log_history if "loss" in entry]
    assert all(0.0 < entry["kfac/kl_factor"] <= 1.0 and entry["kfac/dropped_refreshes"] == 0.0 for entry in logs)
    assert all(0.0 < entry["kfac/plain_share"] < 0.1 for entry in logs)


def test_a_loss_scaler_does_not_hide_the_terms_of_the_loss_from_kfac(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trainer("kfac", family("gpt2"), tmp_path)
    optimizer = run.create_optimizer()
    monkeypatch.setattr(Trainer, "training_step", lambda *args: torch.zeros(()))
    run.accelerator.scaler = SimpleNamespace(get_scale=lambda: 1024.0)
    run.training_step(run.model, {}, torch.tensor(48))
    assert (optimizer.loss_terms, optimizer.gradient_scale) == (48.0, 1024.0 / 48)
    run.args.average_tokens_across_devices = False
    monkeypatch.setattr(type(run.accelerator), "num_processes", 3)
    run.training_step(run.model, {}, torch.tensor(48))
    assert (optimizer.loss_terms, optimizer.gradient_scale) == (144.0, 1024.0 / 144)


def test_kfac_runs_eagerly_where_it_records_a_compiled_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stances: list[str] = []
    original = torch.compiler.set_stance
    monkeypatch.setattr(torch.compiler, "set_stance", lambda stance: stances.append(stance) or original(stance))
    run = trainer("kfac", family("resnet"), tmp_path, optim_args="update_interval=3,inverse_interval=3", max_steps=6)
    run.args.torch_compile = True  # seen by the step; the model itself is left as it is
    run.train()
    assert stances == ["force_eager"] * 2 * 2  # steps 0 and 3, of two micro-batches each
