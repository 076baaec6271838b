"""Factored Tikhonov damping, and inverses of damped Kronecker factors."""

from __future__ import annotations

import logging
import math

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

_ATTEMPTS = 8
"""Number of decompositions tried in float64, each with ten times the damping of the previous one."""


def trace(factor: Tensor) -> float:
    """Trace of a factor, given in full or as its diagonal."""
    return float((factor.diagonal() if factor.dim() == 2 else factor).sum())


def split_damping(left: Tensor, right: Tensor, damping: float) -> tuple[float, float]:
    """Damping of the two factors: ``pi sqrt(damping)`` and ``sqrt(damping) / pi``.

    ``pi = sqrt((tr L / dim L) / (tr R / dim R))`` (Martens and Grosse 2015, section 6.3), so that the result does not
    depend on the split of the Fisher's scale between its factors. If a trace is zero, ``pi = 1``.
    """
    root = math.sqrt(damping)
    means = trace(left) / left.shape[0], trace(right) / right.shape[0]
    pi = math.sqrt(means[0]) / math.sqrt(means[1]) if min(means) > 0.0 else 1.0
    return pi * root, root / pi


def damped_inverse(factor: Tensor, damping: float, name: str) -> Tensor:
    """Inverse ``(factor + damping I)^-1`` by Cholesky decomposition, or elementwise for a diagonal.

    A second moment is positive semi-definite up to rounding. If the decomposition fails, it is repeated in float64,
    then with ten times the damping and a warning, and so on.

    Args:
        factor: Shape (d, d), or (d,) for a diagonal.
        damping: Value > 0 to add to the diagonal.
        name: Name of the parameter in messages.

    Returns:
        The inverse, in the shape and dtype of the factor.

    Raises:
        RuntimeError: All decompositions fail.
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
