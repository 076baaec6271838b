"""Trainer integration: ours, and the stock one with the factory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback
from transformers.training_args import OptimizerNames

from hf_adafisher import (
    AdaFisher,
    AdaFisherCallback,
    AdaFisherTrainer,
    AdaFisherTrainingArguments,
    AdaFisherW,
    OptimizerFactory,
    SpectralAdaFisher,
    available_optimizers,
)
from hf_adafisher.optimizers.factory.catalog import optimizer_record
from tests.model_zoo import family
from tests.training_helper import FORMS, logged_losses, make_trainer, of_form, optimizer_of

RECORD = family("gpt2")
ROWS = {"per_device_train_batch_size": 2}
both_forms = pytest.mark.parametrize("step_size", ["paper", "root"])


def our_trainer(folder: Path, seed: int = 0, model: Any = None, **options: Any) -> AdaFisherTrainer:
    return make_trainer(folder, RECORD, model=model or RECORD.build(seed), **(ROWS | options))


def stock_trainer(folder: Path, seed: int = 0, model: Any = None, step_size: str = "paper", **options: Any) -> Trainer:
    kwargs: dict[str, Any] = {"name": "adafisherw", "lr": 0.05, "damping": 1e-2, "weight_decay": 0.01}
    kwargs |= {"step_size": step_size, "update_interval": 4 if step_size == "paper" else 1}
    given = {"model": model or RECORD.build(seed), "optimizer_cls_and_kwargs": (OptimizerFactory, kwargs)}
    return make_trainer(folder, RECORD, Trainer, **given, **(ROWS | options))


@pytest.mark.parametrize("name", ["adafisher", "adafisherw", "spectral-adafisher", "sgd", "adam", "adamw"])
def test_a_name_gives_its_class(name: str, tmp_path: Path) -> None:
    trainer = our_trainer(tmp_path, optim=name, learning_rate=0.02, max_steps=24, logging_steps=8)
    trainer.train()
    assert logged_losses(trainer)[-1] < logged_losses(trainer)[0]
    kinds = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    ours = {"adafisher": AdaFisher, "adafisherw": AdaFisherW, "spectral-adafisher": SpectralAdaFisher}
    assert type(optimizer_of(trainer)) is {**kinds, **ours}[name]


def test_trainers_own_names_keep_working(tmp_path: Path) -> None:
    trainer = our_trainer(tmp_path, optim="adamw_torch", max_steps=2)
    trainer.train()
    assert type(optimizer_of(trainer)) is torch.optim.AdamW


@pytest.mark.parametrize(
    ("optim", "kind", "own"),
    [
        ("adafisherw", AdaFisherW, {"damping": 0.3}),
        ("adafisherw", AdaFisherW, {"damping": 0.3, "step_size": "paper", "update_interval": 5}),
        ("spectral-adafisher", SpectralAdaFisher, {"relative_damping": 0.3}),
    ],
)
def test_arguments_reach_the_optimizer_and_the_groups_are_trainers(
    optim: str, kind: type[Any], own: dict[str, Any], tmp_path: Path
) -> None:
    options = {"beta": 0.8, "ema_decay": 0.7, **own}
    trainer = our_trainer(tmp_path, optim=optim, learning_rate=0.04, weight_decay=0.2, **options)
    optimizer = trainer.create_optimizer()
    assert isinstance(optimizer, kind)
    stock = make_trainer(tmp_path, RECORD, Trainer, model=trainer.model, weight_decay=0.2).create_optimizer()
    for group, expected in zip(optimizer.param_groups, stock.param_groups, strict=True):
        assert {key: group[key] for key in options} == options
        assert (group["lr"], group["weight_decay"]) == (0.04, expected["weight_decay"])
        assert [id(p) for p in group["params"]] == [id(p) for p in expected["params"]]
    assert trainer.create_optimizer() is optimizer


def test_a_model_argument_an_own_decay_rule_and_an_own_optimizer_are_respected(tmp_path: Path) -> None:
    class NoDecay(AdaFisherTrainer):
        def get_decay_parameter_names(self, model: Any) -> list[str]:
            return []

    other = RECORD.build(1)
    optimizer = make_trainer(tmp_path, RECORD, NoDecay, weight_decay=0.2).create_optimizer(other)
    assert optimizer.model is other and not optimizer.param_groups[0]["params"]
    model = RECORD.build()
    mine = torch.optim.SGD(model.parameters(), lr=0.1)
    assert our_trainer(tmp_path, model=model, optimizers=(mine, None)).create_optimizer() is mine


@both_forms
@pytest.mark.parametrize("make", [our_trainer, stock_trainer], ids=["ours", "stock"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_resume_equals_the_uninterrupted_run_bitwise(
    make: Callable[..., Trainer], dtype: str, step_size: str, tmp_path: Path
) -> None:
    """From a checkpoint in the middle of an update interval, with accumulation; also with weights in bfloat16."""
    options: dict[str, Any] = {"max_steps": 10, "save_strategy": "steps", "save_steps": 6, "step_size": step_size}
    options["gradient_accumulation_steps"] = 2
    if make is our_trainer:
        options |= {"update_interval": 4 if step_size == "paper" else 1, "optim": "adafisher", "weight_decay": 0.01}
    whole, resumed = (
        make(tmp_path / name, model=RECORD.build(seed).to(getattr(torch, dtype)), **options)
        for seed, name in enumerate("ab")
    )
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-6"))
    assert_close(resumed.model.state_dict(), whole.model.state_dict(), rtol=0, atol=0)
    states = [optimizer_of(run).state_dict() for run in (resumed, whole)]
    assert_close(states[0]["state"], states[1]["state"], rtol=0, atol=0)
    assert states[0]["param_groups"] == states[1]["param_groups"]


def test_a_checkpoint_of_the_other_form_is_refused_on_resume(tmp_path: Path) -> None:
    """Its factors are of something else, and `update_interval` of nothing."""
    for writer, reader in (("paper", "root"), ("root", "paper")):
        folder = tmp_path / writer
        our_trainer(folder / "a", step_size=writer, max_steps=2, save_strategy="steps", save_steps=2).train()
        with pytest.raises(ValueError, match="step_size"):
            our_trainer(folder / "b", step_size=reader, max_steps=4).train(str(folder / "a" / "checkpoint-2"))


@pytest.mark.parametrize(
    ("writer", "reader"),
    [
        ("adamw", "adafisherw"),
        ("adafisherw", "adamw"),
        ("adafisher", "adafisherw"),
        ("adafisherw", "spectral-adafisher"),
        ("spectral-adafisher", "adafisherw"),
    ],
)
def test_a_checkpoint_of_another_optimizer_is_refused_on_resume(writer: str, reader: str, tmp_path: Path) -> None:
    our_trainer(tmp_path / "a", optim=writer, max_steps=2, save_strategy="steps", save_steps=2).train()
    with pytest.raises(ValueError, match="resume with"):
        our_trainer(tmp_path / "b", optim=reader, max_steps=4).train(
            resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2")
        )


@both_forms
def test_curvature_scalars_reach_the_history_and_every_reporter(step_size: str, tmp_path: Path) -> None:
    reported: list[dict[str, float]] = []

    class Reporter(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            reported.append(dict(logs))

    trainer = our_trainer(tmp_path, max_steps=4, logging_steps=2, step_size=step_size)
    trainer.add_callback(Reporter())
    trainer.train()
    for logs in (reported, trainer.state.log_history):
        rows = [row for row in logs if "loss" in row]
        assert len(rows) == 2
        for row in rows:
            assert type(row["adafisher/fisher_mean"]) is float and row["adafisher/fisher_mean"] > 0
            of_hooks = {key: row.get(f"adafisher/{key}") for key in ("dropped_refreshes", "gradient_factor_share")}
            assert set(of_hooks.values()) == ({None} if step_size == "root" else {0.0})
            assert 0.0 < row["adafisher/floor_share"] < 1.0
        assert not any("adafisher/fisher_mean" in row for row in logs if "loss" not in row)
    quiet = our_trainer(tmp_path, max_steps=2, logging_steps=1, log_curvature=False)
    quiet.train()
    assert not any(key.startswith("adafisher/") for row in quiet.state.log_history for key in row)


def test_the_model_card_names_the_optimizer_and_its_options(tmp_path: Path) -> None:
    trainer = our_trainer(tmp_path, max_steps=2, damping=0.25, learning_rate=0.03)
    trainer.train()
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert (
        "Use adafisherw and the args are:\nlr=0.03, beta=0.9, damping=0.25, ema_decay=0.95, update_interval=1, "
        "weight_decay=0.0, step_size=root" in card
    )
    assert "Trained with AdaFisherW" in card and "arxiv.org/abs/2405.16397" in card
    assert trainer.args.optim_args is None
    other = our_trainer(tmp_path / "adam", optim="adamw", max_steps=1)
    other.train()
    other.create_model_card()
    card = (tmp_path / "adam" / "README.md").read_text()
    assert "Use adamw with betas" in card and "AdaFisher" not in card


def test_spectral_curvature_has_adafishers_name_in_logs_and_its_own_options_on_the_card(tmp_path: Path) -> None:
    options = {"optim": "spectral-adafisher", "relative_damping": 0.25, "learning_rate": 0.03}
    trainer = our_trainer(tmp_path, max_steps=2, logging_steps=1, **options)
    trainer.train()
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert len(rows) == 2
    for row in rows:
        assert row["adafisher/fisher_mean"] > 0 and "adafisher/dropped_refreshes" not in row
        assert not any(key.startswith("kfac/") for key in row)
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert "lr=0.03, beta=0.9, relative_damping=0.25, ema_decay=0.95, weight_decay=0.0, nesterov=True" in card
    assert "Trained with SpectralAdaFisher" in card


@pytest.mark.parametrize(
    ("optim", "start"), [("adafisherw", 5e-5), ("adafisher", 5e-5), ("spectral-adafisher", 1.5e-4), ("adamw", None)]
)
def test_pretrained_weights_with_a_default_for_scratch_are_pointed_out(
    optim: str, start: float | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Once, and not where a rate was chosen, were it the same."""
    RECORD.build().save_pretrained(tmp_path / "weights")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "weights")
    trainer = our_trainer(tmp_path, model=model, optim=optim)
    trainer.create_optimizer()
    trainer.create_optimizer()
    default = "0.01" if optim == "spectral-adafisher" else "0.004"
    said = [record.getMessage() for record in caplog.records if "fine-tune" in record.getMessage()]
    assert len(said) == (0 if start is None else 1)
    if start is not None:
        assert f"learning_rate={default}, which is for training from scratch" in said[0]
        assert str(tmp_path / "weights") in said[0] and f"set learning_rate: {start} is" in said[0]
    caplog.clear()
    our_trainer(tmp_path, model=model, optim=optim, learning_rate=float(default)).create_optimizer()
    our_trainer(tmp_path, model=RECORD.build(), optim=optim).create_optimizer()
    if optim.startswith("adafisher"):  # the paper's rate is no rate for scratch
        our_trainer(tmp_path, model=model, optim=optim, step_size="paper").create_optimizer()
    assert "fine-tune" not in caplog.text


