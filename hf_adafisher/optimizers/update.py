"""The update of one parameter."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_adafisher.fisher.averages import statistics_dtype
from hf_adafisher.fisher.diagonals import DiagonalTerm
from hf_adafisher.optimizers.fused import kernel_of, takes, update_fused
from hf_adafisher.optimizers.layout import Part, Parts, aligned, blocks

# Blocks of this many values stay in a core's cache between the operations on them, so that memory is read and written
# about as often as by one fused kernel. Elsewhere a block only bounds the temporary: more kernels would cost more.
CPU_BLOCK = 1 << 18
DEVICE_BLOCK = 1 << 24


class Scratch:
    """Memory for the diagonal of one block, shared by the parameters of one step and dropped with it."""

    def __init__(self) -> None:
        self._flat: Tensor | None = None
        self._blocks: dict[Any, Tensor] = {}
        self._rows: dict[Any, Tensor] = {}

    def like(self, block: Tensor, dtype: torch.dtype) -> Tensor:
        """An uninitialised contiguous tensor of the block's shape; the next call takes the memory back."""
        key = block.shape, dtype, block.device
        if key not in self._blocks:
            size, flat = block.numel(), self._flat
            if flat is None or flat.dtype != dtype or flat.device != block.device or flat.numel() < size:
                flat = self._flat = torch.empty(size, dtype=dtype, device=block.device)
                self._blocks.clear()
            self._blocks[key] = flat[:size].view(block.shape)
        return self._blocks[key]

    def row(self, like: Tensor, value: float) -> Tensor:
        """A tensor like ``like`` full of ``value``: loops over a 0-dimensional one would not be vectorised."""
        key = like.shape, like.dtype, like.device, value
        if key not in self._rows:
            self._rows[key] = torch.full_like(like, value, memory_format=torch.contiguous_format)
        return self._rows[key]


class Vectors:
    """Biases and norm weights, updated together: a call an operation for all of them, instead of one for each.

    Args:
        numbers: The keyword arguments of ``update_parameter`` that they share.
    """

    def __init__(self, numbers: dict[str, Any]) -> None:
        self.numbers = numbers
        self._members: dict[tuple[torch.device, torch.dtype], tuple[list[Tensor], ...]] = {}

    def take(self, param: Tensor, grad: Tensor, exp_avg: Tensor, terms: Sequence[DiagonalTerm]) -> bool:
        """Take a parameter in if it is a vector whose tensors are all alike; ``update_`` then updates it."""
        if param.dim() != 1 or len(terms) != 1 or len(terms[0]) != 1:
            return False
        factor, dtype = terms[0][0], param.dtype
        if not (dtype == grad.dtype == exp_avg.dtype == factor.dtype and factor.shape == param.shape):
            return False
        params, grads, exp_avgs, factors = self._members.setdefault((param.device, dtype), ([], [], [], []))
        params.append(param)
        grads.append(grad)
        exp_avgs.append(exp_avg)
        factors.append(factor)
        return True

    def update_(self) -> None:
        """What ``update_parameter`` does to each of them."""
        beta, damping, weight_decay = (self.numbers[name] for name in ("beta", "damping", "weight_decay"))
        shrink, rate, decay = scalars(**self.numbers)
        for params, grads, exp_avgs, factors in self._members.values():
            if decay:
                grads = list(torch._foreach_add(grads, params, alpha=weight_decay))
            torch._foreach_lerp_(exp_avgs, grads, 1.0 - beta)
            if shrink != 1.0:
                torch._foreach_mul_(params, shrink)
            torch._foreach_addcdiv_(params, exp_avgs, torch._foreach_add(factors, damping), value=rate)


def scalars(*, step: int, lr: float, beta: float, weight_decay: float, decoupled: bool, **_: Any) -> tuple[float, ...]:
    """What the parameter is multiplied by, what ``m / F`` is, and what of the parameter is added to the gradient."""
    shrink = 1.0 - lr * weight_decay if decoupled else 1.0
    return shrink, -lr / (1.0 - beta**step), 0.0 if decoupled else weight_decay


