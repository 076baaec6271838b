"""Factored Tikhonov damping, and the inverses of damped Kronecker factors."""

from __future__ import annotations

import logging
import math

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

_ATTEMPTS = 8
"""How often a decomposition is tried in float64, each time with ten times the damping."""


def trace(factor: Tensor) -> float:
    """The trace of a factor, given in full or as its diagonal."""
    return float((factor.diagonal() if factor.dim() == 2 else factor).sum())


def split_damping(left: Tensor, right: Tensor, damping: float) -> tuple[float, float]:
    """What is added to the diagonals of the two factors: ``pi sqrt(damping)`` and ``sqrt(damping) / pi``.

    ``pi = sqrt((tr L / dim L) / (tr R / dim R))`` (Martens and Grosse 2015, section 6.3), so that the result does not
    depend on how the scale of the Fisher is split between its factors. Without a scale (a zero trace) ``pi = 1``.
    """
    root = math.sqrt(damping)
    means = trace(left) / left.shape[0], trace(right) / right.shape[0]
    pi = math.sqrt(means[0]) / math.sqrt(means[1]) if min(means) > 0.0 else 1.0
    return pi * root, root / pi


def damped_inverse(factor: Tensor, damping: float, name: str) -> Tensor:
    """``(factor + damping I)^-1`` by Cholesky; of a diagonal, elementwise.

    A second moment is positive semi-definite but for rounding. Where that makes the decomposition fail, it is repeated
    in float64, then with ten times the damping, with a warning, and so on.

    Raises:
        RuntimeError: It fails with any damping.
    """
    if factor.dim() == 1:
        return (factor + damping).reciprocal()
    lower, failed = torch.linalg.cholesky_ex(_damped(factor, damping))
    if not failed.item():
        return torch.cholesky_inverse(lower)
    exact = factor.to("cpu").double()  # some devices have no float64
    for attempt in range(_ATTEMPTS):
        lower, failed = torch.linalg.cholesky_ex(_damped(exact, damping * 10**attempt))
        if not failed.item():
            if attempt:
                logger.warning(
                    "A factor of %s is not positive definite with %.1e on its diagonal: inverted with %.1e.",
                    name,
                    damping,
                    damping * 10**attempt,
                )
            return torch.cholesky_inverse(lower).to(factor.device, factor.dtype)
    raise RuntimeError(
        f"a Kronecker factor of {name} cannot be inverted, with up to {damping * 10 ** (_ATTEMPTS - 1):.1e} on its "
        "diagonal: raise damping, or leave the parameter out"
    )


def _damped(factor: Tensor, damping: float) -> Tensor:
    damped = factor.clone()
    damped.diagonal().add_(damping)
    return damped
