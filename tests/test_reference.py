"""The oracle itself: against autograd, against torch's optimizers, and by identities that need no oracle."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from tests.cases import (
    CASES,
    ActivatedBatchNorm,
    ActivatedGroupNorm,
    Case,
    ChannelsFirstLayerNorm,
    RenamedConv,
    StandardizedConv,
    regression,
)
from tests.reference import (
    Average,
    Kind,
    ReferenceAdaFisher,
    Window,
    computes_its_class,
    conv_output_loop,
    conv_product,
    gradient_factors,
    input_factor_loop,
    kind_of,
    kronecker_gradient_factors,
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


class RenamedLayerNorm(nn.LayerNorm):
    """Still a LayerNorm."""


class RenamedGroupNorm(nn.GroupNorm):
    """Still a GroupNorm."""


class RenamedBatchNorm(nn.BatchNorm2d):
    """Still a BatchNorm."""


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


CONVOLUTIONS = [
    nn.Conv1d(3, 4, 2),
    nn.Conv1d(4, 6, 3, stride=2, padding=2, groups=2, bias=False),
    nn.Conv2d(2, 3, (2, 3), stride=(1, 2), padding=(1, 2), dilation=(2, 1)),
    nn.Conv2d(3, 6, 3, padding=1, groups=3),
    nn.Conv2d(2, 3, (2, 4), padding="same", dilation=(3, 1)),
    nn.Conv2d(2, 3, 3, padding="valid", stride=2),
    nn.Conv2d(2, 3, 3, padding=(2, 1), padding_mode="reflect"),
    nn.Conv2d(2, 3, 3, padding=(3, 1), padding_mode="replicate", stride=2),
    nn.Conv2d(2, 3, (2, 4), padding="same", padding_mode="circular"),
    nn.Conv3d(2, 4, (2, 1, 3), padding=(1, 0, 2), dilation=(1, 1, 2), groups=2),
]


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("conv", CONVOLUTIONS, ids=str)
def test_patches_times_weights_are_the_convolution(conv: nn.Module, batched: bool) -> None:
    """So the patches are the ones that torch multiplies with, in the order of the weight."""
    conv = copy.deepcopy(conv).double()
    assert isinstance(conv, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    torch.manual_seed(0)
    conv.reset_parameters()
    x = normal(*((2,) if batched else ()), conv.in_channels, *(5, 6, 4)[: len(conv.kernel_size)])
    assert_close(conv_output_loop(conv, x), conv(x))


@pytest.mark.parametrize(("padding", "stride", "dilation"), [(0, 1, 1), (2, 1, 1), (1, 2, 2), (3, 3, 1)])
def test_conv_input_factor_is_the_mean_square_of_unfolded_patches(padding: int, stride: int, dilation: int) -> None:
    """Through torch's own unfold."""
    x = normal(2, 3, 6, 5)
    window = Window((3, 2), (stride,) * 2, (dilation,) * 2, ((padding,) * 2,) * 2)
    patches = F.unfold(x, (3, 2), dilation, padding, stride)
    assert_close(input_factor_loop("conv", x, window=window), patches.square().mean((0, 2)))


def test_conv_output_grad_factor_runs_over_batch_and_positions() -> None:
    """With a batch axis and without."""
    g, window = normal(2, 3, 4, 5), Window((1, 1), (1, 1), (1, 1), ((0, 0), (0, 0)))
    assert_close(output_grad_factor_loop("conv", g, window=window), g.square().mean((0, 2, 3)))
    assert_close(output_grad_factor_loop("conv", g[0], window=window), g[0].square().mean((1, 2)))


@pytest.mark.parametrize("shape", [(6, 4), (3, 4, 5), (2, 4, 3, 2), (2, 4, 3, 2, 2)])
def test_channels_in_second_place_are_normalised(shape: tuple[int, ...]) -> None:
    """As torch's own norms without parameters leave them, in training mode."""
    x = normal(*shape) * 3 + 1
    rest = [axis for axis in range(x.dim()) if axis != 1]
    batch_norm = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[x.dim()]
    expected = batch_norm(4, eps=0.1, affine=False).double()(x)
    assert_close(input_factor_loop("batchnorm", x, eps=0.1), expected.square().mean(rest))
    expected = nn.GroupNorm(2, 4, eps=0.1, affine=False)(x)
    assert_close(input_factor_loop("groupnorm", x, eps=0.1, groups=2), expected.square().mean(rest))
    for kind in ("batchnorm", "groupnorm"):
        assert_close(output_grad_factor_loop(kind, x), x.square().mean(rest))


