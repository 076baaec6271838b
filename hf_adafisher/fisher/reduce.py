"""Summing statistics over data-parallel processes."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def sum_over_ranks(buffer: Tensor) -> Tensor:
    """Sum a flat buffer over all processes of the default group, in place; one all-reduce.

    Without an initialised process group, or with a single process, the buffer is returned as it is. Every process
    must call this with a buffer of the same length.
    """
    if num_ranks() > 1:
        dist.all_reduce(buffer)
    return buffer


def num_ranks() -> int:
    """Number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def check_same_layout(names: Sequence[str], size: int, device: torch.device) -> None:
    """Check that all processes are about to reduce the same statistics; a different buffer would hang them.

    Args:
        names: What the buffer holds, in its order.
        size: Its length.
        device: Where the processes communicate.

    Raises:
        RuntimeError: They are not, on every process alike.
    """
    if num_ranks() == 1:
        return
    mine = torch.tensor([size, len(names), zlib.crc32("\n".join(names).encode())], device=device)
    everyone = [torch.empty_like(mine) for _ in range(num_ranks())]
    dist.all_gather(everyone, mine)
    for rank, other in enumerate(everyone):
        if not torch.equal(other, everyone[0]):
            raise RuntimeError(
                f"process {rank} tracks {int(other[1])} layers with {int(other[0])} statistics, process 0 "
                f"{int(everyone[0][1])} with {int(everyone[0][0])}, or others: all processes must train the same "
                "parameters of the same model (DistributedDataParallel or FSDP2, not pipeline or tensor parallelism)"
            )
