"""Scenarios for several processes: `torchrun -m tests.distributed.worker all|hybrid|reload FOLDER [CHECKPOINTS]`.

Each returns tensors and numbers, which every process writes to FOLDER/rankN.pt for the tests to compare. The single
process that they are compared with runs the same functions in the test.
"""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from hf_adafisher import (
    AdaFisherTrainer,
    AdaFisherW,
    SpectralAdaFisher,
    available_optimizers,
    create_optimizer,
)
from hf_adafisher.fisher import reduce
from hf_adafisher.optimizers import sharding
from hf_adafisher.optimizers.base.kronecker_diagonal import KroneckerDiagonalOptimizer
from hf_adafisher.optimizers.factory.catalog import optimizer_record
from tests.model_zoo import family
from tests.training_helper import make_trainer, optimizer_of, train

OPTIONS: dict[str, Any] = {"lr": 0.02, "damping": 0.1, "ema_decay": 0.8, "update_interval": 3, "weight_decay": 0.05}
ROOT: dict[str, Any] = {key: value for key, value in OPTIONS.items() if key != "update_interval"}
SPECTRAL: dict[str, Any] = {key: value for key, value in ROOT.items() if key != "damping"}
KINDS = ("paper", "root", "spectral")
"""AdaFisherW in both forms, and SpectralAdaFisher."""
STEPS = 7
GLOBAL_BATCH = 12
"""Rows that one, two and three processes share evenly."""


def rank_and_world() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def full(value: Any) -> Any:
    return value.full_tensor().detach().clone() if isinstance(value, DTensor) else value.detach().clone()


def build_optimizer(model: nn.Module, kind: str) -> KroneckerDiagonalOptimizer:
    if kind == "spectral":
        return SpectralAdaFisher(model, **SPECTRAL)
    return AdaFisherW(model, **(ROOT if kind == "root" else OPTIONS), step_size=kind)


def _has_no_factors(optimizer: Any, p: Any) -> bool:
    """True for a single value by the root: nothing is known of it."""
    return p.numel() == 1 and not optimizer.defaults.get("update_interval", 1) > 1


def diagonals_of(model: nn.Module, optimizer: KroneckerDiagonalOptimizer) -> dict[str, Tensor]:
    """That of every parameter that has factors."""
    matrices = {row.name for row in optimizer.coverage() if row.role in ("hidden matrix", "input")}
    without = matrices if isinstance(optimizer, SpectralAdaFisher) else set()
    named = model.named_parameters()
    known = [(name, p) for name, p in named if name not in without and not _has_no_factors(optimizer, p)]
    return {name: optimizer.fisher_diagonal(p) for name, p in known}


def state_of(model: nn.Module, optimizer: KroneckerDiagonalOptimizer) -> dict[str, dict[str, Tensor]]:
    """The whole state of every parameter by name."""
    named = dict(model.named_parameters())
    return {
        name: {key: full(value) for key, value in optimizer.state[p].items()}
        for name, p in named.items()
        if p in optimizer.state
    }


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: full(p) for name, p in model.named_parameters()}


