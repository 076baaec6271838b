"""What torch.compile hides from hooks, and who sees to it that nothing is hidden."""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

from torch import nn

from hf_adafisher.optimizers.validation.environment import accelerate_state, unwrapped

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
            "every step: use AdaFisherTrainer, which runs the few steps that record eagerly, or unset torch_compile"
        )


def refuse_compiling_trainer(tracker: object) -> None:
    """``refuse_compilation`` for an optimizer that was passed as ``optimizers=``, known by its tracker.

    It may be older than the decision to compile, and nothing tells it who drives it: Trainers are looked through.
    """
    trainers = sys.modules.get("transformers.trainer")
    if trainers is None or not _accelerate_compiles():
        return
    for trainer in _alive(trainers.Trainer):
        optimizer = unwrapped(getattr(trainer, "optimizer", None))
        if getattr(optimizer, "_statistics", None) is tracker:
            refuse_compilation(type(optimizer).__name__)


def compiled_regions(model: nn.Module) -> Iterator[nn.Module]:
    """Every compiled module in ``model``, and every compiled wrapper in this process, which may hold a part of it.

    ``torch.compile(model)`` leaves no mark on the model, hence the latter. A compiled function is not found.
    """
    for module in model.modules():
        if module._compiled_call_impl is not None or hasattr(module.forward, "_torchdynamo_orig_callable"):
            yield module
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None:
        yield from _alive(dynamo.OptimizedModule)


def graphs_compiled() -> bool:
    """Whether this process has compiled anything."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    return dynamo is not None and bool(dynamo.counters["stats"].get("unique_graphs"))


def _alive(kind: type) -> list[Any]:
    """All objects of a class; by their type, since proxies may do work when asked for their class."""
    return [found for found in gc.get_objects() if issubclass(type(found), kind)]


def _accelerate_compiles() -> bool:
    backend = getattr(accelerate_state().get("dynamo_plugin"), "backend", None)
    return backend is not None and str(getattr(backend, "value", backend)).upper() != "NO"
