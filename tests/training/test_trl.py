"""AdaFisherMixin over the trainers of TRL: two steps of each, on a tiny model."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from hf_adafisher import AdaFisherMixin, AdaFisherTrainingArguments, AdaFisherW, OptimizerFactory, create_optimizer
from hf_adafisher.data.text.tokens import train_tokenizer
from tests.training_helper import QUIET, optimizer_of

trl = pytest.importorskip("trl")

TOKENIZER = train_tokenizer(["the cat sat on a mat"], 257)
PROMPT = {"prompt": ["the cat"] * 4}
PAIRS = PROMPT | {"chosen": [" sat on a mat"] * 4, "rejected": [" ran"] * 4}
DATA: dict[str, dict[str, Any]] = {
    "SFT": {"text": ["the cat sat on a mat"] * 4},
    "Reward": PAIRS,
    "DPO": PAIRS,
    "KTO": PROMPT | {"completion": [" sat on a mat", " ran"] * 2, "label": [True, False] * 2},
    "GRPO": PROMPT,
}
OWN: dict[str, dict[str, Any]] = {"GRPO": {"num_generations": 2, "max_completion_length": 4}}
RATES = {"SFT": 2e-5, "Reward": 1e-4, "DPO": 1e-6, "KTO": 1e-6, "GRPO": 1e-6}
every_trainer = pytest.mark.parametrize("name", DATA)


@pytest.fixture(autouse=True)
def no_telemetry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "1")


def trainer_class(name: str) -> type[Any]:
    return getattr(trl, f"{name}Trainer")


def config_class(name: str) -> type[Any]:
    return getattr(trl, f"{name}Config")


def mixed_trainer(name: str) -> type[Any]:
    return type(f"Our{name}Trainer", (AdaFisherMixin, trainer_class(name)), {})


def mixed_config(name: str) -> type[Any]:
    return dataclass(type(f"Our{name}Config", (AdaFisherTrainingArguments, config_class(name)), {}))


def saved_model(name: str, folder: Path) -> str:
    """A folder with weights: some of these trainers load a reference model from where the model came from."""
    ends = dict.fromkeys(("pad_token_id", "eos_token_id", "bos_token_id"), 0)
    sides = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=len(TOKENIZER), num_hidden_layers=1, num_labels=1, **sides, **ends)
    torch.manual_seed(0)
    (LlamaForSequenceClassification if name == "Reward" else LlamaForCausalLM)(config).save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return str(folder)


def make(name: str, kind: type[Any], arguments: type[Any], folder: Path, options: Any = None, **given: Any) -> Any:
    """A trainer of the saved model, or of ``model=``."""
    quiet = {**QUIET, "bf16": False, "per_device_train_batch_size": 2, "max_steps": 2, "logging_steps": 1}
    args = arguments(str(folder / "out"), **quiet, **OWN.get(name, {}), **(options or {}))
    given.setdefault("model", str(folder / "weights"))
    if name == "GRPO":
        given["reward_funcs"] = lambda completions, **_: [float(len(text)) for text in completions]
    return kind(args=args, train_dataset=Dataset.from_dict(DATA[name]), processing_class=TOKENIZER, **given)


@every_trainer
@pytest.mark.parametrize("arguments", [config_class, mixed_config])
def test_two_steps_are_those_of_the_trainer_with_the_optimizer(
    name: str, arguments: Callable[[str], type[Any]], tmp_path: Path
) -> None:
    """Built by hand and handed over as ``optimizers=``, which each of them takes; with its own arguments, or both."""
    weights = saved_model(name, tmp_path / "weights")
    options = {"learning_rate": 0.01, "weight_decay": 0.1}
    ours = make(name, mixed_trainer(name), arguments(name), tmp_path, options)
    model = type(ours.model).from_pretrained(weights, dtype=torch.float32)
    start = [p.clone() for p in model.parameters()]
    optimizer = create_optimizer("adafisherw", model, lr=0.01, weight_decay=0.1)
    theirs = make(
        name, trainer_class(name), config_class(name), tmp_path, options, model=model, optimizers=(optimizer, None)
    )
    for trainer in (ours, theirs):
        torch.manual_seed(0)
        trainer.train()
    assert type(optimizer_of(ours)) is AdaFisherW
    assert_close(ours.model.state_dict(), theirs.model.state_dict(), rtol=0, atol=0)
    assert all(not torch.equal(p, q) for p, q in zip(ours.model.parameters(), start, strict=True))
    assert ours.state.log_history[0]["adafisher/fisher_mean"] > 0


@every_trainer
def test_a_configuration_joined_with_ours_keeps_its_objective_and_its_rate(name: str, tmp_path: Path) -> None:
    """DPO's and GRPO's ``beta`` is not the optimizer's; the rates are for AdamW, and so for AdaFisherW."""
    quiet = {"use_cpu": True, "bf16": False, **OWN.get(name, {})}
    theirs = config_class(name)(str(tmp_path), **quiet)
    for bases in ((AdaFisherTrainingArguments, config_class(name)), (config_class(name), AdaFisherTrainingArguments)):
        joined = dataclass(type("Joined", bases, {}))
        ours = joined(str(tmp_path), **quiet)
        assert ours.optim == "adafisherw" and ours.learning_rate == theirs.learning_rate == RATES[name]
        assert getattr(ours, "beta", None) == getattr(theirs, "beta", None)
        spectral = joined(str(tmp_path), optim="spectral-adafisher", **quiet)
        assert spectral.learning_rate == pytest.approx(3 * RATES[name], rel=1e-9)
        assert joined(str(tmp_path), optim="adamw_torch", **quiet).learning_rate == RATES[name]
        assert joined(str(tmp_path), adafisher_step_size="paper", **quiet).learning_rate == 1e-3
        changed = joined(str(tmp_path), adafisher_beta=0.8, damping=0.3, **quiet)
        assert changed.optimizer_options() == {"beta": 0.8, "damping": 0.3}
        if hasattr(theirs, "beta"):
            assert changed.beta == theirs.beta


@every_trainer
def test_the_factory_works_where_the_readme_says(name: str, tmp_path: Path) -> None:
    """SFT and Reward only have the argument; there it is the mixin, bitwise."""
    saved_model(name, tmp_path / "weights")
    stock, factory = trainer_class(name), (OptimizerFactory, {"name": "adafisherw"})
    takes = "optimizer_cls_and_kwargs" in inspect.signature(stock.__init__).parameters
    assert takes == (name in ("SFT", "Reward"))
    if not takes:
        return
    options = {"learning_rate": 0.01, "weight_decay": 0.1}
    theirs = make(name, stock, config_class(name), tmp_path, options, optimizer_cls_and_kwargs=factory)
    ours = make(name, mixed_trainer(name), config_class(name), tmp_path, options)
    for trainer in (theirs, ours):
        torch.manual_seed(0)
        trainer.train()
    assert type(optimizer_of(theirs)) is AdaFisherW
    assert_close(theirs.model.state_dict(), ours.model.state_dict(), rtol=0, atol=0)
