"""Every layer rule: against the loops of the definition, by identities, and exactly where it can be exact."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm
from transformers.pytorch_utils import Conv1D

from hf_adafisher import AdaFisher, AdaFisherW
from hf_adafisher.fisher import find_rule
from tests.cases import ActivatedBatchNorm, ActivatedGroupNorm, ChannelsFirstLayerNorm, RenamedConv, StandardizedConv
from tests.reference import Kind, Window, conv_product, input_factor_loop, minmax, output_grad_factor_loop

LEADS = [(), (1,), (6,), (2, 3), (2, 3, 2), (2, 1, 2, 3)]
"""Everything before the channels: a vector, one row, a batch, a sequence, and more axes."""


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Normal numbers, the same for every precision."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@dataclass(frozen=True)
class Layer:
    """A layer with a rule, and how to describe it to the loops."""

    name: str
    make: Callable[[], nn.Module]
    kind: Kind
    channels: tuple[int, ...]
    outputs: tuple[int, ...]
    options: dict[str, Any]

    def build(self, dtype: torch.dtype = torch.float64) -> nn.Module:
        """A new layer with random weights in all of its parameters."""
        layer = self.make()
        for seed, param in enumerate(layer.parameters()):
            with torch.no_grad():
                param.copy_(normal(*param.shape, seed=100 + seed))
        return layer.to(dtype)

    def batch(self, lead: tuple[int, ...], dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
        """Inputs; for an embedding token numbers, some of them repeated."""
        if self.kind == "embedding":
            size = self.options["vocabulary"]
            return torch.randint(0, size, lead, generator=torch.Generator().manual_seed(seed))
        return normal(*lead, *self.channels, seed=seed, dtype=dtype) * 2 + 1

    @property
    def grad_options(self) -> dict[str, int]:
        """What of `options` the output gradient's loop takes."""
        return {key: value for key, value in self.options.items() if key == "channel_axes"}


LAYERS = (
    Layer("linear", lambda: nn.Linear(4, 3), "linear", (4,), (3,), {}),
    Layer("linear_without_bias", lambda: nn.Linear(4, 3, bias=False), "linear", (4,), (3,), {}),
    Layer("linear_one_output", lambda: nn.Linear(4, 1), "linear", (4,), (1,), {}),
    Layer("conv1d", lambda: Conv1D(3, 4), "conv1d", (4,), (3,), {}),
    Layer("embedding", lambda: nn.Embedding(7, 3), "embedding", (), (3,), {"vocabulary": 7}),
    Layer(
        "embedding_padding",
        lambda: nn.Embedding(7, 3, padding_idx=2),
        "embedding",
        (),
        (3,),
        {"vocabulary": 7, "padding": 2},
    ),
    Layer("layernorm", lambda: nn.LayerNorm(4, eps=1e-2), "layernorm", (4,), (4,), {"eps": 1e-2}),
    Layer(
        "layernorm_without_bias",
        lambda: nn.LayerNorm(4, bias=False),
        "layernorm",
        (4,),
        (4,),
        {"eps": 1e-5},
    ),
    Layer(
        "layernorm_two_axes",
        lambda: nn.LayerNorm((2, 4)),
        "layernorm",
        (2, 4),
        (2, 4),
        {"eps": 1e-5, "channel_axes": 2},
    ),
    Layer("rmsnorm", lambda: nn.RMSNorm(4, eps=1e-2), "rmsnorm", (4,), (4,), {"eps": 1e-2}),
    Layer(
        "rmsnorm_default_eps",
        lambda: nn.RMSNorm(4),
        "rmsnorm",
        (4,),
        (4,),
        {"eps": torch.finfo(torch.float64).eps},
    ),
    Layer("llama_rmsnorm", lambda: LlamaRMSNorm(4, eps=1e-2), "rmsnorm", (4,), (4,), {"eps": 1e-2}),
    Layer("gemma_rmsnorm", lambda: Gemma3RMSNorm(4, eps=1e-2), "rmsnorm", (4,), (4,), {"eps": 1e-2}),
    Layer("t5_layernorm", lambda: T5LayerNorm(4, eps=1e-2), "rmsnorm", (4,), (4,), {"eps": 1e-2}),
)
HALF_FLOAT32 = ("llama_rmsnorm", "gemma_rmsnorm", "t5_layernorm")
each_layer = pytest.mark.parametrize("record", LAYERS, ids=lambda record: record.name)


def input_factor(layer: nn.Module, x: Tensor) -> Tensor:
    """The rule's input factor of one call, flat."""
    rule = find_rule(layer)
    assert rule is not None
    sums, count = rule.input_sums(layer, [x], layer(x))
    return (sums / count).flatten()


