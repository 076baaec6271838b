"""The update by the kernel of torch's fused AdamW, which goes through memory once: for matrices on a CPU.

The kernel divides the momentum by ``sqrt(v) + eps``. Where the diagonal is ``F = s (x) h + damping``, or with a sum of
such products, ``v = (s (x) h)^2`` and ``eps = damping`` make that AdaFisher's division. What else it does is harmless:

- It corrects for the number of steps. Long after the first one (``LATE``) its corrections are 1; that of the momentum
  is part of the learning rate here.
- It mixes the squared gradient into v. With the largest ``beta2`` below 1, ``v + 2^-53 g^2`` is what it uses. The
  diagonal, the damping and the learning rate are therefore all multiplied by ``c``, a power of two, so that F is wrong
  by ``1.1e-8 |g| / c`` at most: in float32 ``4e-23 |g|``. That is less than rounding while ``|g| < 1e15 damping``;
  weights with larger gradients also move by more than about ``1e14 lr``.
- Nothing may overflow or vanish. In float32 factors below 7e-27 count as 0 (where a parameter has several terms,
  products below 4e-34), and products above 6e4 must not occur (normalised factors are at most 1), nor ``lr m`` above
  1e24 or gradients above 1e27: the weight is then NaN, or stays as it is. An infinite gradient leaves NaN in its
  weight, not infinity.

Its functions are private to torch, so each is tried on a few numbers before it is used (``works``).
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hf_adafisher.fisher.diagonals import DiagonalTerm
from hf_adafisher.optimizers.layout import Parts

if TYPE_CHECKING:
    from hf_adafisher.optimizers.update import Scratch

logger = logging.getLogger(__name__)

SCALES = {torch.float32: 2.0**24, torch.float64: 2.0**100}
"""The square root of ``c``, by which each of the two factors is multiplied; for no other dtype this update is used."""

LEAST_DAMPING = 1e-12
"""Smaller ones could be as small as what is wrong in F."""

BETA2 = 1.0 - 2.0**-53
LATE = torch.tensor(1e18, dtype=torch.float32, device="cpu")


def takes(parts: Parts, damping: float, decay: float) -> bool:
    """Whether ``update_fused`` is for this parameter, whose tensors have one dtype.

    Args:
        parts: The parameter.
        damping: Added to the diagonal.
        decay: What of the parameter is added to the gradient.
    """
    if parts.scaled is None:
        parts.scaled = _scaled_terms(parts) if _suitable(parts) else ()
    return len(parts.scaled) > 0 and damping >= LEAST_DAMPING and works(parts.parts[0].param.dtype, bool(decay))


def update_fused(parts: Parts, grad: Tensor, kernel: Callable[..., None], scratch: Scratch) -> None:
    """The update of a parameter that ``takes`` said yes to, by a kernel from ``kernel_of``."""
    for part, g, scaled in zip(parts.parts, parts.split(grad), parts.scaled or (), strict=True):
        # The kernel takes for granted that all its tensors are contiguous; gradients hardly ever are not.
        kernel(part.param, g.contiguous(), part.exp_avg, scaled, scratch.like(part.param, part.param.dtype))
    # Unlike other functions it does not tell autograd, which would go on with graphs built before. Views tell for all.
    torch.autograd.graph.increment_version(parts.parts[0].param)
    torch.autograd.graph.increment_version(parts.parts[0].exp_avg)


def kernel_of(
    dtype: torch.dtype, *, beta: float, damping: float, shrink: float, rate: float, decay: float
) -> Callable[[Tensor, Tensor, Tensor, Sequence[DiagonalTerm], Tensor], None]:
    """The update of contiguous tensors: of ``(param, grad, exp_avg, terms from _scaled, memory for v)``.

    Args:
        dtype: Of all the tensors.
        beta: Decay of the first moment.
        damping: Added to the diagonal.
        shrink: What the parameter is multiplied by.
        rate: What ``m / F`` is multiplied by before it is added; not positive.
        decay: What of the parameter is added to the gradient; then ``shrink`` is 1.
    """
    scale = SCALES[dtype] ** 2
    lr = -rate * scale
    # Adam adds its weight decay to the gradient (in registers: the gradient stays as it is), AdamW shrinks by
    # 1 - lr * weight_decay.
    fused: Callable[..., None] = torch._fused_adam_ if decay else torch._fused_adamw_
    numbers = {
        "lr": lr,
        "beta1": beta,
        "beta2": BETA2,
        "weight_decay": decay or ((1.0 - shrink) / lr if lr else 0.0),
        "eps": damping * scale,
        "amsgrad": False,
        "maximize": False,
    }

    def update(param: Tensor, grad: Tensor, exp_avg: Tensor, scaled: Sequence[DiagonalTerm], out: Tensor) -> None:
        (left, right), *others = scaled
        torch.mul(left, right, out=out)
        for left, right in others:
            out.addcmul_(left, right)
        if others:
            out.square_()
        fused([param], [grad], [exp_avg], [out], [], [LATE], **numbers)

    return update


@functools.cache
def works(dtype: torch.dtype, with_decay: bool) -> bool:
    """Whether torch's function does in this version what is expected of it; tried once."""
    options = {"beta": 0.75, "damping": 0.125, "rate": -0.5}
    shrink, decay = (1.0, 0.25) if with_decay else (0.75, 0.0)
    with torch.no_grad():
        numbers = torch.arange(1, 3 * 5 * 7 + 1, dtype=dtype, device="cpu")  # enough for whole vectors and a rest
        param, grad, exp_avg = (numbers % size - size // 2 for size in (11, 7, 5))
        factor = (numbers % 3) / 4  # among them 0
        moment = exp_avg.lerp(grad + decay * param, 1.0 - options["beta"])
        expected = shrink * param + options["rate"] * moment / (factor + options["damping"])
        before = grad.clone()
        terms = [(_scaled(factor, True), _scaled(torch.ones_like(factor), True))]
        try:
            kernel = kernel_of(dtype, shrink=shrink, decay=decay, **options)
            kernel(param, grad, exp_avg, terms, torch.empty_like(factor))
        except Exception as error:  # it has gone, or takes other arguments
            logger.info("torch's fused Adam cannot be used as here (%s): updates take a little longer.", error)
            return False
        tolerance = 8 * torch.finfo(dtype).eps
        close = all(
            torch.allclose(found, wanted, rtol=tolerance, atol=tolerance)
            for found, wanted in ((param, expected), (exp_avg, moment))
        )
        as_expected = close and torch.equal(grad, before)
    if not as_expected:
        logger.info("torch's fused Adam computes something else than it used to: updates take a little longer.")
    return as_expected


def _suitable(parts: Parts) -> bool:
    """Whether a parameter is a plain matrix (or the like), contiguous in memory, whose terms are outer products."""
    dtype = parts.parts[0].param.dtype
    return (
        parts.lasting
        and dtype in SCALES
        and all(factor.dtype == dtype for factor in parts.factors)
        and all(
            part.outer
            and part.param.device.type == "cpu"
            and part.param.is_contiguous()
            and part.exp_avg.is_contiguous()
            for part in parts.parts
        )
    )


def _scaled_terms(parts: Parts) -> list[list[DiagonalTerm]]:
    """The terms of each part, as the kernel takes them; parts that share a factor share it scaled too."""
    made: dict[tuple[int, torch.Size], Tensor] = {}

    def scaled(factor: Tensor, alone: bool) -> Tensor:
        key = factor.data_ptr(), factor.shape
        if key not in made:
            made[key] = _scaled(factor, alone)
        return made[key]

    return [[tuple(scaled(f, len(part.outer) == 1) for f in term) for term in part.outer] for part in parts.parts]


def _scaled(factor: Tensor, alone: bool) -> Tensor:
    """Squared if its term is the only one: several terms are squared after they were added."""
    scaled = factor * SCALES[factor.dtype]
    return scaled.square_() if alone else scaled
