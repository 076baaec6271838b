"""Normalisation layers as scale-and-shift blocks: LayerNorm, every RMSNorm, BatchNorm, GroupNorm.

RMSNorms are matched by structure, since no transformers class derives from ``torch.nn.RMSNorm``.
For each channel the gradient of the scale is ``g_c * xhat_c``, so ``F_scale = minmax(S * H)`` with ``H`` the second
moment of the *normalised* input, and ``F_shift = minmax(S)``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from hf_adafisher.fisher.averages import statistics_dtype, sum_of_squares, sum_of_squares_along
from hf_adafisher.fisher.diagonals import ParameterDiagonal, ScaleDiagonal, ShiftDiagonal
from hf_adafisher.fisher.layers.registry import (
    PROBE_ROWS,
    LayerRule,
    agree,
    register_layer,
    register_structure,
    weight_of,
)


def _epsilon(module: nn.Module, default: float) -> float:
    """The layer's epsilon under its usual names."""
    eps = getattr(module, "eps", getattr(module, "variance_epsilon", None))
    return default if eps is None else float(eps)


class ScaleAndShiftRule(LayerRule):
    """Base of the normalisation rules: a scale and a shift, whose factors have their shape."""

    @override
    def diagonals(self, module: nn.Module) -> Mapping[str, ParameterDiagonal]:
        return {"weight": ScaleDiagonal(), "bias": ShiftDiagonal()}

    @override
    def factor_shapes(self, module: nn.Module) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return tuple(weight_of(module).shape), tuple(weight_of(module).shape)


class LayerNormRule(ScaleAndShiftRule):
    """``y = xhat * scale + shift`` with ``xhat`` normalised over the trailing axes that the weight covers."""

    name = "LayerNorm"

    def normalized_input(self, module: nn.Module, x: Tensor) -> Tensor:
        """``xhat``, in the dtype of statistics."""
        shape = weight_of(module).shape
        return F.layer_norm(x.to(statistics_dtype(x.dtype)), shape, eps=_epsilon(module, 1e-5))

    @override
    def input_sums(self, module: nn.Module, inputs: Sequence[Tensor], output: Tensor) -> tuple[Tensor, int]:
        shape = weight_of(module).shape
        xhat = self.normalized_input(module, inputs[0].detach())
        return sum_of_squares(xhat, shape.numel()).reshape(shape), xhat.numel() // shape.numel()

    @override
    def output_grad_sums(self, module: nn.Module, grad: Tensor) -> Tensor:
        shape = weight_of(module).shape
        return sum_of_squares(grad, shape.numel()).reshape(shape)

    @override
    def matches_forward(self, module: nn.Module, inputs: Sequence[Tensor], output: Tensor) -> bool:
        if type(module).forward in (nn.LayerNorm.forward, nn.RMSNorm.forward):
            return True
        shape = weight_of(module).shape
        if inputs[0].shape != output.shape or inputs[0].shape[inputs[0].dim() - len(shape) :] != shape:
            return False
        x, y = (t.detach().reshape(-1, *shape)[:PROBE_ROWS] for t in (inputs[0], output))
        xhat, bias = self.normalized_input(module, x), getattr(module, "bias", None)
        shift = 0.0 if bias is None else bias
        # Gemma stores its scale as a distance from one: y = (1 + w) xhat. Gradient and factors are the same.
        return any(agree(y, xhat * (weight_of(module) + offset) + shift) for offset in (0.0, 1.0))


class RMSNormRule(LayerNormRule):
    """``y = xhat * scale``, ``xhat = x / sqrt(mean(x^2) + eps)``."""

    name = "RMSNorm"

    @override
    def normalized_input(self, module: nn.Module, x: Tensor) -> Tensor:
        shape = weight_of(module).shape
        # Where eps is None, torch uses the resolution of the input's dtype, not of the statistics'.
        return F.rms_norm(x.to(statistics_dtype(x.dtype)), shape, eps=_epsilon(module, torch.finfo(x.dtype).eps))


class ChannelNormRule(ScaleAndShiftRule):
    """``y = xhat * scale + shift`` for each channel, axis 1 of an input ``(N, C, *spatial)``."""

    def apply(self, module: nn.Module, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """Output of the layer in training mode, by definition."""
        raise NotImplementedError

    @override
    def input_sums(self, module: nn.Module, inputs: Sequence[Tensor], output: Tensor) -> tuple[Tensor, int]:
        x = inputs[0].detach()
        xhat = self.apply(module, x.to(statistics_dtype(x.dtype)), None, None)
        return sum_of_squares_along(xhat, 1), x.numel() // max(x.shape[1], 1)

    @override
    def output_grad_sums(self, module: nn.Module, grad: Tensor) -> Tensor:
        return sum_of_squares_along(grad, 1)

    @override
    def matches_forward(self, module: nn.Module, inputs: Sequence[Tensor], output: Tensor) -> bool:
        if type(module).forward in (nn.BatchNorm2d.forward, nn.GroupNorm.forward):
            return True
        x, weight = inputs[0].detach().float(), weight_of(module)
        if x.dim() < 2 or x.shape != output.shape or x.shape[1] != weight.numel():
            return False
        bias = module.bias if isinstance(module.bias, Tensor) else None
        return agree(output, self.apply(module, x, weight.float(), None if bias is None else bias.float()))


class BatchNormRule(ChannelNormRule):
    """BatchNorm over one, two or three axes: ``xhat`` is normalised with the statistics of the call's own batch."""

    needs_training = True
    name = "BatchNorm"

    @override
    def apply(self, module: nn.Module, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        return F.batch_norm(x, None, None, weight, bias, training=True, eps=_epsilon(module, 1e-5))


class GroupNormRule(ChannelNormRule):
    """GroupNorm: ``xhat`` is normalised over each example's groups of channels."""

    name = "GroupNorm"

    @override
    def apply(self, module: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        return F.group_norm(x, module.num_groups, weight, bias, eps=_epsilon(module, 1e-5))


def _is_rms_norm(module: nn.Module) -> bool:
    """A leaf with one 1-D weight and an epsilon. That it does compute an RMS norm ``matches_forward`` checks."""
    parameters = dict(module.named_parameters(recurse=False))
    if set(parameters) != {"weight"} or any(True for _ in module.children()) or any(True for _ in module.buffers()):
        return False
    return parameters["weight"].dim() == 1 and (hasattr(module, "eps") or hasattr(module, "variance_epsilon"))


register_layer(nn.LayerNorm, LayerNormRule())
register_layer(nn.RMSNorm, RMSNormRule())
for _module_class in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
    register_layer(_module_class, BatchNormRule())
register_layer(nn.GroupNorm, GroupNormRule())
register_structure(_is_rms_norm, RMSNormRule())
