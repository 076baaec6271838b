"""AdaHessian and Sophia in several processes: `torchrun -m tests.distributed.hessian_worker FOLDER`.

Every process writes what it found to FOLDER/rankN.pt; the tests run the same functions in one process to compare.
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from hf_adafisher import create_optimizer
from hf_adafisher.training.second_order import second_derivatives
from tests.model_zoo import family
from tests.training_helper import logged_losses, make_trainer

STEPS = 4
RATES = {"adahessian": 0.02, "sophia": 0.05}


def my_share(batch: dict[str, Tensor], parts: int) -> list[dict[str, Tensor]]:
    """This process's rows of a global batch, in float64, as ``parts`` micro-batches."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    rows = {key: value.chunk(world)[rank] if world > 1 else value for key, value in batch.items()}
    rows = {key: value.double() if value.is_floating_point() else value for key, value in rows.items()}
    return [{key: value.chunk(parts)[part] for key, value in rows.items()} for part in range(parts)]


def plain_loop(name: str, parts: int = 1) -> dict[str, Any]:
    """Random vectors are seeded alike in every process, so that the average is that of the global batch."""
    model = family("gpt2").build().double()
    optimizer = create_optimizer(name, model, lr=RATES[name], weight_decay=0.05, update_period=2)
    wrapped = DistributedDataParallel(model) if dist.is_initialized() else model
    hessians = []
    for step in range(STEPS):
        optimizer.zero_grad()
        needs_graph = optimizer.needs_graph
        micro_batches = my_share(family("gpt2").batch(n=8, seq=8, seed=step), parts)
        for index, rows in enumerate(micro_batches):
            last = index == parts - 1
            alone = isinstance(wrapped, nn.parallel.DistributedDataParallel) and (needs_graph or not last)
            with wrapped.no_sync() if alone else contextlib.nullcontext():
                (wrapped(**rows).loss / parts).backward(create_graph=needs_graph)
        if needs_graph:
            optimizer.average_gradients()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        torch.manual_seed(step)
        optimizer.step()
        hessians.append({key: optimizer.state[p]["hessian"].clone() for key, p in model.named_parameters()})
    return {"hessians": hessians, "weights": {key: p.detach() for key, p in model.named_parameters()}}


def four_layers() -> nn.ModuleList:
    torch.manual_seed(0)
    return nn.ModuleList([nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 1), nn.Linear(2, 2)]).double()


def unused_on_one_rank() -> dict[str, Any]:
    """The second layer is used by the last process only: its gradient and its Hessian count for all."""
    layers = four_layers()
    unused = layers[3]
    optimizer = create_optimizer("adahessian", layers, lr=0.1, decay_names=[])
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    hidden = layers[0](x).tanh()
    if rank == world - 1:
        hidden = layers[1](hidden).tanh()
    layers[2](hidden).square().mean().backward(create_graph=True)
    optimizer.average_gradients()
    torch.manual_seed(2)
    optimizer.step()
    moved = {key: p.detach() for key, p in layers.named_parameters()}
    return {"weights": moved, "untouched": unused.weight.grad is None and not optimizer.state.get(unused.weight)}


def buffers(broadcast: bool) -> float:
    """A running mean that differs between the processes, after a step that keeps the gradients' graph."""
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    optimizer = create_optimizer("adahessian", model, decay_names=[])
    wrapped = DistributedDataParallel(model, broadcast_buffers=broadcast)  # which shares buffers once, here
    model[1].running_mean.fill_(1.0 + dist.get_rank())
    with second_derivatives(Accelerator(cpu=True), optimizer, wrapped):
        return float(model[1].running_mean.mean())


def trainer(name: str, folder: Path) -> dict[str, Any]:
    """A ResNet under the Trainer, with accumulation."""
    record = family("resnet")
    run = make_trainer(
        folder,
        record,
        train_dataset=record.dataset(8),
        optim=name,
        optim_args="update_period=2",
        max_steps=6,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        logging_steps=1,
        ddp_backend="gloo",
    )
    run.train()
    weights = {key: p.detach() for key, p in run.model.named_parameters()}
    return {"weights": weights, "losses": logged_losses(run)}


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    results = {
        **{f"plain {name} {parts}": plain_loop(name, parts) for name in RATES for parts in (1, 2)},
        "unused": unused_on_one_rank(),
        "buffers": {broadcast: buffers(broadcast) for broadcast in (True, False)},
        **{f"trainer {name}": trainer(name, folder) for name in RATES},
    }
    torch.save(results, folder / f"rank{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