def output_grad_factor(layer: nn.Module, x: Tensor, g: Tensor) -> Tensor:
    """The rule's output-gradient factor of one call, flat; the count is the input's."""
    rule = find_rule(layer)
    assert rule is not None
    _, count = rule.input_sums(layer, [x], layer(x))
    return (rule.output_grad_sums(layer, g) / count).flatten()


def raw_diagonals(layer: nn.Module, loss: Callable[[nn.Module], Tensor]) -> dict[str, Tensor]:
    """The optimizer's diagonal of every parameter after one step, neither normalised nor damped."""
    with AdaFisherW(layer, lr=0.0) as optimizer:
        loss(layer).backward()
        optimizer.step()
        named = layer.named_parameters()
        return {name: optimizer.fisher_diagonal(param, normalized=False) for name, param in named}


# --- the definition ---------------------------------------------------------------------------


@pytest.mark.parametrize("lead", LEADS, ids=str)
@each_layer
def test_input_factor_is_its_definition(record: Layer, lead: tuple[int, ...]) -> None:
    """(1/N) sum_n x_nj^2 over every position."""
    x = record.batch(lead)
    expected = input_factor_loop(record.kind, x, **record.options)
    assert_close(input_factor(record.build(), x), expected)


@pytest.mark.parametrize("lead", LEADS, ids=str)
@each_layer
def test_output_grad_factor_is_its_definition(record: Layer, lead: tuple[int, ...]) -> None:
    """(1/N) sum_n g_ni^2 over every position."""
    x, g = record.batch(lead), normal(*lead, *record.outputs, seed=3)
    expected = output_grad_factor_loop(record.kind, g, **record.grad_options)
    assert_close(output_grad_factor(record.build(), x, g), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@each_layer
def test_factors_are_summed_in_float32(record: Layer, dtype: torch.dtype) -> None:
    """In a low-precision model too: 300 squared is no float16, and 1 + 1/512 is no bfloat16."""
    layer, x = record.build(dtype), record.batch((9, 8), dtype)
    g = normal(9, 8, *record.outputs, seed=3, dtype=dtype) * 300
    options = record.options | ({"eps": torch.finfo(dtype).eps} if record.name == "rmsnorm_default_eps" else {})
    factor, expected = input_factor(layer, x), input_factor_loop(record.kind, x, **options)
    assert factor.dtype == torch.float32
    assert_close(factor, expected.float())
    factor = output_grad_factor(layer, x, g)
    assert factor.dtype == torch.float32
    assert_close(factor, output_grad_factor_loop(record.kind, g, **record.grad_options).float())


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(LAYERS), st.lists(st.integers(1, 3), max_size=4), st.integers(0, 999))
def test_any_shape(record: Layer, lead: list[int], seed: int) -> None:
    """Whatever stands before the channels."""
    x, g = record.batch(tuple(lead), seed=seed), normal(*lead, *record.outputs, seed=seed + 1)
    layer = record.build()
    assert_close(input_factor(layer, x), input_factor_loop(record.kind, x, **record.options))
    expected = output_grad_factor_loop(record.kind, g, **record.grad_options)
    assert_close(output_grad_factor(layer, x, g), expected)


@each_layer
def test_recorded_pair_is_the_mean_over_calls(record: Layer) -> None:
    """Through hooks: two calls with different numbers of positions count by position, not by call."""
    layer = record.build()
    batches = [record.batch((2, 3)), record.batch((5,), seed=1)]
    weights = [normal(2, 3, *record.outputs, seed=5), normal(5, *record.outputs, seed=6)]

    def loss(layer: nn.Module) -> Tensor:
        return sum((layer(x) * w).sum() for x, w in zip(batches, weights, strict=True))

    diagonals = raw_diagonals(layer, loss)
    flat_x = torch.cat([x.reshape(-1, *record.channels) for x in batches])
    flat_g = torch.cat([w.reshape(-1, *record.outputs) for w in weights])
    h = input_factor_loop(record.kind, flat_x, **record.options)
    s = output_grad_factor_loop(record.kind, flat_g, **record.grad_options)
    expected = {
        "linear": torch.outer(s, h),
        "conv1d": torch.outer(h, s),
        "embedding": torch.outer(h, s),
    }.get(record.kind, s * h if record.kind in ("layernorm", "rmsnorm") else s)
    shape = next(layer.parameters()).shape
    assert_close(diagonals["weight"], expected.reshape(shape))
    if "bias" in diagonals:
        assert_close(diagonals["bias"], s.reshape(diagonals["bias"].shape))


# --- identities -------------------------------------------------------------------------------


def test_conv1d_is_a_transposed_linear() -> None:
    """The same numbers, transposed."""
    linear, conv = nn.Linear(4, 3).double(), Conv1D(3, 4).double()
    with torch.no_grad():
        conv.weight.copy_(linear.weight.t())
        conv.bias.copy_(linear.bias)
    x = normal(2, 5, 4)
    left = raw_diagonals(linear, lambda layer: layer(x).pow(3).sum())
    right = raw_diagonals(conv, lambda layer: layer(x).pow(3).sum())
    assert_close(left["weight"], right["weight"].t())
    assert_close(left["bias"], right["bias"])


