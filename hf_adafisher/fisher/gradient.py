"""Factors of a parameter from its own gradient: for parameters that no layer rule reaches, and for shared tables."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from typing_extensions import override

from hf_adafisher.fisher.averages import min_max_normalize, row_and_column_mean_squares, statistics_dtype
from hf_adafisher.fisher.diagonals import INPUT, OUTPUT_GRAD, DiagonalTerm, ParameterDiagonal, mean_square

SHORT = 8
"""Longest axis that gets no factor of its own: the smallest of so few means would be 0 and the largest 1 by chance."""


class FactorAxes(NamedTuple):
    """Axes of one factor.

    Attributes:
        stack: Axes that number the matrices of a stack, each of which is normalised by itself.
        own: Axes that the factor describes.
    """

    stack: tuple[int, ...]
    own: tuple[int, ...]

    @property
    def all(self) -> tuple[int, ...]:
        """Axes of the factor, in ascending order."""
        return self.stack + self.own

    @property
    def name(self) -> str:
        """Its state key."""
        return f"axis{'_'.join(map(str, self.all))}_factor"

    def sizes(self, shape: torch.Size) -> tuple[int, ...]:
        """Shape of the factor of a parameter of ``shape``."""
        return tuple(shape[axis] for axis in self.all)

    def spread(self, shape: torch.Size) -> tuple[int, ...]:
        """Shape of the factor in the diagonal, which has length 1 along every other axis."""
        return tuple(size if axis in self.all else 1 for axis, size in enumerate(shape))


@dataclass(frozen=True)
class GradientDiagonal(ParameterDiagonal):
    """Parameters that no layer rule reaches: the row and column means of grad^2 of a matrix, grad^2 of a vector.

    Axes of length 1 (class tokens, position tables) carry no shape and have no factor. Of more than two axes

    * the last ones, as far as they are short (``SHORT``: kernels), join the axis before them in one factor;
    * all but the last two of what is then left number matrices (fused experts), which have factors of their own.

    A matrix with few rows has one factor, its grad^2. In a transposed convolution ``(in, out, *kernel)`` the kernel
    joins the inputs, as in the rule of convolutions.

    Attributes:
        transposed_convolution: Whether it is the weight of one.
    """

    transposed_convolution: bool = False

    @override
    def factor_shapes(self, shape: torch.Size) -> dict[str, tuple[int, ...]]:
        return {axes.name: axes.sizes(shape) for axes in self.axes(shape)}

    def axes(self, shape: torch.Size) -> tuple[FactorAxes, ...]:
        """Axes of the factors of a parameter of ``shape``, two at most: of its rows, and of its columns."""
        return _factor_axes(self.transposed_convolution, shape)

    @override
    def expand(self, factors: Mapping[str, Tensor], shape: torch.Size, normalize: bool = True) -> DiagonalTerm:
        term = []
        for axes in self.axes(shape):
            factor = factors[axes.name]
            factor = min_max_normalize(factor, len(axes.stack)) if normalize else factor
            term.append(factor.reshape(axes.spread(shape)))
        return tuple(term)

    @override
    def from_gradient(self, grad: Tensor) -> dict[str, Tensor]:
        axes = self.axes(grad.shape)
        return {a.name: factor for a, factor in zip(axes, gradient_factors(grad, axes), strict=True)}


@functools.cache
def _factor_axes(transposed_convolution: bool, shape: torch.Size) -> tuple[FactorAxes, ...]:
    """``GradientDiagonal.axes``, asked for at every step."""
    long = tuple(axis for axis, size in enumerate(shape) if size > 1)
    if transposed_convolution:
        groups = [tuple(axis for axis in long if axis != 1), tuple(axis for axis in long if axis == 1)]
        return tuple(FactorAxes((), group) for group in groups if group)
    first = len(long) - 1
    while first > 0 and all(shape[axis] <= SHORT for axis in long[first:]):
        first -= 1
    row = max(first - 1, 0)
    stack, rows, columns = long[:row], long[row : max(first, 0)], long[max(first, 0) :]
    if all(shape[axis] <= SHORT for axis in rows):
        rows, columns = (), rows + columns
    return tuple(FactorAxes(stack, own) for own in (rows, columns) if own)


def gradient_factors(grad: Tensor, axes: Sequence[FactorAxes]) -> list[Tensor]:
    """Mean of grad^2 over all axes but those of each factor, in the dtype of statistics."""
    if len(axes) == grad.dim() == 2 and grad.device.type == "cpu":
        return list(row_and_column_mean_squares(grad))
    return [_mean_square_along(grad, a.all) for a in axes]


def _mean_square_along(grad: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Mean of grad^2 over every axis but these, in the dtype of statistics."""
    if len(axes) == 1:
        return mean_square(grad, axes[0])
    rest = [axis for axis in range(grad.dim()) if axis not in axes]
    grad, dtype = grad.detach(), statistics_dtype(grad.dtype)
    if not rest:
        return grad.to(dtype).square()
    count = max(grad.numel() // max(torch.Size(grad.shape[axis] for axis in axes).numel(), 1), 1)
    return torch.linalg.vector_norm(grad, dim=rest, dtype=dtype).square_() / count


def gradient_diagonal(owner: nn.Module | None, key: str) -> GradientDiagonal:
    """Diagonal of the parameter ``key`` of a module whose class has no rule, or of no known module."""
    transposed = isinstance(owner, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)) and key == "weight"
    return GradientDiagonal(transposed)


def gradient_term(diagonal: ParameterDiagonal, grad: Tensor) -> DiagonalTerm:
    """Term of a diagonal whose factors are taken from this gradient, normalised."""
    return diagonal.expand(diagonal.from_gradient(grad), grad.shape)


def on_gradient_scale(term: DiagonalTerm) -> DiagonalTerm:
    """Means of ``grad^2`` along rows and columns as a product on its scale: row times column over mean, in each matrix.

    This is Adafactor's estimate (Shazeer and Stern, 2018, arXiv 1804.04235).
    """
    if len(term) < 2:
        return term
    rows, columns = term
    own = [axis for axis in range(columns.dim()) if rows.shape[axis] == 1]  # others number the matrices of a stack
    mean = columns.mean(own, keepdim=True)
    return rows, torch.where(mean > 0, columns / mean, torch.zeros_like(columns))


def with_gradient_sums(diagonal: ParameterDiagonal, factors: Mapping[str, Tensor], grad: Tensor) -> dict[str, Tensor]:
    """Factors of a table whose rows served the whole batch: the output gradients are the rows of its own gradient.

    ``s_j = sum_v grad[v, j]^2 / (number of rows in use)``, which is what one backward over the whole batch records; the
    row of a ``padding_idx``, which has no gradient, is not in use.
    """
    per_row = diagonal.from_gradient(grad)[OUTPUT_GRAD]
    return {**factors, OUTPUT_GRAD: per_row * (factors[INPUT].numel() / rows_in_use(factors))}


def rows_in_use(factors: Mapping[str, Tensor]) -> Tensor:
    """Number of rows of a table that were looked up, at least 1; a 0-dimensional tensor."""
    return factors[INPUT].count_nonzero().clamp(min=1)