def test_resuming_with_other_options_is_pointed_out_and_the_card_tells_the_truth(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    our_trainer(tmp_path / "a", damping=0.01, max_steps=2, save_strategy="steps", save_steps=2).train()
    trainer = our_trainer(tmp_path / "b", damping=0.5, max_steps=4)
    trainer.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert caplog.text.count("options replace those given to the optimizer (damping: 0.5 -> 0.01)") == 1
    trainer.create_model_card()
    assert "damping=0.01" in (tmp_path / "b" / "README.md").read_text()


@pytest.mark.parametrize("name", available_optimizers())
def test_a_stock_trainer_with_our_arguments_says_what_to_use(name: str, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, RECORD, Trainer, AdaFisherTrainingArguments, optim=name)
    if name in [known.value for known in OptimizerNames]:
        assert type(trainer.create_optimizer()).__module__ != "hf_adafisher"  # Trainer's own of that name, as ever
        return
    message = (
        f"optim='{name}' is an optimizer of hf_adafisher.*: use AdaFisherTrainer or AdaFisherMixin .class MyTrainer"
    )
    with pytest.raises(ValueError, match=message):
        trainer.create_optimizer()
    kwargs = {"name": name}
    factory = make_trainer(tmp_path, RECORD, Trainer, optimizer_cls_and_kwargs=(OptimizerFactory, kwargs))
    assert isinstance(factory.create_optimizer(), optimizer_record(name).cls)


class Wrapped(OptimizerFactory):
    """A factory of a user's own, which is not called by Trainer itself."""

    def __call__(self, model: Any, **kwargs: Any) -> Any:
        return OptimizerFactory()(model, **kwargs)


@pytest.mark.parametrize("factory", [OptimizerFactory, Wrapped])
def test_the_factory_takes_what_its_dictionary_lacks_from_trainers_arguments(
    factory: type[Any], tmp_path: Path
) -> None:
    def groups(given: dict[str, Any], **options: Any) -> list[tuple[float, float]]:
        trainer = make_trainer(tmp_path, RECORD, Trainer, optimizer_cls_and_kwargs=(factory, given), **options)
        return [(group["lr"], group["weight_decay"]) for group in trainer.create_optimizer().param_groups]

    theirs = {"learning_rate": 0.01, "weight_decay": 0.1}
    assert groups({}) == groups({"name": "adafisherw"}) == [(5e-5, 0.0), (5e-5, 0.0)]
    for name in ("adafisherw", "spectral-adafisher", "adamw", "lion"):
        assert groups({"name": name}, **theirs) == [(0.01, 0.1), (0.01, 0.0)]
        assert groups({"name": name, "lr": 0.02}, **theirs) == [(0.02, 0.1), (0.02, 0.0)]
        assert groups({"name": name, "weight_decay": 0.3}, **theirs) == [(0.01, 0.3), (0.01, 0.0)]
    given = {"name": "adafisherw", "damping": 0.3}
    groups(given, **theirs)
    assert given == {"name": "adafisherw", "damping": 0.3}  # the next training finds it as it was


def test_trainers_rates_that_do_not_suit_the_factorys_optimizer_are_pointed_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def said(kwargs: dict[str, Any], **options: Any) -> str:
        caplog.clear()
        factory = (OptimizerFactory, kwargs)
        make_trainer(tmp_path, RECORD, Trainer, optimizer_cls_and_kwargs=factory, **options).create_optimizer()
        return caplog.text

    assert not said({"lr": 4e-3}) and not said({"name": "spectral-adafisher", "lr": 0.02})
    assert "learning_rate=5e-05, more than 20 times below its usual ones (0.004 from scratch)" in said({})
    assert "optim=muon runs with learning_rate=5e-05, more than 20 times below" in said({"name": "muon"})
    assert "learning_rate=0.2, more than 20 times above" in said({"lr": 0.2})
    paper = {"step_size": "paper", "lr": 1e-3}
    assert not said(paper) and "set max_grad_norm" in said(paper, max_grad_norm=0.0)
    OptimizerFactory()(RECORD.build(), lr=0.2)
    assert caplog.text.count("runs with") == 0  # in a loop of one's own nothing is taken for a mistake


def test_model_init_builds_a_new_optimizer_on_the_new_model(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, RECORD, model_init=lambda: RECORD.build(), max_steps=2, **ROWS)
    for _ in range(2):
        trainer.train()
        optimizer = optimizer_of(trainer)
        assert isinstance(optimizer, AdaFisher) and optimizer.model is trainer.model
        assert optimizer.param_groups[0]["steps"] == 2


@pytest.mark.parametrize("form", FORMS)
def test_evaluation_between_steps_changes_nothing(form: str, tmp_path: Path) -> None:
    runs = []
    for strategy in ("no", "steps"):
        options = {"max_steps": 6, "eval_strategy": strategy, "eval_steps": 1}
        trainer = our_trainer(tmp_path, eval_dataset=RECORD.dataset(4), **of_form(form, update_interval=2), **options)
        trainer.train()
        runs.append(trainer.model.state_dict())
    assert_close(runs[0], runs[1], rtol=0, atol=0)


@pytest.mark.parametrize("given", ["none", "callback", "optimizers", "optimizer_cls_and_kwargs"])
def test_every_trainer_of_ours_trains_with_one_callback(given: str, tmp_path: Path) -> None:
    model, kwargs = RECORD.build(), {}
    if given == "callback":
        kwargs = {"callbacks": [AdaFisherCallback]}
    elif given == "optimizers":
        kwargs = {"optimizers": (AdaFisherW(model), None)}
    elif given == "optimizer_cls_and_kwargs":
        kwargs = {"optimizer_cls_and_kwargs": (OptimizerFactory, {"lr": 0.02})}
    trainer = our_trainer(tmp_path, model=model, max_steps=1, **kwargs)
    for _ in range(2):
        trainer.train()
        assert sum(isinstance(found, AdaFisherCallback) for found in trainer.callback_handler.callbacks) == 1