def test_embedding_is_a_linear_on_one_hot_rows() -> None:
    """The same numbers, transposed: nothing is approximated."""
    embedding, linear = nn.Embedding(7, 3).double(), nn.Linear(7, 3, bias=False).double()
    with torch.no_grad():
        linear.weight.copy_(embedding.weight.t())
    tokens = torch.tensor([[0, 3, 3, 6], [1, 1, 3, 0]])
    left = raw_diagonals(embedding, lambda layer: layer(tokens).pow(3).sum())
    right = raw_diagonals(linear, lambda layer: layer(F.one_hot(tokens, 7).double()).pow(3).sum())
    assert_close(left["weight"], right["weight"].t())


def test_tied_weight_adds_its_uses() -> None:
    """One matrix as embedding and as head: the sum of what each use alone would give."""
    tokens = torch.tensor([[0, 3, 3, 6], [1, 1, 3, 0]])

    class Tied(nn.Module):
        def __init__(self, tie: bool) -> None:
            super().__init__()
            self.embedding, self.head = nn.Embedding(7, 3), nn.Linear(3, 7, bias=False)
            with torch.no_grad():
                self.embedding.weight.copy_(normal(7, 3))
                self.head.weight.copy_(normal(7, 3))
            if tie:
                self.head.weight = self.embedding.weight

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(self.embedding(tokens))

    def loss(model: nn.Module) -> Tensor:
        return F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())

    tied = raw_diagonals(Tied(True).double(), loss)
    apart = raw_diagonals(Tied(False).double(), loss)
    assert list(tied) == ["embedding.weight"]
    assert_close(tied["embedding.weight"], apart["embedding.weight"] + apart["head.weight"])


def test_a_shared_layer_counts_every_call() -> None:
    """Called twice on halves is called once on the whole."""
    x, layer = normal(6, 4), nn.Linear(4, 3).double()
    whole = raw_diagonals(copy.deepcopy(layer), lambda net: net(x).pow(3).sum())
    halves = raw_diagonals(layer, lambda net: net(x[:2]).pow(3).sum() + net(x[2:]).pow(3).sum())
    for name, diagonal in whole.items():
        assert_close(halves[name], diagonal)


# --- exactness --------------------------------------------------------------------------------


@pytest.mark.parametrize("lead", [(), (1,), (1, 1), (1, 1, 1)], ids=str)
@each_layer
def test_one_position_is_exact(record: Layer, lead: tuple[int, ...]) -> None:
    """With N = 1 the diagonal, before it is normalised, is the squared gradient that autograd gives."""
    layer, x = record.build(), record.batch(lead)
    diagonals = raw_diagonals(layer, lambda net: net(x).pow(3).sum())
    # The RMSNorms of transformers compute in float32 whatever they are given: its default tolerances there.
    tolerance: dict[str, Any] = {"rtol": 1.3e-6, "atol": 1e-5} if record.name in HALF_FLOAT32 else {}
    for name, param in layer.named_parameters():
        assert param.grad is not None
        assert_close(diagonals[name], param.grad**2, **tolerance)


@pytest.mark.parametrize("bias", [True, False])
def test_one_position_is_exact_inside_a_network(bias: bool) -> None:
    """For every layer of a network at once."""
    net = nn.Sequential(
        nn.Linear(4, 6, bias=bias),
        nn.LayerNorm(6, bias=bias),
        nn.GELU(),
        nn.Linear(6, 5, bias=bias),
        nn.RMSNorm(5),
        nn.Tanh(),
        nn.Linear(5, 3, bias=bias),
    ).double()
    diagonals = raw_diagonals(net, lambda net: F.cross_entropy(net(normal(1, 4)), torch.tensor([2])))
    assert len(diagonals) == (9 if bias else 5)
    for name, param in net.named_parameters():
        assert param.grad is not None
        assert_close(diagonals[name], param.grad**2)


@pytest.mark.parametrize("tokens", [[2], [5], [2, 2, 2, 5], [2, 2], [0, 5, 5, 6]], ids=str)
def test_the_padding_token_is_a_one_hot_row_of_zeros(tokens: list[int]) -> None:
    """torch gives its row no gradient: a Linear over one-hot rows has none there if that entry of them is zero."""
    ids, noise = torch.tensor([tokens]), normal(1, len(tokens), 3)
    embedding, linear = nn.Embedding(7, 3, padding_idx=2).double(), nn.Linear(7, 3, bias=False).double()
    one_hot = F.one_hot(ids, 7).double()
    one_hot[..., 2] = 0.0
    diagonal = raw_diagonals(embedding, lambda net: (net(ids) * noise).sum())["weight"]
    assert_close(diagonal, raw_diagonals(linear, lambda net: (net(one_hot) * noise).sum())["weight"].t())
    assert_close(embedding.weight.grad, linear.weight.grad.t() if linear.weight.grad is not None else None)
    assert not diagonal[2].any()
    if tokens == [2, 2, 2, 5]:  # the padding has no part in H, but in N and in S
        assert_close(diagonal[5], output_grad_factor_loop("embedding", noise) / 4)


