"""Trainer callback that passes the epoch to the training data set."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class DatasetEpochs(TrainerCallback):
    """Call ``set_epoch`` of the training data set at the start of every epoch.

    Accelerate's data loader does not do so after a resume in the middle of an epoch. With several processes it calls
    the sampler's ``set_epoch`` only.
    """

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set the epoch before its first batch, or before the first batch after a resume."""
        dataset = getattr(kwargs.get("train_dataloader"), "dataset", None)
        set_epoch = getattr(dataset, "set_epoch", None)
        if set_epoch is not None:
            set_epoch(int((state.epoch or 0.0) + 1e-6))  # 1.5 in the middle of the second epoch