def my_rows(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """This process's share of a global batch, in float64."""
    rank, world = rank_and_world()
    share = {key: value.chunk(world)[rank] if world > 1 else value for key, value in batch.items()}
    return {key: value.double() if value.is_floating_point() else value for key, value in share.items()}


def build(name: str) -> nn.Module:
    return family(name).build().double()


def loop(name: str, model: nn.Module, optimizer: KroneckerDiagonalOptimizer, first: int = 0, last: int = STEPS) -> None:
    """Steps over global batches of equal rows; the loss is a mean, so that gradients average over processes."""

    def loss(model: nn.Module, step: int) -> Tensor:
        return model(**my_rows(family(name).batch(n=GLOBAL_BATCH, seq=8, seed=step))).loss

    train(model, loss, optimizer, last - first, start=first)


class CountAllReduces:
    """Counts the all-reduces that this package makes; DistributedDataParallel's own are in C++."""

    def __enter__(self) -> CountAllReduces:
        self.count, self.original = 0, dist.all_reduce
        reduce.dist.all_reduce = self._counted
        return self

    def _counted(self, *args: Any, **kwargs: Any) -> Any:
        self.count += 1
        return self.original(*args, **kwargs)

    def __exit__(self, *exc_info: object) -> None:
        reduce.dist.all_reduce = self.original


# --- DistributedDataParallel ------------------------------------------------------------------


def data_parallel(name: str = "gpt2", kind: str = "paper") -> dict[str, Any]:
    """A plain loop under DistributedDataParallel."""
    model = build(name)
    wrapped = DistributedDataParallel(model) if dist.is_initialized() else model
    optimizer = build_optimizer(model, kind)
    with CountAllReduces() as reductions:
        loop(name, wrapped, optimizer)
    return {
        "weights": weights_of(model),
        "state": state_of(model, optimizer),
        "diagonals": diagonals_of(model, optimizer),
        "reductions": reductions.count,
        "steps": optimizer.diagnose().numbers["step_relative_to_weights"],
        "refreshes": optimizer.param_groups[0]["refreshes"],
    }


class Branching(nn.Module):
    """A layer that only one of two processes uses in a step, and one that none uses in the first."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.branch, self.head = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor, use_branch: bool) -> Tensor:
        hidden = torch.tanh(self.first(x))
        return self.head(torch.tanh(self.branch(hidden)) if use_branch else hidden)


def unused_on_one_rank(kind: str = "paper") -> dict[str, Any]:
    torch.manual_seed(0)
    model = Branching().double()
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    interval = {"update_interval": 1} if kind == "paper" else {}
    optimizer = build_optimizer(model, kind) if kind == "spectral" else AdaFisherW(model, step_size=kind, **interval)
    rank, _ = rank_and_world()
    generator = torch.Generator().manual_seed(rank)
    for step in range(4):
        optimizer.zero_grad()
        x = torch.randn(3, 4, generator=generator, dtype=torch.float64)
        wrapped(x, step > 0 and rank == step % 2).square().mean().backward()
        optimizer.step()
    return {"weights": weights_of(model), "state": state_of(model, optimizer)}


def not_a_number_on_one_rank() -> dict[str, Any]:
    """The second batch of rank 1 is broken; every rank's loop skips that step, and the refresh is due again."""
    rank, _ = rank_and_world()
    results: dict[str, Any] = {}
    for kind in ("broken", "healthy"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double()
        wrapped = DistributedDataParallel(model)
        optimizer = AdaFisherW(model, lr=0.05, update_interval=1)
        generator = torch.Generator().manual_seed(rank)
        for step in range(4):
            if step == 1:
                if kind == "healthy":
                    continue
                x = torch.full((3, 4), torch.nan if rank == 1 else 1.0, dtype=torch.float64)
            else:
                x = torch.randn(3, 4, generator=generator, dtype=torch.float64)
            optimizer.zero_grad()
            wrapped(x).square().mean().backward()
            if all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None):
                optimizer.step()
        results[kind] = {"weights": weights_of(model), "state": state_of(model, optimizer)}
    # And a loop that does not look: the statistics are dropped on both processes alike.
    optimizer.zero_grad()
    wrapped(torch.full((3, 4), torch.nan if rank == 1 else 1.0, dtype=torch.float64)).square().mean().backward()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    results["dropped"] = optimizer.param_groups[0]["dropped_refreshes"]
    results["finite"] = all(bool(v.isfinite().all()) for s in optimizer.state.values() for v in s.values())
    return results


def different_models() -> dict[str, Any]:
    """Process 1 trains fewer layers: an error on both, not a hang."""
    rank, _ = rank_and_world()
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 2))
    if rank == 1:
        model[0].requires_grad_(False)
    optimizer = AdaFisherW(model)
    model(torch.randn(3, 4)).sum().backward()
    try:
        optimizer.step()
    except RuntimeError as error:
        return {"error": str(error)}
    return {"error": ""}


def trainer(folder: Path, kind: str = "paper", seed: int = 0, **options: Any) -> AdaFisherTrainer:
    """The same global batch, in two micro-batches, whatever the number of processes."""
    _, world = rank_and_world()
    optim = {
        "paper": {"step_size": "paper", "update_interval": 3, "damping": 0.1},
        "root": {"step_size": "root"},
        "spectral": {"optim": "spectral-adafisher"},
    }[kind]
    return make_trainer(
        folder,
        family("gpt2"),
        seed=seed,
        train_dataset=family("gpt2").dataset(8 * GLOBAL_BATCH, seq=8),
        per_device_train_batch_size=GLOBAL_BATCH // world // 2,
        gradient_accumulation_steps=2,
        max_steps=8,
        learning_rate=0.02,
        save_strategy="steps",
        save_steps=4,
        logging_steps=100,
        **({"ddp_backend": "gloo"} if world > 1 else {}),
        **optim,
        **options,
    )


