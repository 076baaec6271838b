"""Diagonal dominance of a matrix: Gershgorin disks, shares of energy, spectra under noise."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_adafisher.experiments.figures.factors.full_factors import (
    energy_share,
    gershgorin_disks,
    independent_share,
    mean_correlation,
    measure_dominance,
    spectrum_of,
    with_noise,
)


def random_moment(seed: int, dimension: int = 6, positions: int = 40) -> Tensor:
    rows = torch.randn(positions, dimension, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    rows = rows @ torch.randn(dimension, dimension, generator=torch.Generator().manual_seed(seed + 1), dtype=rows.dtype)
    product = rows.t() @ rows / positions
    return (product + product.t()) / 2  # a product is symmetric only up to rounding


def test_disks_are_row_sums_without_the_diagonal() -> None:
    matrix = random_moment(0)
    centres, radii = gershgorin_disks(matrix)
    for i, row in enumerate(matrix.tolist()):
        assert centres[i].item() == row[i]
        assert radii[i].item() == pytest.approx(sum(abs(value) for j, value in enumerate(row) if j != i), rel=1e-12)


@given(st.integers(1, 8), st.integers(0, 2**31), st.sampled_from([1e-9, 1.0, 1e6]))
@settings(max_examples=40, deadline=None)
def test_every_eigenvalue_lies_in_the_union_of_the_disks(dimension: int, seed: int, size: float) -> None:
    """Gershgorin's theorem, for any symmetric matrix."""
    draws = torch.randn(dimension, dimension, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * size
    matrix = draws + draws.t()
    centres, radii = gershgorin_disks(matrix)
    for eigenvalue in np.linalg.eigvalsh(matrix.numpy()):
        assert ((eigenvalue - centres).abs() <= radii + 1e-12 * size * dimension).any()


def test_a_diagonal_matrix_is_all_diagonal() -> None:
    values = torch.tensor([3.0, 0.5, 2.0], dtype=torch.float64)
    found = measure_dominance(values.diag(), positions=10)
    assert (found.energy_share, found.dominant_rows, found.radius_ratio, found.zero_rows) == (1.0, 1.0, 0.0, 0)
    assert not gershgorin_disks(values.diag())[1].any()


@pytest.mark.parametrize("dimension", [1, 2, 7])
def test_equal_entries_have_one_in_d_on_the_diagonal(dimension: int) -> None:
    found = measure_dominance(torch.full((dimension, dimension), 0.3), positions=5)
    assert found.energy_share == pytest.approx(1 / dimension)
    assert found.radius_ratio == pytest.approx(dimension - 1)
    assert found.dominant_rows == (1.0 if dimension == 1 else 0.0)


def test_energy_share_is_a_ratio_of_squares() -> None:
    matrix = random_moment(3)
    on_it = sum(matrix[i, i].item() ** 2 for i in range(6))
    assert energy_share(matrix) == pytest.approx(on_it / sum(value**2 for value in matrix.flatten().tolist()))
    assert energy_share(matrix) == pytest.approx(energy_share(1e-7 * matrix))


def test_factors_that_are_diagonal_by_nature_are_like_the_whole_matrix() -> None:
    values = torch.tensor([0.5, 0.0, 0.25, 0.25])
    vector, matrix = measure_dominance(values, 8), measure_dominance(values.diag(), 8)
    assert vector.independent_share == 1.0 and matrix.independent_share < 1.0
    assert (vector.energy_share, vector.dominant_rows, vector.radius_ratio) == (1.0, 1.0, 0.0)
    assert vector.zero_rows == matrix.zero_rows == 1
    assert (matrix.energy_share, matrix.dominant_rows, matrix.radius_ratio) == (1.0, 1.0, 0.0)


def test_rows_of_zeros_take_no_part() -> None:
    live = torch.tensor([[2.0, 1.0, 0.5], [1.0, 1.0, 3.0], [0.5, 3.0, 9.0]])
    padded = torch.zeros(5, 5)
    padded[:3, :3] = live
    found, alone = measure_dominance(padded, 4), measure_dominance(live, 4)
    assert (found.dimension, found.zero_rows) == (5, 2)
    assert (found.dominant_rows, found.radius_ratio) == (alone.dominant_rows, alone.radius_ratio)
    assert found.dominant_rows == pytest.approx(2 / 3)
    assert found.radius_ratio == pytest.approx((1.5 / 2 + 4 / 1 + 3.5 / 9) / 3)


def test_correlations_are_numpys_and_free_of_scale() -> None:
    """Of rows that are centred, numpy's coefficients of correlation are the same."""
    rows = torch.randn(50, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64) @ random_moment(4, 5)
    rows -= rows.mean(0)
    moment = rows.t() @ rows / 50
    off = np.corrcoef(rows.numpy().T)[~np.eye(5, dtype=bool)]
    assert mean_correlation(moment) == pytest.approx(float(np.sqrt((off**2).mean())))
    scale = torch.tensor([1e-5, 1.0, 1e4, 3.0, 0.1], dtype=torch.float64)
    assert mean_correlation(scale[:, None] * moment * scale) == pytest.approx(mean_correlation(moment))
    assert mean_correlation(torch.nn.functional.pad(moment, (0, 1, 0, 1))) == pytest.approx(mean_correlation(moment))
    assert mean_correlation(torch.ones(3, 3)) == pytest.approx(1.0)
    assert mean_correlation(torch.tensor([2.0, 1.0])) == mean_correlation(torch.tensor([2.0, 1.0]).diag()) == 0.0
    assert math.isnan(mean_correlation(torch.ones(1, 1)))


def test_a_dead_layer_has_no_share() -> None:
    for moment in (torch.zeros(3, 3), torch.zeros(3)):
        found = measure_dominance(moment, 4)
        assert math.isnan(found.energy_share) and math.isnan(found.independent_share) and found.zero_rows == 3


def test_independent_coordinates_are_what_random_signs_leave() -> None:
    sizes, positions = torch.tensor([0.5, 1.0, 2.0, 1.5], dtype=torch.float64), 20
    signs = torch.randint(0, 2, (4000, positions, 4), generator=torch.Generator().manual_seed(0)) * 2 - 1
    rows = signs * sizes
    moments = rows.transpose(1, 2) @ rows / positions
    diagonal = moments[0].diagonal()
    torch.testing.assert_close(diagonal, sizes**2)
    total = moments.square().sum((1, 2)).mean()
    assert independent_share(diagonal, positions) == pytest.approx((diagonal.square().sum() / total).item(), rel=0.01)
    assert independent_share(diagonal, 10**9) == pytest.approx(1.0)


def test_noise_keeps_the_diagonal_and_the_symmetry() -> None:
    matrix = random_moment(5, dimension=150, positions=300)
    noisy, sigma = with_noise(matrix, 0.02)
    assert torch.equal(noisy.diagonal(), matrix.diagonal())
    assert torch.equal(noisy, noisy.t())
    assert sigma == pytest.approx(0.02 * matrix.diagonal().mean().item())
    added = (noisy - matrix)[torch.triu(torch.ones_like(matrix), 1).bool()]
    assert added.std().item() == pytest.approx(sigma, rel=0.03)
    assert abs(added.mean().item()) < 0.05 * sigma
    assert torch.equal(with_noise(matrix, 0.02)[0], noisy)
    torch.testing.assert_close(with_noise(1e-6 * matrix, 0.02)[0], 1e-6 * noisy)
    assert torch.equal(with_noise(matrix, 0.0)[0], matrix)


def test_spectra_are_numpys() -> None:
    matrix = random_moment(7, dimension=30, positions=20)
    spectrum = spectrum_of(matrix, 0.01)
    assert spectrum.noisy is not None
    noisy = with_noise(matrix, 0.01)[0]
    for found, of in ((spectrum.eigenvalues, matrix), (spectrum.noisy, noisy)):
        np.testing.assert_allclose(found, np.linalg.eigvalsh(of.numpy())[::-1], atol=1e-10)
    assert spectrum.diagonal.tolist() == sorted(matrix.diagonal().tolist(), reverse=True)
    moved = (spectrum.noisy - spectrum.eigenvalues).abs()
    assert 0.0 < moved.max().item() <= np.linalg.norm((noisy - matrix).numpy(), 2) * (1 + 1e-9)  # Weyl
    mean = np.trace(matrix.numpy()) / 30
    kept = int((np.linalg.eigvalsh(matrix.numpy()) > mean).sum())
    assert spectrum.kaiser == pytest.approx(mean)
    assert spectrum.above(spectrum.eigenvalues) == kept > 1
    assert spectrum.leading_shift == pytest.approx((moved[:kept] / spectrum.eigenvalues[:kept]).max().item())
    assert spectrum_of(matrix, 0.0).leading_shift == 0.0


def test_kaisers_line_is_one_for_a_correlation_matrix() -> None:
    matrix = random_moment(9)
    scale = matrix.diagonal().rsqrt()
    assert spectrum_of(scale[:, None] * matrix * scale, 0.0).kaiser == pytest.approx(1.0)


def test_a_factor_that_is_diagonal_by_nature_gets_no_noise() -> None:
    spectrum = spectrum_of(torch.tensor([0.25, 0.5, 0.0]), 0.5)
    assert spectrum.eigenvalues.tolist() == spectrum.diagonal.tolist() == [0.5, 0.25, 0.0]
    assert spectrum.noisy is None and spectrum.leading_shift == 0.0
