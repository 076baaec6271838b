"""The oracle itself: against autograd, against torch's optimizers, and by identities that need no oracle."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from tests.cases import CASES, Case, regression
from tests.reference import (
    Average,
    ReferenceAdaFisher,
    combine_axes,
    gradient_factors,
    input_factor_loop,
    minmax,
    outer,
    output_grad_factor_loop,
)

SETTINGS: dict[str, Any] = {
    "lr": 0.01,
    "beta": 0.9,
    "damping": 0.1,
    "ema_decay": 0.8,
    "update_interval": 2,
    "weight_decay": 0.01,
}


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers in float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5), (2, 3, 4, 5)])
def test_factors_are_means_of_squares(shape: tuple[int, ...]) -> None:
    """For vectors, batches, sequences, and more axes."""
    x = normal(*shape)
    expected = x.reshape(-1, 5).square().mean(0)
    assert_close(input_factor_loop("linear", x), expected)
    assert_close(output_grad_factor_loop("linear", x), expected)


def test_embedding_is_a_linear_on_one_hot_rows() -> None:
    """Its input factor is the frequency of each token."""
    tokens = torch.tensor([[0, 3, 3], [6, 3, 0]])
    factor = input_factor_loop("embedding", tokens, vocabulary=7)
    assert_close(factor, input_factor_loop("linear", F.one_hot(tokens, 7).double()))
    assert_close(factor, torch.tensor([2, 0, 0, 3, 0, 0, 1], dtype=torch.float64) / 6)


def test_norm_input_is_normalised() -> None:
    """As torch's own norms without parameters leave it."""
    x = normal(2, 3, 4, 5) * 3 + 1
    layer = nn.LayerNorm(5, eps=1e-3, elementwise_affine=False)
    assert_close(input_factor_loop("layernorm", x, eps=1e-3), layer(x).reshape(-1, 5).square().mean(0))
    both = nn.LayerNorm((4, 5), eps=1e-3, elementwise_affine=False)
    expected = both(x).reshape(-1, 20).square().mean(0)
    assert_close(input_factor_loop("layernorm", x, eps=1e-3, channel_axes=2), expected)
    rms = nn.RMSNorm(5, eps=1e-3, elementwise_affine=False)
    assert_close(input_factor_loop("rmsnorm", x, eps=1e-3), rms(x).reshape(-1, 5).square().mean(0))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([2.0, 4.0, 3.0], [0.0, 1.0, 0.5]),
        ([7.0, 7.0], [1.0, 1.0]),
        ([0.0], [1.0]),
        ([1e-30, 2e-30], [0.0, 1.0]),
    ],
)
def test_minmax(given: list[float], expected: list[float]) -> None:
    """It is relative, and ones where there is no shape."""
    assert minmax(torch.tensor(given, dtype=torch.float64)).tolist() == expected


def test_average_is_bias_corrected() -> None:
    """The first value counts in full; the second by 1 / (1 + decay)."""
    average = Average(0.8)
    average.add(torch.tensor([3.0]))
    assert_close(average.read(), torch.tensor([3.0]))
    average.add(torch.tensor([6.0]))
    assert_close(average.read(), torch.tensor([(0.8 * 3 + 6) / 1.8]))


def test_gradient_factors() -> None:
    """Row and column means of the squared gradient; a rank-one square is recovered up to its mean."""
    left, right = normal(3).square(), normal(4, seed=1).square()
    rows, columns = gradient_factors(outer(left, right).sqrt())
    assert_close(rows, left * right.mean())
    assert_close(columns, right * left.mean())
    assert_close(combine_axes([left, right], torch.Size([3, 4])), outer(left, right))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["linear", "layernorm", "rmsnorm", "embedding"])
