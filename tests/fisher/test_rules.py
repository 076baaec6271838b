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

from hf_adafisher import AdaFisherW
from hf_adafisher.fisher import find_rule
from tests.reference import Kind, input_factor_loop, output_grad_factor_loop

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
        {"vocabulary": 7},
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


def test_padding_row_counts_like_any_token() -> None:
    """torch gives its row no gradient, but it is part of the batch the mean is over."""
    tokens = torch.tensor([[2, 2, 2, 5]])
    layer = nn.Embedding(7, 3, padding_idx=2).double()
    diagonal = raw_diagonals(layer, lambda net: (net(tokens) * normal(1, 4, 3)).sum())["weight"]
    s = output_grad_factor_loop("embedding", normal(1, 4, 3))
    assert_close(diagonal[2], s * 0.75)
    assert_close(diagonal[5], s * 0.25)
    assert not diagonal[[0, 1, 3, 4, 6]].any()


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
