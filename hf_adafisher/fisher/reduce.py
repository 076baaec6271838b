"""Averaging statistics over data-parallel processes."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def sum_over_ranks(buffer: Tensor) -> Tensor:
    """Sum a flat buffer over all processes of the default group, in place; one all-reduce.

    Without an initialised process group, or with a single process, the buffer is returned as it is. Every process
    must call this with a buffer of the same length.
    """
    if torch.distributed.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(buffer)
    return buffer
