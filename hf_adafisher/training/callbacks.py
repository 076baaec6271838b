"""What optimizers that record statistics need to hear from loops that scale losses, skip steps or start over."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_adafisher.optimizers.base.hooked import HookedOptimizer
from hf_adafisher.optimizers.validation.checks import unwrapped


class AdaFisherCallback(TrainerCallback):
    """Tells AdaFisher(W) and K-FAC the loss scaler's scale, and to forget statistics that no step is going to use.

    The latter are those of a batch whose gradients overflowed (fp16: the loss scaler skips the optimizer, and Trainer
    resets the gradients behind its back), and those of an attempt that ran out of memory (``auto_find_batch_size``
    starts over with the same optimizer). The refresh stays due. AdaFisherTrainer has this callback by itself; add it
    to a stock Trainer that trains in fp16: ``Trainer(..., callbacks=[AdaFisherCallback()])``.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        optimizer = unwrapped(kwargs.get("optimizer"))
        if isinstance(optimizer, HookedOptimizer):
            optimizer.discard_statistics()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        optimizer = unwrapped(kwargs.get("optimizer"))
        scaler = getattr(kwargs.get("optimizer"), "scaler", None)
        if isinstance(optimizer, HookedOptimizer) and optimizer.recording and scaler is not None:
            optimizer.gradient_scale = scaler.get_scale()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        optimizer = unwrapped(kwargs.get("optimizer"))
        if isinstance(optimizer, HookedOptimizer) and getattr(kwargs["optimizer"], "step_was_skipped", False):
            optimizer.discard_statistics()
