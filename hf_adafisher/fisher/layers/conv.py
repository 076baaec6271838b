"""Convolutions over one, two or three axes: a Linear over patches, whose factors never need the patches."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from hf_adafisher.fisher.averages import statistics_dtype, sum_of_squares_along, sum_of_squares_over_batch
from hf_adafisher.fisher.diagonals import OUTPUT_GRAD, ConvDiagonal, KroneckerDiagonal, ParameterDiagonal
from hf_adafisher.fisher.layers.registry import LayerRule, agree, register_layer, second_moment, weight_of

_FUNCTIONS = {nn.Conv1d: F.conv1d, nn.Conv2d: F.conv2d, nn.Conv3d: F.conv3d}
_PATCH_VALUES = 2**24
"""Largest number of patch values in memory at a time, beyond one example's."""


class ConvRule(LayerRule):
    """``y[n, o, p] = sum W[o, c, k] x[n, c, p * stride + k * dilation]``: ``F_W = S (x) H``, ``F_b = S``.

    ``H[c, k]`` is the mean square of entry ``(c, k)`` of the patches, padding included, over examples and output
    positions; its shape is ``(in_channels, *kernel_size)``. Squares are summed over the batch first and then over the
    windows of that one map, so the input factor takes a padded float32 map of a *single* example as memory, and never
    the patches, whatever the batch size.
    """

    name = "Conv"

    @override
    def diagonals(self, module: Any) -> Mapping[str, ParameterDiagonal]:
        return {"weight": ConvDiagonal(module.groups), "bias": KroneckerDiagonal((OUTPUT_GRAD,))}

    @override
    def factor_shapes(self, module: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (module.in_channels, *module.kernel_size), (module.out_channels,)

    @override
    def input_sums(self, module: Any, inputs: Sequence[Tensor], output: Tensor) -> tuple[Tensor, int]:
        x, spatial = inputs[0].detach(), len(module.kernel_size)
        batched = x if x.dim() == spatial + 2 else x.unsqueeze(0)
        sums = _pad(module, sum_of_squares_over_batch(batched).unsqueeze(0))
        for axis in range(spatial):  # an axis' positions are summed before the next is unfolded: half the time of both
            sums = _unfold(module, sums, 2, axis).sum(2)
        return sums[0], output.numel() // module.out_channels

    @override
    def output_grad_sums(self, module: Any, grad: Tensor) -> Tensor:
        return sum_of_squares_along(grad, grad.dim() - len(module.kernel_size) - 1)

    def full_factor_shapes(self, module: Any) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
        """The moments of whole patches; a grouped convolution is many small layers and has none."""
        if module.groups != 1:
            return None
        patch = module.in_channels * math.prod(module.kernel_size)
        return (patch, patch), (module.out_channels, module.out_channels)

    def full_input_sums(
        self, module: Any, inputs: Sequence[Tensor], output: Tensor, with_one: bool = False
    ) -> tuple[Tensor, int]:
        """Of the patches, which are made for a few examples at a time: all of them would be ``k^2`` times the input."""
        x, spatial = inputs[0].detach(), len(module.kernel_size)
        batched = x if x.dim() == spatial + 2 else x.unsqueeze(0)
        count = output.numel() // module.out_channels
        patch = module.in_channels * math.prod(module.kernel_size)
        size = patch + with_one
        total = torch.zeros(size, size, dtype=statistics_dtype(x.dtype), device=x.device)
        for examples in batched.split(max(1, _PATCH_VALUES * len(batched) // max(count * patch, 1))):
            windows = _windows(module, examples).movedim(1, 1 + spatial)
            total += second_moment(windows.reshape(-1, patch), with_one)
        return total, count

    @override
    def full_output_grad_sums(self, module: Any, grad: Tensor) -> Tensor:
        by_position = grad.movedim(grad.dim() - len(module.kernel_size) - 1, -1)
        return second_moment(by_position.reshape(-1, module.out_channels))

    @override
    def matches_forward(self, module: Any, inputs: Sequence[Tensor], output: Tensor) -> bool:
        base = next(c for c in _FUNCTIONS if isinstance(module, c))
        kind = type(module)
        if kind.forward is base.forward and kind._conv_forward is base._conv_forward:
            return True
        # Subclasses may standardise the weight or pad by themselves: compare on one example.
        x = inputs[0].detach()
        one = x[:1] if x.dim() == len(module.kernel_size) + 2 else x.unsqueeze(0)
        weight, bias = weight_of(module).to(x.dtype), None if module.bias is None else module.bias.to(x.dtype)
        if one.dim() != len(module.kernel_size) + 2 or one.shape[1] != module.in_channels:
            return False
        y = _FUNCTIONS[base](_pad(module, one), weight, bias, module.stride, 0, module.dilation, module.groups)
        return agree(output[:1] if output.dim() == y.dim() else output.unsqueeze(0), y)


def _windows(module: Any, x: Tensor) -> Tensor:
    """The patches of ``x``, padded, as a view of shape ``(N, in_channels, *positions, *kernel_size)``."""
    windows = _pad(module, x)
    for axis in range(len(module.kernel_size)):
        windows = _unfold(module, windows, 2 + axis, axis)
    return windows


def _unfold(module: Any, x: Tensor, at: int, axis: int) -> Tensor:
    """The windows of spatial axis ``axis``, axis ``at`` of ``x``: their positions there, their entries last."""
    size, dilation = module.kernel_size[axis], module.dilation[axis]
    return x.unfold(at, dilation * (size - 1) + 1, module.stride[axis])[..., ::dilation]


def _pad(module: Any, x: Tensor) -> Tensor:
    """``x`` of shape ``(N, C, *spatial)`` with the layer's padding around it."""
    pads: list[int] = []
    for axis in reversed(range(len(module.kernel_size))):  # F.pad starts at the last axis
        if module.padding == "same":
            total = module.dilation[axis] * (module.kernel_size[axis] - 1)
            pads += [total // 2, total - total // 2]
        else:
            pads += [0, 0] if module.padding == "valid" else [module.padding[axis]] * 2
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    return F.pad(x, pads, mode=mode) if any(pads) else x


for _module_class in _FUNCTIONS:
    register_layer(_module_class, ConvRule())
