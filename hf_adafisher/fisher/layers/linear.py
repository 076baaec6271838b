"""Fully connected layers: ``torch.nn.Linear`` and transformers' ``Conv1D``, a Linear with a transposed weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from hf_adafisher.fisher.averages import sum_of_squares
from hf_adafisher.fisher.diagonals import INPUT, OUTPUT_GRAD, KroneckerDiagonal, ParameterDiagonal
from hf_adafisher.fisher.layers.registry import (
    PROBE_ROWS,
    LayerRule,
    agree,
    register_layer,
    register_structure,
    second_moment,
    weight_of,
)


class LinearRule(LayerRule):
    """``y = x W^T + b``: ``F_W = S (x) H``, ``F_b = S``; weight ``(d_out, d_in)``, input ``(..., d_in)``."""

    name = "Linear"
    axes: tuple[str, str] = (OUTPUT_GRAD, INPUT)

    @override
    def diagonals(self, module: nn.Module) -> Mapping[str, ParameterDiagonal]:
        return {"weight": KroneckerDiagonal(self.axes), "bias": KroneckerDiagonal((OUTPUT_GRAD,))}

    @override
    def factor_shapes(self, module: nn.Module) -> tuple[tuple[int, ...], tuple[int, ...]]:
        sizes = dict(zip(self.axes, weight_of(module).shape, strict=True))
        return (sizes[INPUT],), (sizes[OUTPUT_GRAD],)

    @override
    def input_sums(self, module: nn.Module, inputs: Sequence[Tensor], output: Tensor) -> tuple[Tensor, int]:
        (width,), _ = self.factor_shapes(module)
        return sum_of_squares(inputs[0], width), inputs[0].numel() // width

    @override
    def output_grad_sums(self, module: nn.Module, grad: Tensor) -> Tensor:
        _, (width,) = self.factor_shapes(module)
        return sum_of_squares(grad, width)

    @override
    def full_factor_shapes(self, module: nn.Module) -> tuple[tuple[int, ...], tuple[int, ...]]:
        (d_in,), (d_out,) = self.factor_shapes(module)
        return (d_in, d_in), (d_out, d_out)

    @override
    def full_input_sums(
        self, module: nn.Module, inputs: Sequence[Tensor], output: Tensor, with_one: bool = False
    ) -> tuple[Tensor, int]:
        (width,), _ = self.factor_shapes(module)
        return second_moment(inputs[0].reshape(-1, width), with_one), inputs[0].numel() // width

    @override
    def full_output_grad_sums(self, module: nn.Module, grad: Tensor) -> Tensor:
        _, (width,) = self.factor_shapes(module)
        return second_moment(grad.reshape(-1, width))

    @override
    def matches_forward(self, module: nn.Module, inputs: Sequence[Tensor], output: Tensor) -> bool:
        if type(module).forward is nn.Linear.forward:
            return True
        (d_in,), (d_out,) = self.factor_shapes(module)
        if inputs[0].shape[-1] != d_in or output.shape[-1] != d_out:
            return False
        x, y = inputs[0].reshape(-1, d_in)[:PROBE_ROWS], output.reshape(-1, d_out)[:PROBE_ROWS]
        weight = weight_of(module) if self.axes[0] == OUTPUT_GRAD else weight_of(module).t()
        bias = module.bias.to(x.dtype) if isinstance(module.bias, Tensor) else None
        return agree(y, F.linear(x, weight.to(x.dtype), bias))


class Conv1DRule(LinearRule):
    """Transformers' Conv1D, ``y = x W + b``: the same with a weight ``(d_in, d_out)``, so ``F_W = H (x) S``."""

    name = "Conv1D"
    axes = (INPUT, OUTPUT_GRAD)


def _is_conv1d(module: nn.Module) -> bool:
    """Transformers' Conv1D by structure, so that this package does not import transformers."""
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    if not (hasattr(module, "nx") and hasattr(module, "nf") and isinstance(weight, Tensor)):
        return False
    return weight.shape == (module.nx, module.nf) and isinstance(bias, Tensor) and bias.shape == (module.nf,)


register_layer(nn.Linear, LinearRule())
register_structure(_is_conv1d, Conv1DRule())
