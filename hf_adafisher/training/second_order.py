"""Backward passes that keep the graph of the gradients, for optimizers that estimate a Hessian."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel


@contextlib.contextmanager
def second_derivatives(accelerator: Any, optimizer: Any, model: nn.Module) -> Iterator[None]:
    """Make ``accelerator.backward`` keep the graph of the gradients if the optimizer's next step needs it.

    DistributedDataParallel cannot average such gradients, since its buckets would become part of the graph. So its
    averaging is turned off, and the optimizer averages the gradients after the last backward of a step.

    Args:
        accelerator: Accelerator of the Trainer, whose ``backward`` is replaced inside the context.
        optimizer: Optimizer of any kind, without accelerate's wrapper.
        model: Model that Trainer trains, wrapped or not.

    Yields:
        Nothing.
    """
    if not getattr(optimizer, "needs_graph", False):
        yield
        return
    parallel = model if isinstance(model, DistributedDataParallel) else None
    backward, patched = accelerator.backward, "backward" in vars(accelerator)
    accelerator.backward = functools.partial(backward, create_graph=True)
    try:
        with contextlib.nullcontext() if parallel is None else parallel.no_sync(), warnings.catch_warnings():
            # The cycle it warns of ends with the optimizer's step.
            warnings.filterwarnings("ignore", message="Using backward\\(\\) with create_graph=True")
            if parallel is not None:
                _broadcast_buffers(parallel)
            yield
    finally:
        if patched:
            accelerator.backward = backward
        else:
            del accelerator.backward
    if parallel is not None and accelerator.sync_gradients:
        optimizer.average_gradients()


@torch.no_grad()
def _broadcast_buffers(model: DistributedDataParallel) -> None:
    """Broadcast the buffers of rank 0, which DDP omits together with its averaging."""
    if model.broadcast_buffers:
        for buffer in model.module.buffers():
            dist.broadcast(buffer, src=0, group=model.process_group)
