"""Operators that one ``step()`` launches, and their growth with the number of parameters."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.autograd.profiler_util import FunctionEvent

from hf_adafisher.experiments.benchmark.workloads import gpt2
from hf_adafisher.optimizers.adafisher import AdaFisherW

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
