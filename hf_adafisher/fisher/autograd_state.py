"""State of autograd, by which a hook knows whether a call is part of training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge


def inside_transform() -> bool:
    """True inside a transform of ``torch.func``, and while a call is traced, exported or compiled.

    Tensors are then stand-ins without values of their own, or batches of them; nothing that they go through trains.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return True
    transforms = getattr(torch._C, "_functorch", None)
    return getattr(transforms, "peek_interpreter_stack", lambda: None)() is not None


def inside_backward() -> bool:
    """True in code that a backward pass runs, such as the recomputed forward of activation checkpointing."""
    current_task = getattr(torch._C, "_current_graph_task_id", None)
    return current_task is not None and current_task() != -1


def accumulators(leaves: Sequence[Tensor]) -> list[Any]:
    """The nodes of the graph that add to the ``.grad`` of these leaves."""
    return [get_gradient_edge(leaf).node for leaf in leaves]


def will_accumulate(nodes: Sequence[Any]) -> bool:
    """True inside a backward pass that adds to the ``.grad`` of one of the leaves whose ``accumulators`` these are.

    It is False inside ``torch.autograd.grad`` and ``backward(inputs=...)`` of something else: they run the hooks that
    lie on their way, but train none of these. The engine itself answers; there is no public way to ask it. A torch
    that cannot be asked counts every pass.
    """
    will_execute = getattr(torch._C, "_will_engine_execute_node", None)
    return will_execute is None or any(_accumulates(node, will_execute) for node in nodes)


def _accumulates(node: Any, will_execute: Any) -> bool:
    try:
        return bool(will_execute(node))
    except RuntimeError:  # the engine refuses to answer for a leaf whose gradient torch.autograd.grad was asked for
        return False
