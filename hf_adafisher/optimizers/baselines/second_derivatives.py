"""Preparation of a model for optimizers that need second derivatives."""

from __future__ import annotations

import logging
from typing import Any

from torch import nn

from hf_adafisher.optimizers.validation.compilation import compiled_regions

logger = logging.getLogger(__name__)


def prepare_model(model: nn.Module, kind: str) -> None:
    """Switch the attention of transformers' models to eager, with one warning.

    Fused attention kernels have no second derivative. Other models are not changed.

    Args:
        model: The model to train.
        kind: Name of the optimizer in messages.

    Raises:
        ValueError: The model is compiled, or uses reentrant activation checkpointing.
    """
    if any(True for _ in compiled_regions(model)):
        raise ValueError(
            f"{kind} needs second derivatives, which compiled graphs do not have: use the model without torch.compile"
        )
    if any(_recomputes_once(module) for module in model.modules()):
        raise ValueError(
            f"{kind} needs second derivatives, which reentrant activation checkpointing does not allow: set "
            "use_reentrant to False in activation_checkpointing_kwargs (or gradient_checkpointing_kwargs)"
        )
    switched = set()
    for module in model.modules():
        current = getattr(getattr(module, "config", None), "_attn_implementation", None)
        if current not in (None, "eager") and callable(getattr(module, "set_attn_implementation", None)):
            module.set_attn_implementation("eager")  # type: ignore[operator]
            switched.add(current)
    if switched:
        logger.warning(
            "%s needs second derivatives, which fused attention does not have: the model's attention was switched "
            "from %s to eager.",
            kind,
            ", ".join(sorted(switched)),
        )


def _recomputes_once(module: nn.Module) -> bool:
    """True if transformers has set up reentrant checkpointing, torch's default, on this module."""
    function: Any = getattr(module, "_gradient_checkpointing_func", None)
    if not getattr(module, "gradient_checkpointing", False) or function is None:
        return False
    return bool(getattr(function, "keywords", {}).get("use_reentrant", True))
