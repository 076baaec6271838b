"""Parameter groups: what weight decay applies to, by Trainer's own rule."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import nn


def decay_parameter_names(model: nn.Module) -> list[str]:
    """Names of the parameters that weight decay applies to, as ``transformers.Trainer`` decides it.

    Everything but biases and normalisation layers. Trainer's method is called itself, so that the two never differ.
    """
    from transformers import Trainer

    return Trainer.get_decay_parameter_names(None, model)  # type: ignore[arg-type]  # it does not use self


def decay_groups(
    model: nn.Module, weight_decay: float, decay_names: Collection[str] | None = None
) -> list[dict[str, Any]]:
    """Two parameter groups, as Trainer builds them: with weight decay, and (biases, norms) without.

    Args:
        model: The model; parameters that do not require grad are left out.
        weight_decay: Decay of the first group.
        decay_names: Names of the parameters to decay. Default: :func:`decay_parameter_names`.

    Returns:
        Always two groups in this order, so that a checkpoint restores by position; one of them may be empty.

    Raises:
        ValueError: The model has no trainable parameter.
    """
    names = set(decay_parameter_names(model) if decay_names is None else decay_names)
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not trainable:
        raise ValueError(
            f"{type(model).__name__} has no trainable parameter: set requires_grad=True on what should be trained"
        )
    return [
        {"params": [p for name, p in trainable if name in names], "weight_decay": weight_decay},
        {"params": [p for name, p in trainable if name not in names], "weight_decay": 0.0},
    ]
