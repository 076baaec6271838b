"""Convolutions: a Linear over patches. Identities, exact cases, all geometries, and what it costs in memory."""

from __future__ import annotations

import copy
import gc
import json
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from torch.testing import assert_close

from hf_adafisher import AdaFisherW
from hf_adafisher.fisher import LayerRule, find_rule
from tests.reference import Window, conv_product, input_factor_loop, minmax, output_grad_factor_loop

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
DAMPING = 0.25
Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d
Diagonals = dict[str, tuple[Tensor, Tensor]]
"""By parameter: the raw diagonal, and the normalised and damped one."""


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers in float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def filled(layer: Conv, seed: int = 100) -> Conv:
    """The layer in float64 with random weights."""
    layer.double()
    with torch.no_grad():
        for offset, param in enumerate(layer.parameters()):
            param.copy_(normal(*param.shape, seed=seed + offset))
    return layer


def rule_of(layer: nn.Module) -> LayerRule:
    """Its rule."""
    rule = find_rule(layer)
    assert rule is not None
    return rule


def sums(layer: nn.Module, x: Tensor) -> tuple[Tensor, int]:
    """The rule's input sums of one call and its number of positions."""
    return rule_of(layer).input_sums(layer, [x], layer(x))


def input_factor(layer: nn.Module, x: Tensor) -> Tensor:
    """H of one call, of shape (in_channels, *kernel)."""
    total, count = sums(layer, x)
    return total / count


def diagonals(model: nn.Module, loss: Callable[[nn.Module], Tensor]) -> Diagonals:
    """Of every parameter, after one step."""
    with AdaFisherW(model, lr=0.0, damping=DAMPING) as optimizer:
        loss(model).backward()
        optimizer.step()
        return {
            name: (optimizer.fisher_diagonal(param, normalized=False), optimizer.fisher_diagonal(param))
            for name, param in model.named_parameters()
        }


def reshaped(found: Diagonals, name: str, shape: torch.Size) -> tuple[Tensor, Tensor]:
    """The diagonals of one parameter, in another shape."""
    raw, damped = found[name]
    return raw.reshape(shape), damped.reshape(shape)


def cubed(output: Tensor, seed: int = 7) -> Tensor:
    """A loss whose gradient differs at every position."""
    return (output + normal(*output.shape, seed=seed)).pow(3).sum()


