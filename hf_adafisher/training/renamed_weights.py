"""Weights of a checkpoint that have other names than the model's, or do not fit it.

Transformers saves some models (ViT, Mixtral, ...) under the names of their published weights, which ``from_pretrained``
translates. ``Trainer`` does not: it loads the weights whose names agree, and with a warning leaves the others at their
initial values (https://github.com/huggingface/transformers/issues/43701).
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel

from hf_adafisher.training.checkpoints import CheckpointError


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
        ValueError: The checkpoint lacks weights of the model or has others besides, or the model's class cannot be
            built from its configuration alone.
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
    unexpected = sorted(info["unexpected_keys"])
    if unexpected:
        raise ValueError(f"{checkpoint} has weights that this model lacks: {', '.join(unexpected)}")
    model.load_state_dict(loaded.state_dict())


def check_weights_fit(model: nn.Module, checkpoint: Path) -> None:
    """Check that the weights of a checkpoint have the names and shapes of the model's.

    Trainer loads those with the model's names and leaves the others. Layouts other than Trainer's of a complete model
    are not checked.

    Args:
        model: Model as it is trained, neither wrapped nor sharded.
        checkpoint: The ``checkpoint-N`` directory.

    Raises:
        CheckpointError: The model has weights that the checkpoint lacks, or has in another shape, or the reverse.
    """
    saved = dict(_saved_shapes(checkpoint))
    own = model.state_dict()
    if not saved:
        return
    # Of tied weights, one name is saved.
    tied = {own[name].data_ptr() for name in saved if name in own}
    ignored = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    lacking = [name for name in own if name not in saved and name not in ignored and own[name].data_ptr() not in tied]
    problems = [
        f"{name} is {saved[name]} there, {tuple(own[name].shape)} here"
        for name in saved
        if name in own and saved[name] != tuple(own[name].shape)
    ]
    problems += [f"it has no {name}" for name in lacking] + [
        f"it has {name} besides" for name in saved if name not in own
    ]
    if problems:
        more = f", and {len(problems) - 1} more" if len(problems) > 1 else ""
        raise CheckpointError(
            f"{checkpoint} does not fit the model: {problems[0]}{more}. Resume with the arguments of the run that "
            "wrote it"
        )


def _saved_names(checkpoint: Path) -> Iterable[str]:
    """Names of the weights in a checkpoint; empty for layouts other than Trainer's of a complete model."""
    return [name for name, _ in _saved_shapes(checkpoint)]


def _saved_shapes(checkpoint: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the weights in a checkpoint; tensors are not read."""
    for index in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        if (checkpoint / index).is_file():
            names = json.loads((checkpoint / index).read_text(encoding="utf-8"))["weight_map"].values()
            files = [checkpoint / name for name in sorted(set(names))]
            break
    else:
        files = [checkpoint / name for name in ("model.safetensors", "pytorch_model.bin")]
        files = [file for file in files if file.is_file()][:1]
    for file in files:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as weights:
                for name in weights.keys():  # noqa: SIM118  # it is no dictionary
                    yield name, tuple(weights.get_slice(name).get_shape())
        else:
            for name, tensor in torch.load(file, map_location="meta", weights_only=True).items():
                yield name, tuple(tensor.shape)
