"""Normalisation, sums and the moving average against their definitions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from hf_adafisher.fisher.averages import (
    FactorSums,
    MovingAverage,
    min_max_normalize,
    sum_of_squares,
    sum_of_squares_along,
)
from hf_adafisher.fisher.gradient import GradientDiagonal

VALUES = st.lists(st.floats(0.0, 1e3, width=32), min_size=1, max_size=20)


@given(VALUES)
def test_normalised_values_span_0_to_1_or_are_all_ones(values: list[float]) -> None:
    v = torch.tensor(values, dtype=torch.float64)
    out = min_max_normalize(v)
    if v.max() - v.min() > 1e-5 * v.max():
        assert_close(out, (v - v.min()) / (v.max() - v.min()))
        assert out.min() == 0.0 and out.max() == 1.0
    else:
        assert_close(out, torch.ones_like(v))


@given(VALUES, st.floats(1e-12, 1e12))
def test_the_scale_does_not_matter(values: list[float], scale: float) -> None:
    v = torch.tensor(values, dtype=torch.float64)
    assert_close(min_max_normalize(v * scale), min_max_normalize(v), rtol=1e-5, atol=1e-5)


def test_rounding_noise_is_not_stretched() -> None:
    """The two logits of a binary classifier: g and -g up to rounding."""
    assert_close(min_max_normalize(torch.tensor([1e-9, 1e-9 * (1 + 2e-7)])), torch.ones(2))
    assert min_max_normalize(torch.zeros(0)).shape == (0,)


def test_tiny_statistics_are_not_swamped_by_an_absolute_epsilon() -> None:
    """Released code: 1e-6 is added to a spread of 1e-9."""
    assert_close(min_max_normalize(torch.tensor([1e-10, 6e-10, 1.1e-9])), torch.tensor([0.0, 0.5, 1.0]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_sums_of_squares_do_not_overflow_in_low_precision(dtype: torch.dtype) -> None:
    values = torch.full((2, 5, 3), 300.0, dtype=dtype)
    out = sum_of_squares(values, 3)
    assert out.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_close(out, (values.to(out.dtype) ** 2).sum((0, 1)))
    assert_close(sum_of_squares(values[:0], 3), torch.zeros(3, dtype=out.dtype))


LAYOUTS: dict[str, tuple[int, ...]] = {"contiguous": (0, 1, 2, 3), "channels_last": (0, 2, 3, 1), "other": (2, 0, 3, 1)}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_sums_along_every_axis_of_every_layout(layout: str, dtype: torch.dtype) -> None:
    order = LAYOUTS[layout]
    dense = torch.randn(*((3, 4, 5, 2)[i] for i in order), generator=torch.Generator().manual_seed(0)).to(dtype)
    values = dense.permute([order.index(axis) for axis in range(4)])
    assert values.shape == (3, 4, 5, 2)
    statistics = torch.float64 if dtype == torch.float64 else torch.float32
    for axis in range(4):
        rest = [other for other in range(4) if other != axis]
        assert_close(sum_of_squares_along(values, axis), values.to(statistics).square().sum(rest))


@pytest.mark.parametrize("step", [1, 2])
def test_sums_along_the_only_axis_are_the_squares(step: int) -> None:
    """Also of a column: torch takes a norm over no axis for one over all of them."""
    values = torch.randn(6, generator=torch.Generator().manual_seed(0))[::step]
    assert_close(sum_of_squares_along(values, 0), values.square())
    assert_close(sum_of_squares(values, len(values)), values.square())


def test_the_average_is_the_weighted_mean_of_all_samples() -> None:
    decay, samples = 0.8, [torch.tensor([float(i), i**2]) for i in range(1, 6)]
    average = MovingAverage([torch.zeros(2)], torch.zeros(()))
    assert average.is_empty
    with pytest.raises(RuntimeError, match="no sample"):
        average.mean()
    for n, sample in enumerate(samples, start=1):
        average.update_([sample], decay)
        weights = torch.tensor([(1 - decay) * decay ** (n - 1 - i) for i in range(n)])
        expected = (weights[:, None] * torch.stack(samples[:n])).sum(0) / weights.sum()
        assert_close(average.mean()[0], expected)


def test_pairs_add_sums_and_counts() -> None:
    pair = FactorSums(torch.ones(2), torch.ones(3), 4)
    pair.add_(FactorSums(torch.full((2,), 2.0), torch.full((3,), 5.0), 6))
    assert_close((pair.input_factor, pair.output_grad_factor), (torch.full((2,), 3.0), torch.full((3,), 6.0)))
    assert pair.count == 10


def test_gradient_factors_of_every_number_of_axes() -> None:
    form, grad = GradientDiagonal(), torch.randn(2, 1, 14, 13, dtype=torch.float64)
    factors = form.from_gradient(grad)
    assert set(factors) == set(form.factor_shapes(grad.shape)) == {"axis0_2_factor", "axis0_3_factor"}
    assert_close(factors["axis0_2_factor"][1], torch.stack([grad[1, 0, i].square().mean() for i in range(14)]))
    raw = form.expand(factors, grad.shape, normalize=False)
    product = raw[0] * raw[1]
    assert_close(
        product.expand(grad.shape)[1, 0, 2, 1], factors["axis0_2_factor"][1, 2] * factors["axis0_3_factor"][1, 1]
    )
    assert form.expand({}, torch.Size((1, 1))) == ()