def update_parameter(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    terms: Sequence[DiagonalTerm],
    *,
    step: int,
    lr: float,
    beta: float,
    damping: float,
    weight_decay: float,
    decoupled: bool,
    scratch: Scratch | None = None,
) -> None:
    """One step of AdaFisher (``decoupled=False``) or AdaFisherW (``decoupled=True``), in place.

    ``m <- beta m + (1 - beta) g``, then ``theta <- theta - lr m / (1 - beta^step) / F``, where ``F`` is the damped
    diagonal. AdaFisher adds ``weight_decay * theta`` to ``g``; AdaFisherW subtracts ``lr * weight_decay * theta``.
    There is no square root over F.

    Large parameters are updated block by block, with F for one block at a time. Everything is computed in float32
    (float64 where the parameter or the momentum is) and rounded once, when it is stored.

    Args:
        param: The parameter, updated in place.
        grad: Its gradient; left as it is.
        exp_avg: First moment ``m``, updated in place.
        terms: The parameter's factors, normalised and spread (see ``hf_adafisher.fisher.diagonals``).
        step: Number of updates of this parameter, this one included.
        scratch: Memory that the updates of a step share. Default: new memory.
    """
    numbers = {"step": step, "lr": lr, "beta": beta, "damping": damping, "weight_decay": weight_decay}
    scratch = Scratch() if scratch is None else scratch
    update_parts(cut(param, grad, exp_avg, terms), grad, {**numbers, "decoupled": decoupled}, scratch)


def cut(param: Tensor, grad: Tensor, exp_avg: Tensor, terms: Sequence[DiagonalTerm]) -> Parts:
    """The parts of a parameter, which ``update_parts`` updates one after the other."""
    limit = CPU_BLOCK if param.device.type == "cpu" else DEVICE_BLOCK
    return Parts(param, grad, exp_avg, terms, lambda tensors: blocks(aligned(*tensors), limit))


def update_parts(parts: Parts, grad: Tensor, numbers: Mapping[str, Any], scratch: Scratch) -> None:
    """``update_parameter`` of a parameter that is cut already.

    Args:
        parts: Made of the same tensors.
        grad: This step's gradient.
        numbers: The keyword arguments of ``update_parameter``.
        scratch: Memory that the updates of a step share.
    """
    shrink, rate, decay = scalars(**numbers)
    beta, damping = numbers["beta"], numbers["damping"]
    rest, first = 1.0 - beta, parts.parts[0]
    if first.param.numel() == 0:
        return
    own = statistics_dtype(first.param.dtype)
    alike = first.param.dtype == first.exp_avg.dtype == grad.dtype == own
    if alike and takes(parts, damping, decay):
        kernel = kernel_of(own, beta=beta, damping=damping, shrink=shrink, rate=rate, decay=decay)
        update_fused(parts, grad, kernel, scratch)
        return
    dtype = torch.promote_types(own, first.exp_avg.dtype)
    size = None
    for part, g in zip(parts.parts, parts.split(grad), strict=True):
        if part.size != size:  # most parts of a parameter have one size
            size, out = part.size, scratch.like(part.param, own)
            row = scratch.row(part.outer[0][1], damping) if part.outer else None
        param, exp_avg = part.param, part.exp_avg
        p, m = param, exp_avg
        if not alike:
            p, g, m = (tensor.to(dtype) for tensor in (p, g, m))
        m.lerp_(g.add(p, alpha=decay) if decay else g, rest)
        diagonal = _diagonal(part, damping, out, row)
        if shrink != 1.0:
            p.mul_(shrink)
        p.addcdiv_(m, diagonal, value=rate)
        if m is not exp_avg:
            exp_avg.copy_(m)
        if p is not param:
            param.copy_(p)


def _diagonal(part: Part, damping: float, out: Tensor, row: Tensor | None) -> Tensor:
    """``sum of the products of the terms + damping``, in the shape of this part of the parameter.

    Args:
        part: Of the parameter.
        damping: What every value of it begins with.
        out: Where it is made.
        row: Full of ``damping``, where the part has ``outer``.
    """
    terms = part.terms
    if row is not None:
        (left, right), *others = part.outer
        torch.addcmul(row, left, right, out=out)
        for left, right in others:
            out.addcmul_(left, right)
        return out
    if len(terms) == 1 and len(terms[0]) == 1 and terms[0][0].shape == part.param.shape:
        return torch.add(terms[0][0], damping, out=out)
    out.fill_(damping)
    for term in terms:
        if len(term) < 2:
            out.add_(term[0] if term else 1.0)
        else:
            out.addcmul_(math.prod(term[1:-1], start=term[0]), term[-1])
    return out
