"""Cross-entropy of image classifiers for class numbers and for class probabilities, as from Mixup and CutMix."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


def image_classification_loss(
    labels: Tensor, pooled_logits: Tensor, config: Any = None, num_items_in_batch: Tensor | int | None = None, **_: Any
) -> Tensor:
    """Cross-entropy with the signature of a ``loss_function`` of transformers' image classifiers.

    The loss of transformers would treat class probabilities as multi-label targets and use binary cross-entropy.

    Args:
        labels: Class numbers, integers of shape (batch,), or class probabilities, floats of shape (batch, classes).
        pooled_logits: Logits, shape (batch, classes).
        config: Not used.
        num_items_in_batch: Number of label values over all micro-batches, as Trainer counts them: batch x classes for
            class probabilities. Default: the mean over this batch.

    Returns:
        The loss in nats per image, a float32 scalar; float64 for float64 logits.
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
    """Set the loss of a classifier to ``image_classification_loss``, a mean over the batch under Trainer.

    Trainer counts label values, which for class probabilities is not the number of images. So the model is marked as
    taking no such count.

    Returns:
        The same model.
    """
    model.loss_function = image_classification_loss
    model.accepts_loss_kwargs = False  # type: ignore[assignment]
    model.config.problem_type = "single_label_classification"
    return model
