"""The AdaFisher update of many parameters, in blocks that stay in a core's cache and in few calls."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor

from hf_adafisher.fisher.diagonals import diagonal_of
from hf_adafisher.optimizers.update import Block, StepCoefficients, adafisher_update_

# Values that are updated by one call. On a CPU they stay in a core's cache between the operations of the update: 1.5
# times torch's fused AdamW instead of 3.8 (``scripts/benchmark_step.py``). Elsewhere they bound the temporary.
CPU_BLOCK = 1 << 18
DEVICE_BLOCK = 1 << 24


def update_in_blocks(parameters: Iterable[Block], coefficients: StepCoefficients) -> None:
    """Call ``adafisher_update_`` for parameters of any size, dtype and device: large ones cut, small ones together."""
    pending: dict[Any, tuple[list[Block], int]] = {}
    for parameter in parameters:
        limit = CPU_BLOCK if parameter.param.device.type == "cpu" else DEVICE_BLOCK
        for block in split_into_blocks(parameter, limit):
            key = block.param.device, block.param.dtype, block.grad.dtype, block.exp_avg.dtype
            batch, size = pending.get(key, ([], 0))
            if batch and size + block.param.numel() > limit:
                adafisher_update_(batch, coefficients)
                batch, size = [], 0
            batch.append(block)
            pending[key] = batch, size + block.param.numel()
    for batch, _ in pending.values():
        adafisher_update_(batch, coefficients)


def split_into_blocks(block: Block, limit: int) -> Iterator[Block]:
    """Views of at most ``limit`` values, cut along the first axes; nothing for an empty parameter."""
    if block.param.numel() <= limit:
        if block.param.numel():
            yield _with_group_axis(block) if _has_group_axis(block) else block
        return
    if _has_group_axis(block):
        block = _with_group_axis(block)
    shape = block.param.shape
    axis = next(i for i, size in enumerate(shape) if size > 1)
    rows = max(1, limit * shape[axis] // block.param.numel())
    param, grad, exp_avg = (tensor.split(rows, axis) for tensor in block[:3])
    from_right = axis - len(shape)

    def split(factor: Tensor) -> Sequence[Tensor]:
        varies = factor.dim() >= -from_right and factor.shape[from_right] > 1
        return factor.split(rows, from_right) if varies else (factor,) * len(param)

    terms = [[split(factor) for factor in term] for term in block.terms]
    for i in range(len(param)):
        part = [tuple(pieces[i] for pieces in term) for term in terms]
        yield from split_into_blocks(Block(param[i], grad[i], exp_avg[i], part), limit)


def _has_group_axis(block: Block) -> bool:
    """True where a factor has one axis more than the parameter (grouped convolutions, see ``DiagonalTerm``)."""
    return any(factor.dim() > block.param.dim() for term in block.terms for factor in term)


def _with_group_axis(block: Block) -> Block:
    """Split the parameter's first axis into ``(groups, out / groups)``.

    Where two uses group a weight in different ways, the diagonal is formed as a whole.
    """
    axes = block.param.dim()
    groups = {factor.shape[0] for term in block.terms for factor in term if factor.dim() > axes}
    if len(groups) > 1:
        return block._replace(terms=[(diagonal_of(block.terms, block.param, 0.0),)])
    sizes = (groups.pop(), -1)

    def split(factor: Tensor) -> Tensor:
        if factor.dim() != axes:
            return factor
        return factor[None] if factor.shape[0] == 1 else factor.unflatten(0, sizes)

    terms = [tuple(split(factor) for factor in term) for term in block.terms]
    param, grad, exp_avg = (tensor.unflatten(0, sizes) for tensor in block[:3])
    return Block(param, grad, exp_avg, terms)