@pytest.mark.parametrize("decoupled", [True, False])
@pytest.mark.parametrize("padding", [2, -1])
def test_the_row_of_the_padding_token_never_moves(padding: int, decoupled: bool) -> None:
    """Its Fisher is the damping alone, the divisor of the largest steps, but its momentum stays zero."""
    model = nn.Sequential(nn.Embedding(7, 3, padding_idx=padding), nn.Linear(3, 7)).double()
    start = model[0].weight.detach().clone()
    with (AdaFisherW if decoupled else AdaFisher)(model, lr=0.01, update_interval=2) as optimizer:
        for seed in range(5):
            tokens = torch.randint(0, 7, (4, 6), generator=torch.Generator().manual_seed(seed))
            tokens[:, -2:] = padding % 7
            optimizer.zero_grad()
            F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
            optimizer.step()
        damping = optimizer.param_groups[0]["damping"]
        assert_close(optimizer.fisher_diagonal(model[0].weight)[padding], torch.full((3,), damping).double())
    moved = (model[0].weight != start).all(dim=1)
    assert moved.tolist() == [row != padding % 7 for row in range(7)]


def test_normalised_diagonal_is_bounded() -> None:
    """F of a single use lies in [damping, 1 + damping] and reaches both ends."""
    layer = nn.Linear(4, 3).double()
    with AdaFisherW(layer, lr=0.0, damping=0.25) as optimizer:
        layer(normal(9, 4)).pow(3).sum().backward()
        optimizer.step()
        for param in layer.parameters():
            diagonal = optimizer.fisher_diagonal(param)
            low, high = diagonal.min(), diagonal.max()
            assert_close((low, high), (low.new_tensor(0.25), high.new_tensor(1.25)))


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_scale_of_the_loss_does_not_matter(scale: float) -> None:
    """The normalisation is relative: a tiny mean loss gives the diagonal of a large one."""
    diagonals = []
    for factor in (1.0, scale):
        torch.manual_seed(0)
        layer = nn.Linear(4, 3)
        with AdaFisherW(layer, lr=0.0) as optimizer:
            (factor * layer(normal(9, 4).float()).pow(3).sum()).backward()
            optimizer.step()
            diagonals.append([optimizer.fisher_diagonal(param) for param in layer.parameters()])
    for left, right in zip(*diagonals, strict=True):
        assert_close(left, right)


# --- layers whose channels come second: convolutions, BatchNorm, GroupNorm --------------------


@dataclass(frozen=True)
class MapLayer:
    """A layer over feature maps (N, C, *spatial), the shapes to try, and how to describe it to the loops."""

    name: str
    make: Callable[[], nn.Module]
    kind: Kind
    shapes: tuple[tuple[int, ...], ...]
    options: dict[str, Any]

    def build(self, dtype: torch.dtype = torch.float64) -> nn.Module:
        """A new layer with random weights in all of its parameters."""
        return Layer(self.name, self.make, self.kind, (), (), {}).build(dtype)

    def input_options(self, layer: nn.Module) -> dict[str, Any]:
        """What the loops need for the input."""
        return self.options | self.grad_options(layer)

    def grad_options(self, layer: nn.Module) -> dict[str, Any]:
        """What they need for the output's gradient."""
        return {"window": Window.of(layer)} if self.kind == "conv" else {}

    def weight_diagonal(self, s: Tensor, h: Tensor, layer: nn.Module) -> Tensor:
        """The raw diagonal of the weight."""
        shape = next(layer.parameters()).shape
        return conv_product(s, h, shape) if self.kind == "conv" else s * h


SEQUENCES = ((2, 4, 7), (1, 4, 6), (4, 6))
IMAGES = ((2, 4, 5, 6), (1, 4, 4, 4), (4, 5, 5))
VOLUMES = ((2, 4, 3, 3, 2), (4, 2, 4, 3))
ONE_POSITION = (1, 4)

