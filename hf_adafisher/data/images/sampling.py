"""Stratified sampling of labelled examples, and the epoch by which a data set orders them."""

from __future__ import annotations

from typing import Any

import numpy as np
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


def stratified_positions(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Draw a stratified sample of positions, deterministic for a seed.

    Class sizes follow the largest remainder method: each class gets its share rounded down, and the remaining positions
    go to the largest fractions, ties to the lower class number.

    Args:
        labels: Class numbers, shape (number,).
        count: Size of the sample, from 0 to the number of labels.
        seed: Seed of the choice within each class.

    Returns:
        Sorted positions, int64, shape (count,).

    Raises:
        ValueError: ``count`` is out of range.
    """
    if not 0 <= count <= len(labels):
        raise ValueError(f"cannot choose {count} of {len(labels)} images")
    classes, sizes = np.unique(labels, return_counts=True)
    quotas, remainders = np.divmod(sizes * count, max(1, len(labels)))
    quotas[np.argsort(-remainders, kind="stable")[: count - quotas.sum()]] += 1
    generator = np.random.default_rng(seed)
    by_class = [
        generator.permutation(np.flatnonzero(labels == label))[:quota]
        for label, quota in zip(classes, quotas, strict=True)
    ]
    return np.sort(np.concatenate([np.empty(0, dtype=np.int64), *by_class]))


def held_out_positions(labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Draw a stratified share of the positions, at least one, that leaves an image of every class.

    Args:
        labels: Class numbers, shape (number,).
        fraction: Share of the positions, in (0, 1).
        seed: Seed of the choice within each class.

    Returns:
        Sorted positions, int64.

    Raises:
        ValueError: Every class has one image only.
    """
    sample = stratified_positions(labels, min(len(labels), max(1, round(len(labels) * fraction))), seed)
    _, sizes = np.unique(labels, return_counts=True)
    if sizes.max(initial=0) < 2:
        raise ValueError(
            f"cannot hold out a validation split from {len(labels)} images of as many classes: "
            "give a validation split, or more images"
        )
    by_class = [sample[labels[sample] == label] for label in np.unique(labels)]
    held_out = [positions[: size - 1] for positions, size in zip(by_class, sizes, strict=True)]
    if not any(map(len, held_out)):
        held_out = [np.flatnonzero(labels == np.unique(labels)[sizes.argmax()])[:1]]
    return np.sort(np.concatenate(held_out))


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
