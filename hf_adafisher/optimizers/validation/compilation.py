"""Refusals and detection of compiled graphs, which do not run hooks."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from contextvars import ContextVar
from types import FrameType
from typing import Any

from torch import nn

from hf_adafisher.optimizers.validation.environment import accelerate_state

_OWN = "hf_adafisher"
_SEEN_TO: ContextVar[bool] = ContextVar("hf_adafisher_due_steps_run_eagerly", default=False)


@contextlib.contextmanager
def due_steps_run_eagerly() -> Iterator[None]:
    """Within it ``refuse_compilation`` lets optimizers with hooks pass: the Trainer that builds one knows them."""
    token = _SEEN_TO.set(True)
    try:
        yield
    finally:
        _SEEN_TO.reset(token)


def refuse_compilation(kind: str, *, second_derivatives: bool = False) -> None:
    """Raises ValueError where accelerate is about to compile the model and the optimizer cannot live with that.

    Args:
        kind: The optimizer's name, for the message.
        second_derivatives: Whether it needs those; no Trainer can do that with compiled graphs. Else it has hooks.
    """
    if not _accelerate_compiles():
        return
    if second_derivatives:
        raise ValueError(f"{kind} needs second derivatives, which compiled graphs do not have: unset torch_compile")
    if not _SEEN_TO.get():
        raise ValueError(
            f"{kind} records its statistics with hooks, which compiled graphs do not run, and a stock Trainer compiles "
            "every step: use AdaFisherTrainer, which runs the few steps that record eagerly, or unset torch_compile; "
            'in a loop of your own, run forward and backward within "with optimizer.eager_if_due():"'
        )


def refuse_compiling_driver(kind: str) -> None:
    """``refuse_compilation`` at the first due step of an optimizer that is older than the decision to compile.

    A stock Trainer that got it as ``optimizers=`` tells it nothing, so the callers of its first step are searched.
    """
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_globals.get("__name__") == "transformers.trainer":
            refuse_compilation(kind)
        frame = frame.f_back


def compiled_regions(model: nn.Module) -> Iterator[nn.Module]:
    """Every module in ``model`` that was compiled in place or wrapped by ``torch.compile``."""
    dynamo = sys.modules.get("torch._dynamo")
    wrapper = () if dynamo is None else dynamo.OptimizedModule
    for module in model.modules():
        in_place = module._compiled_call_impl is not None or hasattr(module.forward, "_torchdynamo_orig_callable")
        if in_place or isinstance(module, wrapper):
            yield module


def graphs_compiled() -> bool:
    """True once this process has compiled anything but update kernels of this package."""
    counters = _dynamo_counters()
    return counters is not None and counters["stats"]["unique_graphs"] > counters[_OWN]["unique_graphs"]


@contextlib.contextmanager
def own_graphs() -> Iterator[None]:
    """Graphs compiled within it are update kernels, which hide no layers."""
    before = _dynamo_counters()
    compiled = 0 if before is None else before["stats"]["unique_graphs"]
    yield
    counters = _dynamo_counters()
    if counters is not None:
        counters[_OWN]["unique_graphs"] += counters["stats"]["unique_graphs"] - compiled


def _dynamo_counters() -> Any:
    """Torch's counters by group and name, zero where nothing was counted; None while dynamo is not imported."""
    return getattr(sys.modules.get("torch._dynamo.utils"), "counters", None)


def _accelerate_compiles() -> bool:
    backend = getattr(accelerate_state().get("dynamo_plugin"), "backend", None)
    return backend is not None and str(getattr(backend, "value", backend)).upper() != "NO"
