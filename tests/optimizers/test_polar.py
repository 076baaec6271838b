"""The orthogonal factor by Newton-Schulz iteration against singular value decompositions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from hf_adafisher.optimizers.polar import BAND, COEFFICIENTS, polar_factor
from tests.reference import iterated_polar, iterated_values

SHAPES = pytest.mark.parametrize("shape", [(6, 6), (5, 24), (24, 5), (1, 7), (7, 1), (1, 1), (32, 128)], ids=str)


def with_spectrum(rows: int, columns: int, smallest: float, number: int = 3) -> Tensor:
    """Random matrices whose singular values fall from the largest to `smallest` of their Frobenius norm."""
    generator = torch.Generator().manual_seed(rows + 100 * columns)
    x = torch.randn(number, rows, columns, generator=generator, dtype=torch.float64)
    u, _, vt = torch.linalg.svd(x, full_matrices=False)
    s = torch.linspace(1.0, 0.0, min(rows, columns), dtype=torch.float64)
    s = s / s.norm() if len(s) > 1 else s
    s = smallest + (1 - smallest) * s
    while len(s) > 1 and (s / s.norm()).min() < smallest:
        s = s + 0.1 * smallest
    return (u * s) @ vt


def arrived() -> Tensor:
    """What the iteration makes of all singular values from 0.003 of the norm on."""
    return iterated_values(torch.linspace(0.003, 1.0, 100001, dtype=torch.float64))


@SHAPES
def test_polar_factor_keeps_singular_vectors_and_brings_values_into_the_band(shape: tuple[int, int]) -> None:
    """`U^T X V` is diagonal, with values where they should be, for a smallest singular value of 0.02 of the norm."""
    x = with_spectrum(*shape, smallest=0.02)
    u, s, vt = torch.linalg.svd(x, full_matrices=False)
    assert (s / s.norm(dim=1, keepdim=True)).min() >= 0.02
    core = u.mT @ polar_factor(x) @ vt.mT
    values = core.diagonal(dim1=1, dim2=2)
    assert_close(core, torch.diag_embed(values), rtol=0, atol=1e-12)
    least, most = arrived().aminmax()
    assert least - 1e-6 <= values.min() and values.max() <= most + 1e-6
    assert_close(polar_factor(x), u @ torch.diag_embed(values) @ vt)  # nothing outside their span


@SHAPES
def test_polar_factor_is_the_polynomial_of_singular_values(shape: tuple[int, int]) -> None:
    """Also of small ones."""
    x = with_spectrum(*shape, smallest=1e-4)
    assert_close(polar_factor(x), torch.stack([iterated_polar(matrix) for matrix in x]), rtol=1e-9, atol=1e-11)


def test_polar_factor_band_is_that_of_the_polynomials() -> None:
    """To two hundredths, over all singular values that have arrived, and around one; noise stays noise."""
    least, most = arrived().aminmax()
    assert_close(torch.tensor(BAND, dtype=torch.float64), torch.stack([least, most]), rtol=0, atol=0.02)
    assert BAND[0] < 1.0 < BAND[1]
    small = torch.tensor([1e-6, 1e-5], dtype=torch.float64)
    gain = torch.tensor(COEFFICIENTS, dtype=torch.float64)[:, 0].prod()
    assert gain < 293
    for size in small.tolist():
        x = torch.diag(torch.tensor([1.0, size], dtype=torch.float64))[None]
        assert polar_factor(x)[0, 1, 1].item() == pytest.approx(size * gain.item() / 1.01, rel=0.01)


@SHAPES
def test_polar_factor_of_a_batch_is_that_of_each(shape: tuple[int, int]) -> None:
    """Each is divided by its own norm, whatever the others' are."""
    x = with_spectrum(*shape, smallest=0.02) * torch.tensor([1.0, 1e6, 1e-6], dtype=torch.float64)[:, None, None]
    given = x.clone()
    each = torch.cat([polar_factor(matrix[None]) for matrix in x])
    assert_close(polar_factor(x), each, rtol=1e-12, atol=1e-13)
    assert_close(x, given, rtol=0, atol=0)