# --- identities -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{}, {"padding": 2}, {"stride": 2, "padding": 1}, {"dilation": 2}, {"stride": (1, 3), "dilation": (2, 1)}],
    ids=str,
)
def test_conv2d_is_unfold_and_linear(options: dict[str, Any]) -> None:
    """The factors, and both diagonals of weight and bias."""
    conv, linear = filled(nn.Conv2d(3, 4, (3, 2), **options)), nn.Linear(18, 4).double()
    with torch.no_grad():
        linear.weight.copy_(conv.weight.flatten(1))
        linear.bias.copy_(conv.bias)
    x = normal(2, 3, 7, 6)
    patches = F.unfold(x, (3, 2), **options).transpose(1, 2)
    noise = normal(*conv(x).shape, seed=7)

    factor = input_factor(conv, x)
    assert factor.shape == (3, 3, 2)
    assert_close(factor.flatten(), input_factor(linear, patches))
    left = diagonals(conv, lambda net: (net(x) + noise).pow(3).sum())
    right = diagonals(linear, lambda net: (net(patches).transpose(1, 2) + noise.flatten(2)).pow(3).sum())
    assert_close(left["weight"], reshaped(right, "weight", conv.weight.shape))
    assert_close(left["bias"], right["bias"])


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_one_by_one_conv_is_a_linear_over_pixels(axes: int) -> None:
    """Positions are rows, channels are columns."""
    conv, linear = filled(CONVOLUTIONS[axes](3, 4, 1)), nn.Linear(3, 4).double()
    with torch.no_grad():
        linear.weight.copy_(conv.weight.flatten(1))
        linear.bias.copy_(conv.bias)
    x = normal(2, 3, *(4, 3, 2)[:axes])
    noise = normal(2, 4, *(4, 3, 2)[:axes], seed=7)
    left = diagonals(conv, lambda net: (net(x) + noise).pow(3).sum())
    right = diagonals(linear, lambda net: (net(x.movedim(1, -1)).movedim(-1, 1) + noise).pow(3).sum())
    assert_close(left["weight"], reshaped(right, "weight", conv.weight.shape))
    assert_close(left["bias"], right["bias"])


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
def test_conv1d_is_conv2d_with_a_singleton_axis(mode: str, place: int) -> None:
    """Before or behind its own axis, for every padding mode."""
    options: dict[str, Any] = {"padding_mode": mode, "groups": 2}
    pads = {"kernel_size": (1, 1), "stride": (1, 1), "padding": (0, 0), "dilation": (1, 1)}
    flat = filled(nn.Conv1d(4, 6, 3, stride=2, padding=2, dilation=2, **options))
    for name, value in (("kernel_size", 3), ("stride", 2), ("padding", 2), ("dilation", 2)):
        pads[name] = (1 if name != "padding" else 0, value) if place == 0 else (value, 1 if name != "padding" else 0)
    wide = nn.Conv2d(4, 6, **pads, **options).double()
    with torch.no_grad():
        wide.weight.copy_(flat.weight.unsqueeze(2 + place))
        wide.bias.copy_(flat.bias)
    x = normal(2, 4, 7)
    left = diagonals(flat, lambda net: cubed(net(x)))
    right = diagonals(wide, lambda net: cubed(net(x.unsqueeze(2 + place)).squeeze(2 + place)))
    assert_close(left["weight"], reshaped(right, "weight", flat.weight.shape))
    assert_close(left["bias"], right["bias"])


