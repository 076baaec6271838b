"""How alike two tensors are: rank correlation, correlation of logarithms, relative scale."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def average_ranks(values: Tensor) -> Tensor:
    """Ranks from 1 on, float64; equal values share the mean of their ranks.

    Args:
        values: shape (n,).
    """
    ordered, order = values.sort()
    _, group, sizes = torch.unique_consecutive(ordered, return_inverse=True, return_counts=True)
    middle = sizes.cumsum(0).double() - (sizes - 1) / 2
    return torch.empty(len(values), dtype=torch.float64, device=values.device).scatter_(0, order, middle[group])


def pearson(first: Tensor, second: Tensor) -> float:
    """Pearson's correlation of two vectors; nan where one is constant or has no values."""
    if not len(first) or any(bool(v.min() == v.max()) for v in (first, second)):
        return math.nan
    one, other = (v.double() - v.double().mean() for v in (first, second))
    norm = (torch.linalg.vector_norm(one) * torch.linalg.vector_norm(other)).item()
    return max(-1.0, min(1.0, (one @ other).item() / norm))


def spearman(first: Tensor, second: Tensor) -> float:
    """Spearman's rank correlation of two tensors' values, ties with average ranks; nan where one is constant."""
    return pearson(average_ranks(first.reshape(-1)), average_ranks(second.reshape(-1)))


def log_pearson(first: Tensor, second: Tensor) -> float:
    """Pearson's correlation of the logarithms of those values that are above zero in both."""
    first, second = first.reshape(-1).double(), second.reshape(-1).double()
    both = (first > 0.0) & (second > 0.0)
    return pearson(first[both].log(), second[both].log())


def log_scale(estimate: Tensor, exact: Tensor) -> float:
    """``log10(mean(estimate) / mean(exact))``: how many decades too large an estimate is; nan where a mean is zero."""
    means = estimate.double().mean().item(), exact.double().mean().item()
    return math.log10(means[0] / means[1]) if min(means) > 0.0 else math.nan