MAP_LAYERS = (
    MapLayer("conv_1d", lambda: nn.Conv1d(4, 6, 3, padding=1), "conv", SEQUENCES, {}),
    MapLayer("conv_1d_strided", lambda: nn.Conv1d(4, 6, 2, stride=3, groups=2), "conv", SEQUENCES, {}),
    MapLayer("conv_2d", lambda: nn.Conv2d(4, 6, 3), "conv", IMAGES, {}),
    MapLayer("conv_2d_without_bias", lambda: nn.Conv2d(4, 3, (2, 3), bias=False), "conv", IMAGES, {}),
    MapLayer("conv_2d_one_output", lambda: nn.Conv2d(4, 1, 2, stride=2, padding=(0, 1)), "conv", IMAGES, {}),
    MapLayer(
        "conv_2d_grouped", lambda: nn.Conv2d(4, 6, 3, groups=2, padding=2, dilation=2, stride=3), "conv", IMAGES, {}
    ),
    MapLayer("conv_2d_depthwise", lambda: nn.Conv2d(4, 8, 2, groups=4, padding="same"), "conv", IMAGES, {}),
    MapLayer("conv_3d", lambda: nn.Conv3d(4, 2, (2, 1, 2), padding=(0, 1, 0), groups=2), "conv", VOLUMES, {}),
    MapLayer("batch_norm_1d", lambda: nn.BatchNorm1d(4, eps=0.1), "batchnorm", ((5, 4), (2, 4, 3)), {"eps": 0.1}),
    MapLayer("batch_norm_2d", lambda: nn.BatchNorm2d(4), "batchnorm", ((2, 4, 3, 2), (1, 4, 2, 2)), {"eps": 1e-5}),
    MapLayer("batch_norm_3d", lambda: nn.BatchNorm3d(4), "batchnorm", ((2, 4, 1, 3, 2),), {"eps": 1e-5}),
    MapLayer(
        "batch_norm_without_statistics",
        lambda: nn.BatchNorm2d(4, track_running_stats=False),
        "batchnorm",
        ((2, 4, 3, 2),),
        {"eps": 1e-5},
    ),
    MapLayer(
        "group_norm",
        lambda: nn.GroupNorm(2, 4, eps=0.1),
        "groupnorm",
        ((5, 4), (2, 4, 3), (2, 4, 3, 2), (1, 4, 1, 2, 3), ONE_POSITION),
        {"eps": 0.1, "groups": 2},
    ),
    MapLayer("group_norm_one_group", lambda: nn.GroupNorm(1, 4), "groupnorm", ((2, 4, 3),), {"eps": 1e-5, "groups": 1}),
    MapLayer(
        "group_norm_as_many_as_channels",
        lambda: nn.GroupNorm(4, 4),
        "groupnorm",
        ((2, 4, 3),),
        {"eps": 1e-5, "groups": 4},
    ),
)
each_map_layer = pytest.mark.parametrize("record", MAP_LAYERS, ids=lambda record: record.name)
each_map = pytest.mark.parametrize(
    ("record", "shape"),
    [(record, shape) for record in MAP_LAYERS for shape in record.shapes],
    ids=lambda value: value.name if isinstance(value, MapLayer) else str(value),
)


@each_map
def test_factors_over_maps_are_their_definition(record: MapLayer, shape: tuple[int, ...]) -> None:
    """Means of squares over batch and positions; a convolution's patches go over its padding too."""
    layer, x = record.build(), normal(*shape) * 2 + 1
    g = normal(*layer(x).shape, seed=3)
    expected = input_factor_loop(record.kind, x, **record.input_options(layer))
    assert_close(input_factor(layer, x), expected)
    assert_close(output_grad_factor(layer, x, g), output_grad_factor_loop(record.kind, g, **record.grad_options(layer)))


@each_map
def test_inputs_and_gradients_are_left_alone(record: MapLayer, shape: tuple[int, ...]) -> None:
    """They belong to the model: in float32, where no conversion makes a copy."""
    layer, x = record.build(torch.float32), normal(*shape).float()
    g = normal(*layer(x).shape, seed=3).float()
    kept = x.clone(), g.clone()
    statistics = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    rule = find_rule(layer)
    assert rule is not None
    with torch.no_grad():
        output = layer(x)
        after_forward = {name: buffer.clone() for name, buffer in layer.named_buffers()}
        rule.input_sums(layer, [x], output)
        rule.output_grad_sums(layer, g)
    assert torch.equal(x, kept[0]) and torch.equal(g, kept[1])
    assert_close(dict(layer.named_buffers()), after_forward, rtol=0, atol=0)
    assert statistics.keys() == after_forward.keys()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@each_map_layer
def test_factors_over_maps_are_summed_in_float32(record: MapLayer, dtype: torch.dtype) -> None:
    """As for every other layer: 300 squared is no float16, and 1 + 1/512 is no bfloat16."""
    layer, x = record.build(dtype), (normal(*record.shapes[0]) * 200 + 300).to(dtype)
    output = layer(x)
    g = (normal(*output.shape, seed=3) * 300).to(dtype)
    for factor, expected in (
        (input_factor(layer, x), input_factor_loop(record.kind, x, **record.input_options(layer))),
        (
            output_grad_factor(layer, x, g),
            output_grad_factor_loop(record.kind, g, **record.grad_options(layer)),
        ),
    ):
        assert factor.dtype == torch.float32
        assert_close(factor, expected.float())