@pytest.mark.parametrize("mode", ["zeros", "circular"])
@pytest.mark.parametrize("groups", [2, 3, 6])
def test_a_grouped_conv_is_a_dense_one_with_structural_zeros(groups: int, mode: str) -> None:
    """Same factors over all channels, so the same diagonal, normalised too, where the grouped weight exists."""
    grouped = filled(nn.Conv2d(6, 12, (2, 3), groups=groups, padding=1, padding_mode=mode))
    dense = nn.Conv2d(6, 12, (2, 3), padding=1, padding_mode=mode).double()
    exists = torch.zeros(12, 6, dtype=torch.bool)
    for group in range(groups):
        exists[group * 12 // groups :, group * 6 // groups :][: 12 // groups, : 6 // groups] = True
    with torch.no_grad():
        dense.weight.zero_()
        dense.weight[exists] = grouped.weight.flatten(0, 1)
        dense.bias.copy_(grouped.bias)
    x = normal(2, 6, 4, 5) * torch.arange(1.0, 7.0)[:, None, None]
    assert_close(dense(x), grouped(x))
    assert_close(input_factor(grouped, x), input_factor(dense, x))
    left = diagonals(grouped, lambda net: cubed(net(x)))
    right = diagonals(dense, lambda net: cubed(net(x)))
    for ours, theirs in zip(left["weight"], right["weight"], strict=True):
        assert_close(ours, theirs[exists].reshape(ours.shape))
    assert_close(left["bias"], right["bias"])


def test_a_depthwise_conv_is_one_conv_a_channel() -> None:
    """Before normalisation, which runs over all of them together."""
    depthwise = filled(nn.Conv2d(3, 6, 3, groups=3, padding=1))
    x, noise = normal(2, 3, 4, 5), normal(2, 6, 4, 5, seed=7)
    found = diagonals(depthwise, lambda net: (net(x) + noise).pow(3).sum())
    for channel in range(3):
        own = slice(2 * channel, 2 * channel + 2)
        single = nn.Conv2d(1, 2, 3, padding=1).double()
        with torch.no_grad():
            single.weight.copy_(depthwise.weight[own])
            single.bias.copy_(depthwise.bias[own])
        alone = raw_of(single, x[:, channel : channel + 1], noise[:, own])
        for name, diagonal in alone.items():
            assert_close(found[name][0][own], diagonal)


def raw_of(conv: nn.Module, x: Tensor, noise: Tensor) -> dict[str, Tensor]:
    """The raw diagonals for the loss of the test above."""
    found = diagonals(conv, lambda net: (net(x) + noise).pow(3).sum())
    return {name: raw for name, (raw, _) in found.items()}


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("axes", [1, 2, 3])
def test_an_unbatched_call_is_a_batch_of_one(axes: int, groups: int) -> None:
    """For the count too, which is that of the positions."""
    conv = filled(CONVOLUTIONS[axes](4, 6, 2, padding=1, groups=groups))
    x = normal(4, *(4, 3, 2)[:axes])
    total, count = sums(conv, x)
    assert count == math.prod((5, 4, 3)[:axes])
    assert_close(sums(conv, x[None]), (total, count))
    left = diagonals(copy.deepcopy(conv), lambda net: cubed(net(x)))
    right = diagonals(conv, lambda net: cubed(net(x[None])[0]))
    assert_close(left, right)


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_an_in_place_consumer_of_an_unbatched_call(axes: int) -> None:
    """torch returns a view of a batch of one; a rectifier that overwrites it must not lose the gradient."""
    conv = filled(CONVOLUTIONS[axes](3, 4, 2))
    x = normal(3, *(4, 3, 2)[:axes])
    noise = normal(*conv(x).shape, seed=7)
    left = diagonals(copy.deepcopy(conv), lambda net: ((net(x) + 0.1).relu() * noise).sum())
    right = diagonals(conv, lambda net: (net(x).add_(0.1).relu_() * noise).sum())
    assert_close(left, right)
    assert left["bias"][0].any()


def test_examples_and_calls_add_up() -> None:
    """Called on halves is called on the whole; a permuted batch is the batch."""
    conv, x = filled(nn.Conv2d(2, 3, 3, padding=1)), normal(4, 2, 4, 4)
    whole = diagonals(copy.deepcopy(conv), lambda net: net(x).pow(3).sum())
    halves = diagonals(copy.deepcopy(conv), lambda net: net(x[:1]).pow(3).sum() + net(x[1:]).pow(3).sum())
    swapped = diagonals(conv, lambda net: net(x.flip(0)).pow(3).sum())
    assert_close(halves, whole)
    assert_close(swapped, whole)


# --- exactness --------------------------------------------------------------------------------


@dataclass(frozen=True)
class OnePosition:
    """A convolution and an input that leave it exactly one place to stand."""

    make: Callable[[], Conv]
    shape: tuple[int, ...]


@pytest.mark.parametrize(
    "case",
    [
        OnePosition(lambda: nn.Conv1d(4, 6, 3), (1, 4, 3)),
        OnePosition(lambda: nn.Conv1d(4, 6, 3, groups=2), (1, 4, 3)),
        OnePosition(lambda: nn.Conv2d(4, 6, (2, 3)), (1, 4, 2, 3)),
        OnePosition(lambda: nn.Conv2d(4, 6, (2, 3), bias=False), (1, 4, 2, 3)),
        OnePosition(lambda: nn.Conv2d(4, 6, (2, 3), groups=2), (1, 4, 2, 3)),
        OnePosition(lambda: nn.Conv2d(4, 8, 2, groups=4), (1, 4, 2, 2)),
        OnePosition(lambda: nn.Conv2d(4, 6, (2, 3), groups=2), (4, 2, 3)),
        OnePosition(lambda: nn.Conv2d(4, 6, 2, dilation=2, stride=3), (1, 4, 3, 4)),
        OnePosition(lambda: nn.Conv2d(4, 6, 5, padding=2, stride=9), (1, 4, 3, 3)),
        OnePosition(lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="replicate", groups=2), (1, 4, 1, 1)),
        OnePosition(lambda: nn.Conv2d(4, 6, (3, 5), padding=1, padding_mode="circular"), (1, 4, 1, 3)),
        OnePosition(lambda: nn.Conv2d(4, 6, (1, 4), padding=(0, 1), padding_mode="reflect"), (1, 4, 1, 2)),
        OnePosition(lambda: nn.Conv2d(4, 6, (3, 2), padding="same"), (1, 4, 1, 1)),
        OnePosition(lambda: nn.Conv3d(4, 6, (2, 1, 3), groups=2), (1, 4, 2, 1, 3)),
    ],
    ids=lambda case: f"{case.make()}-{case.shape}",
)
def test_one_position_is_exact(case: OnePosition) -> None:
    """With N = 1 the raw diagonal of weight and bias is the squared gradient that autograd gives."""
    conv, x = filled(case.make()), normal(*case.shape)
    assert conv(x).numel() == conv.out_channels
    found = diagonals(conv, lambda net: cubed(net(x)))
    for name, param in conv.named_parameters():
        assert param.grad is not None
        assert_close(found[name][0], param.grad**2)


