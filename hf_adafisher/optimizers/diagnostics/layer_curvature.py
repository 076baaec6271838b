"""Curvature of every layer in a few numbers: spread of the damped Fisher, and size of the step that it gave."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hf_adafisher.fisher.averages import statistics_dtype
from hf_adafisher.fisher.diagonals import DiagonalTerm, diagonal_of
from hf_adafisher.fisher.reduce import sum_over_ranks
from hf_adafisher.optimizers.base.kronecker_diagonal import KroneckerDiagonalOptimizer
from hf_adafisher.optimizers.base.trained_parameter import TrainedParameter
from hf_adafisher.optimizers.blocks import block_size, split_into_blocks
from hf_adafisher.optimizers.diagnostics.diagonal_numbers import (
    SMALL,
    at_floor,
    outer_vectors,
    products_below,
    some_values,
    sorted_logarithms,
)
from hf_adafisher.optimizers.sharding import is_sharded, local_part, local_terms
from hf_adafisher.optimizers.update import Block, root_coefficients, step_coefficients

NUMBERS = (
    "fisher_min",
    "fisher_median",
    "fisher_max",
    "condition_number",
    "floor_share",
    "update_rms",
    "step_gain",
)
"""Keys of ``layer_curvature``'s numbers."""
_ACCURACY = 2.0**-25
"""Relative accuracy of a median that is found without the diagonal: below the rounding of float32."""


class _Spread(NamedTuple):
    """Of a damped diagonal: its extremes, its median, and the share of its values at the floor."""

    low: float
    median: float
    high: float
    floor_share: float


@torch.no_grad()
def layer_curvature(optimizer: KroneckerDiagonalOptimizer) -> dict[str, dict[str, float]]:
    """The numbers of every parameter that has statistics, as the last step used them.

    With the damped diagonal ``F = fisher_diagonal(p)``, the bias-corrected momentum ``m^`` and the group's learning
    rate:

    * ``fisher_min``, ``fisher_median``, ``fisher_max``: of all values of ``F``; of an even number of values the
      median is the lower one of the middle two, as in torch;
    * ``condition_number``: ``fisher_max / fisher_min``. The paper's factors are normalised to [0, 1], so for most
      layers it is ``(1 + damping) / damping``, and 1 where all factors are constant; tied weights and grouped
      convolutions differ;
    * ``floor_share``: share of the values whose Fisher is below the damping, which then decides their step: see
      ``at_floor``;
    * ``update_rms``: root mean square of the last update, ``lr m^ / F``, without the weight decay that AdaFisherW adds;
    * ``step_gain``: ``update_rms / lr`` divided by the root mean square of ``m^``: by how much the curvature multiplies
      what the layer's momentum asks for, whatever the learning rate. Between ``1 / fisher_max`` and
      ``1 / fisher_min``; nan while the momentum is zero.

    With ``step_size="root"`` ``F`` is the diagonal of the gradient's second moment, damped by ``damping`` times its
    mean. ``update_rms`` is that of the step as it was made, with the momentum one step ahead, and shortened where the
    rule does so; of a state that was loaded it is nan until the next step. ``step_gain`` has the unit of ``1 / grad``,
    and is nan at a learning rate of zero. Single values, which have no factors, are left out.

    All are exact up to rounding, with one exception: the median of a diagonal of more than 16,384 values that is a sum
    (tied weights) or falls into groups (grouped convolutions) is that of 65,536 of its values, a random one of each of
    as many equal stretches, always the same ones; it lies within 0.8 % of the ranks of the true one (four standard
    errors). No diagonal of a larger product is formed as a whole: its extremes are those of the factors, its median and
    its share at the floor come from the sorted factors.

    Under FSDP2 every process must call it: one all-reduce of three numbers a parameter.

    Returns:
        The names of the parameters, in the model's order and tied ones once, with their ``NUMBERS``. Empty before the
        first step.

    Raises:
        TypeError: The optimizer does not divide by the diagonal (SpectralAdaFisher).
    """
    if "damping" not in optimizer.defaults:
        raise TypeError(f"layer_curvature is about AdaFisher and AdaFisherW, got {type(optimizer).__name__}")
    parameters = _with_statistics(optimizer)
    damping = [optimizer.damping_of(t.group, t.terms) for t in parameters]
    updates = _root_updates(optimizer, parameters) if optimizer.divides_by_root else _updates(optimizer, parameters)
    return {t.name: _describe(t, floor, *u) for t, floor, u in zip(parameters, damping, updates, strict=True)}