@each_map_layer
def test_recorded_pair_over_maps_is_the_mean_over_calls(record: MapLayer) -> None:
    """Through hooks: calls on different shapes count by position; each has its own batch statistics."""
    layer = record.build()
    batches = [normal(*shape, seed=seed) + seed for seed, shape in enumerate(record.shapes)]
    weights = [normal(*layer(x).shape, seed=5 + seed) for seed, x in enumerate(batches)]

    def loss(layer: nn.Module) -> Tensor:
        return sum((layer(x) * w).sum() for x, w in zip(batches, weights, strict=True))

    diagonals = raw_diagonals(layer, loss)
    h = [input_factor_loop(record.kind, x, **record.input_options(layer)) for x in batches]
    s = [output_grad_factor_loop(record.kind, g, **record.grad_options(layer)) for g in weights]
    counts = [g.numel() / factor.numel() for g, factor in zip(weights, s, strict=True)]
    mean_h = sum(n * factor for n, factor in zip(counts, h, strict=True)) / sum(counts)
    mean_s = sum(n * factor for n, factor in zip(counts, s, strict=True)) / sum(counts)
    assert isinstance(mean_h, Tensor) and isinstance(mean_s, Tensor)
    assert_close(diagonals["weight"], record.weight_diagonal(mean_s, mean_h, layer))
    if "bias" in diagonals:
        assert_close(diagonals["bias"], mean_s)


@pytest.mark.parametrize("shape", [(1, 4), (1, 4, 1), (1, 4, 1, 1)], ids=str)
def test_one_position_of_a_group_norm_is_exact(shape: tuple[int, ...]) -> None:
    """The squared gradient that autograd gives."""
    layer = next(record for record in MAP_LAYERS if record.name == "group_norm").build()
    diagonals = raw_diagonals(layer, lambda net: (net(normal(*shape)) - 3).pow(3).sum())
    for name, param in layer.named_parameters():
        assert param.grad is not None
        assert_close(diagonals[name], param.grad**2)


@pytest.mark.parametrize(("layer", "shape"), [(nn.BatchNorm1d, (2, 4)), (nn.BatchNorm2d, (1, 4, 2, 1))], ids=str)
def test_two_positions_of_a_batch_norm_are_exact(layer: type[nn.Module], shape: tuple[int, ...]) -> None:
    """Standardised pairs are (-a, a): with one of them in the loss, twice the diagonal is the squared gradient."""
    norm = layer(4, eps=0.1).double()
    with torch.no_grad():
        for seed, param in enumerate(norm.parameters()):
            param.copy_(normal(4, seed=seed))
    diagonals = raw_diagonals(norm, lambda net: (net(normal(*shape)).movedim(1, -1).reshape(2, 4)[0] - 3).pow(3).sum())
    for name, param in norm.named_parameters():
        assert param.grad is not None
        assert_close(2 * diagonals[name], param.grad**2)


def test_batch_norm_over_sequences_is_batch_norm_over_their_positions() -> None:
    """(N, C, L) and (N L, C) are the same rows."""
    x, layer = normal(3, 4, 5), nn.BatchNorm1d(4).double()
    left = raw_diagonals(copy.deepcopy(layer), lambda net: (net(x) + x).pow(3).sum())
    flat = x.transpose(1, 2).reshape(-1, 4)
    right = raw_diagonals(layer, lambda net: (net(flat) + flat).pow(3).sum())
    assert_close(left, right)


def test_group_norm_of_one_group_is_a_layer_norm() -> None:
    """Over vectors; there the scale and the shift are the same too."""
    x = normal(6, 4)
    left = raw_diagonals(nn.GroupNorm(1, 4).double(), lambda net: (net(x) + x).pow(3).sum())
    right = raw_diagonals(nn.LayerNorm(4).double(), lambda net: (net(x) + x).pow(3).sum())
    assert_close(left, right)


@pytest.mark.parametrize("layer", [nn.BatchNorm2d(4), nn.GroupNorm(2, 4)], ids=str)
def test_the_scale_is_normalised_after_the_product_and_the_shift_is_not_scaled_by_it(layer: nn.Module) -> None:
    """F_scale = minmax(S H) + damping, F_shift = minmax(S) + damping."""
    layer, x = copy.deepcopy(layer).double(), normal(3, 4, 2, 2) * normal(4, 1, 1, seed=1) + 0.5
    g = normal(3, 4, 2, 2, seed=2) * normal(4, 1, 1, seed=3)
    with AdaFisherW(layer, lr=0.0, damping=0.25) as optimizer:
        (layer(x) * g).sum().backward()
        optimizer.step()
        kind: Kind = "batchnorm" if isinstance(layer, nn.BatchNorm2d) else "groupnorm"
        groups = {} if kind == "batchnorm" else {"groups": 2}
        h, s = input_factor_loop(kind, x, eps=1e-5, **groups), output_grad_factor_loop(kind, g)
        assert_close(optimizer.fisher_diagonal(layer.weight), minmax(s * h) + 0.25)
        assert_close(optimizer.fisher_diagonal(layer.bias), minmax(s) + 0.25)


