"""Counts, no times: operators that one ``step()`` launches, and optimizer state by the size of the model."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.autograd.profiler_util import FunctionEvent
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PretrainedConfig, Qwen2Config, Qwen3Config

from hf_adafisher.experiments.benchmark.measurement import gpt2
from hf_adafisher.optimizers.adafisher import AdaFisherW
from hf_adafisher.optimizers.factory.create import create_optimizer, optimizer_state_bytes

DEPTHS = (2, 4)
"""Layers of the two models, whose parameters differ in number, not in shape."""
NO_KERNEL = {
    "as_strided", "detach", "detach_", "empty", "empty_like", "empty_strided", "expand", "item", "lift_fresh",
    "new_empty", "promote_types", "reshape", "result_type", "select", "slice", "split", "squeeze", "t", "to",
    "transpose", "unsqueeze", "view",
}  # fmt: skip
"""Operators on a tensor's metadata, or on numbers that stay on the host."""


def count_operators(function: Callable[[], Any]) -> dict[str, int]:
    """Count the operators of one call on a CPU.

    Returns:
        ``launches``: operators called from Python, each foreach operator and each compiled graph being one: about the
        number of kernels on an accelerator. ``leaf_operators``: operators that call no others; a CPU runs foreach
        operators tensor by tensor.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function()
    events = profile.events() or []
    operators = [event for event in events if _is_operator(event)]
    outermost = [event for event in operators if not any(map(_is_operator, _callers(event)))]
    launched = [event for event in outermost if event.name.removeprefix("aten::") not in NO_KERNEL]
    graphs = [event for event in events if event.name.startswith("## Call CompiledFxGraph")]
    leaves = [event for event in operators if not any(map(_is_operator, event.cpu_children))]
    return {"launches": len(launched) + len(graphs), "leaf_operators": len(leaves)}


def measure_operators(compiled: bool = False) -> dict[str, Any]:
    """Count the operators of steps of AdaFisherW and AdamW on two GPT-2s of different depth.

    Those of the paper's form are idle. Factors of the root's form take a few launches a parameter.

    Returns:
        By optimizer: the counts on both models, and ``launches_per_parameter``, their slope: 0 for a step whose
        number of launches does not grow with the model.
    """
    makers: dict[str, Callable[[Any], Any]] = {
        "adafisherw": lambda model: AdaFisherW(model, update_interval=10**9),
        "adafisherw root": lambda model: AdaFisherW(model, step_size="root"),
        "adamw foreach": lambda model: torch.optim.AdamW(model.parameters(), foreach=True),
        "adamw fused": lambda model: torch.optim.AdamW(model.parameters(), fused=True),
    }
    if compiled:
        makers["compiled"] = lambda model: AdaFisherW(model, update_interval=10**9, compiled=True)
        makers["compiled root"] = lambda model: AdaFisherW(model, step_size="root", compiled=True)
    counts: dict[str, Any] = {}
    for name, make in makers.items():
        models = []
        for depth in DEPTHS:
            work = gpt2("cpu", depth=depth, batch=1, length=8)
            optimizer = make(work.model)
            for _ in range(2):  # the first step creates the state and compiles
                work.backward()
                optimizer.step()
            parameters = sum(p.requires_grad for p in work.model.parameters())
            models.append({"parameters": parameters, **count_operators(optimizer.step)})
        (small, large) = models
        growth = (large["launches"] - small["launches"]) / (large["parameters"] - small["parameters"])
        counts[name] = {"models": models, "launches_per_parameter": growth}
    return {"operators": counts}


def _is_operator(event: FunctionEvent) -> bool:
    return event.name.startswith("aten::")


def _callers(event: FunctionEvent) -> Iterator[FunctionEvent]:
    while event.cpu_parent is not None:
        event = event.cpu_parent
        yield event


def operators_table(counts: dict[str, Any]) -> str:
    """Markdown table of ``measure_operators``."""
    lines = ["| | parameters | launches | leaf operators | launches per parameter |", "|---" * 5 + "|"]
    for (name, row), index in itertools.product(counts.items(), range(len(DEPTHS))):
        model = row["models"][index]
        cells = [name, model["parameters"], model["launches"], model["leaf_operators"]]
        lines.append("| " + " | ".join(map(str, cells)) + f" | {row['launches_per_parameter']:.2f} |")
    return "\n".join(lines)


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
