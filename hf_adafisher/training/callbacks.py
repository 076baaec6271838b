"""Trainer callback for optimizers with hooks: loss scale, skipped steps and restarted attempts."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_adafisher.optimizers.base.hooked import HookedOptimizer
from hf_adafisher.optimizers.validation.environment import unwrapped


class AdaFisherCallback(TrainerCallback):
    """Pass the loss scale to the optimizer, and discard statistics that no step will use.

    It matters for optimizers with hooks: AdaFisher(W) with ``step_size="paper"``, and K-FAC. Statistics are discarded
    in two cases:

    * Gradients overflowed in fp16, so the loss scaler skipped the step.
    * An attempt ran out of memory, so ``auto_find_batch_size`` starts over with the same optimizer.

    The refresh of the factors stays due. AdaFisherTrainer adds this callback itself. A stock Trainer needs it for fp16
    with such an optimizer:
    ``Trainer(..., callbacks=[AdaFisherCallback()])``.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Discard the statistics of an earlier attempt."""
        optimizer = unwrapped(kwargs.get("optimizer"))
        if isinstance(optimizer, HookedOptimizer):
            optimizer.discard_statistics()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set the optimizer's ``gradient_scale`` before a step that refreshes the factors."""
        optimizer = unwrapped(kwargs.get("optimizer"))
        scaler = getattr(kwargs.get("optimizer"), "scaler", None)
        if isinstance(optimizer, HookedOptimizer) and optimizer.recording and scaler is not None:
            optimizer.gradient_scale = scaler.get_scale()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Discard the statistics of a skipped step."""
        optimizer = unwrapped(kwargs.get("optimizer"))
        if isinstance(optimizer, HookedOptimizer) and getattr(kwargs["optimizer"], "step_was_skipped", False):
            optimizer.discard_statistics()