def rules_after_a_step(model: nn.Module, x: Tensor) -> dict[str, str]:
    """Each parameter's rule, as `coverage()` tells it after one training step."""
    with AdaFisherW(model, lr=0.0) as optimizer:
        model(x).pow(3).sum().backward()
        optimizer.step()
        return {row.name: row.rule for row in optimizer.coverage()}


@pytest.mark.parametrize(
    ("layer", "shape", "rule"),
    [
        (nn.Conv1d(2, 3, 2), (2, 2, 4), "Conv"),
        (nn.Conv2d(2, 4, 2, groups=2), (2, 2, 4, 4), "Conv"),
        (nn.Conv2d(2, 3, 2, padding_mode="reflect", padding=1), (2, 4, 4), "Conv"),
        (nn.Conv3d(2, 3, 2), (2, 2, 2, 3, 2), "Conv"),
        (RenamedConv(2, 3, 2), (2, 2, 4, 4), "Conv"),
        (RenamedConv(2, 4, 2, groups=2), (2, 4, 4), "Conv"),
        (nn.BatchNorm1d(2), (4, 2), "BatchNorm"),
        (nn.BatchNorm2d(2), (4, 2, 2, 2), "BatchNorm"),
        (nn.BatchNorm3d(2), (4, 2, 2, 1, 2), "BatchNorm"),
        (nn.GroupNorm(1, 2), (4, 2, 3), "GroupNorm"),
        (nn.ConvTranspose1d(2, 3, 2), (2, 2, 4), "gradient factors"),
        (nn.ConvTranspose2d(2, 3, 2), (2, 2, 4, 4), "gradient factors"),
        (nn.ConvTranspose3d(2, 3, 2), (2, 2, 4, 4, 2), "gradient factors"),
        (nn.InstanceNorm1d(2, affine=True), (2, 2, 4), "gradient factors"),
        (nn.InstanceNorm2d(2, affine=True), (2, 2, 4, 4), "gradient factors"),
        (nn.InstanceNorm3d(2, affine=True), (2, 2, 4, 4, 2), "gradient factors"),
    ],
    ids=str,
)
def test_coverage_names_the_rule(layer: nn.Module, shape: tuple[int, ...], rule: str) -> None:
    """One name for every convolution, one for every BatchNorm."""
    assert set(rules_after_a_step(copy.deepcopy(layer), normal(*shape).float()).values()) == {rule}


def test_synchronised_batch_norm_has_no_rule() -> None:
    """Its statistics are those of all processes (and it does not run on a CPU)."""
    assert find_rule(nn.SyncBatchNorm(3)) is None


class CausalConv(nn.Conv1d):
    """Pads its own input, in front."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(F.pad(input, (self.dilation[0] * (self.kernel_size[0] - 1), 0)))


class ChompedConv(nn.Conv1d):
    """Cuts its own output."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input)[..., : input.shape[-1]]


class InnerForwardConv(nn.Conv2d):
    """Standardises its weight below `forward`, which stays torch's."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(input, weight - weight.mean((1, 2, 3), keepdim=True), bias)


class ActivatedConv(nn.Conv2d):
    """Has its rectifier inside."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).relu()


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (StandardizedConv(2, 3, 2), (2, 2, 4, 4)),
        (StandardizedConv(4, 4, 2, groups=2), (2, 4, 4, 4)),
        (InnerForwardConv(2, 3, 2), (2, 2, 4, 4)),
        (ActivatedConv(2, 3, 2), (2, 2, 4, 4)),
        (CausalConv(2, 3, 3), (2, 2, 5)),
        (ChompedConv(2, 3, 3, padding=2), (2, 2, 5)),
        (ActivatedBatchNorm(3), (2, 3, 4, 4)),
        (ActivatedGroupNorm(1, 3), (2, 3, 4, 4)),
        (ChannelsFirstLayerNorm(3), (2, 3, 4, 5)),
        (ChannelsFirstLayerNorm(3), (2, 3, 3, 3)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else str(value),
)
def test_a_layer_that_is_one_in_name_only_gets_gradient_factors(layer: nn.Module, shape: tuple[int, ...]) -> None:
    """In the form of its rule: S and H of a convolution, the squared gradient of a norm."""
    layer = copy.deepcopy(layer).double()
    with AdaFisherW(layer, lr=0.0, damping=0.25) as optimizer:
        (layer(normal(*shape)) + 1).pow(3).sum().backward()
        optimizer.step()
        assert {row.rule for row in optimizer.coverage()} == {"gradient factors"}
        weight = layer.weight
        assert isinstance(weight, nn.Parameter) and weight.grad is not None
        square = weight.grad.square()
        if weight.dim() == 1:
            expected = minmax(square)
        else:
            groups = layer.groups
            assert isinstance(groups, int)
            h = square.unflatten(0, (groups, -1)).mean(1).flatten(0, 1)
            expected = conv_product(minmax(square.flatten(1).mean(1)), minmax(h), weight.shape)
        assert_close(optimizer.fisher_diagonal(weight), expected + 0.25)


