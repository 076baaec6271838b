"""Diagonal Fisher of one parameter from its factors (AdaFisher, Eq. 4).

A diagonal says which factors a parameter needs, how they spread over its axes once they are normalised, and what
stands in for them when only the parameter's own gradient is known.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from hf_adafisher.fisher.averages import min_max_normalize, statistics_dtype, sum_of_squares_along

INPUT = "input_factor"
OUTPUT_GRAD = "output_grad_factor"

DiagonalTerm = tuple[Tensor, ...]
"""Tensors that broadcast to the parameter's shape; their product is one use's share of the diagonal.

They may have one axis more than the parameter, whose first axis is then split in two, ``(groups, out / groups)``: the
weight of a grouped convolution. The product has the parameter's shape once these two are flattened.
"""


class ParameterDiagonal(ABC):
    """From factors to the diagonal of one parameter."""

    @abstractmethod
    def factor_shapes(self, shape: torch.Size) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the factors that a parameter of ``shape`` keeps, in a fixed order."""

    @abstractmethod
    def expand(self, factors: Mapping[str, Tensor], shape: torch.Size, normalize: bool = True) -> DiagonalTerm:
        """Tensors whose product is the diagonal of a parameter of ``shape`` (a term), min-max normalised or raw."""

    @abstractmethod
    def from_gradient(self, grad: Tensor) -> dict[str, Tensor]:
        """Gradient factors: the stand-ins for the factors when only the parameter's gradient is known."""


