"""The directions of SpectralAdaFisher: pure functions of momentum and factors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from hf_adafisher.fisher.forms import Term, diagonal_of
from hf_adafisher.optimizers.polar import polar_factor
from hf_adafisher.optimizers.spectral_curvature import Whitening

UPDATE_RMS = 0.2
"""Root mean square of a hidden matrix's update before the learning rate; that of Adam's lies at 0.2 to 0.4."""
REST_RMS = 0.5
"""The largest one of everything else, which puts the best learning rates of both near each other (docs/spectral.md)."""


def spectral_directions(momenta: Sequence[Tensor], whitenings: Sequence[Whitening]) -> Iterator[Tensor]:
    """``0.2 O / rms(O)`` with ``O = a * polar(a * M * b) * b`` for every matrix.

    Args:
        momenta: Matrices ``M (rows, columns)`` of one shape, dtype and device.
        whitenings: ``a (rows, 1)`` and ``b (1, columns)`` of each.

    Returns:
        A matrix for each, zero where the momentum is.
    """
    a = torch.stack([whitening.rows for whitening in whitenings])
    b = torch.stack([whitening.columns for whitening in whitenings])
    direction = polar_factor(torch.stack(list(momenta)).mul_(a).mul_(b)).mul_(a).mul_(b)
    norm = torch.linalg.vector_norm(direction, dim=(1, 2), keepdim=True)
    scale = UPDATE_RMS * direction[0].numel() ** 0.5
    return iter(direction.mul_(scale / norm.clamp_min(torch.finfo(norm.dtype).tiny)))


def diagonal_direction(momentum: Tensor, terms: Sequence[Term], relative_damping: float) -> Tensor:
    """``0.5 u / max(1, rms(u))`` with ``u = m / sqrt(F + rho * mean(F))``.

    Args:
        momentum: ``m``; the result takes its memory.
        terms: Whose products' sum is ``F``. A single term without tensors knows no scale: ``u`` then has the root mean
            square 1 before it is halved, and so it has where ``F`` is zero.
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
    return momentum.mul_(REST_RMS / torch.maximum(rms, least))
