"""Backward passes whose gradients can be differentiated again, for the steps that estimate a Hessian."""

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
    """Within it, ``accelerator.backward`` keeps the graph of the gradients, if the optimizer's next step needs it.

    DistributedDataParallel cannot average such gradients: its buckets would become part of the graph. So its
    averaging is left out, and after the last backward of a step the optimizer averages them itself.

    Args:
        accelerator: The Trainer's; Trainer has no argument for the keywords of its ``backward``.
        optimizer: The optimizer itself, without accelerate's wrapper; any kind.
        model: The model that Trainer trains, wrapped or not.
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
                _share_buffers(parallel)
            yield
    finally:
        if patched:
            accelerator.backward = backward
        else:
            del accelerator.backward
    if parallel is not None and accelerator.sync_gradients:
        optimizer.average_gradients()


@torch.no_grad()
def _share_buffers(model: DistributedDataParallel) -> None:
    """The running statistics of rank 0 for all processes, which DDP leaves out together with its averaging."""
    if model.broadcast_buffers:
        for buffer in model.module.buffers():
            dist.broadcast(buffer, src=0, group=model.process_group)
