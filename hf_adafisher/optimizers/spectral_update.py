"""The directions of SpectralAdaFisher: pure functions of momentum and factors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from hf_adafisher.fisher.diagonals import DiagonalTerm, diagonal_of
from hf_adafisher.optimizers.base.spectral_statistics import Whitening
from hf_adafisher.optimizers.polar import polar_factor

UPDATE_RMS = 0.2
"""Root mean square of the update of a hidden matrix before the learning rate, and the largest of a vector's.

That of Adam's lies at 0.2 to 0.4.
"""
TABLE_RMS = 1.0
"""The largest of any other table or matrix; the bound on relative steps holds it back (docs/spectral.md)."""
LEAST_RMS = 0.02
"""A parameter's root mean square counts as this at least where its step is bounded: weights of zeros can move."""


def spectral_directions(
    momenta: Sequence[Tensor], whitenings: Sequence[Whitening], polar_dtype: torch.dtype | None = None
) -> Iterator[Tensor]:
    """``0.2 O / rms(O)`` with ``O = a * polar(a * M * b) * b`` for every matrix.

    Args:
        momenta: Matrices ``M (rows, columns)`` of one shape, dtype and device.
        whitenings: ``a (rows, 1)`` and ``b (1, columns)`` of each.
        polar_dtype: See ``hf_adafisher.optimizers.polar.polar_factor``.

    Returns:
        A matrix for each, zero where the momentum is.
    """
    a = torch.stack([whitening.rows for whitening in whitenings])
    b = torch.stack([whitening.columns for whitening in whitenings])
    direction = polar_factor(torch.stack(list(momenta)).mul_(a).mul_(b), polar_dtype).mul_(a).mul_(b)
    norm = torch.linalg.vector_norm(direction, dim=(1, 2), keepdim=True)
    scale = UPDATE_RMS * direction[0].numel() ** 0.5
    return iter(direction.mul_(scale / norm.clamp_min(torch.finfo(norm.dtype).tiny)))


def diagonal_direction(momentum: Tensor, terms: Sequence[DiagonalTerm], relative_damping: float) -> Tensor:
    """``u / max(1, rms(u))`` with ``u = m / sqrt(F + rho * mean(F))``, and 0.2 of that for a vector or a single value.

    Args:
        momentum: ``m``; the result takes its memory.
        terms: Whose products' sum is ``F``. A single term without tensors knows no scale: ``u`` then has the root mean
            square 1, and so it has where ``F`` is zero.
        relative_damping: rho.

    Returns:
        A tensor of the momentum's shape, zero where the momentum is.
    """
    tiny = torch.finfo(momentum.dtype).tiny
    largest = momentum.abs().amax().clamp_min(tiny)
    if any(term for term in terms):
        diagonal = diagonal_of(terms, momentum, 0.0)
        mean = diagonal.mean()
        root = diagonal.add_(mean * relative_damping).sqrt_()
        momentum = momentum.div_(torch.where(mean > 0, root, largest))
        least = torch.where(mean > 0, torch.ones_like(mean), mean.new_tensor(tiny))
    else:
        momentum, least = momentum.div_(largest), largest.new_tensor(tiny)
    rms = torch.linalg.vector_norm(momentum) / momentum.numel() ** 0.5
    largest_rms = TABLE_RMS if momentum.dim() > 1 else UPDATE_RMS
    return momentum.mul_(largest_rms / torch.maximum(rms, least))


def bounded(direction: Tensor, lr: float, norm: Tensor, most: float) -> Tensor:
    """``direction``, made shorter where ``lr`` times its Frobenius norm is more than ``most`` times the parameter's.

    Args:
        direction: Of a whole parameter; the result takes its memory.
        lr: Learning rate.
        norm: The parameter's Frobenius norm, 0-dimensional; counted as that of a root mean square of ``LEAST_RMS`` at
            least.
        most: The largest relative step.
    """
    limit = most * norm.clamp_min(LEAST_RMS * direction.numel() ** 0.5)
    return direction.mul_((limit / (lr * torch.linalg.vector_norm(direction))).clamp_max(1.0))