def needs_every_process(optimizer: KroneckerDiagonalOptimizer) -> bool:
    """True where ``layer_curvature`` communicates, since FSDP2 has sharded parameters."""
    return any(is_sharded(p) for group in optimizer.param_groups for p in group["params"])


def _with_statistics(optimizer: KroneckerDiagonalOptimizer) -> list[TrainedParameter]:
    """Parameters that have statistics and values, in the model's order, tied ones once."""
    known = {id(t.param): t for t in optimizer.trained_parameters() if t.terms and t.param.numel()}
    return [known[id(p)] for p in optimizer.model.parameters() if id(p) in known]


def _describe(t: TrainedParameter, damping: float, update_rms: float, step_gain: float) -> dict[str, float]:
    """The ``NUMBERS`` of a parameter, given those that are not about its diagonal."""
    spread = _spread(t.terms, t.param, damping)
    values = (
        spread.low,
        spread.median,
        spread.high,
        spread.high / spread.low,
        spread.floor_share,
        update_rms,
        step_gain,
    )
    return dict(zip(NUMBERS, values, strict=True))


# --- size of the last update ------------------------------------------------------------------


def _updates(
    optimizer: KroneckerDiagonalOptimizer, parameters: Sequence[TrainedParameter]
) -> list[tuple[float, float]]:
    """``update_rms`` and ``step_gain`` of each parameter that moves by ``m / F``."""
    found = []
    for t, (divided, plain, count) in zip(parameters, _motion(parameters, needs_every_process(optimizer)), strict=True):
        rate = float(step_coefficients(t.group, int(t.state["step"].item()), decoupled=True).rate)
        gain = math.sqrt(divided / plain) if plain > 0 else math.nan
        found.append((abs(rate) * math.sqrt(divided / count), gain))
    return found


def _root_updates(
    optimizer: KroneckerDiagonalOptimizer, parameters: Sequence[TrainedParameter]
) -> list[tuple[float, float]]:
    """The same of each parameter that moves by the root of its diagonal, whose step the optimizer has measured."""
    found, steps = [], optimizer.root_steps()
    motion = _motion(parameters, needs_every_process(optimizer), divide=False)
    for t, (_, plain, count) in zip(parameters, motion, strict=True):
        c = root_coefficients(t.group, int(t.state["step"].item()), decoupled=True)
        momentum = abs(float(c.lr)) * float(c.correction) * math.sqrt(plain / count)
        update = math.sqrt(steps.get(id(t.param), math.nan) / t.param.numel())
        found.append((update, update / momentum if momentum > 0 else math.nan))
    return found


def _motion(parameters: Sequence[TrainedParameter], sharded: bool, divide: bool = True) -> list[list[float]]:
    """Of each parameter: the sums of ``(m / F)^2`` (zero unless ``divide``) and ``m^2``, and over how many values."""
    sums = [
        _local_motion(t.param, t.state["exp_avg"], t.terms, t.group["damping"] if divide else None) for t in parameters
    ]
    total = torch.stack(sums) if sums else torch.zeros(0, 3, dtype=torch.float64)
    if sharded:
        # Replicas count as often in the sums as in the number of values.
        total = sum_over_ranks(total.to(local_part(parameters[0].param).device if parameters else "cpu"))
    return total.tolist()


