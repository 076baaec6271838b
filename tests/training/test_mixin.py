"""AdaFisherMixin over transformers' trainers and one's own; those of TRL are in ``test_trl.py``."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainingArguments

from hf_adafisher import AdaFisherMixin, AdaFisherTrainer, AdaFisherTrainingArguments, AdaFisherW, create_optimizer
from tests.model_zoo import family
from tests.training_helper import make_trainer, optimizer_of

CAUSAL, SEQ2SEQ = family("gpt2"), family("t5")
TWO_STEPS: dict[str, Any] = {"max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 0.01}


class Doubled(Trainer):
    """A trainer of a user's own, with a loss and a rule for weight decay of its own."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        return 2 * super().compute_loss(*args, **kwargs)

    def get_decay_parameter_names(self, model: Any) -> list[str]:
        return []


class Mixed(AdaFisherMixin, Trainer):
    pass


class MixedSeq2Seq(AdaFisherMixin, Seq2SeqTrainer):
    pass


class MixedDoubled(AdaFisherMixin, Doubled):
    pass


@dataclass
class Seq2SeqArguments(AdaFisherTrainingArguments, Seq2SeqTrainingArguments):
    pass


@pytest.mark.parametrize(
    ("stock", "mixed", "arguments", "record"),
    [
        (Trainer, Mixed, AdaFisherTrainingArguments, CAUSAL),
        (Doubled, MixedDoubled, AdaFisherTrainingArguments, CAUSAL),
        (Seq2SeqTrainer, MixedSeq2Seq, Seq2SeqArguments, SEQ2SEQ),
    ],
)
def test_two_steps_are_those_of_the_trainer_with_the_optimizer(
    stock: type[Any], mixed: type[Any], arguments: type[Any], record: Any, tmp_path: Path
) -> None:
    """Built by hand and handed over as ``optimizers=``; own losses and rules of decay stay in force."""
    plain = Seq2SeqTrainingArguments if stock is Seq2SeqTrainer else TrainingArguments
    ours = make_trainer(tmp_path / "a", record, mixed, arguments, weight_decay=0.1, **TWO_STEPS)
    model = record.build()
    decay = {"decay_names": []} if stock is Doubled else {}
    optimizer = create_optimizer("adafisherw", model, lr=0.01, weight_decay=0.1, **decay)
    theirs = make_trainer(tmp_path / "b", record, stock, plain, model=model, optimizers=(optimizer, None), **TWO_STEPS)
    for trainer in (ours, theirs):
        trainer.train()
    assert type(optimizer_of(ours)) is AdaFisherW
    assert_close(ours.model.state_dict(), theirs.model.state_dict(), rtol=0, atol=0)
    start = record.build()
    moved = [not torch.equal(p, q) for p, q in zip(ours.model.parameters(), start.parameters(), strict=True)]
    assert all(moved)


@pytest.mark.parametrize(("kind", "plain"), [(Mixed, TrainingArguments), (MixedSeq2Seq, Seq2SeqTrainingArguments)])
def test_arguments_without_adafisher_stand_for_adafisherw_at_their_rate(
    kind: type[Any], plain: type[Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = make_trainer(tmp_path, CAUSAL, kind, plain, weight_decay=0.1)
    optimizer = trainer.create_optimizer()
    assert type(optimizer) is AdaFisherW
    assert [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups] == [(5e-5, 0.1), (5e-5, 0.0)]
    assert optimizer.param_groups[0]["step_size"] == "root"
    assert trainer.args.optim != "adafisherw"
    said = [entry.getMessage() for entry in caplog.records]
    assert len(said) == 2 and said[0].startswith(f"{plain.__name__} has no optimizer of hf_adafisher in it")
    assert "optim=adafisherw and learning_rate=5e-05" in said[0]
    assert "more than 20 times below its usual ones (0.004 from scratch)" in said[1]


@pytest.mark.parametrize(("optim", "kind"), [("adamw_torch", torch.optim.AdamW), ("sgd", torch.optim.SGD)])
def test_arguments_without_adafisher_get_the_optimizer_that_they_ask_for(
    optim: str, kind: type[Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = make_trainer(tmp_path, CAUSAL, Mixed, TrainingArguments, optim=optim)
    assert type(trainer.create_optimizer()) is kind
    assert not caplog.text


def test_an_optimizer_that_was_given_comes_first(tmp_path: Path) -> None:
    model = CAUSAL.build()
    mine = torch.optim.SGD(model.parameters(), lr=0.1)
    assert make_trainer(tmp_path, CAUSAL, Mixed, model=model, optimizers=(mine, None)).create_optimizer() is mine


def test_the_card_names_the_optimizer_that_trained(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, CAUSAL, Mixed, TrainingArguments, **TWO_STEPS)
    trainer.train()
    optim = trainer.args.optim
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert "Use adafisherw and the args are:\nlr=0.01, " in card and "\n\n### Optimizer\n" in card
    assert trainer.args.optim is optim


def test_a_trainer_before_the_mixin_is_an_error() -> None:
    """It would shadow every method of the mixin and train AdamW."""
    message = r"before AdaFisherMixin: write class Wrong\(AdaFisherMixin, Seq2SeqTrainer\)"
    with pytest.raises(TypeError, match=message):
        type("Wrong", (Seq2SeqTrainer, AdaFisherMixin), {})
    with pytest.raises(TypeError, match="comes before AdaFisherMixin"):
        type("Wrong", (Doubled, AdaFisherTrainer), {})
    for bases in ((AdaFisherTrainer, Doubled), (Mixed, Doubled), (MixedDoubled,), (AdaFisherMixin,)):
        type("Right", bases, {})


def test_the_constructor_is_the_trainers() -> None:
    for mixed, stock in ((Mixed, Trainer), (MixedSeq2Seq, Seq2SeqTrainer), (AdaFisherTrainer, Trainer)):
        assert inspect.signature(mixed) == inspect.signature(stock)


@pytest.mark.parametrize(("scaled", "scale"), [(None, 1 / 48), (True, 1 / 48), (False, 1.0)])
def test_a_loss_that_the_trainer_averages_itself_has_no_terms_to_undo(
    scaled: bool | None, scale: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As DPO's: Trainer counts the tokens of its batches, and its loss is a mean over pairs."""
    trainer = make_trainer(tmp_path, CAUSAL, Mixed, AdaFisherTrainingArguments, adafisher_step_size="paper")
    trainer.loss_is_scaled_for_ga = scaled
    optimizer = trainer.create_optimizer()
    monkeypatch.setattr(Trainer, "training_step", lambda *args: torch.zeros(()))
    trainer.training_step(trainer.model, {}, torch.tensor(48))
    assert optimizer.gradient_scale == scale
