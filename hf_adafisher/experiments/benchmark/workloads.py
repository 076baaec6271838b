"""Models of the benchmarks, with random weights, and a batch for each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    GPT2Config,
    LlamaConfig,
    ResNetConfig,
    ViTConfig,
)


@dataclass(frozen=True)
class Workload:
    """A model and a batch to train it on."""

    model: nn.Module
    batch: dict[str, Tensor]

    def backward(self, create_graph: bool = False) -> None:
        """Run one forward and backward pass; gradients add up."""
        self.model(**self.batch).loss.backward(create_graph=create_graph)


def gpt2(
    device: str, *, width: int = 256, depth: int = 4, vocabulary: int = 8192, batch: int = 16, length: int = 128
) -> Workload:
    """Create a GPT-2 without dropout, with equal weights for equal sizes."""
    config = GPT2Config(
        vocab_size=vocabulary, n_positions=512, n_embd=width, n_layer=depth, n_head=max(1, width // 64),
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return _language_model(config, device, batch, length)


def _language_model(config: Any, device: str, batch: int, length: int) -> Workload:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).to(device).train()
    ids = torch.randint(config.vocab_size, (batch, length), device=device)
    return Workload(model, {"input_ids": ids, "labels": ids})


def _classifier(config: Any, device: str) -> Workload:
    torch.manual_seed(0)
    model = AutoModelForImageClassification.from_config(config).to(device).train()
    pixels = torch.randn(2, 3, 64, 64, device=device)
    return Workload(model, {"pixel_values": pixels, "labels": torch.tensor([0, 1], device=device)})


def _llama(device: str) -> Workload:
    config = LlamaConfig(
        vocab_size=16000, hidden_size=384, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=6,
        num_key_value_heads=2, use_cache=False,
    )  # fmt: skip
    return _language_model(config, device, 2, 32)


class SmallTensors(nn.Module):
    """Thousands of layers of eight channels: 10,000 tensors, whose step costs calls and nothing else."""

    def __init__(self, layers: int = 5000) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(layers))

    def forward(self, x: Tensor) -> Any:
        """Return an object with a loss."""
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return SimpleNamespace(loss=x.square().mean())


def _small_tensors(device: str) -> Workload:
    torch.manual_seed(0)
    return Workload(SmallTensors().to(device), {"x": torch.randn(2, 8, device=device)})


MODELS: dict[str, Callable[[str], Workload]] = {
    "gpt2-20m": lambda device: gpt2(device, width=384, depth=8, vocabulary=16000, batch=2, length=32),
    "llama": _llama,
    "vit": lambda device: _classifier(
        ViTConfig(hidden_size=384, num_hidden_layers=8, num_attention_heads=6, intermediate_size=1536, image_size=64),
        device,
    ),
    "small-tensors": _small_tensors,
    "resnet": lambda device: _classifier(ResNetConfig(embedding_size=64, hidden_sizes=[128, 256, 512, 1024]), device),
}
