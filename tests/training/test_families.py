"""Twenty model families under the Trainer: every trainable parameter moves, and is accounted for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from hf_adafisher import AdaFisher, AdaFisherTrainer, AdaFisherTrainingArguments
from tests.model_zoo import FAMILIES, Family

STEPS = 4
each_family = pytest.mark.parametrize("record", FAMILIES, ids=lambda record: record.name)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters by name; a tied one has one name."""
    return {name: param for name, param in model.named_parameters() if param.requires_grad}


def train(record: Family, folder: Path, optim: str) -> tuple[dict[str, Tensor], AdaFisherTrainer]:
    """A few steps under the Trainer, with a refresh at every other; the weights before, and the trainer."""
    arguments = AdaFisherTrainingArguments(
        output_dir=str(folder),
        optim=optim,
        max_steps=STEPS,
        per_device_train_batch_size=4,
        update_interval=2,
        weight_decay=0.01,
        learning_rate=0.01,
        lr_scheduler_type="constant",
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        use_cpu=True,
    )
    model = record.build()
    before = {name: param.detach().clone() for name, param in trainable(model).items()}
    trainer = AdaFisherTrainer(model=model, args=arguments, train_dataset=record.dataset(4 * STEPS))
    trainer.train()
    return before, trainer


def model_of(trainer: AdaFisherTrainer) -> nn.Module:
    """The trained model."""
    assert isinstance(trainer.model, nn.Module)
    return trainer.model


def adafisher_of(trainer: AdaFisherTrainer) -> AdaFisher:
    """The optimizer inside accelerate's wrapper."""
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    assert isinstance(optimizer, AdaFisher)
    return optimizer


@each_family
def test_every_parameter_has_a_gradient(record: Family) -> None:
    """Of the zoo itself: within a few batches no trainable parameter's gradient is identically zero."""
    model = record.build()
    seen: set[str] = set()
    for seed in range(STEPS):
        model.zero_grad()
        model(**record.batch(seed=seed)).loss.backward()
        seen |= {name for name, param in trainable(model).items() if param.grad is not None and param.grad.any()}
    assert seen == set(trainable(model))


@each_family
def test_every_parameter_moves(record: Family, tmp_path: Path) -> None:
    """Bitwise, and to finite values, under AdaFisherW; and the coverage accounts for every value."""
    before, trainer = train(record, tmp_path, "adafisherw")
    assert trainer.state.global_step == STEPS
    after = trainable(model_of(trainer))
    assert set(after) == set(before)
    assert [name for name, param in after.items() if torch.equal(before[name], param)] == []
    assert [name for name, param in after.items() if not param.isfinite().all()] == []

    rows = adafisher_of(trainer).coverage()
    assert {row.name: row.numel for row in rows} == {name: param.numel() for name, param in after.items()}
    assert len(rows) == len(after)
    assert sum(row.share for row in rows) == pytest.approx(1.0)


@each_family
def test_every_matrix_takes_the_rule_of_its_layer(record: Family, tmp_path: Path) -> None:
    """Gradient factors are for what no rule reaches, by name; everything else has the rule of its layer."""
    _, trainer = train(record, tmp_path, "adafisher")
    rows = adafisher_of(trainer).coverage()
    without_rule = {row.name for row in rows if row.rule == "gradient factors"}
    assert without_rule == {
        name for name in trainable(model_of(trainer)) if any(part in name for part in WITHOUT_RULE.get(record.name, ()))
    }
    assert {rule for row in rows for rule in row.rule.split("+")} <= RULES
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == STEPS


RULES = {"Linear", "Conv1D", "Embedding", "LayerNorm", "RMSNorm", "gradient factors"}
WITHOUT_RULE = {
    "opt": ("embed_positions",),  # an Embedding called with the attention mask
    "bart": ("embed_positions",),
    "deberta_v2": ("rel_embeddings",),  # read without being called
    "mixtral": ("mlp.gate.weight", "mlp.experts."),  # fused experts, and a router that applies its own weight
    "mamba": ("A_log", "mixer.D", "conv1d", "dt_proj"),  # functional use; no rule for convolutions yet
    "vit": ("cls_token", "position_embeddings", "patch_embeddings.projection"),
}
"""Parameters on gradient factors, by a part of their name."""
