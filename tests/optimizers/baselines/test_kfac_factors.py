"""K-FAC's factors: exact for one position, equal for equal layers, and what is done to them before they are used."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close
from transformers.pytorch_utils import Conv1D

from hf_adafisher.optimizers.baselines.kfac import KFAC
from hf_adafisher.optimizers.baselines.kfac_inverse import damped_inverse, split_damping
from tests.cases import mlp

PLAIN: dict[str, Any] = {"kl_clip": None, "update_interval": 1, "inverse_interval": 1}


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def stepped(model: nn.Module, loss: Callable[[], Tensor], **options: Any) -> KFAC:
    """K-FAC after one step on `loss`."""
    optimizer = KFAC(model, **(PLAIN | options))
    loss().backward()
    optimizer.step()
    return optimizer


def block_gradient(weight: Tensor, bias: Tensor | None, input_axis: int) -> Tensor:
    """The gradient of a block as the matrix that its factors act on."""
    assert weight.grad is not None
    matrix = weight.grad.reshape(weight.shape[0], -1)
    if bias is not None:
        assert bias.grad is not None
        matrix = torch.cat([matrix, bias.grad.unsqueeze(input_axis)], dim=input_axis)
    return matrix


# ------------------------------------------------------------------------------ exactness


@pytest.mark.parametrize("bias", [True, False])
def test_for_one_example_every_block_of_a_deep_linear_net_is_the_exact_empirical_fisher(bias: bool) -> None:
    """Its Kronecker product is the outer product of the gradient with itself, in every layer."""
    torch.manual_seed(0)
    layers = [nn.Linear(a, b, bias=bias) for a, b in ((3, 4), (4, 5), (5, 2))]
    model = nn.Sequential(*layers).double()
    optimizer = stepped(model, lambda: F.mse_loss(model(normal(1, 3)), normal(1, 2, seed=1)))
    for layer in layers:
        state = optimizer.state[layer.weight]
        gradient = block_gradient(layer.weight, layer.bias, 1).flatten()
        product = torch.kron(state["output_grad_factor"], state["input_factor"]) / state["factor_weight"] ** 2
        assert_close(product, torch.outer(gradient, gradient))
        assert product.abs().max() > 1e-4


ONE_POSITION: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "linear": (lambda: nn.Linear(3, 4), normal(1, 3)),
    "conv1d": (lambda: Conv1D(4, 3), normal(1, 3)),
    "conv": (lambda: nn.Conv2d(2, 3, (2, 3), dilation=(2, 1)), normal(1, 2, 3, 3)),
    "padded conv": (lambda: nn.Conv1d(2, 3, 4, padding=1), normal(1, 2, 2)),
    "embedding": (lambda: nn.Embedding(5, 3), torch.tensor([[2]])),
}


@pytest.mark.parametrize("name", ONE_POSITION)
def test_for_one_position_every_kind_of_layer_is_exact(name: str) -> None:
    torch.manual_seed(0)
    make, x = ONE_POSITION[name]
    layer = make().double()
    optimizer = stepped(layer, lambda: (layer(x) * normal(*layer(x).shape, seed=2)).sum().square())
    state, bias = optimizer.state[layer.weight], getattr(layer, "bias", None)
    a, g = state["input_factor"], state["output_grad_factor"]
    input_first = name in ("conv1d", "embedding")
    left, right = (a, g) if input_first else (g, a)
    left, right = (f if f.dim() == 2 else f.diag() for f in (left, right))
    gradient = block_gradient(layer.weight, bias, 0 if input_first else 1).flatten()
    product = torch.kron(left, right) / state["factor_weight"] ** 2
    assert product.abs().max() > 0
    assert_close(product / product.abs().max(), torch.outer(gradient, gradient) / product.abs().max())


def test_for_many_positions_they_are_the_mean_and_the_sum_of_outer_products() -> None:
    """`A` a mean over all positions; `G` a sum over those of a term of the loss, of the terms' own gradients."""
    layer, x, target = nn.Linear(3, 4).double(), normal(6, 5, 3), normal(6, 5, 4, seed=1)
    optimizer = KFAC(layer, **PLAIN, stat_decay=0.0)
    optimizer.gradient_scale = 1 / 6  # six examples of five positions
    output = layer(x)
    loss = F.mse_loss(output, target, reduction="none").sum((1, 2)).mean()
    output.retain_grad()
    loss.backward()
    optimizer.step()
    rows = torch.cat([x, torch.ones(6, 5, 1, dtype=x.dtype)], dim=-1)
    own = 2 * (output - target).detach()
    assert_close(optimizer.state[layer.weight]["input_factor"], torch.einsum("btj,btk->jk", rows, rows) / 30)
    assert_close(optimizer.state[layer.weight]["output_grad_factor"], torch.einsum("bti,btj->ij", own, own) / 6)


# ----------------------------------------------------------------------------- identities