def under_trainer(folder: Path, kind: str = "paper") -> dict[str, Any]:
    """The Trainer, then a second one that resumes from the middle of an update interval."""
    whole = trainer(folder / "whole", kind)
    whole.train()
    resumed = trainer(folder / "resumed", kind, seed=1)
    resumed.train(resume_from_checkpoint=str(folder / "whole" / "checkpoint-4"))
    results = {}
    for kind, run in (("whole", whole), ("resumed", resumed)):
        results[kind] = {"weights": weights_of(run.model), "state": state_of(run.model, optimizer_of(run))}
    return results


# --- FSDP2 ------------------------------------------------------------------------------------


UNITS = ("GPT2Block", "ViTLayer", "LlamaDecoderLayer", "LlamaRMSNorm")
"""Classes whose modules `fully_shard` makes units of their own; the norms inside of another unit."""


def shard(model: nn.Module, replicas: int = 1) -> nn.Module:
    """`fully_shard` for every block and the rest; over a mesh of two axes where there are several replicas (HSDP)."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    _, world = rank_and_world()
    if replicas == 1:
        mesh = init_device_mesh("cpu", (world,))
    else:
        mesh = init_device_mesh("cpu", (replicas, world // replicas), mesh_dim_names=("replicate", "shard"))
    for block in reversed([m for m in model.modules() if type(m).__name__ in UNITS]):  # the innermost first
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def fully_sharded(name: str, replicas: int = 1, kind: str = "paper") -> dict[str, Any]:
    """As in a plain loop: shard, then build the optimizer."""
    model = shard(build(name), replicas)
    optimizer = build_optimizer(model, kind)
    with CountAllReduces() as reductions:
        loop(name, model, optimizer)
    kinds = {key: isinstance(p, DTensor) for key, p in model.named_parameters()}
    momentum = {key: isinstance(optimizer.state[p]["exp_avg"], DTensor) for key, p in model.named_parameters()}
    return {
        "weights": weights_of(model),
        "state": state_of(model, optimizer),
        "diagonals": diagonals_of(model, optimizer),
        "reductions": reductions.count,
        "sharded": all(kinds.values()) and all(momentum.values()),
        "summary": optimizer.curvature_summary(),
        "steps": optimizer.diagnose().numbers["step_relative_to_weights"],
        "rules": {row.name: row.rule for row in optimizer.coverage()},
    }


def grouped_convolution() -> dict[str, Any]:
    """Shards of nine channels in three groups end inside of a group; one process has one shard of everything."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(6, 9, (3, 2), groups=3), nn.Tanh(), nn.Conv2d(9, 2, 2)).double()
    if dist.is_initialized():
        shard(model)
    optimizer = AdaFisherW(model, **OPTIONS)
    for step in range(STEPS):
        optimizer.zero_grad()
        images = torch.randn(GLOBAL_BATCH, 6, 5, 4, generator=torch.Generator().manual_seed(step))
        model(my_rows({"x": images})["x"]).pow(3).mean().backward()
        optimizer.step()
    return {"weights": weights_of(model), "state": state_of(model, optimizer)}


