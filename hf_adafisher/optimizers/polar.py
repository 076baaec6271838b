"""The orthogonal factor of a matrix by Newton-Schulz iteration, for many matrices of one shape at once."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

COEFFICIENTS = (
    (7.7110, -22.1138, 16.2487),
    (4.1772, -3.5156, 0.7581),
    (3.6231, -2.8774, 0.6095),
    (2.5061, -1.8478, 0.4383),
)
"""Of the odd polynomials ``a s + b s^3 + c s^5`` that are applied one after the other.

Each is the one nearest to 1 in the maximum norm over the interval to which those before it take [0.003, 1] (from a
fiftieth of the interval's end on, so that none is too steep), after Amsel et al., 2025, arXiv 2505.16932.
"""
BAND = (0.78, 1.23)
"""Interval to which they take singular values from 0.003 of the Frobenius norm: near one is all that is needed."""
_MARGIN = 1.01
"""Rounding must not take a singular value beyond 1, where the first polynomial is steep."""


def polar_factor(matrices: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """``U V^T`` of the singular value decompositions ``U diag(s) V^T``, up to singular values in ``BAND``.

    Each matrix is divided by its Frobenius norm, then ``X <- (a + b A + c A^2) X`` with ``A = X X^T`` acts on every
    singular value as a polynomial of ``COEFFICIENTS``. Small ones grow by at most 293 in all, so that noise is not
    blown up to full size. Where the long side is long enough, the polynomials in ``A`` are multiplied with each other
    first and applied to ``X`` once, which is less work; it would lose too much in half precision.

    Args:
        matrices: Shape ``(batch, rows, columns)``; only products of the shorter side's length are formed.
        dtype: What it is computed in. Default None: on a CPU that of the matrices, on other devices bfloat16, whose
            rounding is below the width of the band.

    Returns:
        A tensor of the same shape and dtype; zero for a matrix of zeros.
    """
    if dtype is None:
        dtype = matrices.dtype if matrices.device.type == "cpu" else torch.bfloat16
    transposed = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if transposed else matrices
    x = x / x.abs().amax((1, 2), keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)  # squares of small ones underflow
    x = x / torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).mul_(_MARGIN).clamp_min(torch.finfo(x.dtype).tiny)
    x = x.to(dtype)
    short, long = x.shape[1:]
    # 16 short^2 long + 8 short^3 operations step by step, against 4 short^2 long + 26 short^3
    apart = x.dtype in (torch.float32, torch.float64) and 12 * long > 18 * short
    with _no_autocast(x.device.type):
        x = _factors_first(x) if apart else _step_by_step(x)
    x = x.to(matrices.dtype)
    return x.mT if transposed else x


def _no_autocast(device: str) -> contextlib.AbstractContextManager[object]:
    """Steps are sometimes taken within autocast, which would multiply in another dtype."""
    if torch.amp.is_autocast_available(device):
        return torch.autocast(device, enabled=False)
    return contextlib.nullcontext()


def _step_by_step(x: Tensor) -> Tensor:
    for a, b, c in COEFFICIENTS:
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def _factors_first(x: Tensor) -> Tensor:
    gram = x @ x.mT
    product = factor = _factor(gram, COEFFICIENTS[0])
    for coefficients in COEFFICIENTS[1:]:
        gram = factor @ gram @ factor  # of what the factors so far make of x
        factor = _factor(gram, coefficients)
        product = factor @ product
    return product @ x


def _factor(gram: Tensor, coefficients: tuple[float, float, float]) -> Tensor:
    a, b, c = coefficients
    factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
    factor.diagonal(dim1=1, dim2=2).add_(a)
    return factor
