"""One of two processes that train with K-FAC: `python -m tests.optimizers.baselines.kfac_worker RANK FOLDER`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from hf_adafisher.optimizers.baselines.kfac import KFAC
from tests.training_helper import train

OPTIONS: dict[str, Any] = {"lr": 0.05, "damping": 0.1, "update_interval": 2, "inverse_interval": 4, "kl_clip": 1e-3}
EXAMPLES, STEPS = 8, 7


def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.LayerNorm(64), nn.Linear(64, 3)
    ).double()


def trained(broken_rank: int | None = None) -> dict[str, Any]:
    """Steps over global batches, of which each process has a part; one may see infinities at a step that is due."""
    model = build()
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    wrapped = DistributedDataParallel(model) if dist.is_initialized() else model
    optimizer = KFAC(model, **OPTIONS)

    def loss(wrapped: nn.Module, step: int) -> Tensor:
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(EXAMPLES, 2, 4, 4, generator=generator, dtype=torch.float64)
        y = torch.randint(0, 3, (EXAMPLES,), generator=generator)
        if step == 2 and broken_rank == rank:
            (model(torch.full((1, 2, 4, 4), float("inf"), dtype=torch.float64)).sum() * 0).backward()
            model.zero_grad(set_to_none=False)  # zeros, which the recorder does not take for a new start
        return F.cross_entropy(wrapped(x.chunk(world)[rank]), y.chunk(world)[rank])

    train(wrapped, loss, optimizer, STEPS)
    first = optimizer.param_groups[0]
    return {
        "weights": model.state_dict(),
        "state": optimizer.state_dict()["state"],
        "refreshes": first["refreshes"],
        "dropped": first["dropped_refreshes"],
    }


if __name__ == "__main__":
    rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2)
    torch.save({"plain": trained(), "broken": trained(broken_rank=1)}, folder / f"rank{rank}.pt")
    dist.destroy_process_group()
