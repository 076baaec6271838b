"""Diagonal dominance of Kronecker factors: Gershgorin disks, spectra under noise, energy (AdaFisher, Fig. 3).

A factor is a second moment: a square matrix (d, d), symmetric and positive semi-definite, or the vector (d,) of its
diagonal where it is diagonal by nature.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_NOISE_SEED = 0


def gershgorin_disks(moment: Tensor) -> tuple[Tensor, Tensor]:
    """Centres and radii of the Gershgorin disks ``D(a_ii, sum_{j != i} |a_ij|)``, whose union holds every eigenvalue.

    Args:
        moment: Square matrix (d, d), or the diagonal (d,) of one that is diagonal.

    Returns:
        Two tensors of shape (d,).
    """
    if moment.dim() == 1:
        return moment, torch.zeros_like(moment)
    return moment.diagonal(), moment.abs().fill_diagonal_(0.0).sum(1)


def energy_share(moment: Tensor) -> float:
    """``sum_i a_ii^2 / ||A||_F^2``: 1 for a diagonal matrix, 1/d for one of equal entries; nan for zeros."""
    if moment.dim() == 1:
        return 1.0 if bool(moment.any()) else math.nan
    total = moment.square().sum().item()
    return moment.diagonal().square().sum().item() / total if total > 0.0 else math.nan


def independent_share(diagonal: Tensor, positions: int) -> float:
    """Share of energy on the diagonal of a factor of independent coordinates: the effect of sampling alone.

    ``N`` positions of independent coordinates with mean zero and these mean squares ``a_ii`` give off-diagonal entries
    of expected square ``a_ii a_jj / N``. Positions of one example are correlated, which makes the share smaller even
    for independent coordinates.

    Args:
        diagonal: Shape (d,).
        positions: Number of positions N, at least 1.
    """
    on_diagonal = diagonal.square().sum().item()
    off_diagonal = (diagonal.sum().item() ** 2 - on_diagonal) / positions
    return on_diagonal / (on_diagonal + off_diagonal) if on_diagonal > 0.0 else math.nan


def mean_correlation(moment: Tensor) -> float:
    """Root mean square of ``a_ij / sqrt(a_ii a_jj)``, i != j: off-diagonal entries relative to the rows' sizes.

    The largest rows dominate ``energy_share``; this is invariant to a rescaling of coordinates. Independent coordinates
    have about ``1 / sqrt(N)``. Rows of zeros are left out; nan with fewer than two others, 0 for a vector (d,).
    """
    if moment.dim() == 1:
        return 0.0
    alive = moment.diagonal() > 0.0
    scale, count = moment.diagonal()[alive].rsqrt(), int(alive.sum())
    squares = (moment[alive][:, alive] * scale[:, None] * scale).square_().fill_diagonal_(0.0)
    return math.sqrt(squares.sum().item() / (count * (count - 1))) if count > 1 else math.nan


@dataclass(frozen=True)
class DiagonalDominance:
    """Diagonal dominance of a factor.

    Attributes:
        dimension: Dimension d of the factor.
        energy_share: See the function ``energy_share``.
        independent_share: See ``independent_share``; 1 for a factor that is diagonal by nature.
        dominant_rows: Share of the rows whose Gershgorin disk does not reach zero; rows of zeros (dead inputs, tokens
            that do not occur) are left out here and in the next.
        radius_ratio: Mean over rows of radius / centre.
        mean_correlation: See the function ``mean_correlation``.
        zero_rows: Number of rows of zeros.
    """

    dimension: int
    energy_share: float
    independent_share: float
    dominant_rows: float
    radius_ratio: float
    mean_correlation: float
    zero_rows: int


def measure_dominance(moment: Tensor, positions: int) -> DiagonalDominance:
    """Measure a second moment (d, d), or the diagonal (d,) of a diagonal one, averaged over ``positions``."""
    moment = moment.double()
    centres, radii = gershgorin_disks(moment)
    alive = centres > 0.0
    ratios = radii[alive] / centres[alive]
    return DiagonalDominance(
        dimension=len(centres),
        energy_share=energy_share(moment),
        independent_share=energy_share(moment) if moment.dim() == 1 else independent_share(centres, positions),
        dominant_rows=(ratios < 1.0).double().mean().item(),
        radius_ratio=ratios.mean().item(),
        mean_correlation=mean_correlation(moment),
        zero_rows=int((~alive).sum()),
    )


def with_noise(moment: Tensor, noise: float) -> tuple[Tensor, float]:
    """Add ``e_ij = e_ji ~ N(0, sigma^2)`` off the diagonal: the matrix stays symmetric and keeps its diagonal.

    The paper takes ``sigma = 1e-3`` for matrices whose diagonals are of order one. Factors are of any size, so here
    ``sigma = noise * mean(diagonal)``.

    Args:
        moment: Shape (d, d).
        noise: Relative size of the noise, at least 0.

    Returns:
        The new matrix and sigma. All calls draw the same noise, scaled by sigma.
    """
    sigma = noise * moment.diagonal().mean().item()
    draws = torch.randn(moment.shape, generator=torch.Generator().manual_seed(_NOISE_SEED), dtype=moment.dtype)
    upper = draws.triu_(1).mul_(sigma)
    return moment + upper + upper.t(), sigma


@dataclass(frozen=True)
class Spectrum:
    """Eigenvalues of a factor, each list falling, shape (d,).

    Attributes:
        eigenvalues: Eigenvalues of the factor.
        noisy: Eigenvalues of ``with_noise``; None for a factor that is diagonal by nature, which gets no noise.
        diagonal: Eigenvalues of the diagonal alone, AdaFisher's approximation.
        sigma: Standard deviation of the noise, in units of the factor.
    """

    eigenvalues: Tensor
    noisy: Tensor | None
    diagonal: Tensor
    sigma: float

    @property
    def kaiser(self) -> float:
        """Kaiser's line: the mean eigenvalue, which is 1 for a correlation matrix."""
        return self.diagonal.mean().item()

    def above(self, values: Tensor) -> int:
        """Number of these eigenvalues above Kaiser's line."""
        return int((values > self.kaiser).sum())

    @property
    def leading_shift(self) -> float:
        """Largest relative change of an eigenvalue above the line under the noise; 0 without noise."""
        kept = self.eigenvalues[: self.above(self.eigenvalues)]
        if self.noisy is None or not len(kept):
            return 0.0
        return ((self.noisy[: len(kept)] - kept).abs() / kept).max().item()


def spectrum_of(moment: Tensor, noise: float) -> Spectrum:
    """Eigenvalues of a second moment (d, d), or of a diagonal one (d,), with and without noise; see the class."""
    moment = moment.double().cpu()
    if moment.dim() == 1:
        falling = moment.sort(descending=True).values
        return Spectrum(falling, None, falling, 0.0)
    noisy, sigma = with_noise(moment, noise)
    eigenvalues, shaken = (torch.linalg.eigvalsh(matrix).flip(0) for matrix in (moment, noisy))
    return Spectrum(eigenvalues, shaken, moment.diagonal().sort(descending=True).values, sigma)
