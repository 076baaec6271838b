"""The spectral AdaFisher at the ends of float32, and with odd heads."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from hf_adafisher import SpectralAdaFisher
from hf_adafisher.fisher.gradient import GradientDiagonal, on_gradient_scale
from hf_adafisher.optimizers.polar import polar_factor


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("power", [-120, -80, -60, 60, 100])
@pytest.mark.parametrize("shape", [(1, 8, 8), (2, 8, 24)])
def test_spectral_polar_factor_of_very_small_and_large_matrices(power: int, shape: tuple[int, ...]) -> None:
    """Squares leave float32's range long before the values do."""
    x = draw(*shape)
    assert_close(polar_factor(x * 2.0**power), polar_factor(x))


def test_spectral_weights_stay_finite_while_momentum_fades() -> None:
    """A step with gradients, then a thousand with zeros: 0.9^1000 is beyond float32."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))
    optimizer = SpectralAdaFisher(model, lr=1e-3)
    model(draw(16, 8)).square().mean().backward()
    for _ in range(1000):
        optimizer.step()
        for p in model.parameters():
            assert p.grad is not None and p.isfinite().all()
            p.grad.zero_()


@pytest.mark.parametrize("axes", [2, 3, 4, 5])
@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e9])
def test_spectral_estimates_of_parameters_without_a_rule_scale_as_gradients_squared(axes: int, scale: float) -> None:
    grad = draw(*range(2, axes), 9, 10)
    product = torch.ones(())
    diagonal = GradientDiagonal()
    term = diagonal.expand(diagonal.from_gradient(grad * scale), grad.shape, normalize=False)
    for factor in on_gradient_scale(term):
        product = product * factor
    square = grad.double().square()  # of each matrix: row means times column means over the mean
    expected = square.mean(-1, keepdim=True) * square.mean(-2, keepdim=True) / square.mean((-2, -1), keepdim=True)
    assert_close(product.double() / scale**2, expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e18])
def test_spectral_hidden_steps_of_very_small_and_large_gradients(scale: float) -> None:
    """Those of a hidden matrix do not depend on the scale, however far squares are from float32's range."""
    ends = []
    for factor in (1.0, scale):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 9), nn.Linear(9, 2))
        optimizer = SpectralAdaFisher(model, lr=0.1, max_relative_step=None)
        model[0].weight.grad = draw(9, 8) * factor
        optimizer.step()
        ends.append(model[0].weight.detach())
    assert_close(*ends, rtol=1e-3, atol=1e-4)


def test_spectral_heads_that_are_grouped_convolutions_are_no_matrices() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(4, 8, 3), nn.Tanh(), nn.Conv1d(8, 16, 3, groups=2))
    optimizer = SpectralAdaFisher(model, spectral_heads=True)
    before = model[2].weight.detach().clone()
    model(draw(2, 4, 12)).square().mean().backward()
    optimizer.step()
    assert model[2].weight.isfinite().all() and not torch.equal(model[2].weight, before)


class SharedKernel(nn.Module):
    """One weight, used by a convolution with groups and by one without."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(4, 4, 1)
        self.dense, self.grouped = nn.Conv1d(4, 8, 3), nn.Conv1d(8, 8, 3, groups=2)
        self.grouped.weight = self.dense.weight
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.grouped(torch.tanh(self.dense(self.first(x)))))
        return self.head(F.gelu(hidden).mean(-1))


def test_spectral_kernels_shared_by_convolutions_of_different_groups_move() -> None:
    torch.manual_seed(0)
    model = SharedKernel()
    optimizer = SpectralAdaFisher(model)
    before = model.dense.weight.detach().clone()
    model(draw(2, 4, 12)).square().mean().backward()
    optimizer.step()
    assert model.dense.weight.isfinite().all() and not torch.equal(model.dense.weight, before)
