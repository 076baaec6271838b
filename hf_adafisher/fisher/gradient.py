"""Factors of a parameter from its own gradient: for parameters that no layer rule reaches, and for shared tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from hf_adafisher.fisher.averages import min_max_normalize
from hf_adafisher.fisher.diagonals import INPUT, OUTPUT_GRAD, DiagonalTerm, ParameterDiagonal, mean_square


@dataclass(frozen=True)
class GradientDiagonal(ParameterDiagonal):
    """Parameters that no layer rule reaches: one factor an axis, from the parameter's own gradient.

    Each axis longer than 1 has the mean of grad^2 over all other axes: the row and column means of a matrix,
    grad^2 itself for a vector. Axes of length 1 (class tokens, position tables) carry no shape and have no factor.
    """

    @override
    def factor_shapes(self, shape: torch.Size) -> dict[str, tuple[int, ...]]:
        return {f"axis{axis}_factor": (size,) for axis, size in enumerate(shape) if size > 1}

    @override
    def expand(self, factors: Mapping[str, Tensor], shape: torch.Size, normalize: bool = True) -> DiagonalTerm:
        term = []
        for axis, size in enumerate(shape):
            if size > 1:
                factor = factors[f"axis{axis}_factor"]
                factor = min_max_normalize(factor) if normalize else factor
                term.append(factor.reshape([-1 if i == axis else 1 for i in range(len(shape))]))
        return tuple(term)

    @override
    def from_gradient(self, grad: Tensor) -> dict[str, Tensor]:
        return {f"axis{axis}_factor": mean_square(grad, axis) for axis, size in enumerate(grad.shape) if size > 1}


def gradient_term(diagonal: ParameterDiagonal, grad: Tensor) -> DiagonalTerm:
    """Term of a diagonal whose factors are taken from this gradient, normalised."""
    return diagonal.expand(diagonal.from_gradient(grad), grad.shape)


def gradient_estimate(diagonal: ParameterDiagonal, grad: Tensor) -> DiagonalTerm:
    """Term of a diagonal from this gradient, not normalised, on the scale of ``grad^2``."""
    return on_gradient_scale(diagonal.expand(diagonal.from_gradient(grad), grad.shape, normalize=False))


def on_gradient_scale(term: DiagonalTerm) -> DiagonalTerm:
    """Means of ``grad^2`` along each axis as a product on its scale: row times column over mean.

    This is Adafactor's estimate (Shazeer and Stern, 2018, arXiv 1804.04235).
    """
    if len(term) < 2:
        return term
    first, *others = term
    return first, *(torch.where(o.mean() > 0, o / o.mean(), torch.zeros_like(o)) for o in others)


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