def test_zeros_of_the_padding_count_as_positions() -> None:
    """Ones under a 3 x 3 kernel over 4 x 4 pixels, padded by 1: a corner of the kernel meets 9 of 16, an edge 12."""
    factor = input_factor(nn.Conv2d(1, 2, 3, padding=1).double(), torch.ones(2, 1, 4, 4, dtype=torch.float64))
    corner, edge = 9 / 16, 12 / 16
    expected = [[corner, edge, corner], [edge, 1.0, edge], [corner, edge, corner]]
    assert_close(factor[0], torch.tensor(expected, dtype=torch.float64))


def test_pixels_between_the_strides_do_not_count() -> None:
    """Only what the kernel reads."""
    x = torch.full((1, 1, 6, 6), 100.0)
    x[..., ::3, ::3] = 2.0
    conv = nn.Conv2d(1, 2, 1, stride=3)
    assert_close(sums(conv, x), (torch.full((1, 1, 1), 16.0), 4))


def test_a_bright_pixel_does_not_drown_the_others() -> None:
    """Each entry is a sum of what it reads, in float32: no differences of running totals, no transforms."""
    x = normal(2, 1, 9, 9).float() * 1e-2
    x[:, :, 3, 5] = 1e6
    conv = nn.Conv2d(1, 1, 2, stride=2)
    expected = input_factor_loop("conv", x, window=Window.of(conv)).float()
    assert_close(input_factor(conv, x).flatten(), expected, rtol=1e-5, atol=0)
    assert expected.max() / expected.min() > 1e12


