"""Every model family of the zoo under the Trainer: every trainable parameter moves, and is accounted for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_adafisher import AdaFisherTrainer
from hf_adafisher.optimizers.base.kronecker_diagonal import KroneckerDiagonalOptimizer
from tests.model_zoo import FAMILIES, Family
from tests.training_helper import make_trainer, of_form, optimizer_of

STEPS = 4
each_family = pytest.mark.parametrize("record", FAMILIES, ids=lambda record: record.name)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters by name; a tied one has one name."""
    return {name: param for name, param in model.named_parameters() if param.requires_grad}


def train(record: Family, folder: Path, form: str, **options: Any) -> tuple[dict[str, Tensor], AdaFisherTrainer]:
    """A few steps under the Trainer, the paper's with a refresh at every other; the weights before, and the trainer."""
    own = of_form(form, update_interval=2, damping=3e-3) | options
    trainer = make_trainer(
        folder,
        record,
        train_dataset=record.dataset(4 * STEPS),
        data_collator=record.collate,
        max_steps=STEPS,
        per_device_train_batch_size=4,
        weight_decay=0.01,
        learning_rate=0.01,
        lr_scheduler_type="constant",
        logging_steps=1,
        **own,
    )
    before = {name: param.detach().clone() for name, param in trainable(trainer.model).items()}
    trainer.train()
    return before, trainer


def model_of(trainer: AdaFisherTrainer) -> nn.Module:
    """The trained model."""
    assert isinstance(trainer.model, nn.Module)
    return trainer.model


def adafisher_of(trainer: AdaFisherTrainer) -> KroneckerDiagonalOptimizer:
    """The optimizer inside accelerate's wrapper."""
    optimizer = optimizer_of(trainer)
    assert isinstance(optimizer, KroneckerDiagonalOptimizer)
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


SPECTRAL = ("albert", "mixtral", "mamba", "swinv2", "convnextv2", "mobilenet_v2", "clip", "wav2vec2")
"""Families with layers used twice, fused experts, weights that are read, grouped and weight-normed convolutions."""


@pytest.mark.parametrize(
    ("record", "form"),
    [(record, form) for record in FAMILIES for form in ("paper", "root")]
    + [(record, "spectral") for record in FAMILIES if record.name in SPECTRAL],
    ids=lambda value: getattr(value, "name", value),
)
def test_every_parameter_moves(record: Family, form: str, tmp_path: Path) -> None:
    """Bitwise, and to finite values; and the coverage accounts for every value."""
    before, trainer = train(record, tmp_path, form)
    assert trainer.state.global_step == STEPS
    after = trainable(model_of(trainer))
    assert set(after) == set(before)
    assert [name for name, param in after.items() if torch.equal(before[name], param)] == []
    assert [name for name, param in after.items() if not param.isfinite().all()] == []

    rows = adafisher_of(trainer).coverage()
    assert {row.name: row.numel for row in rows} == {name: param.numel() for name, param in after.items()}
    assert len(rows) == len(after)
    assert sum(row.share for row in rows) == pytest.approx(1.0)


def rule_by_class(module: nn.Module) -> str:
    """The rule that a module's class calls for."""
    kinds: dict[str, tuple[type[nn.Module], ...]] = {
        "Linear": (nn.Linear,),
        "Conv": (nn.Conv1d, nn.Conv2d, nn.Conv3d),
        "Embedding": (nn.Embedding,),
        "LayerNorm": (nn.LayerNorm,),
        "BatchNorm": (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d),
        "GroupNorm": (nn.GroupNorm,),
        "Conv1D": (Conv1D,),
    }
    named = [rule for rule, classes in kinds.items() if isinstance(module, classes)]
    return named[0] if named else "RMSNorm"


@each_family
def test_every_layer_takes_the_rule_of_its_class(record: Family, tmp_path: Path) -> None:
    """Gradient factors are for what no rule reaches, by name; everything else has the rule of its layer's class."""
    _, trainer = train(record, tmp_path, "paper", optim="adafisher")
    model = model_of(trainer)
    rows = adafisher_of(trainer).coverage()
    parts = WITHOUT_RULE.get(record.name, ())
    without_rule = {row.name for row in rows if row.rule == GRADIENT_FACTORS}
    assert without_rule == {name for name in trainable(model) if any(part in name for part in parts)}
    assert [part for part in parts if not any(part in name for name in without_rule)] == []
    for row in rows:
        if row.rule != GRADIENT_FACTORS:
            by_class = {rule_by_class(model.get_submodule(name)) for name in row.modules}
            assert set(row.rule.split("+")) <= by_class & RULES, row.name
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == STEPS


GRADIENT_FACTORS = "gradient factors"
RULES = {"Linear", "Conv1D", "Conv", "Embedding", "LayerNorm", "RMSNorm", "BatchNorm", "GroupNorm"}
WITHOUT_RULE = {
    "opt": ("embed_positions",),  # an Embedding called with the attention mask
    "bart": ("embed_positions",),
    "whisper": ("decoder.embed_positions",),  # an Embedding called with the tokens, that reads rows by position
    "deberta_v2": ("rel_embeddings",),  # read without being called
    "mixtral": ("mlp.gate.weight", "mlp.experts."),  # fused experts, and a router that applies its own weight
    "mamba": ("A_log", "mixer.D", "conv1d", "dt_proj"),  # bare, and layers whose weights are read, never called
    # Bare parameters: tokens and position tables that are added to the patches, and scales of whole layers.
    "vit": ("cls_token", "position_embeddings"),
    "deit": ("cls_token", "distillation_token", "position_embeddings"),
    "dinov2": ("cls_token", "position_embeddings", "lambda1"),
    "beit": ("cls_token", "position_embeddings", "lambda_", "relative_position_bias_table"),
    "swin": ("relative_position_bias_table",),
    "swinv2": ("logit_scale",),
    "focalnet": ("gamma_",),
    # A bare scale, and LayerNorms that take the channels first: not a LayerNorm over the last axis of their input.
    "convnext": ("layer_scale_parameter", "embeddings.layernorm", "downsampling_layer.0"),
    # The same norms, and a normalisation over positions of transformers' own (GRN).
    "convnextv2": ("grn", "embeddings.layernorm", "downsampling_layer.0"),
    "clip": ("logit_scale", "class_embedding"),
    "siglip": ("logit_scale", "logit_bias", "head.probe", "head.attention"),  # torch's attention calls no layer
    "wav2vec2": ("parametrizations.weight",),  # a weight-normed convolution: its weight is computed from these two
}
"""Parameters on gradient factors, by a part of their name."""