def test_one_position_gives_the_squared_gradient(kind: str, bias: bool) -> None:
    """With N = 1 the diagonal of the Kronecker product is the squared gradient itself."""
    layer: nn.Module
    x = normal(1, 4)
    if kind == "linear":
        layer = nn.Linear(4, 3, bias=bias)
    elif kind == "layernorm":
        layer = nn.LayerNorm(4, bias=bias)
    elif kind == "rmsnorm":
        layer = nn.RMSNorm(4)
    else:
        layer, x = nn.Embedding(6, 4), torch.tensor([[2]])
    layer.double()
    twin = ReferenceAdaFisher(layer, decoupled=True, **(SETTINGS | {"lr": 0.0}))
    layer(x).pow(3).sum().backward()
    twin.step()
    for param in layer.parameters():
        assert param.grad is not None
        assert_close(twin.fisher_diagonal(param, normalized=False), param.grad**2)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_watching_changes_no_gradient(case: Case) -> None:
    """The probes are invisible: gradients are bitwise those of a model that nobody watches."""
    plain = case.build()
    watched = copy.deepcopy(plain)
    ReferenceAdaFisher(watched, decoupled=True, **SETTINGS)
    for model in (plain, watched):
        case.loss(model, torch.Generator().manual_seed(0)).backward()
    for (name, left), right in zip(plain.named_parameters(), watched.parameters(), strict=True):
        if left.grad is None or right.grad is None:
            assert left.grad is right.grad is None, name
        else:
            assert torch.equal(left.grad, right.grad), name


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_case_trains(case: Case) -> None:
    """Every trainable parameter with a gradient moves, and only those."""
    model = case.build().double()
    before = copy.deepcopy(model.state_dict())
    twin = ReferenceAdaFisher(model, decoupled=True, **SETTINGS)
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        twin.zero_grad()
        case.loss(model, generator).backward()
        twin.step()
    for name, param in model.named_parameters():
        moves = param.requires_grad and name not in case.no_gradient
        assert torch.equal(before[name], param) != moves, name


@pytest.mark.parametrize("decoupled", [True, False])
def test_constant_factors_are_plain_momentum(decoupled: bool) -> None:
    """One channel everywhere: all factors are one; the step is bias-corrected momentum over 1 + damping."""
    model = nn.Linear(1, 1).double()
    other = copy.deepcopy(model)
    twin = ReferenceAdaFisher(model, decoupled=decoupled, **SETTINGS)
    momentum = {param: torch.zeros_like(param) for param in other.parameters()}
    loss = regression(5, 1)
    for step in range(1, 8):
        for net in (model, other):
            net.zero_grad()
            loss(net, torch.Generator().manual_seed(step)).backward()
        twin.step()
        with torch.no_grad():
            for param, average in momentum.items():
                assert param.grad is not None
                decay = 0.01 * param
                average.lerp_(param.grad + (not decoupled) * decay, 0.1)
                direction = average / (1 - 0.9**step) / 1.1
                param.sub_(0.01 * (direction + decoupled * decay))
        for left, right in zip(model.parameters(), other.parameters(), strict=True):
            assert_close(left, right)


def test_a_forward_without_backward_does_not_count() -> None:
    """Neither under no_grad, nor in eval mode, nor when nobody calls backward."""
    model = nn.Linear(3, 2).double()
    twin = ReferenceAdaFisher(model, decoupled=True, **SETTINGS)
    model(normal(4, 3) * 100)
    with torch.no_grad():
        model(normal(4, 3) * 100)
    model.eval()
    model(normal(4, 3) * 100).sum().backward()
    model.train()
    x = normal(4, 3, seed=1)
    model(x).sum().backward()
    twin.step()
    assert_close(twin.watched[0].input_factor.read(), input_factor_loop("linear", x))


def test_micro_batches_equal_one_batch() -> None:
    """Two backward passes over halves give the factors of one over the whole (the same sum loss)."""
    x = normal(6, 3)
    diagonals = []
    for parts in ([x], [x[:2], x[2:]]):
        model = nn.Linear(3, 2).double()
        nn.init.constant_(model.weight, 0.5)
        nn.init.zeros_(model.bias)
        twin = ReferenceAdaFisher(model, decoupled=True, **SETTINGS)
        for part in parts:
            model(part).pow(3).sum().backward()
        twin.step()
        diagonals.append(twin.fisher_diagonal(model.weight))
    assert_close(*diagonals)
