"""Factors as plain vectors: sums over positions, their moving average, and their normalisation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# A factor whose entries agree to this relative accuracy is constant up to float32 rounding. Without the bound
# rounding noise alone would be stretched to {0, 1}: the two logits of a binary classifier have gradients g and -g.
CONSTANT_RTOL = 1e-5
_SLICE = 1 << 15
"""Number of values that sums over a batch look at at once."""


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which statistics of a model of ``dtype`` are kept: float32, and float64 for float64 models."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def min_max_normalize(factor: Tensor, stack_axes: int = 0) -> Tensor:
    """Map a factor linearly onto [0, 1]: ``(v - min v) / (max v - min v)`` (AdaFisher, Eq. 4).

    The rule is relative, without an absolute epsilon: ``c * v`` gives the same result for every ``c > 0``, so
    neither the scale of the loss nor the number of tokens in a batch changes the preconditioner.

    Args:
        factor: Non-negative tensor of any shape; minimum and maximum run over all its entries.
        stack_axes: How many of its first axes number factors that are to be normalised one by one.

    Returns:
        A tensor of the same shape. A constant factor (spread at most ``1e-5`` of the maximum), and so every factor
        of one entry, carries no shape and becomes all ones; an empty factor stays empty.
    """
    if factor.numel() == 0:
        return factor.clone()
    if stack_axes:
        rows = factor.flatten(stack_axes).flatten(0, stack_axes - 1)
        low, high = (bound[:, None] for bound in torch.aminmax(rows, dim=1))
        return _onto_unit_interval(rows, low, high).reshape(factor.shape)
    return _onto_unit_interval(factor, *torch.aminmax(factor))


def _onto_unit_interval(factor: Tensor, low: Tensor, high: Tensor) -> Tensor:
    spread = high - low
    return torch.where(spread > CONSTANT_RTOL * high.abs(), (factor - low) / spread, torch.ones_like(factor))


def sum_of_squares(values: Tensor, width: int) -> Tensor:
    """Column sums of squares of ``values`` seen as rows of ``width`` entries.

    Args:
        values: Tensor of shape ``(..., width)``, any floating dtype.
        width: Length of a row.

    Returns:
        Tensor of shape ``(width,)`` in ``statistics_dtype``; reduced in that dtype (a float16 square overflows
        above 256), without a temporary of the size of ``values``.
    """
    return sum_of_squares_over_batch(values.detach().reshape(-1, width))


def sum_of_squares_over_batch(values: Tensor) -> Tensor:
    """Sums of squares over the first axis; what ``sum_of_squares`` promises holds here too."""
    values, dtype = values.detach(), statistics_dtype(values.dtype)
    if values.numel() == 0:
        return torch.zeros(values.shape[1:], dtype=dtype, device=values.device)
    if values.device.type != "cpu":
        return torch.linalg.vector_norm(values, dim=0, dtype=dtype).square_()
    # On a CPU this is several times faster than the norm, which also copies 16-bit values into float32 as a whole.
    parts = values.split(max(1, _SLICE * values.shape[0] // values.numel()))
    total = torch.zeros(parts[0].shape, dtype=dtype)
    for part in parts:
        part = part.to(dtype)
        total[: part.shape[0]].addcmul_(part, part)
    return total.sum(0)


def sum_of_squares_along(values: Tensor, axis: int) -> Tensor:
    """Sums of squares over every axis of ``values`` but ``axis``; a vector, as ``sum_of_squares``."""
    values, dtype, size = values.detach(), statistics_dtype(values.dtype), values.shape[axis]
    last = values.movedim(axis, -1)
    if values.dim() == 1 or values.numel() == 0 or last.is_contiguous():
        return sum_of_squares(last, size)
    if not values.is_contiguous():
        rest = [i for i in range(values.dim()) if i != axis]
        return torch.linalg.vector_norm(values, dim=rest, dtype=dtype).square_()
    blocks = values.reshape(-1, size, values.shape[axis + 1 :].numel())
    parts = blocks.split(max(1, _SLICE * blocks.shape[0] // blocks.numel())) if dtype != values.dtype else (blocks,)
    total = torch.zeros(size, dtype=dtype, device=values.device)
    for part in parts:
        total += torch.linalg.vector_norm(part, dim=2, dtype=dtype).square_().sum(0)
    return total


def row_and_column_mean_squares(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Mean squares of the rows and of the columns of a matrix that is not empty, in the dtype of statistics.

    Reads the matrix once, some rows at a time.
    """
    values, dtype = matrix.detach(), statistics_dtype(matrix.dtype)
    rows, sums = [], []
    for part in values.split(max(1, 4 * _SLICE // max(values.shape[1], 1))):
        squares = part.to(dtype).square()
        rows.append(squares.mean(1))
        sums.append(squares.sum(0))
    if len(rows) == 1:
        return rows[0], sums[0] / len(values)
    return torch.cat(rows), torch.stack(sums).sum(0) / len(values)


@dataclass
class FactorSums:
    """Statistics of one layer: sums over ``count`` positions (batch times tokens or pixels).

    Attributes:
        input_factor: ``sum_n x_n^2``, shape given by the layer's rule, usually ``(d_in,)``.
        output_grad_factor: ``sum_n g_n^2``, shape given by the layer's rule, usually ``(d_out,)``.
        count: Number of positions summed over.
        broadcast: Whether the output of a call served the whole batch at once (a table of positions), so that its
            gradient is a sum over examples.
    """

    input_factor: Tensor
    output_grad_factor: Tensor
    count: int
    broadcast: bool = False

    def add_(self, other: FactorSums) -> None:
        """Add the sums and the count of another call, or another micro-batch, of the same layer."""
        self.input_factor = self.input_factor + other.input_factor
        self.output_grad_factor = self.output_grad_factor + other.output_grad_factor
        self.count += other.count
        self.broadcast = self.broadcast or other.broadcast


class MovingAverage:
    """Bias-corrected exponential moving average of several vectors that are always refreshed together (Eq. 3).

    ``value <- decay * value + (1 - decay) * sample`` and the same recursion for ``weight`` with the sample 1, both
    from zero; the average is ``value / weight``. The first sample is therefore used at full strength, and ``decay``
    may change between updates.

    Args:
        values: The running values, updated in place (they live in the optimizer's state).
        weight: 0-dimensional CPU tensor, the sum of the weights of all samples so far.
    """

    def __init__(self, values: Sequence[Tensor], weight: Tensor) -> None:
        self.values = tuple(values)
        self.weight = weight

    @property
    def is_empty(self) -> bool:
        """True until the first sample arrives."""
        return not self.weight.item() > 0.0

    def update_(self, samples: Sequence[Tensor], decay: float) -> None:
        """Take in one sample for each value; ``decay`` (gamma) lies in [0, 1)."""
        for value, sample in zip(self.values, samples, strict=True):
            value.mul_(decay).add_(sample.to(value.device, value.dtype).reshape(value.shape), alpha=1.0 - decay)
        self.weight.mul_(decay).add_(1.0 - decay)

    def mean(self) -> tuple[Tensor, ...]:
        """The bias-corrected averages. Raises RuntimeError while no sample has arrived."""
        if self.is_empty:
            raise RuntimeError("the moving average has no sample yet: call update_ first")
        weight = self.weight.item()
        return tuple(value / weight for value in self.values)
