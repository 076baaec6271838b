"""State of optimizers by the size of the model: real steps of real optimizers, on tensors without storage."""

from __future__ import annotations

import copy

import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PretrainedConfig, Qwen2Config, Qwen3Config

from hf_adafisher.optimizers.factory.create import create_optimizer, optimizer_state_bytes

OPTIMIZERS = ("adamw", "muon", "adafisherw", "spectral-adafisher")
MODELS: dict[str, PretrainedConfig] = {
    "GPT-2": GPT2Config(),
    "Qwen3 0.6B": Qwen3Config(
        vocab_size=151936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16,
        num_key_value_heads=8, head_dim=128, tie_word_embeddings=True,
    ),
    "Llama 3.2 1B": LlamaConfig(
        vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8, tie_word_embeddings=True,
    ),
    "Llama 3.1 8B": LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8,
    ),
    "Qwen2.5 32B": Qwen2Config(
        vocab_size=152064, hidden_size=5120, intermediate_size=27648, num_hidden_layers=64, num_attention_heads=40,
        num_key_value_heads=8, tie_word_embeddings=False,
    ),
    "Llama 3.1 70B": LlamaConfig(
        vocab_size=128256, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
        num_key_value_heads=8,
    ),
}  # fmt: skip
"""Published shapes of language models, from 0.1 to 70 billion parameters."""


def state_bytes(config: PretrainedConfig, optim: str, dtype: torch.dtype = torch.float32) -> tuple[int, int]:
    """Count the parameters of a language model, and the bytes of an optimizer's state after a step.

    All layers of a language model are alike, so that two models, of one and of two layers, give those of any number.

    Args:
        config: The model's configuration.
        optim: One of ``available_optimizers()``, with its defaults. ``adafactor`` cannot: it reads numbers.
        dtype: Of the weights. Default float32.

    Returns:
        The number of parameters, and the bytes.
    """
    (first, one), (second, two) = (_after_a_step(config, layers, optim, dtype) for layers in (1, 2))
    more = config.num_hidden_layers - 1
    return first + more * (second - first), one + more * (two - one)


def _after_a_step(config: PretrainedConfig, layers: int, optim: str, dtype: torch.dtype) -> tuple[int, int]:
    shallow = copy.deepcopy(config)
    shallow.num_hidden_layers = layers
    if getattr(shallow, "layer_types", None):
        shallow.layer_types = shallow.layer_types[:layers]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shallow, dtype=dtype)
    for p in model.parameters():
        p.grad = torch.empty_like(p)
    optimizer = create_optimizer(optim, model)
    optimizer.step()
    return sum(p.numel() for p in model.parameters()), optimizer_state_bytes(optimizer)


def memory_as_markdown() -> str:
    """Render the states of ``OPTIMIZERS`` for ``MODELS`` with float32 weights, in GB (10^9 bytes), as Markdown."""
    lines = [["model", "parameters", *(f"`{name}`" for name in OPTIMIZERS)], ["---"] * (2 + len(OPTIMIZERS))]
    for name, config in MODELS.items():
        counted = [state_bytes(config, optim) for optim in OPTIMIZERS]
        gigabytes = [f"{size / 1e9:.{1 if size < 1e11 else 0}f} GB" for _, size in counted]
        lines.append([name, f"{counted[0][0] / 1e9:.2f} B", *gigabytes])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
