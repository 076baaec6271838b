"""The updates of AdaFisher(W) as kernels that torch.compile makes: C++ on a CPU, Triton on a GPU."""

from __future__ import annotations

import contextlib
import functools
import logging
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hf_adafisher.optimizers.blocks import RootParameter, RootSteps, root_update_in_blocks, update_in_blocks
from hf_adafisher.optimizers.update import (
    Block,
    RootCoefficients,
    StepCoefficients,
    adafisher_update_,
    root_update_,
)
from hf_adafisher.optimizers.validation.compilation import own_graphs

logger = logging.getLogger(__name__)

COMPILED_FROM = 1 << 17
"""Smaller parameters are updated eagerly: the call of a compiled function costs more than their few operations."""


class CompiledUpdate:
    """Update rules compiled: one kernel for each rule and kind of parameter, whatever its sizes.

    Coefficients are passed as tensors, so that schedules and groups with other options compile nothing again. Where
    compiling fails, one warning says why, and everything is left to the eager update from then on. A kernel that has
    run once was compiled: any later error of it is one of the step.
    """

    def __init__(self) -> None:
        self.works = True
        self._proven: set[Any] = set()
        self._coefficients: Any = None
        self._as_tensors: dict[tuple[torch.dtype, torch.device], Any] = {}

    def supports(self, block: Block) -> bool:
        """True for a parameter that is not left to the eager update."""
        return self.works and block.param.numel() >= COMPILED_FROM and type(block.param) in (Tensor, nn.Parameter)

    def update_(self, block: Block, coefficients: StepCoefficients) -> None:
        """Divide by the diagonal (``adafisher_update_``): one whole parameter in place; eagerly without a compiler."""
        block = _detached(block)
        if not self._run(_kind_of(block), adafisher_update_, [block], self._on_device(coefficients, block)):
            update_in_blocks([block], coefficients)

    def root_update_(self, parameter: RootParameter, coefficients: RootCoefficients) -> list[RootSteps]:
        """Divide by the root of the diagonal (``root_update_``), as ``update_``."""
        block, size = _detached(parameter.block), parameter.size
        kind = *_kind_of(block), *size, coefficients.nesterov
        squares = self._run(kind, root_update_, block, size, self._on_device(coefficients, block))
        if not squares:
            return root_update_in_blocks([parameter], coefficients)
        return [RootSteps([parameter.whole], *squares)]

    def _run(self, kind: Any, rule: Callable[..., Any], *arguments: Any) -> tuple[Any, ...]:
        """Run a rule's kernel: what it returned, in a tuple; an empty one where no compiler works."""
        kind = rule.__name__, *kind
        try:
            with own_graphs() if kind not in self._proven else contextlib.nullcontext():
                found = _kernel(kind, rule)(*arguments)
        except Exception as error:  # whatever a compiler, or the lack of one, raises
            if kind in self._proven or isinstance(error, torch.OutOfMemoryError):
                raise
            self.works = False
            logger.warning(
                "torch.compile does not work here (%s: %s); parameters are updated eagerly, as with compiled=False.",
                type(error).__name__,
                (str(error).strip().splitlines() or [""])[0],
            )
            return ()
        self._proven.add(kind)
        return (found,)

    def _on_device(self, coefficients: Any, block: Block) -> Any:
        """Coefficients as tensors of the update's dtype, made once for all parameters of a step; an l2 of 0 stays."""
        if coefficients != self._coefficients:
            self._coefficients = coefficients
            self._as_tensors.clear()
        key = block.compute_dtype, block.param.device
        if key not in self._as_tensors:
            numbers = {
                name: torch.tensor(value, dtype=key[0], device=key[1])
                for name, value in coefficients._asdict().items()
                if not isinstance(value, bool) and not (name == "l2" and value == 0.0)
            }
            self._as_tensors[key] = coefficients._replace(**numbers)
        return self._as_tensors[key]


def _detached(block: Block) -> Block:
    """Kernels are also compiled for what a view is a view of, unless it is detached."""
    return block._replace(param=block.param.detach(), grad=block.grad.detach())


def _kind_of(block: Block) -> Any:
    """Key of the kernel for a parameter: device, dtypes, number of axes and of factors; sizes do not matter."""
    param, grad, exp_avg, terms = block
    return param.device, param.dtype, grad.dtype, exp_avg.dtype, param.dim(), *[len(term) for term in terms]


@functools.cache
def _kernel(kind: Any, rule: Callable[..., Any]) -> Callable[..., Any]:
    """A rule, compiled for one kind of parameter."""
    # Recompilations are counted and limited by code object; the kinds must not use up each other's.
    name = f"{rule.__name__}{_kernel.cache_info().currsize}"
    code = rule.__code__.replace(co_name=name)
    return torch.compile(types.FunctionType(code, rule.__globals__, name), dynamic=True)