class Uneven(nn.Module):
    """Of two processes one has more rows of most parameters, and none at all of those of one row."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.grouped = nn.Conv2d(2, 9, 2), nn.Conv2d(9, 9, (1, 2), groups=3)
        self.table, self.positions = nn.Embedding(7, 9), nn.Parameter(torch.randn(1, 4, 9))
        self.cls, self.single = nn.Parameter(torch.randn(1, 1, 9)), nn.Parameter(torch.ones(1))
        self.stack = nn.Parameter(torch.randn(3, 10, 9))
        self.hidden, self.one, self.norm = nn.Linear(10, 11), nn.Linear(11, 1), nn.LayerNorm(3)
        self.head = nn.Linear(11, 3)

    def forward(self, tokens: Tensor, images: Tensor) -> Tensor:
        pixels = self.grouped(torch.tanh(self.patches(images))).flatten(2).mT
        rows = self.table(tokens) + self.positions + self.cls + pixels.mean(1, keepdim=True)
        rows = torch.einsum("eoi,bti->bto", self.stack, torch.tanh(rows))
        hidden = torch.tanh(self.hidden(rows))
        return self.norm(self.head(hidden)) * self.single + torch.tanh(self.one(hidden))


def uneven(kind: str, replicas: int = 1) -> dict[str, Any]:
    """Shards of different sizes and empty ones; one process has one shard of everything."""
    torch.manual_seed(0)
    model = Uneven().double()
    if dist.is_initialized():
        shard(model, replicas)
    optimizer = build_optimizer(model, kind)
    for step in range(STEPS):
        optimizer.zero_grad()
        generator = torch.Generator().manual_seed(step)
        tokens = torch.randint(0, 7, (GLOBAL_BATCH, 4), generator=generator)
        images = torch.randn(GLOBAL_BATCH, 2, 3, 3, generator=generator)
        mine = my_rows({"tokens": tokens, "images": images})
        (model(**mine) - 1.0).pow(2).mean().backward()
        optimizer.step()
    rows = {name: p.to_local().shape[0] if isinstance(p, DTensor) else len(p) for name, p in model.named_parameters()}
    return {
        "weights": weights_of(model),
        "state": state_of(model, optimizer),
        "diagonals": diagonals_of(model, optimizer),
        "rows": rows,
    }


def sums_over_shards() -> dict[str, Any]:
    """Gradient factors, and a sum over shards, of shapes that two processes do not share evenly."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    from hf_adafisher.fisher.gradient import GradientDiagonal
    from hf_adafisher.fisher.parameter_uses import ParameterUse
    from hf_adafisher.optimizers.base.gradient_statistics import _factors, _new_layout

    _, world = rank_and_world()
    found: dict[str, Any] = {}
    for shape in ((1,), (3,), (1, 12), (3, 12), (13, 10), (1, 9, 12), (3, 9, 12), (9, 10, 3, 3)):
        for axis in range(min(len(shape), 2)):
            whole = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
            grad = whole
            if dist.is_initialized():
                grad = distribute_tensor(whole, init_device_mesh("cpu", (world,)), [Shard(axis)])
            local = sharding.local_part(grad)
            total = sharding.sum_over_shards(torch.stack([local.sum(), local.square().sum()]), grad)
            layout = _new_layout([ParameterUse(GradientDiagonal(), None)], grad, sharding.is_sharded(grad), 1.0)
            found[f"{shape} along {axis}"] = {
                "sums": total,
                **dict(zip(layout.keys, _factors(layout, grad), strict=True)),
            }
    return found


SHARDABLE = [name for name in available_optimizers() if "FSDP2" not in optimizer_record(name).refuses]


def others_sharded() -> dict[str, Any]:
    """Every other optimizer that is said to work on sharded parameters; whole ones in a single process."""
    found = {}
    for name in SHARDABLE:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)).double()
        if dist.is_initialized():
            shard(model)
        optimizer = create_optimizer(name, model, lr=0.02, weight_decay=0.1)
        getattr(optimizer, "train", lambda: None)()  # schedule-free
        for step in range(STEPS):
            optimizer.zero_grad()
            x = torch.randn(GLOBAL_BATCH, 6, generator=torch.Generator().manual_seed(step))
            model(my_rows({"x": x})["x"]).square().mean().backward()
            optimizer.step()
        getattr(optimizer, "eval", lambda: None)()
        found[name] = weights_of(model)
    return found


def factor_of_an_offloaded_shard() -> dict[str, Any]:
    """A factor goes where the shard is, which with CPUOffloadPolicy is not the mesh's device: `meta` stands for it."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard

    _, world = rank_and_world()
    local = torch.empty(4 // world, 3, device="meta")
    param = SimpleNamespace(
        device_mesh=init_device_mesh("cpu", (world,)), placements=[Shard(0)], to_local=lambda: local
    )
    rows, columns = (sharding._local_factor(factor, param) for factor in (torch.ones(4, 1), torch.ones(1, 3)))
    return {"devices": [rows.device.type, columns.device.type], "shapes": [tuple(rows.shape), tuple(columns.shape)]}


def through_accelerate(name: str, kind: str = "paper") -> dict[str, Any]:
    """accelerate's own code for FSDP2, which replaces the parameters of an optimizer that was built before.

    Its public `prepare` shards on accelerators only, so the method behind it is called on the CPU.
    """
    from accelerate import Accelerator
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["ViTLayer"],
        cpu_ram_efficient_loading=False,
    )
    accelerator = Accelerator(cpu=True)
    accelerator.state.distributed_type, accelerator.state.fsdp_plugin = DistributedType.FSDP, plugin
    model = build(name)
    optimizer = build_optimizer(model, kind)
    model, prepared = accelerator._prepare_fsdp2(model, optimizer)
    assert prepared.optimizer is optimizer
    loop(name, model, optimizer)
    return {"weights": weights_of(model), "state": state_of(model, optimizer)}


def distributed_checkpoint(folder: Path, kind: str = "paper") -> dict[str, Any]:
    """Save in the middle of an interval, load into a new model and optimizer, go on."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict

    model = shard(build("gpt2"))
    optimizer = build_optimizer(model, kind)
    loop("gpt2", model, optimizer, last=4)
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=str(folder / "dcp"))
    loop("gpt2", model, optimizer, first=4)
    return {
        "uninterrupted": {"weights": weights_of(model), "state": state_of(model, optimizer)},
        "resumed": reload_distributed_checkpoint(folder, kind),
        "fresh": saved_before_the_first_step(),
    }