def same_updates(
    first: nn.Module, second: nn.Module, x: Tensor, y: Tensor, pairs: list[tuple[Tensor, Callable[[], Tensor]]]
) -> None:
    """Two layers make the same four steps; `pairs` hold a parameter of the first and its image in the second."""
    optimizers = [KFAC(m, lr=0.1, damping=0.1, update_interval=1, inverse_interval=2) for m in (first, second)]
    starts = [p.clone() for p, _ in pairs]
    for _ in range(4):
        for model, optimizer, inputs in zip((first, second), optimizers, (x, y), strict=True):
            optimizer.zero_grad()
            output = model(inputs)
            (output * output.detach().sin()).sum().backward()
            optimizer.step()
    for (p, image), start in zip(pairs, starts, strict=True):
        assert_close(p, image())
        assert not torch.equal(p, start)


def test_conv1d_is_a_transposed_linear() -> None:
    first, second, x = Conv1D(4, 3).double(), nn.Linear(3, 4).double(), normal(2, 5, 3)
    with torch.no_grad():
        second.weight.copy_(first.weight.t())
        second.bias.copy_(first.bias)
    same_updates(first, second, x, x, [(first.weight, lambda: second.weight.t()), (first.bias, lambda: second.bias)])


@pytest.mark.parametrize("chunk", [2**24, 1])
def test_conv2d_is_a_linear_over_patches(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the patches of only one example at a time fit into memory."""
    monkeypatch.setattr("hf_adafisher.fisher.layers.conv._PATCH_VALUES", chunk)
    options: dict[str, Any] = {"stride": (1, 2), "dilation": (2, 1), "padding": (1, 2)}
    first, second, x = nn.Conv2d(2, 4, (2, 3), **options).double(), nn.Linear(12, 4).double(), normal(3, 2, 5, 4)
    with torch.no_grad():
        second.weight.copy_(first.weight.flatten(1))
        second.bias.copy_(first.bias)
    patches = F.unfold(x, (2, 3), **options).transpose(1, 2)
    pairs = [(first.weight, lambda: second.weight.reshape(4, 2, 2, 3)), (first.bias, lambda: second.bias)]
    same_updates(first, second, x, patches, pairs)


def test_an_embedding_is_a_linear_over_one_hot_rows() -> None:
    first, second = nn.Embedding(6, 4).double(), nn.Linear(6, 4, bias=False).double()
    ids = torch.tensor([[1, 5, 1], [0, 2, 2]])  # 3 and 4 do not occur
    with torch.no_grad():
        second.weight.copy_(first.weight.t())
    one_hot = F.one_hot(ids, 6).double()
    same_updates(first, second, ids, one_hot, [(first.weight, lambda: second.weight.t())])


def test_equal_uses_of_a_tied_weight_are_one_use_of_twice_the_positions() -> None:
    """Where the uses agree in one side up to scale, the product for the sum of them is exact."""

    class Twice(nn.Module):
        def __init__(self, tied: bool) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 4, bias=False), nn.Linear(3, 4, bias=False)
            self.b.weight = self.a.weight if tied else self.b.weight
            self.tied = tied

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([self.a(x), 3 * (self.b if self.tied else self.a)(x)])

    first, second, x = Twice(True).double(), Twice(False).double(), normal(5, 3)
    second.load_state_dict(first.state_dict())
    second.b.weight.requires_grad_(False)
    same_updates(first, second, x, x, [(first.a.weight, lambda: second.a.weight)])


# ------------------------------------------------------------------------------- inverses


def test_pi_splits_the_damping_by_the_mean_eigenvalues() -> None:
    left, right = torch.diag(torch.tensor([1.0, 3.0])), torch.tensor([0.25, 0.25, 0.25, 0.25])
    pi = (2.0 / 0.25) ** 0.5
    assert split_damping(left, right, 0.09) == pytest.approx((pi * 0.3, 0.3 / pi))
    assert split_damping(right, left, 0.09) == pytest.approx((0.3 / pi, pi * 0.3))
    assert split_damping(torch.zeros(2, 2), right, 0.09) == pytest.approx((0.3, 0.3))
    assert split_damping(right, torch.zeros(2), 0.09) == pytest.approx((0.3, 0.3))


@pytest.mark.parametrize("scale", [1e-6, 7.0])
def test_how_the_scale_is_split_between_the_factors_does_not_matter(scale: float) -> None:
    a, g = (m @ m.t() for m in (normal(4, 6), normal(3, 5, seed=1)))
    products = []
    for left, right in ((a, g), (scale * a, g / scale)):
        for_left, for_right = split_damping(left, right, 0.2)
        products.append(torch.kron(damped_inverse(left, for_left, "w"), damped_inverse(right, for_right, "w")))
    assert_close(products[0], products[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_inverse_is_that_of_the_damped_factor(dtype: torch.dtype) -> None:
    factor = normal(6, 9, dtype=dtype)
    factor = factor @ factor.t()
    inverse = damped_inverse(factor, 0.5, "w")
    assert inverse.dtype == dtype
    identity = torch.eye(6, dtype=dtype)
    assert_close(inverse @ (factor + 0.5 * identity), identity, rtol=1e-5, atol=1e-5)
    assert_close(damped_inverse(factor.diagonal(), 0.5, "w"), 1 / (factor.diagonal() + 0.5))


def test_a_factor_that_float32_cannot_decompose_is_inverted_in_float64(caplog: pytest.LogCaptureFixture) -> None:
    """Rank one, in whole numbers, with a damping below float32's resolution of them."""
    vector = 30.0 * torch.arange(1, 41, dtype=torch.float64)
    factor = torch.outer(vector, vector).float()
    assert torch.linalg.cholesky_ex(factor + 1e-3 * torch.eye(40)).info.item() > 0
    inverse = damped_inverse(factor, 1e-3, "w")
    assert inverse.dtype == torch.float32 and not caplog.records  # with the damping that was asked for
    expected = (torch.eye(40) - torch.outer(vector, vector) / (1e-3 + vector @ vector)) / 1e-3
    assert_close(inverse, expected.float(), rtol=1e-4, atol=1e-2)


def test_a_factor_that_is_not_semi_definite_gets_more_damping_with_a_warning_or_an_error(
    caplog: pytest.LogCaptureFixture,
) -> None:
    factor = torch.diag(torch.tensor([1.0, -0.05]))
    with caplog.at_level(logging.WARNING):
        inverse = damped_inverse(factor, 0.01, "layer.weight")
    assert_close(inverse, torch.diag(torch.tensor([1 / 1.1, 1 / 0.05])), rtol=1e-5, atol=1e-5)
    assert "A factor of layer.weight is not positive definite with 1.0e-02" in caplog.text
    with pytest.raises(RuntimeError, match=r"factor of layer\.weight cannot be inverted.*raise damping"):
        damped_inverse(torch.diag(torch.tensor([1.0, -1e12])), 0.01, "layer.weight")


# ---------------------------------------------------------------------- what enters a factor


def test_moments_are_float32_under_autocast_and_in_low_precision() -> None:
    """A product inside an autocast region is made in bfloat16 unless told otherwise: three digits instead of seven."""
    x = normal(64, 8, dtype=torch.float32)
    for layer in (nn.Linear(8, 4), nn.Conv1d(8, 4, 1)):
        optimizer = KFAC(layer, **PLAIN, stat_decay=0.0)
        with torch.autocast("cpu", torch.bfloat16):
            layer(x if isinstance(layer, nn.Linear) else x.t().unsqueeze(0)).float().square().sum().backward()
        optimizer.step()
        factor = optimizer.state[layer.weight]["input_factor"]
        rows = F.pad(x, (0, 1), value=1.0)
        assert factor.dtype == torch.float32
        assert_close(factor, rows.t() @ rows / 64)
    low = nn.Linear(8, 4).to(torch.bfloat16)
    optimizer = KFAC(low, **PLAIN, stat_decay=0.0)
    low(x.bfloat16()).square().sum().backward()
    optimizer.step()
    rows = F.pad(x.bfloat16().float(), (0, 1), value=1.0)
    state = optimizer.state[low.weight]
    assert_close(state["input_factor"], rows.t() @ rows / 64)
    assert state["momentum_buffer"].dtype == torch.bfloat16
    assert {state[key].dtype for key in ("output_grad_factor", "row_inverse", "column_inverse")} == {torch.float32}


def test_micro_batches_are_one_batch() -> None:
    """Of equal size, their losses divided by their number: factors, inverses and weights are those of the batch."""
    states = []
    for parts in (1, 4):
        torch.manual_seed(0)
        model = mlp(4, 6, 3).double()
        optimizer = KFAC(model, **PLAIN)
        for x, y in zip(normal(12, 4).chunk(parts), normal(12, 3, seed=1).chunk(parts), strict=True):
            (F.mse_loss(model(x), y) / parts).backward()
        optimizer.step()
        states.append([model.state_dict(), optimizer.state_dict()])
    assert_close(states[0], states[1])


def test_the_loss_scale_is_taken_out() -> None:
    """A loss scaler multiplies the loss, unscales the gradients, and says by how much: nothing changes."""
    states = []
    for scale in (1.0, 1024.0):
        torch.manual_seed(0)
        model = mlp(4, 6, 3).double()
        optimizer = KFAC(model, **PLAIN)
        optimizer.gradient_scale = scale
        (scale * F.mse_loss(model(normal(12, 4)), normal(12, 3, seed=1))).backward()
        for p in model.parameters():
            assert p.grad is not None
            p.grad /= scale
        optimizer.step()
        states.append([model.state_dict(), optimizer.state_dict()])
    assert_close(states[0], states[1])


def test_loss_terms_divide_g_and_have_a_default() -> None:
    optimizer = KFAC(nn.Linear(3, 2))
    assert optimizer.loss_terms == 1.0
    for scale, terms in ((1 / 32, 32.0), (65536.0, 1.0), (1.0, 1.0)):
        optimizer.gradient_scale = scale
        assert optimizer.loss_terms == terms
    optimizer.loss_terms = 12
    assert optimizer.loss_terms == 12.0
    optimizer.loss_terms = None
    assert optimizer.loss_terms == 1.0
    for bad in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"loss_terms must be finite and > 0, or None, got {bad}"):
            optimizer.loss_terms = bad
