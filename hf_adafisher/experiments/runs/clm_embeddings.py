"""Pretrained embeddings in a new GPT-2, as in the paper's language modelling tables."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModel, GPT2LMHeadModel, PreTrainedModel

_POSITIONS = {"openai-gpt": "positions_embed", "gpt2": "wpe"}
"""Name of the position embedding, by model type."""


def copy_embeddings(source: str, model: PreTrainedModel, *, freeze: bool, **hub: Any) -> None:
    """Copy token and position embeddings into a new GPT-2.

    Args:
        source: A GPT or GPT-2 (Hub id or directory).
        model: The new GPT-2; its context may be shorter.
        freeze: Keep them as they are, and with the token embeddings the head that is tied to them.
        **hub: Further arguments of ``from_pretrained``.

    Raises:
        ValueError: Another kind of model, another width, fewer tokens than the tokenizer has, or fewer positions.
    """
    assert isinstance(model, GPT2LMHeadModel)
    pretrained = AutoModel.from_pretrained(source, dtype=torch.float32, **hub)
    kind = pretrained.config.model_type
    if kind not in _POSITIONS:
        raise ValueError(f"{source!r} is a {kind}; embeddings can be taken from: {', '.join(_POSITIONS)}")
    tables = (
        ("tokens", pretrained.get_input_embeddings(), model.transformer.wte),
        ("positions", getattr(pretrained, _POSITIONS[kind]), model.transformer.wpe),
    )
    for name, theirs, ours in tables:
        (rows, width), (needed, wanted) = theirs.weight.shape, ours.weight.shape
        if width != wanted:
            raise ValueError(f"the embeddings of {source!r} are {width} wide, the model {wanted}: use --n_embd {width}")
        if rows < needed:
            raise ValueError(f"{source!r} has embeddings for {rows} {name}, the model needs {needed}")
        with torch.no_grad():
            ours.weight.copy_(theirs.weight[:needed])
        ours.weight.requires_grad_(not freeze)