def reload_distributed_checkpoint(folder: Path, kind: str = "paper") -> dict[str, Any]:
    """Load what `distributed_checkpoint` saved, with any number of processes, and make the remaining steps."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    torch.manual_seed(1)
    model = build("gpt2")
    with torch.no_grad():
        for p in model.parameters():
            p.normal_()
    shard(model)
    damping = "relative_damping" if kind == "spectral" else "damping"
    optimizer = build_optimizer(model, kind)
    optimizer.param_groups[0][damping] = 0.7
    weights, state = get_state_dict(model, optimizer)
    dcp.load({"model": weights, "optimizer": state}, checkpoint_id=str(folder / "dcp"))
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
    loop("gpt2", model, optimizer, first=4)
    group = optimizer.param_groups[0]
    return {
        "weights": weights_of(model),
        "state": state_of(model, optimizer),
        "options": {key: group[key] for key in (damping, "steps", "next_refresh", "refreshes")},
    }


def saved_before_the_first_step() -> dict[str, Any]:
    """A distributed checkpoint of a new optimizer makes a step of zeros: it must not count as a refresh."""
    from torch.distributed.checkpoint.state_dict import get_state_dict

    model = shard(build("gpt2"))
    optimizer = AdaFisherW(model, **OPTIONS)
    get_state_dict(model, optimizer)
    due = optimizer.refresh_due
    loop("gpt2", model, optimizer, last=1)
    return {"due": due, "rules": sorted({row.rule for row in optimizer.coverage()})}


def scenarios(folder: Path) -> dict[str, Callable[[], dict[str, Any]]]:
    found: dict[str, Callable[[], dict[str, Any]]] = {
        "not_a_number_on_one_rank": not_a_number_on_one_rank,
        "different_models": different_models,
        "fully_sharded_vit": lambda: fully_sharded("vit"),
        "fully_sharded_llama": lambda: fully_sharded("llama"),
        "root_fully_sharded_convnext": lambda: fully_sharded("convnext", kind="root"),
        "spectral_fully_sharded_convnext": lambda: fully_sharded("convnext", kind="spectral"),
        "grouped_convolution": grouped_convolution,
        "others_sharded": others_sharded,
        "sums_over_shards": sums_over_shards,
        "factor_of_an_offloaded_shard": factor_of_an_offloaded_shard,
    }
    for kind in KINDS:
        found |= {
            f"{kind}_data_parallel": partial(data_parallel, kind=kind),
            f"{kind}_unused_on_one_rank": partial(unused_on_one_rank, kind),
            f"{kind}_fully_sharded_gpt2": partial(fully_sharded, "gpt2", kind=kind),
            f"{kind}_uneven": partial(uneven, kind),
            f"{kind}_distributed_checkpoint": partial(distributed_checkpoint, folder / kind, kind),
            f"{kind}_under_trainer": partial(under_trainer, folder / f"{kind}_trainer", kind),
            f"{kind}_through_accelerate": partial(through_accelerate, "vit", kind),
        }
    return found


def main() -> None:
    what, folder = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    results: dict[str, Any] = {}
    if what == "all":
        for name, scenario in scenarios(folder).items():
            results[name] = scenario()
            dist.barrier()
    elif what == "hybrid":
        for kind in KINDS:
            results[f"{kind}_hybrid"] = fully_sharded("gpt2", replicas=2, kind=kind)
            results[f"{kind}_uneven"] = uneven(kind, replicas=2)
    else:
        results["reloaded"] = reload_distributed_checkpoint(Path(sys.argv[3]))
    torch.save(copy.deepcopy(results), folder / f"rank{os.environ['RANK']}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
