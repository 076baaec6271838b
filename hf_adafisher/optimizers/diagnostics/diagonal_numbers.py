"""Numbers about a diagonal from its factors, without forming it: its mean, and the share of its values at the floor."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hf_adafisher.fisher.averages import statistics_dtype
from hf_adafisher.fisher.diagonals import DiagonalTerm, diagonal_of

SMALL = 1 << 14
"""Diagonals of at most this many values are simply formed."""
SAMPLE = 1 << 16
"""Number of values that stand for a large diagonal without a simpler form, where its median is wanted."""


def floor_share(terms: Sequence[DiagonalTerm], p: Tensor, damping: float) -> float:
    """Share of the values of a damped diagonal in the shape of ``p`` that are at the floor (``at_floor``).

    Exact for a product of factors. That of a sum (tied weights) or of groups and stacks is of ``SAMPLE`` values, of
    each of which the standard error is 0.2 % of all, where there are more than ``SMALL``.
    """
    # A stand-in of the parameter's shape without its memory.
    like = torch.zeros((), dtype=statistics_dtype(p.dtype), device=p.device).expand(p.shape)
    vectors = outer_vectors(terms)
    if like.numel() <= SMALL:
        values = diagonal_of(terms, like, damping)
    elif vectors is None:
        values = some_values(terms, like).add_(damping)
    else:
        logs = [sorted_logarithms(vector) for vector in vectors]
        above = len(logs[0]) * len(logs[1]) - products_below(logs[0], logs[1], damping)
        return 1.0 - above / like.numel()
    return at_floor(values, damping).double().mean().item()


def at_floor(diagonal: Tensor, damping: float) -> Tensor:
    """Mask of the values of a damped diagonal at the floor: their Fisher is below the damping, ``F < 2 * damping``."""
    return diagonal < 2 * damping


def sorted_logarithms(vector: Tensor) -> Tensor:
    """Logarithms of the values > 0 in ascending order, in float64 on the CPU.

    Many small operations follow, each waiting for the one before: on an accelerator they would cost more than the copy.
    """
    vector = vector.double().cpu()
    return vector[vector > 0].log().sort().values


def products_below(left: Tensor, right: Tensor, bound: float) -> int:
    """Number of pairs whose product is below ``bound``, given the sorted logarithms of both sides."""
    return int(torch.searchsorted(right, math.log(bound) - left).sum())


def outer_vectors(terms: Sequence[DiagonalTerm]) -> tuple[Tensor, Tensor] | None:
    """Two vectors whose outer product holds the diagonal's values, the shorter first; None where there are none.

    Of three factors and more, all but the longest are multiplied out.
    """
    if len(terms) != 1 or not terms[0]:
        return None
    axes = [axis for factor in terms[0] for axis, size in enumerate(factor.shape) if size > 1]
    if len(axes) != len(set(axes)):
        return None
    *short, long = sorted((factor.flatten() for factor in terms[0]), key=len)
    product = torch.ones(1, dtype=long.dtype, device=long.device)
    for vector in short:
        product = torch.outer(product, vector).flatten()
    return product, long


def some_values(terms: Sequence[DiagonalTerm], like: Tensor) -> Tensor:
    """``SAMPLE`` values of the undamped diagonal, one at a random place of each of as many equal stretches."""
    generator = torch.Generator().manual_seed(0)  # its own: training must not notice
    places = torch.arange(SAMPLE, dtype=torch.float64) + torch.rand(SAMPLE, generator=generator, dtype=torch.float64)
    flat = (places * (like.numel() / SAMPLE)).long().clamp_(max=like.numel() - 1).to(like.device)
    total = torch.zeros(SAMPLE, dtype=like.dtype, device=like.device)
    for term in terms:
        split = next((factor.shape[0] for factor in term if factor.dim() > like.dim()), None)
        axes = like.shape if split is None else (split, like.shape[0] // split, *like.shape[1:])
        index = torch.unravel_index(flat, axes)
        total += math.prod((factor.expand(axes)[index] for factor in term), start=torch.ones_like(total))
    return total
