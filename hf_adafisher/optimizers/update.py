"""Update rules, each written once: pure functions of momentum, factors and options, for eager and compiled steps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_adafisher.fisher.diagonals import DiagonalTerm, mean_of_terms, sum_of_terms
from hf_adafisher.optimizers.polar import polar_factor

UPDATE_RMS = 0.2
"""Root mean square of a spectral direction; Adam's is 0.2 to 0.4."""
FULL_RMS = 1.0
"""Largest root mean square of a direction by the root: of hidden matrices, embeddings and output layers."""
SMALL_RMS = 0.2
"""The largest of all other parameters (docs/step_sizes.md)."""
MAX_RELATIVE_STEP = 0.05
"""Largest step of a parameter with more than one axis, in units of its norm."""
LEAST_RMS = 0.02
"""Smallest root mean square that a parameter counts with where its step is bounded: weights of zeros can move."""
LEAST_DAMPING = 1e-16
"""Smallest damping of a diagonal under a root: gradients of less than 1e-8 are noise, as Adam's eps has it."""
LEAST_DIRECTION = 1e-19
"""Smallest root mean square that a direction of unknown scale is divided by: squares of smaller values are zero."""


class Block(NamedTuple):
    """A parameter, or some rows of it, with what its update reads and writes.

    Attributes:
        param: Parameter.
        grad: Its gradient.
        exp_avg: Its first moment.
        terms: Terms of its diagonal, each factor of which broadcasts to the parameter.
    """

    param: Tensor
    grad: Tensor
    exp_avg: Tensor
    terms: Sequence[DiagonalTerm]

    @property
    def compute_dtype(self) -> torch.dtype:
        """Dtype in which the update is computed: float32, or float64 where the parameter or the moment is."""
        return torch.promote_types(torch.promote_types(self.param.dtype, torch.float32), self.exp_avg.dtype)

    @property
    def makes_its_diagonal(self) -> bool:
        """True where the sum of the terms is a new tensor; a single factor is the state's own."""
        return len(self.terms) > 1 or len(self.terms[0]) > 1


class StepCoefficients(NamedTuple):
    """Numbers of one step, shared by the parameters of a group that are equally old.

    Attributes:
        rest: ``1 - beta``, the gradient's weight in the first moment.
        damping: lambda, added to the diagonal.
        l2: ``weight_decay`` of AdaFisher, which adds ``l2 * theta`` to the gradient; 0 for AdaFisherW.
        shrink: ``1 - lr * weight_decay`` of AdaFisherW, 1 for AdaFisher.
        rate: ``-lr / (1 - beta^step)``.

    They are 0-dimensional tensors where the update is compiled, so that changing ones compile nothing again.
    """

    rest: float | Tensor
    damping: float | Tensor
    l2: float | Tensor
    shrink: float | Tensor
    rate: float | Tensor


def step_coefficients(group: Mapping[str, Any], step: int, decoupled: bool) -> StepCoefficients:
    """Coefficients of a parameter group at its parameters' update number ``step`` (1 for the first)."""
    lr, beta, weight_decay = float(group["lr"]), group["beta"], group["weight_decay"]
    shrink, l2 = (1.0 - lr * weight_decay, 0.0) if decoupled else (1.0, weight_decay)
    return StepCoefficients(1.0 - beta, group["damping"], l2, shrink, -lr / (1.0 - beta**step))


def adafisher_update_(blocks: Sequence[Block], c: StepCoefficients) -> None:
    """Apply one step of AdaFisher or AdaFisherW to parameters, or blocks of them, of one device and dtype, in place.

    ``m <- beta m + (1 - beta) (g + l2 theta)``, then ``theta <- shrink theta + rate m / (F + damping)`` with the
    diagonal ``F`` that the terms make. There is no square root over it. Everything is computed in float32 (float64
    where the parameter or the momentum is) and rounded once, when it is stored. Gradients are left as they are.
    """
    dtype = blocks[0].compute_dtype
    params, grads, exp_avgs = ([getattr(block, name) for block in blocks] for name in ("param", "grad", "exp_avg"))
    p, g, m = (t if t[0].dtype == dtype else _cast(t, dtype) for t in (params, grads, exp_avgs))
    if isinstance(c.l2, Tensor) or c.l2 != 0.0:
        g = list(torch._foreach_add(g, torch._foreach_mul(p, c.l2)))
    _average_(m, g, c.rest)
    damping = [c.damping] * len(blocks) if isinstance(c.damping, Tensor) else c.damping
    diagonals = [sum_of_terms(b.terms, b.param).to(dtype) for b in blocks]
    if all(b.makes_its_diagonal for b in blocks):
        torch._foreach_add_(diagonals, damping)
    else:
        diagonals = list(torch._foreach_add(diagonals, damping))
    if isinstance(c.shrink, Tensor) or c.shrink != 1.0:
        torch._foreach_mul_(p, c.shrink)
    if isinstance(c.rate, Tensor):  # addcdiv takes no tensor as its factor; F >= damping > 0, so a rate of 0 is no step
        torch._foreach_addcdiv_(p, m, torch._foreach_div(diagonals, c.rate))
    else:
        torch._foreach_addcdiv_(p, m, diagonals, value=c.rate)
    for computed, stored in ((p, params), (m, exp_avgs)):
        if computed is not stored:
            torch._foreach_copy_(stored, computed)