@pytest.mark.parametrize("layer", [nn.BatchNorm2d(3), ActivatedBatchNorm(3)], ids=lambda layer: type(layer).__name__)
def test_running_statistics_are_those_of_a_model_that_nobody_watches(layer: nn.Module) -> None:
    """Neither the normalised input nor the check of the numbers goes through the module again."""
    watched, alone = copy.deepcopy(layer), copy.deepcopy(layer)
    with AdaFisherW(watched, lr=0.0, update_interval=1) as optimizer:
        for seed in range(3):
            x = normal(4, 3, 2, 2, seed=seed).float() + 1
            alone(x)
            watched(x).pow(3).sum().backward()
            optimizer.step()
    assert_close(dict(watched.named_buffers()), dict(alone.named_buffers()), rtol=0, atol=0)


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv2d(3, 8, 3, padding=1), (2, 3, 6, 6)),
        (RenamedConv(3, 8, 3, padding=1), (2, 3, 6, 6)),
        (nn.BatchNorm2d(3), (2, 3, 6, 6)),
        (nn.GroupNorm(1, 3), (2, 3, 6, 6)),
    ],
    ids=str,
)
def test_low_precision_does_not_make_a_layer_unbelievable(
    layer: nn.Module, shape: tuple[int, ...], autocast: bool
) -> None:
    """Its rounding is not a difference in kind."""
    layer, x = copy.deepcopy(layer), normal(*shape).float() * 3 + 1
    if not autocast:
        layer, x = layer.to(torch.bfloat16), x.to(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        rules = rules_after_a_step(layer, x)
    assert "gradient factors" not in rules.values()


def test_a_batch_norm_in_eval_mode_records_nothing() -> None:
    """Its output hangs on fixed numbers: grad^2 of each channel stands in."""
    layer = nn.BatchNorm2d(3).double().eval()
    model = nn.Sequential(layer, nn.Conv2d(3, 2, 1).double())
    with AdaFisherW(model, lr=0.0, damping=0.25) as optimizer:
        model(normal(4, 3, 2, 2) * 2 + 1).pow(3).sum().backward()
        optimizer.step()
        assert [row.rule for row in optimizer.coverage()] == ["gradient factors"] * 2 + ["Conv"] * 2
        for param in layer.parameters():
            assert param.grad is not None
            assert_close(optimizer.fisher_diagonal(param), minmax(param.grad**2) + 0.25)
            assert_close(optimizer.fisher_diagonal(param, normalized=False), param.grad**2)


@pytest.mark.parametrize(
    "norm", [nn.BatchNorm2d(3, affine=False), nn.GroupNorm(1, 3, affine=False), nn.InstanceNorm2d(3)], ids=str
)
def test_norms_without_parameters_are_ignored(norm: nn.Module) -> None:
    """There is nothing to track; the layers around them are."""
    model = nn.Sequential(nn.Conv2d(2, 3, 2), copy.deepcopy(norm), nn.Conv2d(3, 2, 2))
    rules = rules_after_a_step(model, normal(3, 2, 4, 4).float())
    assert rules == dict.fromkeys(("0.weight", "0.bias", "2.weight", "2.bias"), "Conv")


@pytest.mark.parametrize("frozen", ["weight", "bias"])
@pytest.mark.parametrize("layer", [nn.Conv2d(3, 4, 2), nn.BatchNorm2d(3), nn.GroupNorm(1, 3)], ids=str)
def test_half_a_layer_may_be_frozen(layer: nn.Module, frozen: str) -> None:
    """The other half's diagonal does not change."""
    x, layer = normal(3, 3, 4, 4), copy.deepcopy(layer).double()
    whole = raw_diagonals(copy.deepcopy(layer), lambda net: (net(x) + 1).pow(3).sum())
    getattr(layer, frozen).requires_grad_(False)
    rest = "bias" if frozen == "weight" else "weight"
    with AdaFisherW(layer, lr=0.0) as optimizer:
        (layer(x) + 1).pow(3).sum().backward()
        optimizer.step()
        assert_close(optimizer.fisher_diagonal(getattr(layer, rest), normalized=False), whole[rest])
