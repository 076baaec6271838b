"""Trainer of image classifiers: no augmentation in evaluation, and learning rates by layer."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset

from hf_adafisher.data.images.augmentation import ImageCollator
from hf_adafisher.models import scale_groups
from hf_adafisher.training.trainer import AdaFisherTrainer

logger = logging.getLogger(__name__)


class ImageTrainer(AdaFisherTrainer):
    """AdaFisherTrainer with a collator of its own for evaluation, and scaled learning rates.

    Args:
        *args: As Trainer's; ``data_collator`` augments the training images.
        eval_collator: For validation and test images.
        scales: Each parameter's share of the learning rate, by name; parameters that are left out have all of it.
        **kwargs: As Trainer's.
    """

    def __init__(
        self, *args: Any, eval_collator: ImageCollator, scales: Mapping[str, float] | None = None, **kwargs: Any
    ) -> None:
        self.eval_collator = eval_collator
        self.scales = dict(scales or {})
        super().__init__(*args, **kwargs)

    def create_optimizer(self, model: torch.nn.Module | None = None) -> Optimizer:
        """Create the optimizer; the groups of a new one are split by their parameters' scales."""
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if is_new and self.scales:
            scale_learning_rates(optimizer, self.model if model is None else model, self.scales)
        return optimizer

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """Return the validation batches, not augmented."""
        return self._without_augmentation(super().get_eval_dataloader, eval_dataset)

    def get_test_dataloader(self, test_dataset: Dataset) -> DataLoader:
        """Return the test batches, not augmented."""
        return self._without_augmentation(super().get_test_dataloader, test_dataset)

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate a batch; the loss is that of the true labels, without label smoothing."""
        smoother, self.label_smoother = self.label_smoother, None
        try:
            return super().prediction_step(*args, **kwargs)
        finally:
            self.label_smoother = smoother

    def _without_augmentation(self, make: Any, dataset: Any) -> DataLoader:
        collator, self.data_collator = self.data_collator, self.eval_collator
        try:
            return make(dataset)
        finally:
            self.data_collator = collator


def scale_learning_rates(optimizer: Optimizer, model: Any, scales: Mapping[str, float]) -> None:
    """Split the groups of an optimizer that has made no step, each parameter's learning rate times its scale.

    The optimizer's own groups are split, not those it is made of, because some optimizers sort parameters into groups
    with learning rates of their own: each is scaled. Trainer logs the first group's, so higher rates come first.
    """
    groups: list[dict[str, Any]] = []
    for group in optimizer.param_groups:
        groups += reversed(scale_groups([group], model, scales, group["lr"]))
    optimizer.param_groups[:] = groups
