"""Parameters that FSDP2 has sharded (``DTensor``): their local rows, and the part of a term that belongs to them.

Factors are vectors and stay whole on every process; momentum is sharded as its parameter is.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from hf_adafisher.fisher.diagonals import DiagonalTerm


def is_sharded(tensor: Tensor) -> bool:
    """True for a DTensor. There is none before its module is imported, which takes half a second and is left alone."""
    return isinstance(tensor, getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", ()))


def local_part(tensor: Tensor) -> Any:
    """This process's part of a DTensor, sharing its memory; any other tensor as it is."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def full_tensor(tensor: Tensor) -> Any:
    """A DTensor gathered from all processes, which must all call this; any other tensor as it is."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def local_terms(terms: Sequence[DiagonalTerm], param: Any) -> list[DiagonalTerm]:
    """The part of each term that broadcasts to this process's part of ``param``."""
    if not is_sharded(param):
        return list(terms)
    return [tuple(_local_factor(_unsplit(factor, param), param) for factor in term) for term in terms]


def local_values(full: Tensor, param: Any) -> Tensor:
    """This process's part of a tensor that every process has in the shape of ``param``, cut as ``param`` is."""
    return _local_factor(full, param) if is_sharded(param) else full


def sum_over_shards(values: Tensor, param: Any) -> Tensor:
    """Sum of what each process has of its shard of ``param``; the values as they are where it is not sharded."""
    if not is_sharded(param):
        return values
    from torch.distributed.tensor import DTensor, Partial, Replicate

    placements = [Partial() if placement.is_shard() else Replicate() for placement in param.placements]
    # The mesh's device is not the parameter's where FSDP2 keeps shards on the CPU (CPUOffloadPolicy).
    on_mesh = values.to(param.device_mesh.device_type)
    return DTensor.from_local(on_mesh, param.device_mesh, placements, run_check=False).full_tensor().to(values.device)


def is_split(terms: Sequence[DiagonalTerm], param: Any) -> bool:
    """True for terms of a grouped convolution with one axis more: their local part is of the weight's size.

    Shards need not end where a group ends, so that the factors are copied out for each row before they are cut.
    """
    return any(factor.dim() > param.dim() for term in terms for factor in term)


def _unsplit(factor: Tensor, param: Any) -> Tensor:
    if factor.dim() == param.dim():
        return factor
    groups, inside = factor.shape[0], param.shape[0] // factor.shape[0]
    return factor.expand(groups, inside, *factor.shape[2:]).flatten(0, 1)


def _local_factor(factor: Tensor, param: Any) -> Tensor:
    from torch.distributed.tensor import DTensor, Replicate, Shard

    placements = [
        Shard(placement.dim) if placement.is_shard() and factor.shape[placement.dim] > 1 else Replicate()
        for placement in param.placements
    ]
    replicated = DTensor.from_local(factor, param.device_mesh, [Replicate()] * len(placements), run_check=False)
    # The mesh's device is not the parameter's where FSDP2 keeps shards on the CPU (CPUOffloadPolicy).
    return replicated.redistribute(placements=placements).to_local().to(param.to_local().device)
