"""The update as one kernel that torch.compile makes: C++ on a CPU, Triton on a GPU."""

from __future__ import annotations

import functools
import logging
import math
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_adafisher.fisher.factors import statistics_dtype
from hf_adafisher.fisher.forms import Term
from hf_adafisher.optimizers.layout import Part, Parts, aligned, merged
from hf_adafisher.optimizers.update import scalars

logger = logging.getLogger(__name__)

COMPILED_FROM = 1 << 14
"""Smaller parameters are updated eagerly: the call of a compiled function costs more than their few operations."""


class CompiledUpdate:
    """Updates parameters with compiled kernels, one for each kind of parameter, whatever their sizes.

    Options and the step count are passed as 0-dimensional tensors, so that schedules compile nothing again. Where
    compiling fails, one warning says why, and everything is left to the eager update from then on.
    """

    def __init__(self) -> None:
        self.works = True
        self._numbers: dict[str, Any] = {}
        self._tensors: tuple[Tensor, ...] = ()

    def takes(self, param: Tensor) -> bool:
        """Whether this parameter is not left to the eager update."""
        size = param.numel()
        return self.works and size >= COMPILED_FROM and size > 0 and type(param) in (Tensor, nn.Parameter)

    def __call__(self, parts: Parts, grad: Tensor, numbers: Mapping[str, Any]) -> bool:
        """Update a parameter in place; False, from then on, where no compiler works.

        Args:
            parts: The parameter, from :func:`whole`.
            grad: Its gradient in this step.
            numbers: The keyword arguments of ``update_parameter``.
        """
        (part,) = parts.parts
        own = part.of(grad).detach()  # kernels are also compiled for what a view is a view of, unless it is detached
        try:
            if parts.kernel is None:
                parts.kernel = _kernel(*_kind(part, own))
            parts.kernel(part.param, own, part.exp_avg, parts.factors, *self._as_tensors(numbers))
        except Exception as error:  # whatever a compiler, or the lack of one, raises
            self.works = False
            logger.warning(
                "torch.compile does not work here (%s: %s); parameters are updated eagerly, as with compiled=False.",
                type(error).__name__,
                (str(error).strip().splitlines() or [""])[0],
            )
            return False
        return True

    def _as_tensors(self, numbers: Mapping[str, Any]) -> tuple[Tensor, ...]:
        """The numbers as kernels take them: 0-dimensional tensors on the CPU; made once for parameters in a row."""
        if numbers != self._numbers:
            shrink, rate, decay = scalars(**numbers)
            values = (numbers["beta"], 1.0 - numbers["beta"], decay, shrink, rate, numbers["damping"])
            self._tensors = tuple(torch.tensor(value, dtype=torch.float64, device="cpu") for value in values)
            self._numbers = dict(numbers)
        return self._tensors


def whole(param: Tensor, grad: Tensor, exp_avg: Tensor, terms: Sequence[Term]) -> Parts:
    """The parameter as one part with as few axes as possible, for :class:`CompiledUpdate`."""
    return Parts(param, grad, exp_avg, terms, lambda tensors: [merged(aligned(*tensors))])


def _kind(part: Part, grad: Tensor) -> tuple[Any, ...]:
    """What a kernel is compiled for: everything but the sizes."""
    tensors = (part.param, grad, part.exp_avg)
    spread = tuple(tuple(size == 1 for size in factor.shape) for term in part.terms for factor in term)
    dtypes = tuple(tensor.dtype for tensor in tensors)
    contiguous = tuple(tensor.is_contiguous() for tensor in tensors)
    return tuple(len(term) for term in part.terms), spread, dtypes, contiguous, part.param.device.type


@functools.cache
def _kernel(lengths: tuple[int, ...], spread: Any, dtypes: tuple[torch.dtype, ...], *rest: Any) -> Callable[..., None]:
    """The compiled update of parameters of one kind; ``lengths`` are the numbers of factors in each term."""
    dtype = torch.promote_types(statistics_dtype(dtypes[0]), dtypes[2])

    def update(
        param: Tensor,
        grad: Tensor,
        exp_avg: Tensor,
        factors: Sequence[Tensor],
        beta: Tensor,
        rest: Tensor,
        decay: Tensor,
        shrink: Tensor,
        rate: Tensor,
        damping: Tensor,
    ) -> None:
        p, start = param.to(dtype), 0
        m = exp_avg.to(dtype) * beta + (grad.to(dtype) + p * decay) * rest
        diagonal: Any = damping
        for length in lengths:
            diagonal = diagonal + math.prod(factors[start : start + length])
            start += length
        exp_avg.copy_(m)
        param.copy_(p * shrink + m / diagonal * rate)

    # Recompilations are counted and limited by code object; the kinds must not use up each other's.
    name = f"update_{_kernel.cache_info().currsize}"
    code = update.__code__.replace(co_name=name)
    own = types.FunctionType(code, update.__globals__, name, None, update.__closure__)
    return torch.compile(own, dynamic=True, fullgraph=True)
