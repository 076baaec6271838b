"""Loading of checkpoints whose weights have other names than the model's.

Transformers saves some models (ViT, Mixtral, ...) under the names of their published weights, which ``from_pretrained``
translates. ``Trainer`` does not: it loads the weights whose names agree, and with a warning leaves the others at their
initial values (https://github.com/huggingface/transformers/issues/43701).
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel


def has_renamed_weights(model: nn.Module, checkpoint: Path) -> bool:
    """True if the checkpoint has weights under names that the model does not have."""
    if not isinstance(model, PreTrainedModel):
        return False
    names = set(model.state_dict())
    return any(name not in names for name in _saved_names(checkpoint))


def load_renamed_weights(model: Any, checkpoint: Path) -> None:
    """Load the weights of a checkpoint through ``from_pretrained``, which translates their names.

    Args:
        model: Model of transformers, changed in place.
        checkpoint: The ``checkpoint-N`` directory.

    Raises:
        ValueError: The checkpoint lacks weights of the model, or the model's class cannot be built from its
            configuration alone.
    """
    # The widest dtype: a model may keep its head in float32 and the rest in bfloat16.
    dtype = functools.reduce(torch.promote_types, (p.dtype for p in model.parameters()))
    try:
        loaded, info = type(model).from_pretrained(
            checkpoint, config=model.config, dtype=dtype, output_loading_info=True
        )
    except TypeError as error:
        raise ValueError(
            f"the weights in {checkpoint} have other names than the model's, and {type(model).__name__}, which could "
            f"translate them, cannot be built from its configuration alone ({error}): load them yourself"
        ) from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise ValueError(f"{checkpoint} lacks weights of this model: {', '.join(missing)}")
    model.load_state_dict(loaded.state_dict())


def _saved_names(checkpoint: Path) -> Iterable[str]:
    """Names of the weights in a checkpoint; empty for layouts other than Trainer's of a complete model."""
    for index in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        if (checkpoint / index).is_file():
            return json.loads((checkpoint / index).read_text(encoding="utf-8"))["weight_map"]
    if (checkpoint / "model.safetensors").is_file():
        with safe_open(checkpoint / "model.safetensors", framework="pt") as weights:
            return list(weights.keys())
    if (checkpoint / "pytorch_model.bin").is_file():
        return torch.load(checkpoint / "pytorch_model.bin", map_location="meta", weights_only=True)
    return []
