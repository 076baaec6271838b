"""The weights that are evaluated are those that are saved, and those that are saved are those that are loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import TrainerCallback

from hf_adafisher import AdaFisherTrainer
from hf_adafisher.training.renamed_weights import has_renamed_weights, load_renamed_weights
from tests.model_zoo import family
from tests.training_helper import make_trainer


def trainer(name: str, model: str, folder: Path, **options: Any) -> AdaFisherTrainer:
    """All four examples in every step."""
    record = family(model)
    settings: dict[str, Any] = {
        "optim": name,
        "per_device_train_batch_size": 4,
        "max_steps": 5,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "save_strategy": "steps",
        "train_dataset": record.dataset(4),
        "eval_dataset": record.dataset(4, seed=1),
    }
    return make_trainer(folder, record, **(settings | options))


class Averages(TrainerCallback):
    """After each step, the average x that schedule-free evaluates, by the paper's y = (1 - beta) z + beta x.

    The model then holds y, the weights that are trained; z is in the optimizer's state.
    """

    def __init__(self) -> None:
        self.shown: dict[int, dict[str, torch.Tensor]] = {}
        self.trained: dict[int, dict[str, torch.Tensor]] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        optimizer, beta = kwargs["optimizer"].optimizer, 0.9
        assert optimizer.param_groups[0]["train_mode"]
        y = {key: p.detach().clone() for key, p in kwargs["model"].named_parameters()}
        z = {key: optimizer.state[p]["z"] for key, p in kwargs["model"].named_parameters()}
        self.trained[state.global_step] = y
        self.shown[state.global_step] = {key: (y[key] - (1 - beta) * z[key]) / beta for key in y}


def test_schedule_free_saves_and_leaves_the_weights_that_it_evaluates(tmp_path: Path) -> None:
    run, averages = trainer("schedule_free_adamw", "gpt2", tmp_path, save_steps=2), Averages()
    run.add_callback(averages)
    run.train()
    for step in (2, 4):
        saved = load_file(tmp_path / f"checkpoint-{step}" / "model.safetensors")
        assert_close(saved, averages.shown[step])
        with pytest.raises(AssertionError):
            assert_close(saved, averages.trained[step], rtol=0.0, atol=1e-4)
    assert_close(dict(run.model.named_parameters()), averages.shown[5])
    run.save_model(str(tmp_path / "last"))
    assert_close(load_file(tmp_path / "last" / "model.safetensors"), averages.shown[5])


def test_schedule_free_leaves_the_evaluated_weights_without_any_saving(tmp_path: Path) -> None:
    run, averages = trainer("schedule_free_adamw", "resnet", tmp_path, save_strategy="no"), Averages()
    run.add_callback(averages)
    run.train()
    assert_close(dict(run.model.named_parameters()), averages.shown[5])


class StopAfter(TrainerCallback):
    """Ends training after a step that is neither evaluated nor saved, as early stopping may."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= self.step


@pytest.mark.parametrize("model", ["gpt2", "vit"])
@pytest.mark.parametrize("name", ["schedule_free_adamw", "adamw"])
def test_the_best_model_is_the_one_that_was_evaluated(name: str, model: str, tmp_path: Path) -> None:
    """Though training goes on for a step after the last save, and ViT's weights are saved under other names."""
    run = trainer(
        name,
        model,
        tmp_path,
        learning_rate=1e-2,
        eval_strategy="steps",
        eval_steps=2,
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=model == "vit",
        max_steps=10,
    )
    run.add_callback(StopAfter(5))
    run.train()
    history = {entry["step"]: entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry}
    assert set(history) == {2, 4} and history[2] != history[4]
    assert run.state.best_metric in history.values()
    for _ in range(2):
        assert run.evaluate()["eval_loss"] == pytest.approx(run.state.best_metric, rel=1e-5)


def test_names_that_agree_are_left_to_trainer(tmp_path: Path) -> None:
    for name, renamed in (("gpt2", False), ("resnet", False), ("vit", True), ("mixtral", True)):
        model = family(name).build()
        model.save_pretrained(tmp_path / name)
        assert has_renamed_weights(model, tmp_path / name) == renamed
    assert not has_renamed_weights(torch.nn.Linear(2, 2), tmp_path / "vit")
    assert not has_renamed_weights(family("vit").build(), tmp_path)


@pytest.mark.parametrize("name", ["vit", "mixtral"])
@pytest.mark.parametrize("size", ["1GB", "20KB"])
def test_renamed_weights_are_loaded_whole_also_in_several_files(name: str, size: str, tmp_path: Path) -> None:
    model, other = family(name).build(), family(name).build(seed=1)
    model.save_pretrained(tmp_path, max_shard_size=size)
    assert (tmp_path / "model.safetensors").is_file() == (size == "1GB")
    assert has_renamed_weights(other, tmp_path)
    load_renamed_weights(other, tmp_path)
    assert_close(dict(other.state_dict()), dict(model.state_dict()), rtol=0, atol=0)


def test_a_head_of_another_precision_is_restored_exactly(tmp_path: Path) -> None:
    model, other = family("vit").build().bfloat16(), family("vit").build(seed=1).bfloat16()
    model.classifier.float()
    torch.nn.init.normal_(model.classifier.weight)
    other.classifier.float()
    model.save_pretrained(tmp_path)
    load_renamed_weights(other, tmp_path)
    assert_close(dict(other.state_dict()), dict(model.state_dict()), rtol=0, atol=0)


def test_a_class_that_its_configuration_does_not_build_is_named(tmp_path: Path) -> None:
    kind = type(family("vit").build())

    class Wider(kind):  # type: ignore[misc, valid-type]
        def __init__(self, config: Any, width: int) -> None:
            super().__init__(config)
            self.width = width

    model = Wider(family("vit").build().config, 3)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="Wider, which could translate them, cannot be built from its configuration"):
        load_renamed_weights(model, tmp_path)


def test_missing_weights_are_named(tmp_path: Path) -> None:
    model = family("vit").build()
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["classifier.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks weights of this model: classifier\.weight"):
        load_renamed_weights(model, tmp_path)