@SHAPES
def test_polar_factor_of_the_transposed_is_the_transposed(shape: tuple[int, int]) -> None:
    x = with_spectrum(*shape, smallest=0.02)
    assert polar_factor(x).shape == x.shape
    assert_close(polar_factor(x.mT), polar_factor(x).mT, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_polar_factor_knows_no_scale_and_leaves_zeros(dtype: torch.dtype) -> None:
    """The scales are powers of two, which round nothing."""
    x = with_spectrum(4, 9, smallest=0.02).to(dtype)
    for scale in (2.0**-40, 2.0**40):
        assert_close(polar_factor(scale * x), polar_factor(x), rtol=0, atol=0)
    x[1] = 0.0
    result = polar_factor(x)
    assert result.dtype == dtype and not result[1].any() and result.isfinite().all()


@pytest.mark.parametrize("shape", [(8, 8), (64, 256), (256, 64), (128, 128)], ids=str)
@pytest.mark.parametrize("given", [torch.bfloat16, torch.float64])
def test_polar_factor_in_bfloat16_is_near(shape: tuple[int, int], given: torch.dtype) -> None:
    """Off by 2 to 4 hundredths of its norm, and by 0.05 to 0.11 in some direction (measured)."""
    x = with_spectrum(*shape, smallest=0.02)
    exact, rounded = polar_factor(x), polar_factor(x.to(given), torch.bfloat16).double()
    error = torch.linalg.matrix_norm(rounded - exact) / torch.linalg.matrix_norm(exact)
    assert 1e-4 < error.max() < 0.05
    assert torch.linalg.matrix_norm(rounded - exact, ord=2).max() < 0.15
    values = torch.linalg.svdvals(rounded)
    assert BAND[0] - 0.03 < values.min() and values.max() < BAND[1] + 0.1


@pytest.mark.parametrize("shape", [(8, 8), (64, 256), (256, 64)], ids=str)
def test_polar_factor_in_float16_is_nearer(shape: tuple[int, int]) -> None:
    """Off by 3 to 4 thousandths of its norm (measured); with the factors first it would be 11 to 50."""
    x = with_spectrum(*shape, smallest=0.02)
    exact, rounded = polar_factor(x), polar_factor(x.float(), torch.float16).double()
    error = torch.linalg.matrix_norm(rounded - exact) / torch.linalg.matrix_norm(exact)
    assert 1e-5 < error.max() < 0.006


@pytest.mark.parametrize("shape", [(8, 8), (64, 256), (256, 64)], ids=str)
def test_polar_factor_within_autocast_is_that_without(shape: tuple[int, int]) -> None:
    x = with_spectrum(*shape, smallest=0.02).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = polar_factor(x)
    assert_close(inside, polar_factor(x), rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(8, 8), (64, 256), (256, 64)], ids=str)
def test_polar_factor_in_float32_is_nearly_exact(shape: tuple[int, int]) -> None:
    """Off by up to 4e-5 in a value (measured)."""
    x = with_spectrum(*shape, smallest=3e-3)
    assert_close(polar_factor(x.float()).double(), polar_factor(x), rtol=0, atol=1e-4)


class Products(TorchDispatchMode):
    """Notes the dtype and the shape of every matrix product."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.baddbmm, torch.ops.aten.bmm):
            self.dtypes.add(result.dtype)
            self.shapes.add(tuple(result.shape))
        return result


@pytest.mark.parametrize(
    ("device", "asked", "expected"),
    [
        ("cpu", None, torch.float32),
        ("meta", None, torch.bfloat16),
        ("cpu", torch.bfloat16, torch.bfloat16),
        ("meta", torch.float32, torch.float32),
    ],
)
def test_polar_factor_multiplies_in_the_dtype_asked_for_or_its_devices(
    device: str, asked: torch.dtype | None, expected: torch.dtype
) -> None:
    """On a CPU the matrix's own, elsewhere bfloat16; it gives the dtype back that it was given."""
    with Products() as products:
        result = polar_factor(torch.ones(2, 3, 4, device=device), asked)
    assert products.dtypes == {expected}
    assert result.dtype == torch.float32 and result.shape == (2, 3, 4)


@pytest.mark.parametrize("shape", [(2, 3, 8), (2, 8, 3)], ids=["wide", "tall"])
def test_polar_factor_multiplies_along_the_shorter_side(shape: tuple[int, int, int]) -> None:
    """A square of its length, and the matrix itself, wide; never a square of the longer side's length."""
    with Products() as products:
        polar_factor(torch.ones(shape))
    assert products.shapes == {(2, 3, 3), (2, 3, 8)}