def _average_(averages: list[Tensor], samples: list[Tensor], rest: float | Tensor) -> None:
    """``average <- average + rest (sample - average)``, in place."""
    if isinstance(rest, Tensor):  # compilers fuse this, and no lerp by a tensor
        torch._foreach_add_(averages, torch._foreach_mul(torch._foreach_sub(samples, averages), rest))
    else:
        torch._foreach_lerp_(averages, samples, rest)


def _averaged(averages: list[Tensor], samples: list[Tensor], rest: float | Tensor) -> Sequence[Tensor]:
    """``average + rest (sample - average)``, in new tensors."""
    if isinstance(rest, Tensor):
        return torch._foreach_add(averages, torch._foreach_mul(torch._foreach_sub(samples, averages), rest))
    return torch._foreach_lerp(averages, samples, rest)


def _cast(tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Copies of tensors of one dtype in another, made together."""
    copies = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
    torch._foreach_copy_(copies, tensors)
    return copies


class RootCoefficients(NamedTuple):
    """Numbers of one step by the root of the diagonal, shared by the parameters of a group that are equally old.

    Attributes:
        rest: ``1 - beta``, the gradient's weight in the first moment.
        l2: ``weight_decay`` of AdaFisher; 0 where the decay is decoupled.
        shrink: ``1 - lr * weight_decay`` where the decay is decoupled, else 1.
        lr: Learning rate.
        correction: ``1 / (1 - beta^step)``.
        most: The largest step in units of the parameter's norm; infinity for no bound.
        nesterov: Whether the momentum looks one step ahead.

    Numbers are 0-dimensional tensors where the update is compiled.
    """

    rest: float | Tensor
    l2: float | Tensor
    shrink: float | Tensor
    lr: float | Tensor
    correction: float | Tensor
    most: float | Tensor
    nesterov: bool


def root_coefficients(group: Mapping[str, Any], step: int, decoupled: bool) -> RootCoefficients:
    """Coefficients of a parameter group at its parameters' update number ``step`` (1 for the first)."""
    lr, beta, weight_decay = float(group["lr"]), group["beta"], group["weight_decay"]
    shrink, l2 = (1.0 - lr * weight_decay, 0.0) if decoupled else (1.0, weight_decay)
    most = group.get("max_relative_step", MAX_RELATIVE_STEP)  # AdaFisher(W) has no such option
    most = math.inf if most is None else most
    return RootCoefficients(1.0 - beta, l2, shrink, lr, 1.0 / (1.0 - beta**step), most, group.get("nesterov", True))


def damping_terms(terms: Sequence[DiagonalTerm], relative_damping: float, axes: int) -> list[DiagonalTerm]:
    """The term that adds ``max(rho * mean(F), 1e-16)`` to the diagonal of a parameter with this many axes.

    There is none without factors.
    """
    if not any(term for term in terms):
        return []
    damping = (mean_of_terms(terms) * relative_damping).clamp_min(LEAST_DAMPING)
    return [(damping.reshape([1] * axes),)]


class DirectionSize(NamedTuple):
    """Length of a parameter's direction.

    Attributes:
        rms: Its root mean square, or the largest one.
        exact: It always has this root mean square, whatever the momentum.
        bounded: The bound on relative steps holds for it.
    """

    rms: float
    exact: bool
    bounded: bool


def root_directions(blocks: Sequence[Block], c: RootCoefficients) -> list[Tensor]:
    """Update first moments, and return ``m / sqrt(F)`` of each block in a new tensor, ``m`` not bias-corrected.

    Args:
        blocks: Parameters, or blocks of them, of one device and dtype, with their damping among the terms.
        c: Coefficients.
    """
    dtype = blocks[0].compute_dtype
    params, grads, exp_avgs = ([getattr(block, name) for block in blocks] for name in ("param", "grad", "exp_avg"))
    g, m = (t if t[0].dtype == dtype else _cast(t, dtype) for t in (grads, exp_avgs))
    if isinstance(c.l2, Tensor) or c.l2 != 0.0:
        p = params if params[0].dtype == dtype else _cast(params, dtype)
        g = list(torch._foreach_add(g, torch._foreach_mul(p, c.l2)))
    _average_(m, g, c.rest)
    if m is not exp_avgs:
        torch._foreach_copy_(exp_avgs, m)
    roots = torch._foreach_rsqrt([sum_of_terms(block.terms, block.param).to(dtype) for block in blocks])
    if not c.nesterov:
        return list(torch._foreach_mul(m, roots))
    ahead = list(_averaged(m, g, c.rest))
    torch._foreach_mul_(ahead, roots)
    return ahead


def root_factors(squares: Tensor, counts: Sequence[int], sizes: Sequence[DirectionSize], c: RootCoefficients) -> Tensor:
    """Factors that turn directions (``root_directions``, ``spectral_directions``) into steps, one a parameter.

    With ``u`` the bias-corrected direction the step is ``-lr s u / max(s, rms(u))``, or ``-lr s u / rms(u)`` where its
    size ``s`` is exact; where it is bounded at most ``most`` times the parameter's norm (``LEAST_RMS`` at least).

    Args:
        squares: Sums of squares of each whole direction and each whole parameter, shape ``(2, parameters)``.
        counts: Number of values of each.
        sizes: Size of each.
        c: Coefficients.
    """
    rms, norm_rms = (squares / squares.new_tensor(counts)).sqrt_().unbind()
    rms = rms * c.correction
    least = squares.new_tensor([LEAST_DIRECTION if size.exact else size.rms for size in sizes])
    factor = squares.new_tensor([size.rms for size in sizes]) / torch.maximum(rms, least)
    bound = c.most * norm_rms.clamp_min(LEAST_RMS) / (factor * rms * c.lr).abs()
    bounded = squares.new_tensor([size.bounded for size in sizes], dtype=torch.bool)
    bound = torch.where(bounded & (bound < 1.0), bound, torch.ones_like(bound))
    return factor * bound * -c.lr * c.correction


def root_move_(params: list[Tensor], directions: list[Tensor], factors: Sequence[Tensor], c: RootCoefficients) -> None:
    """``theta <- shrink theta + factor * direction``, in place."""
    dtype = directions[0].dtype
    p = params if params[0].dtype == dtype else _cast(params, dtype)
    if isinstance(c.shrink, Tensor) or c.shrink != 1.0:
        torch._foreach_mul_(p, c.shrink)
    torch._foreach_addcmul_(p, directions, list(factors))
    if p is not params:
        torch._foreach_copy_(params, p)


def root_update_(block: Block, size: DirectionSize, c: RootCoefficients) -> Tensor:
    """One step of one whole parameter by the root of its diagonal, in place; ``torch.compile`` makes a kernel of it.

    Returns:
        Sum of squares of the step, decay left out, shape ``(1,)``.
    """
    directions = root_directions([block], c)
    norms = [torch.linalg.vector_norm(tensor, dtype=directions[0].dtype) for tensor in (directions[0], block.param)]
    squares = torch.stack(norms).square()[:, None]
    factors = root_factors(squares, [block.param.numel()], [size], c)
    root_move_([block.param], directions, factors.unbind(), c)
    return squares[0] * factors.square()


def spectral_directions(
    momenta: Sequence[Tensor], relative_damping: float, polar_dtype: torch.dtype | None = None
) -> Tensor:
    """``O = a * polar(a * M * b) * b`` for every matrix; ``root_factors`` gives it its size.

    ``a = (r / mean(r) + rho)^-1/2`` and ``b = (c / mean(c) + rho)^-1/2``, where ``r`` and ``c`` are the mean squares of
    the rows and the columns of ``M``.

    Args:
        momenta: Matrices ``M (rows, columns)`` of one shape, dtype and device.
        relative_damping: rho.
        polar_dtype: See ``hf_adafisher.optimizers.polar.polar_factor``.

    Returns:
        Tensor ``(matrices, rows, columns)``, zero where the momentum is.
    """
    momentum = torch.stack(list(momenta))
    tiny = torch.finfo(momentum.dtype).tiny
    momentum.div_(momentum.abs().amax((1, 2), keepdim=True).clamp_min(tiny))  # squares of small values would be 0
    squares = momentum.square()
    sides = []
    for axis in (2, 1):
        factor = squares.mean(axis, keepdim=True)
        sides.append(factor.div_(factor.mean((1, 2), keepdim=True).clamp_min(tiny)).add_(relative_damping).rsqrt_())
    a, b = sides
    return polar_factor(momentum.mul_(a).mul_(b), polar_dtype).mul_(a).mul_(b)