def test_a_grouped_product_is_the_dense_one_at_the_weights_that_exist() -> None:
    """Factors run over all channels; group 1 reads the second half of them."""
    s, h = normal(6), normal(4, 2, 3, seed=1)
    dense = torch.einsum("o,cij->ocij", s, h)
    product = conv_product(s, h.flatten(), torch.Size((6, 2, 2, 3)))
    assert_close(product, torch.cat([dense[:3, :2], dense[3:, 2:]]))
    assert_close(conv_product(s, h.flatten(), torch.Size((6, 4, 2, 3))), dense)
    assert_close(conv_product(s, h.flatten(), torch.Size((6, 24))), outer(s, h.flatten()))


def test_gradient_factors_of_a_convolution() -> None:
    """A rank-one square is recovered up to its mean, group by group; a matrix has its row and column means."""
    s, h = normal(6).square(), normal(4, 2, 3, seed=1).square()
    ours = kronecker_gradient_factors(conv_product(s, h, torch.Size((6, 2, 2, 3))).sqrt(), groups=2)
    halves = torch.stack([h[:2].mean(), h[2:].mean()]).repeat_interleave(3)
    assert_close(ours[0], s * halves)
    assert_close(ours[1], h * torch.stack([s[:3].mean(), s[3:].mean()]).repeat_interleave(2)[:, None, None])
    matrix = normal(13, 14)
    assert_close(kronecker_gradient_factors(matrix, groups=1), [v.flatten() for v in gradient_factors(matrix)])


@pytest.mark.parametrize(
    ("kind", "layer", "expected"),
    [
        ("conv", nn.Conv2d(4, 4, 2), True),
        ("conv", RenamedConv(4, 4, 2, groups=2), True),
        ("conv", StandardizedConv(4, 4, 2), False),
        ("layernorm", RenamedLayerNorm(4), True),
        ("layernorm", ChannelsFirstLayerNorm(4), False),
        ("groupnorm", ActivatedGroupNorm(2, 4), False),
        ("groupnorm", RenamedGroupNorm(2, 4), True),
        ("batchnorm", ActivatedBatchNorm(4), False),
        ("batchnorm", RenamedBatchNorm(4), True),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else str(value),
)
def test_a_layer_that_is_one_in_name_only_is_not_believed(kind: Kind, layer: nn.Module, expected: bool) -> None:
    """One that standardises its weight is no convolution; one that only wraps the call is."""
    layer, x = copy.deepcopy(layer).double(), normal(2, 4, 4, 4) * 2 + 1
    assert kind_of(layer) == kind
    with torch.no_grad():
        for seed, param in enumerate(layer.parameters()):
            param.copy_(normal(*param.shape, seed=seed))
        assert computes_its_class(kind, layer, x, layer(x)) is expected


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
    left, right = normal(13).square(), normal(14, seed=1).square()
    rows, columns = gradient_factors(outer(left, right).sqrt())
    assert_close(rows, left[:, None] * right.mean())
    assert_close(columns, right[None] * left.mean())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "kind", ["linear", "layernorm", "rmsnorm", "embedding", "conv", "grouped", "unbatched", "groupnorm"]
)
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
    elif kind == "groupnorm":
        layer = nn.GroupNorm(2, 4)
    elif kind in ("conv", "grouped", "unbatched"):
        layer = nn.Conv2d(4, 6, (3, 2), padding=(1, 0), groups=2 if kind == "grouped" else 1, bias=bias)
        x = normal(*(() if kind == "unbatched" else (1,)), 4, 1, 2)
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
    """Neither under no_grad, nor when nobody calls backward."""
    model = nn.Linear(3, 2).double()
    twin = ReferenceAdaFisher(model, decoupled=True, **SETTINGS)
    model(normal(4, 3) * 100)
    with torch.no_grad():
        model(normal(4, 3) * 100)
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