# --- geometry ---------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", [(2, 1), (0, 3), "same"], ids=str)
@pytest.mark.parametrize("kernel", [(3, 3), (2, 4)], ids=str)
def test_every_padding_is_its_explicit_padding(
    kernel: tuple[int, int], padding: tuple[int, int] | str, mode: str
) -> None:
    """A convolution that pads is one that does not, after F.pad."""
    conv = filled(nn.Conv2d(2, 4, kernel, padding=padding, padding_mode=mode, dilation=(1, 2), groups=2))
    bare = nn.Conv2d(2, 4, kernel, dilation=(1, 2), groups=2).double()
    bare.load_state_dict(conv.state_dict())
    if isinstance(padding, str):
        totals = [kernel[1] - 1, kernel[0] - 1]
        totals[0] *= 2
        border = [totals[0] // 2, totals[0] - totals[0] // 2, totals[1] // 2, totals[1] - totals[1] // 2]
    else:
        border = [padding[1], padding[1], padding[0], padding[0]]
    x = normal(3, 2, 5, 6)
    padded = F.pad(x, border, mode="constant" if mode == "zeros" else mode)
    assert_close(bare(padded), conv(x))
    assert_close(sums(conv, x), sums(bare, padded))
    left, right = (diagonals(net, lambda net, y=y: cubed(net(y))) for net, y in ((conv, x), (bare, padded)))
    assert_close(left, right)


def test_valid_is_no_padding() -> None:
    """The other string."""
    conv, x = filled(nn.Conv2d(2, 3, 3, padding="valid", stride=2)), normal(2, 2, 6, 5)
    bare = nn.Conv2d(2, 3, 3, stride=2).double()
    bare.load_state_dict(conv.state_dict())
    assert_close(sums(conv, x), sums(bare, x))


@st.composite
def geometries(draw: st.DrawFn) -> tuple[Conv, Tensor]:
    """Any small convolution, and an input that it can take."""
    axes = draw(st.integers(1, 3))

    def per_axis(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(axes))

    kernel, dilation, groups = per_axis(1, 3), per_axis(1, 2), draw(st.integers(1, 3))
    padding: Any = draw(st.sampled_from(["numbers", "same", "valid"]))
    stride = (1,) * axes if padding == "same" else per_axis(1, 4)
    padding = per_axis(0, 2) if padding == "numbers" else padding
    conv = CONVOLUTIONS[axes](
        groups * draw(st.integers(1, 2)),
        groups * draw(st.integers(1, 2)),
        kernel,
        stride,
        padding,
        dilation,
        groups,
        draw(st.booleans()),
        draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"])),
    )
    window, spatial = Window.of(conv), per_axis(1, 5)
    assume(all(count >= 1 for count in window.outputs(spatial)))
    if conv.padding_mode in ("reflect", "circular"):  # torch's limits
        spare = 1 if conv.padding_mode == "reflect" else 0
        assume(all(max(pads) <= size - spare for pads, size in zip(window.padding, spatial, strict=True)))
    lead = draw(st.sampled_from([(), (1,), (3,)]))
    return filled(conv), normal(*lead, conv.in_channels, *spatial, seed=draw(st.integers(0, 99))) + 0.5


@settings(max_examples=150, deadline=None, derandomize=True)
@given(geometries())
def test_any_geometry(case: tuple[Conv, Tensor]) -> None:
    """Both factors and both diagonals against the loops."""
    conv, x = case
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        output = conv(x)
        window, g = Window.of(conv), normal(*output.shape, seed=3)
        h, s = input_factor_loop("conv", x, window=window), output_grad_factor_loop("conv", g, window=window)
        factor = input_factor(conv, x)
        found = diagonals(conv, lambda net: (net(x) * g).sum())
    assert factor.shape == (conv.in_channels, *conv.kernel_size)
    assert_close(factor.flatten(), h)
    shape = conv.weight.shape
    assert_close(found["weight"], (conv_product(s, h, shape), conv_product(minmax(s), minmax(h), shape) + DAMPING))
    if conv.bias is not None:
        assert_close(found["bias"], (s, minmax(s) + DAMPING))


@pytest.mark.parametrize("layout", ["channels_last", "transposed", "expanded", "sliced"])
def test_any_layout_in_memory(layout: str) -> None:
    """The numbers decide, not where they lie."""
    conv, x = filled(nn.Conv2d(4, 6, 3, padding=1, groups=2)), normal(2, 4, 5, 5)
    strange = {
        "channels_last": lambda: x.to(memory_format=torch.channels_last),
        "transposed": lambda: x.transpose(2, 3).contiguous().transpose(2, 3),
        "expanded": lambda: x[:1].expand(2, -1, -1, -1),
        "sliced": lambda: torch.cat([x, x], 1)[:, ::2],
    }[layout]()
    plain = strange.clone(memory_format=torch.contiguous_format)
    left = diagonals(copy.deepcopy(conv), lambda net: cubed(net(strange)))
    right = diagonals(conv, lambda net: cubed(net(plain)))
    assert_close(left, right)


@pytest.mark.parametrize("shape", [(0, 2, 4, 4), (0, 2, 3, 3)], ids=str)
def test_a_batch_without_examples_counts_for_nothing(shape: tuple[int, ...]) -> None:
    """Zeros over no positions."""
    conv = nn.Conv2d(2, 3, 3)
    assert_close(sums(conv, torch.zeros(shape)), (torch.zeros(2, 3, 3), 0))
    grad_sums = rule_of(conv).output_grad_sums(conv, torch.zeros(0, 3, shape[2] - 2, shape[3] - 2))
    assert_close(grad_sums, torch.zeros(3))


# --- precision --------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_low_precision_inputs_are_summed_in_float32(dtype: torch.dtype, mode: str) -> None:
    """Squares of 300 and more overflow float16; sums of many small ones stall in bfloat16."""
    conv = nn.Conv2d(2, 3, 3, padding=1, padding_mode=mode).to(dtype)
    x = (normal(4, 2, 16, 16) * 200 + 300).to(dtype)
    factor = input_factor(conv, x)
    assert factor.dtype == torch.float32
    assert_close(factor.flatten(), input_factor_loop("conv", x, window=Window.of(conv)).float())
    g = (normal(4, 3, 16, 16, seed=1) * 300).to(dtype)
    grad_sums = rule_of(conv).output_grad_sums(conv, g)
    assert grad_sums.dtype == torch.float32
    # 1,024 numbers added up in float32
    assert_close(grad_sums, g.double().square().sum((0, 2, 3)).float(), rtol=1e-5, atol=0)


def test_many_positions_do_not_wear_the_sums_out() -> None:
    """Four hundred thousand of them, in float32; the gradient's are added one by one, hence the tolerance."""
    conv, x = nn.Conv2d(1, 4, 3, padding=1), normal(8, 1, 224, 224).float()
    assert_close(input_factor(conv, x)[0, 1, 1], x.double().square().mean().float())
    g = normal(8, 4, 224, 224, seed=1).float()
    for grad in (g, g.to(memory_format=torch.channels_last)):
        expected = g.double().square().sum((0, 2, 3)).float()
        assert_close(rule_of(conv).output_grad_sums(conv, grad), expected, rtol=1e-3, atol=0)


# --- gradient factors -------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("axes", [1, 2, 3])
def test_a_conv_used_functionally_gets_gradient_factors_in_its_own_form(axes: int, groups: int) -> None:
    """S from the rows of grad^2, H from the means over the channels that read an input channel."""
    conv = filled(CONVOLUTIONS[axes](4, 6, 2, groups=groups))
    function = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[axes]
    x = normal(3, 4, *(4, 3, 3)[:axes])
    found = diagonals(conv, lambda net: cubed(function(x, net.weight, net.bias, groups=groups)))
    assert conv.weight.grad is not None and conv.bias is not None and conv.bias.grad is not None
    square = conv.weight.grad.square()
    s = square.flatten(1).mean(1)
    h = square.unflatten(0, (groups, -1)).mean(1).flatten(0, 1)
    assert h.shape == (4, *conv.kernel_size)
    shape = conv.weight.shape
    assert_close(found["weight"], (conv_product(s, h, shape), conv_product(minmax(s), minmax(h), shape) + DAMPING))
    bias_square = conv.bias.grad.square()
    assert_close(found["bias"], (bias_square, minmax(bias_square) + DAMPING))


# --- memory -----------------------------------------------------------------------------------


def peak_and_largest(work: Callable[[], object], folder: Path) -> tuple[int, int]:
    """The most bytes alive at once during `work`, and the largest single allocation, inside kernels too."""
    work()  # whatever is cached on the first call
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()
    recorded.export_chrome_trace(str(folder / "trace.json"))
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    allocations = sorted((event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]")
    alive = peak = largest = 0
    for _, size in allocations:
        alive += size
        peak, largest = max(peak, alive), max(largest, size)
    assert allocations
    return peak, largest


def storages_of(size: int) -> set[int]:
    """The storages of exactly that many bytes that some python object holds."""
    gc.collect()
    tensors = [found for found in gc.get_objects() if type(found) in (Tensor, nn.Parameter)]
    return {t.untyped_storage().data_ptr() for t in tensors if t.untyped_storage().nbytes() == size}


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("functional", [False, True])
def test_nothing_of_the_weights_size_outlives_a_step_but_the_momentum(groups: int, functional: bool) -> None:
    """A grouped convolution multiplies its factors out in every update; its H is out / groups times smaller."""
    conv = nn.Conv2d(3 * 7, 3 * 11, (5, 3), groups=groups, bias=False)
    size = conv.weight.numel() * conv.weight.element_size()
    before = storages_of(size)
    optimizer = AdaFisherW(conv, update_interval=2)
    for seed in range(3):
        optimizer.zero_grad()
        x = normal(2, 3 * 7, 6, 5, seed=seed).float()
        output = F.conv2d(x, conv.weight, groups=groups) if functional else conv(x)
        output.pow(3).mean().backward()
        optimizer.step()
        gradient = conv.weight.grad
        assert gradient is not None
        momentum = optimizer.state[conv.weight]["exp_avg"]
        assert storages_of(size) - before == {t.untyped_storage().data_ptr() for t in (gradient, momentum)}
        del gradient, momentum, output
    assert optimizer.fisher_diagonal(conv.weight).shape == conv.weight.shape


STEM_PATCHES = 3 * 49 * 112 * 112 * 8 * 4
PADDED_EXAMPLE = 3 * 230 * 230 * 4


@torch.no_grad()
def test_the_meter_sees_patches(tmp_path: Path) -> None:
    """The test below would notice: what F.unfold makes of a batch is found, to the byte."""
    x = torch.zeros(8, 3, 224, 224)
    peak, largest = peak_and_largest(lambda: F.unfold(x, 7, padding=3, stride=2), tmp_path)
    assert largest == STEM_PATCHES <= peak


@pytest.mark.parametrize("mode", ["zeros", "reflect"])
@torch.no_grad()
def test_the_input_factor_needs_one_padded_example(mode: str, tmp_path: Path) -> None:
    """A ResNet stem at 224 x 224: never the patches, not even a copy of the batch; the batch size does not matter."""
    conv = nn.Conv2d(3, 64, 7, stride=2, padding=3, padding_mode=mode)
    rule, peaks = rule_of(conv), {}
    for size in (2, 8):
        x = torch.zeros(size, 3, 224, 224)
        output = conv(x)
        peaks[size], largest = peak_and_largest(lambda x=x, output=output: rule.input_sums(conv, [x], output), tmp_path)
        assert largest <= 1.5 * PADDED_EXAMPLE
        assert 0 < peaks[size] <= 3 * PADDED_EXAMPLE < x.numel() * 4 * 8 / size
    assert peaks[8] <= peaks[2] + PADDED_EXAMPLE // 10


@torch.no_grad()
def test_low_precision_needs_no_copy_of_the_batch_either(tmp_path: Path) -> None:
    """The conversion to float32 goes example by example too."""
    conv = nn.Conv2d(3, 8, 7, stride=2, padding=3).to(torch.bfloat16)
    x = torch.zeros(8, 3, 224, 224, dtype=torch.bfloat16)
    output = conv(x)
    peak, _ = peak_and_largest(lambda: rule_of(conv).input_sums(conv, [x], output), tmp_path)
    assert peak <= 3 * PADDED_EXAMPLE


@torch.no_grad()
def test_the_output_grad_factor_makes_no_copy_of_the_gradient(tmp_path: Path) -> None:
    """Contiguous or with channels last."""
    conv = nn.Conv2d(3, 64, 7, stride=2, padding=3)
    g = torch.zeros(8, 64, 28, 28)
    for grad in (g, g.to(memory_format=torch.channels_last)):
        peak, _ = peak_and_largest(lambda grad=grad: rule_of(conv).output_grad_sums(conv, grad), tmp_path)
        assert peak <= g.numel() * 4 // 8
