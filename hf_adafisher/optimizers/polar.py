"""The orthogonal factor of a matrix by Newton-Schulz iteration, for many matrices of one shape at once."""

from __future__ import annotations

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the odd polynomial that Muon iterates (Jordan et al., 2024): steep at zero, and it does not settle at one."""
STEPS = 5
BAND = (0.68, 1.21)
"""Where five steps take singular values of 0.02 of the Frobenius norm and more: near one is all that is asked for."""


def polar_factor(matrices: Tensor, steps: int = STEPS) -> Tensor:
    """``U V^T`` of the singular value decompositions ``U diag(s) V^T``, up to singular values in ``BAND``.

    Each matrix is divided by its Frobenius norm, then ``X <- a X + (b A + c A A) X`` with ``A = X X^T`` acts on every
    singular value as the polynomial ``a s + b s^3 + c s^5``. Small ones grow by 3.4 a step, so that after five those
    below 0.002 of the norm have not arrived: noise is not blown up to full size.

    Args:
        matrices: Shape ``(batch, rows, columns)``; only products of the shorter side's length are formed.
        steps: Number of iterations, >= 1.

    Returns:
        A tensor of the same shape and dtype; zero for a matrix of zeros. On a CPU it is computed in the given dtype, on
        other devices in bfloat16, whose rounding is below the width of the band.
    """
    dtype = matrices.dtype
    transposed = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if transposed else matrices
    norm = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True)
    x = x / norm.clamp_min(torch.finfo(dtype).tiny)
    if x.device.type != "cpu":
        x = x.to(torch.bfloat16)
    a, b, c = COEFFICIENTS
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    x = x.to(dtype)
    return x.mT if transposed else x
