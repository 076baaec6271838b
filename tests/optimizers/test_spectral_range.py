"""The spectral AdaFisher at the ends of float32, with options that change between refreshes, and with odd heads."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from hf_adafisher import SpectralAdaFisher
from hf_adafisher.fisher.gradient import GradientDiagonal, gradient_estimate
from hf_adafisher.optimizers.diagnostics.layer_curvature import layer_curvature
from hf_adafisher.optimizers.polar import polar_factor
from hf_adafisher.optimizers.update import diagonal_direction


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
    for factor in gradient_estimate(GradientDiagonal(), grad * scale):
        product = product * factor
    square = grad.double().square()  # of each matrix: row means times column means over the mean
    expected = square.mean(-1, keepdim=True) * square.mean(-2, keepdim=True) / square.mean((-2, -1), keepdim=True)
    assert_close(product.double() / scale**2, expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("size", [1e-30, 1e-3, 1.0, 1e3, 1e30])
def test_spectral_diagonals_of_zeros_know_no_scale(size: float) -> None:
    m = draw(5, 4) * size
    moved = diagonal_direction(m.clone(), [(torch.zeros(5, 1), torch.ones(1, 4))], 0.1)
    assert_close(moved, diagonal_direction(draw(5, 4), [()], 0.1))
    assert_close(moved.square().mean().sqrt(), torch.tensor(1.0))


def test_spectral_options_that_change_between_refreshes_take_effect_at_once() -> None:
    """Also where the metric was made before: a resumed run would make it from the new options."""

    def weights(change: bool, reload: bool) -> Tensor:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 2))
        optimizer = SpectralAdaFisher(model, lr=0.1, update_interval=100)
        for step in range(4):
            if step == 2 and change:
                optimizer.param_groups[0].update(relative_damping=10.0, input_exponent=0.0)
            if step == 2 and reload:
                optimizer.load_state_dict(optimizer.state_dict())
            optimizer.zero_grad()
            model(draw(9, 6)).square().mean().backward()
            optimizer.step()
        return model[2].weight.detach()  # type: ignore[return-value]

    assert not torch.equal(weights(True, False), weights(False, False))
    assert_close(weights(True, False), weights(True, True), rtol=0, atol=0)


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


def test_spectral_steps_are_not_described_as_divisions_by_the_diagonal() -> None:
    with pytest.raises(TypeError, match="about AdaFisher and AdaFisherW, got SpectralAdaFisher"):
        layer_curvature(SpectralAdaFisher(nn.Linear(3, 2)))  # type: ignore[arg-type]
