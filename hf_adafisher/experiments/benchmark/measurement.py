"""Measurement: models with a batch for each, functions timed alternately, peak memory, and their table."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    Dinov2Config,
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
    device: str,
    *,
    width: int = 256,
    depth: int = 4,
    heads: int | None = None,
    vocabulary: int = 8192,
    positions: int = 512,
    batch: int = 16,
    length: int = 128,
) -> Workload:
    """Create a GPT-2 without dropout, with equal weights for equal sizes, and a head for every 64 of its width."""
    config = GPT2Config(
        vocab_size=vocabulary, n_positions=positions, n_embd=width, n_layer=depth, n_head=heads or max(1, width // 64),
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return _language_model(config, device, batch, length)


def _language_model(config: Any, device: str, batch: int, length: int) -> Workload:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).to(device).train()
    ids = torch.randint(config.vocab_size, (batch, length), device=device)
    return Workload(model, {"input_ids": ids, "labels": ids})


def _classifier(config: Any, device: str, batch: int = 2, side: int = 64) -> Workload:
    torch.manual_seed(0)
    model = AutoModelForImageClassification.from_config(config).to(device).train()
    pixels = torch.randn(batch, 3, side, side, device=device)
    return Workload(model, {"pixel_values": pixels, "labels": torch.arange(batch, device=device) % 2})


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
    "vit-small": lambda device: _classifier(  # that of the preset vit-finetune
        Dinov2Config(
            hidden_size=384, num_attention_heads=6, patch_size=14, image_size=56, id2label=dict(enumerate("0123456789"))
        ),
        device,
        32,
        56,
    ),
    "small-tensors": _small_tensors,
    "resnet": lambda device: _classifier(ResNetConfig(embedding_size=64, hidden_sizes=[128, 256, 512, 1024]), device),
}


WARM_UP = 3
"""Rounds that are not counted: states are created, kernels compiled, memory touched for the first time."""


def timed(function: Callable[[], Any], device: str) -> float:
    """Duration of one call in milliseconds, by CUDA events on a GPU."""
    if not device.startswith("cuda"):
        start = time.perf_counter()
        function()
        return 1e3 * (time.perf_counter() - start)
    start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start_event.record()
    function()
    end_event.record()
    torch.cuda.synchronize()
    return float(start_event.elapsed_time(end_event))


def alternate(
    functions: Mapping[str, Callable[[], float]], rounds: int, label: str, warm_up: int = WARM_UP
) -> dict[str, list[float]]:
    """Call all functions in every round, so that other load on the machine affects all of them.

    Args:
        functions: Each returns its duration in milliseconds.
        rounds: Number of rounds that count.
        label: Title of the progress bar.
        warm_up: Number of rounds before them that do not count.

    Returns:
        Durations of each function, one for each round.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    for index in tqdm(range(warm_up + rounds), desc=label, leave=False):
        for name, function in functions.items():
            value = function()
            if index >= warm_up:
                times[name].append(value)
    return times


def compare_times(times: Sequence[float], peer: Sequence[float]) -> dict[str, float]:
    """Median and quartiles of the times, and of the ratios to the peer's time in the same round; the fastest time."""
    ratios = [mine / theirs for mine, theirs in zip(times, peer, strict=True)]
    row: dict[str, float] = {"fastest_ms": min(times)}
    for name, values in (("ms", times), ("ratio", ratios)):
        low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
        row |= {name: middle, f"{name}_q1": low, f"{name}_q3": high}
    return row


def timer(function: Callable[[], Any], device: str) -> Callable[[], float]:
    """Function that times one call, for ``alternate``."""
    return lambda: timed(function, device)


def peak_extra_bytes(function: Callable[[], Any], device: str) -> int:
    """Largest memory that a call holds beside the memory before it, from the allocator's own records."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return int(torch.cuda.max_memory_allocated() - before)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    records = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    records.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate((event.nbytes() for event in records), initial=0))


def as_table(rows: Mapping[str, Mapping[str, float]]) -> str:
    """Markdown table of medians with quartiles, and of the memory where it was measured."""
    extra = [key for key in ("state_bytes", "peak_extra_bytes", "state_ratio") if any(key in r for r in rows.values())]
    lines = ["| | ms | quartiles | x peer | quartiles |" + "".join(f" {key} |" for key in extra)]
    lines.append("|---" * (5 + len(extra)) + "|")
    for name, row in rows.items():
        cells = [name, f"{row['ms']:.2f}", f"{row['ms_q1']:.2f} .. {row['ms_q3']:.2f}"]
        cells += [f"{row['ratio']:.3f}", f"{row['ratio_q1']:.3f} .. {row['ratio_q3']:.3f}"]
        cells += [f"{row[key]:.3g}" if key == "state_ratio" else f"{int(row[key])}" for key in extra if key in row]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
