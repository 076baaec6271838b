"""Telling a data set which epoch it is, in resumed and distributed runs too."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class DatasetEpochs(TrainerCallback):
    """Calls `set_epoch` of the training data set at the start of every epoch.

    Accelerate's data loader does so by itself, but not after a resume in the middle of an epoch, nor with several
    processes: it then finds a sampler to tell and stops there.
    """

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Before the first batch of an epoch, or the first one after a resume in the middle of it."""
        dataset = getattr(kwargs.get("train_dataloader"), "dataset", None)
        set_epoch = getattr(dataset, "set_epoch", None)
        if set_epoch is not None:
            set_epoch(int((state.epoch or 0.0) + 1e-6))  # 1.5 in the middle of the second epoch
