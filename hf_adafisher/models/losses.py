"""The loss of an image classifier, for class numbers and for the class shares that Mixup and CutMix make."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


def image_classification_loss(
    labels: Tensor, pooled_logits: Tensor, config: Any = None, num_items_in_batch: Tensor | int | None = None, **_: Any
) -> Tensor:
    """Cross-entropy, with the signature of a ``loss_function`` of transformers' image classifiers.

    Transformers' own takes class shares for independent yes-no labels and would train with binary cross-entropy.

    Args:
        labels: class numbers, integers of shape (batch,), or class shares, floats of shape (batch, classes).
        pooled_logits: shape (batch, classes).
        config: not used.
        num_items_in_batch: label values over all micro-batches, as Trainer counts them (batch x classes for class
            shares). Default: the mean over this batch.

    Returns:
        The loss, in nats per image, a float32 scalar (float64 for float64 logits).
    """
    logits = pooled_logits.to(torch.promote_types(pooled_logits.dtype, torch.float32))
    labels = labels.to(logits.device)
    if labels.is_floating_point():
        labels = labels.to(logits.dtype)
    if num_items_in_batch is None:
        return nn.functional.cross_entropy(logits, labels)
    images = num_items_in_batch / (labels.shape[-1] if labels.is_floating_point() else 1)
    return nn.functional.cross_entropy(logits, labels, reduction="sum") / images


def use_image_loss(model: PreTrainedModel) -> PreTrainedModel:
    """Gives a classifier ``image_classification_loss``; its loss is then a plain mean over the batch under Trainer.

    Trainer counts the values of labels, which for class shares is not the number of images: so the model says that
    it takes no such count.
    """
    model.loss_function = image_classification_loss
    model.accepts_loss_kwargs = False  # type: ignore[assignment]
    model.config.problem_type = "single_label_classification"
    return model