def _local_motion(p: Tensor, exp_avg: Tensor, terms: Sequence[DiagonalTerm], damping: float | None) -> Tensor:
    """Sums over this process's part of the parameter, block by block; three float64 numbers."""
    local, momentum = local_part(p), local_part(exp_avg)
    norms = []
    for m, part in _momentum_blocks(local.detach(), momentum, local_terms(terms, p)):
        divided = m.new_zeros(()) if damping is None else m / diagonal_of(part, m, damping)
        norms.append(torch.stack((torch.linalg.vector_norm(divided), torch.linalg.vector_norm(m))))
    sums = torch.stack(norms).cpu().double().square().sum(0) if norms else torch.zeros(2, dtype=torch.float64)
    return torch.cat((sums, torch.tensor([float(local.numel())], dtype=torch.float64)))


def _momentum_blocks(
    p: Tensor, exp_avg: Tensor, terms: Sequence[DiagonalTerm]
) -> Iterator[tuple[Tensor, Sequence[DiagonalTerm]]]:
    block = Block(p, exp_avg, exp_avg, terms)
    dtype = block.compute_dtype
    if 0 < p.numel() <= SMALL:
        yield exp_avg.to(dtype), terms
    elif p.numel():
        for part in split_into_blocks(block, block_size(p)):
            yield part.exp_avg.to(dtype), part.terms


# --- how the diagonal is spread ---------------------------------------------------------------


def _spread(terms: Sequence[DiagonalTerm], p: Tensor, damping: float) -> _Spread:
    """Of a parameter's whole diagonal, also where FSDP2 has sharded the parameter: factors are whole everywhere."""
    shape, dtype = p.shape, statistics_dtype(p.dtype)
    # A stand-in of the parameter's shape without its memory.
    like = torch.zeros((), dtype=dtype, device=local_part(p).device).expand(shape)
    if shape.numel() <= SMALL:
        diagonal = diagonal_of(terms, like, damping)
        return _spread_of_blocks([diagonal], diagonal.flatten(), damping)
    vectors = outer_vectors(terms)
    if vectors is not None:
        return _spread_of_product(*vectors, damping)
    parts = split_into_blocks(Block(like, like, like, terms), block_size(like))
    some = some_values(terms, like).add(damping)
    return _spread_of_blocks((diagonal_of(part.terms, part.param, damping) for part in parts), some, damping)


def _spread_of_blocks(diagonals: Sequence[Tensor] | Iterator[Tensor], some: Tensor, damping: float) -> _Spread:
    """From a diagonal's blocks, and the values whose median stands for that of all."""
    found, count = [], 0
    for diagonal in diagonals:
        low, high = torch.aminmax(diagonal)
        found.append(torch.stack((low, high, at_floor(diagonal, damping).sum().to(low.dtype))))
        count += diagonal.numel()
    lows, highs, floor = torch.stack(found).cpu().double().unbind(1)
    return _Spread(lows.min().item(), some.median().item(), highs.max().item(), floor.sum().item() / count)


def _spread_of_product(left: Tensor, right: Tensor, damping: float) -> _Spread:
    """Of ``left[i] * right[j] + damping`` for vectors >= 0, without forming it."""
    low = (left.min() * right.min() + damping).item()
    high = (left.max() * right.max() + damping).item()
    values = len(left) * len(right)
    # Many small operations, each waiting for the one before: on an accelerator they would cost more than the copy.
    left, right = left.double().cpu(), right.double().cpu()
    logs = [sorted_logarithms(vector) for vector in (left, right)]
    zeros = values - len(logs[0]) * len(logs[1])
    below = zeros + products_below(logs[0], logs[1], damping)
    rank = (values - 1) // 2
    median = 0.0 if rank < zeros else math.exp(_sum_of_rank(logs[0], logs[1], rank - zeros))
    return _Spread(low, median + damping, high, below / values)


def _sum_of_rank(left: Tensor, right: Tensor, rank: int) -> float:
    """The sum ``left[i] + right[j]`` of this rank (0 for the smallest); both sorted. Bisection by counting."""
    low, high = (left[0] + right[0]).item(), (left[-1] + right[-1]).item()
    while high - low > _ACCURACY:
        middle = (low + high) / 2
        if int(torch.searchsorted(right, middle - left, right=True).sum()) > rank:
            high = middle
        else:
            low = middle
    return high
