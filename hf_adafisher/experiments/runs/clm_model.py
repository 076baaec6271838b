"""Changes to a language model before its training: pretrained embeddings in a new GPT-2, and LoRA adapters."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
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


ADAPTER_FILE = "adapter_config.json"


def add_lora(model: PreTrainedModel, settings: Mapping[str, Any]) -> Any:
    """Freeze a model and give it new adapters.

    Args:
        model: A causal language model.
        settings: Arguments of ``LoraConfig``.

    Returns:
        The ``PeftModel``.

    Raises:
        ImportError: peft is not installed.
        ValueError: No module has such a name, or peft knows none for this kind of model.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ImportError("--use_lora needs peft: pip install peft") from error
    try:
        return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))
    except ValueError as error:
        raise ValueError(f"--lora_target_modules: {error}") from error


def base_model(name: str) -> str:
    """Name of the model that the adapters in a folder belong to; any other name as it is."""
    path = Path(name) / ADAPTER_FILE
    return str(json.loads(path.read_text(encoding="utf-8"))["base_model_name_or_path"]) if path.is_file() else name


def check_lora(checkpoint: Path, settings: Mapping[str, Any] | None) -> None:
    """Check that a checkpoint has adapters of these settings, or has none where there are none.

    Raises:
        ValueError: It was made with other settings; the message names the argument.
    """
    path = checkpoint / ADAPTER_FILE
    saved: dict[str, Any] | None = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    if (saved is None) != (settings is None):
        have = "no LoRA adapters" if saved is None else "LoRA adapters"
        way = "leave out" if saved is None else "give"
        raise ValueError(f"{checkpoint} has {have}: to go on from it, {way} --use_lora")
    if saved is None or settings is None:
        return
    for name, value in settings.items():
        given = sorted(value) if isinstance(value, list) else value
        there = saved[name]
        there = sorted(there) if isinstance(there, list) else there
        if given is not None and given != "all-linear" and given != there:  # peft writes the names that it chose
            argument = name if name.startswith("lora_") else f"lora_{name}"
            raise ValueError(f"{checkpoint} was made with --{argument} {there}, and now it is {given}")
