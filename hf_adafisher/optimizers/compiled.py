"""The update as one kernel that torch.compile makes: C++ on a CPU, Triton on a GPU."""

from __future__ import annotations

import functools
import logging
import math
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hf_adafisher.fisher.averages import statistics_dtype
from hf_adafisher.fisher.diagonals import DiagonalTerm
from hf_adafisher.optimizers.layout import Part, Parts, aligned, merged
from hf_adafisher.optimizers.update import scalars, update_parameter

logger = logging.getLogger(__name__)

COMPILED_FROM = 1 << 17
"""Smaller parameters are updated eagerly: the call of a compiled function costs more than their few operations."""


class Call(NamedTuple):
    """The update of one parameter by a kernel; ``arguments`` are the kernel's."""

    kernel: Callable[..., None]
    arguments: tuple[Any, ...]
    part: Part
    grad: Tensor
    numbers: Mapping[str, Any]


class CompiledUpdate:
    """Updates parameters with compiled kernels, one for each kind of parameter, whatever their sizes.

    What depends on options and the step count is passed as one tensor, so that schedules compile nothing again. Where
    compiling fails, one warning says why, and everything is left to the eager update from then on. A kernel that has
    run once was compiled: what it raises later is an error of the step, which may be half done.
    """

    def __init__(self) -> None:
        self.works = True
        self._proven: set[Callable[..., None]] = set()
        self._numbers: dict[str, Any] = {}
        self._scalars: dict[tuple[torch.dtype, torch.device], Tensor] = {}

    def takes(self, param: Tensor) -> bool:
        """Whether this parameter is not left to the eager update."""
        size = param.numel()
        return self.works and size >= COMPILED_FROM and size > 0 and type(param) in (Tensor, nn.Parameter)

    def call(self, parts: Parts, grad: Tensor, numbers: Mapping[str, Any]) -> Call:
        """The update of a parameter, for ``run``.

        Args:
            parts: The parameter, from ``whole``.
            grad: Its gradient in this step.
            numbers: The keyword arguments of ``update_parameter``.
        """
        (part,) = parts.parts
        own = part.of(grad).detach()  # kernels are also compiled for what a view is a view of, unless it is detached
        if parts.kernel is None:
            parts.kernel = _kernel(numbers["decoupled"], *_kind(part, own))
        scalars = self._as_tensor(numbers, _dtype_of(part.param.dtype, part.exp_avg.dtype), own.device)
        arguments = (part.param, own, part.exp_avg, parts.factors, scalars)
        return Call(parts.kernel, arguments, part, own, numbers)

    def run(self, calls: Sequence[Call]) -> bool:
        """Make these updates, in place; False where no compiler works, and what was left of them is made eagerly."""
        done: list[Callable[..., None]] = []
        if calls and self.works:
            try:
                _runner()(calls, done)
            except Exception as error:  # whatever a compiler, or the lack of one, raises
                proven = self._proven.union(done)
                if calls[len(done)].kernel in proven or isinstance(error, torch.OutOfMemoryError):
                    raise
                self.works = False
                logger.warning(
                    "torch.compile does not work here (%s: %s); "
                    "parameters are updated eagerly, as with compiled=False.",
                    type(error).__name__,
                    (str(error).strip().splitlines() or [""])[0],
                )
            self._proven.update(done)
        for call in calls[len(done) :]:
            part = call.part
            update_parameter(part.param, call.grad, part.exp_avg, part.terms, **call.numbers)
        return self.works

    def _as_tensor(self, numbers: Mapping[str, Any], dtype: torch.dtype, device: torch.device) -> Tensor:
        """The numbers as kernels take them, made once for the parameters of a step.

        One tensor, and of the kernels' own dtype: each further argument is checked in every call, and a number of
        another dtype is converted again for every few values.
        """
        if numbers != self._numbers:
            self._numbers = dict(numbers)
            self._scalars.clear()
        key = dtype, device
        if key not in self._scalars:
            shrink, rate, decay = scalars(**numbers)
            values = (1.0 - numbers["beta"], shrink if numbers["decoupled"] else decay, rate, numbers["damping"])
            self._scalars[key] = torch.tensor(values, dtype=dtype, device=device)
        return self._scalars[key]


def whole(param: Tensor, grad: Tensor, exp_avg: Tensor, terms: Sequence[DiagonalTerm]) -> Parts:
    """The parameter as one part with as few axes as possible, for ``CompiledUpdate``."""
    return Parts(param, grad, exp_avg, terms, lambda tensors: [merged(aligned(*tensors))])


def _kind(part: Part, grad: Tensor) -> tuple[Any, ...]:
    """What a kernel is compiled for: everything but the sizes."""
    tensors = (part.param, grad, part.exp_avg)
    spread = tuple(tuple(size == 1 for size in factor.shape) for term in part.terms for factor in term)
    dtypes = tuple(tensor.dtype for tensor in tensors)
    contiguous = tuple(tensor.is_contiguous() for tensor in tensors)
    return tuple(len(term) for term in part.terms), spread, dtypes, contiguous, part.param.device.type


def _dtype_of(param: torch.dtype, exp_avg: torch.dtype) -> torch.dtype:
    """In which an update is computed."""
    return torch.promote_types(statistics_dtype(param), exp_avg)


@functools.cache
def _kernel(
    decoupled: bool, lengths: tuple[int, ...], spread: Any, dtypes: tuple[torch.dtype, ...], *rest: Any
) -> Callable[..., None]:
    """The update of parameters of one kind, not yet compiled; ``lengths`` are the numbers of factors in its terms."""
    dtype = _dtype_of(dtypes[0], dtypes[2])

    def update(param: Tensor, grad: Tensor, exp_avg: Tensor, factors: Sequence[Tensor], numbers: Tensor) -> None:
        p, g, m, start = param.to(dtype), grad.to(dtype), exp_avg.to(dtype), 0
        if not decoupled:
            g = g + p * numbers[1]
        m = m + (g - m) * numbers[0]
        diagonal: Any = numbers[3]
        for length in lengths:
            diagonal = diagonal + math.prod(factors[start : start + length])
            start += length
        exp_avg.copy_(m)
        param.copy_((p * numbers[1] if decoupled else p) + m / diagonal * numbers[2])

    # Recompilations are counted and limited by code object; the kinds must not use up each other's.
    name = f"update_{_kernel.cache_info().currsize}"
    code = update.__code__.replace(co_name=name)
    return types.FunctionType(code, update.__globals__, name, None, update.__closure__)


@functools.cache
def _runner() -> Callable[[Sequence[Call], list[Callable[..., None]]], None]:
    """Calls kernels compiled, and lists those that have run.

    The loop itself is not compiled, only what it calls: so a step enters torch.compile once (about 20 us), not once for
    every parameter.
    """

    def run(calls: Sequence[Call], done: list[Callable[..., None]]) -> None:
        for call in calls:
            call.kernel(*call.arguments)
            done.append(call.kernel)

    torch._dynamo.eval_frame.skip_code(run.__code__)
    return torch.compile(run, dynamic=True)