def mean_square(grad: Tensor, axis: int) -> Tensor:
    """Mean of grad^2 over every axis but ``axis``, in the dtype of statistics."""
    return sum_of_squares_along(grad, axis) / max(grad.numel() // max(grad.shape[axis], 1), 1)


@dataclass(frozen=True)
class KroneckerDiagonal(ParameterDiagonal):
    """An outer product with one factor an axis: ``F[i, j] = minmax(a)[i] * minmax(b)[j]``.

    Attributes:
        axes: The factor of each axis: ``(OUTPUT_GRAD, INPUT)`` for a weight ``(d_out, d_in)``, ``(OUTPUT_GRAD,)``
            for a bias, whose input is the constant 1 and stays 1.
    """

    axes: tuple[str, ...]

    @override
    def factor_shapes(self, shape: torch.Size) -> dict[str, tuple[int, ...]]:
        return {name: (size,) for name, size in zip(self.axes, shape, strict=True)}

    @override
    def expand(self, factors: Mapping[str, Tensor], shape: torch.Size, normalize: bool = True) -> DiagonalTerm:
        term = []
        for axis, name in enumerate(self.axes):
            factor = min_max_normalize(factors[name]) if normalize else factors[name]
            term.append(factor.reshape([-1 if i == axis else 1 for i in range(len(self.axes))]))
        return tuple(term)

    @override
    def from_gradient(self, grad: Tensor) -> dict[str, Tensor]:
        return {name: mean_square(grad, axis) for axis, name in enumerate(self.axes)}


@dataclass(frozen=True)
class ConvDiagonal(ParameterDiagonal):
    """The weight ``(out, in / groups, *kernel)`` of a convolution: ``F[o, j, k] = minmax(S)[o] * minmax(H)[c, k]``.

    ``c`` is the input channel that ``j`` stands for in the group of ``o``. With several groups the weight is that of
    a dense convolution with zeros in the other groups' places, and so are the factors: each is normalised as a whole.
    Its terms split the first axis into the groups and what is inside them.

    Attributes:
        groups: Number of groups; ``H`` has the shape ``(in, *kernel)`` for any.
    """

    groups: int

    @override
    def factor_shapes(self, shape: torch.Size) -> dict[str, tuple[int, ...]]:
        return {OUTPUT_GRAD: (shape[0],), INPUT: (shape[1] * self.groups, *shape[2:])}

    @override
    def expand(self, factors: Mapping[str, Tensor], shape: torch.Size, normalize: bool = True) -> DiagonalTerm:
        s, h = factors[OUTPUT_GRAD], factors[INPUT]
        if normalize:
            s, h = min_max_normalize(s), min_max_normalize(h)
        lead = (self.groups,) if self.groups > 1 else ()
        return s.reshape(*lead, -1, *[1] * (len(shape) - 1)), h.reshape(*lead, 1, *shape[1:])

    @override
    def from_gradient(self, grad: Tensor) -> dict[str, Tensor]:
        out, *rest = grad.shape
        by_group = grad.detach().reshape(self.groups, out // self.groups, *rest)
        norm = torch.linalg.vector_norm(by_group, dim=1, dtype=statistics_dtype(grad.dtype))
        mean = norm.square_() / max(out // self.groups, 1)
        return {OUTPUT_GRAD: mean_square(grad, 0), INPUT: mean.reshape(rest[0] * self.groups, *rest[1:])}


@dataclass(frozen=True)
class ScaleDiagonal(ParameterDiagonal):
    """The scale of a normalisation layer: ``F[c] = minmax(S * H)[c]``, a block for each channel.

    The gradient of the scale is ``g_c * xhat_c``, so the product of the two second moments is formed before it is
    normalised. Factors have the parameter's shape.
    """

    @override
    def factor_shapes(self, shape: torch.Size) -> dict[str, tuple[int, ...]]:
        return {OUTPUT_GRAD: tuple(shape), INPUT: tuple(shape)}

    @override
    def expand(self, factors: Mapping[str, Tensor], shape: torch.Size, normalize: bool = True) -> DiagonalTerm:
        product = factors[OUTPUT_GRAD] * factors[INPUT]
        return (min_max_normalize(product) if normalize else product,)

    @override
    def from_gradient(self, grad: Tensor) -> dict[str, Tensor]:
        square = grad.detach().to(statistics_dtype(grad.dtype)).square()
        return {OUTPUT_GRAD: square, INPUT: torch.ones_like(square)}


@dataclass(frozen=True)
class ShiftDiagonal(ParameterDiagonal):
    """The shift of a normalisation layer: ``F[c] = minmax(S)[c]``; the factor has the parameter's shape."""

    @override
    def factor_shapes(self, shape: torch.Size) -> dict[str, tuple[int, ...]]:
        return {OUTPUT_GRAD: tuple(shape)}

    @override
    def expand(self, factors: Mapping[str, Tensor], shape: torch.Size, normalize: bool = True) -> DiagonalTerm:
        factor = factors[OUTPUT_GRAD]
        return (min_max_normalize(factor) if normalize else factor,)

    @override
    def from_gradient(self, grad: Tensor) -> dict[str, Tensor]:
        return {OUTPUT_GRAD: grad.detach().to(statistics_dtype(grad.dtype)).square()}


def sum_of_terms(terms: Sequence[DiagonalTerm], like: Tensor) -> Tensor:
    """Sum of the products of the terms, in a shape that broadcasts to that of ``like``.

    Several terms belong to a tied parameter: the Fisher of a sum of uses is the sum of their Fishers when the uses
    are taken as independent. A term without tensors is the constant 1.
    """
    total: Tensor | None = None
    owned = False  # a term of a single tensor is the caller's
    for term in terms:
        product = math.prod(term[1:], start=term[0]) if term else like.new_ones((), dtype=statistics_dtype(like.dtype))
        product = product.flatten(0, 1) if product.dim() > like.dim() else product
        if total is None:
            total, owned = product, len(term) > 1
        elif owned and total.shape == like.shape:
            total.add_(product)
        else:
            total, owned = total + product, True
    assert total is not None, "a parameter has at least one term"
    return total


def diagonal_of(terms: Sequence[DiagonalTerm], like: Tensor, damping: float) -> Tensor:
    """``sum of the products of the terms + damping``: the damped diagonal in the shape of ``like``."""
    total = sum_of_terms(terms, like).add(damping)
    return total if total.shape == like.shape else total.expand(like.shape)


def mean_of_terms(terms: Sequence[DiagonalTerm]) -> Tensor:
    """Mean of the undamped diagonal that these terms make, without forming it; 0-dimensional.

    A term without tensors is the constant 1.
    """
    return torch.stack([_mean_of_term(term) for term in terms]).sum()


def _mean_of_term(term: DiagonalTerm) -> Tensor:
    """Mean of a product: each factor's mean over the axes that it alone has, and only then the product."""
    reduced = []
    for factor in term:
        others = [other for other in term if other is not factor]
        alone = [axis for axis in range(factor.dim()) if all(other.shape[axis] == 1 for other in others)]
        reduced.append(factor.mean(alone, keepdim=True) if alone else factor)
    return math.prod(reduced[1:], start=reduced[0]).mean() if reduced else torch.ones(())
