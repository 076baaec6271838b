"""The AdaFisher update as one kernel that torch.compile makes: C++ on a CPU, Triton on a GPU."""

from __future__ import annotations

import contextlib
import functools
import logging
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hf_adafisher.optimizers.blocks import update_in_blocks
from hf_adafisher.optimizers.update import Block, StepCoefficients, adafisher_update_
from hf_adafisher.optimizers.validation.compilation import own_graphs

logger = logging.getLogger(__name__)

COMPILED_FROM = 1 << 17
"""Smaller parameters are updated eagerly: the call of a compiled function costs more than their few operations."""


class CompiledUpdate:
    """``adafisher_update_`` compiled: one kernel for each kind of parameter, whatever its sizes.

    Coefficients are passed as tensors, so that schedules and groups with other options compile nothing again. Where
    compiling fails, one warning says why, and everything is left to the eager update from then on. A kernel that has
    run once was compiled: any later error of it is one of the step.
    """

    def __init__(self) -> None:
        self.works = True
        self._proven: set[Any] = set()
        self._coefficients: StepCoefficients | None = None
        self._as_tensors: dict[tuple[torch.dtype, torch.device], StepCoefficients] = {}

    def supports(self, block: Block) -> bool:
        """True for a parameter that is not left to the eager update."""
        return self.works and block.param.numel() >= COMPILED_FROM and type(block.param) in (Tensor, nn.Parameter)

    def update_(self, block: Block, coefficients: StepCoefficients) -> None:
        """Update one whole parameter in place; eagerly where no compiler works."""
        # Kernels are also compiled for what a view is a view of, unless it is detached.
        block = block._replace(param=block.param.detach(), grad=block.grad.detach())
        kind = _kind_of(block)
        try:
            with own_graphs() if kind not in self._proven else contextlib.nullcontext():
                _kernel(kind)([block], self._on_device(coefficients, block))
        except Exception as error:  # whatever a compiler, or the lack of one, raises
            if kind in self._proven or isinstance(error, torch.OutOfMemoryError):
                raise
            self.works = False
            logger.warning(
                "torch.compile does not work here (%s: %s); parameters are updated eagerly, as with compiled=False.",
                type(error).__name__,
                (str(error).strip().splitlines() or [""])[0],
            )
            update_in_blocks([block], coefficients)
        else:
            self._proven.add(kind)

    def _on_device(self, coefficients: StepCoefficients, block: Block) -> StepCoefficients:
        """Coefficients as tensors of the update's dtype, made once for all parameters of a step."""
        if coefficients != self._coefficients:
            self._coefficients = coefficients
            self._as_tensors.clear()
        key = block.compute_dtype, block.param.device
        if key not in self._as_tensors:
            tensors = [torch.tensor(value, dtype=key[0], device=key[1]) for value in coefficients]
            self._as_tensors[key] = StepCoefficients(*tensors)._replace(
                l2=tensors[2] if coefficients.l2 != 0.0 else 0.0
            )
        return self._as_tensors[key]


def _kind_of(block: Block) -> Any:
    """Key of the kernel for a parameter: device, dtypes, number of axes and of factors; sizes do not matter."""
    param, grad, exp_avg, terms = block
    return param.device, param.dtype, grad.dtype, exp_avg.dtype, param.dim(), *[len(term) for term in terms]


@functools.cache
def _kernel(kind: Any) -> Callable[..., None]:
    """``adafisher_update_``, compiled for one kind of parameter."""
    # Recompilations are counted and limited by code object; the kinds must not use up each other's.
    name = f"adafisher_update_{_kernel.cache_info().currsize}"
    code = adafisher_update_.__code__.replace(co_name=name)
    return torch.compile(types.FunctionType(code, adafisher_update_.__globals__, name), dynamic=True)
