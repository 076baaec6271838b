"""Update rules, each written once: pure functions of momentum, factors and options, for eager and compiled steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_adafisher.fisher.diagonals import DiagonalTerm, diagonal_of, sum_of_terms
from hf_adafisher.optimizers.polar import polar_factor

UPDATE_RMS = 0.2
"""Root mean square of a hidden matrix's spectral direction, and the largest of a vector's; Adam's is 0.2 to 0.4."""
TABLE_RMS = 1.0
"""Largest root mean square of any other direction; the bound on relative steps holds it back (docs/spectral.md)."""
LEAST_RMS = 0.02
"""Smallest root mean square that a parameter counts with where its step is bounded: weights of zeros can move."""


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
    if isinstance(c.rest, Tensor):  # compilers fuse this, and no lerp by a tensor
        torch._foreach_add_(m, torch._foreach_mul(torch._foreach_sub(g, m), c.rest))
    else:
        torch._foreach_lerp_(m, g, c.rest)
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


def _cast(tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Copies of tensors of one dtype in another, made together."""
    copies = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
    torch._foreach_copy_(copies, tensors)
    return copies


def spectral_directions(
    momenta: Sequence[Tensor], whitenings: Sequence[tuple[Tensor, Tensor]], polar_dtype: torch.dtype | None = None
) -> Iterator[Tensor]:
    """``0.2 O / rms(O)`` with ``O = a * polar(a * M * b) * b`` for every matrix.

    Args:
        momenta: Matrices ``M (rows, columns)`` of one shape, dtype and device.
        whitenings: ``a (rows, 1)`` and ``b (1, columns)`` of each.
        polar_dtype: See ``hf_adafisher.optimizers.polar.polar_factor``.

    Returns:
        A matrix for each, zero where the momentum is.
    """
    a, b = (torch.stack(side) for side in zip(*whitenings, strict=True))
    direction = polar_factor(torch.stack(list(momenta)).mul_(a).mul_(b), polar_dtype).mul_(a).mul_(b)
    norm = torch.linalg.vector_norm(direction, dim=(1, 2), keepdim=True)
    scale = UPDATE_RMS * direction[0].numel() ** 0.5
    return iter(direction.mul_(scale / norm.clamp_min(torch.finfo(norm.dtype).tiny)))


def diagonal_direction(momentum: Tensor, terms: Sequence[DiagonalTerm], relative_damping: float) -> Tensor:
    """``u / max(1, rms(u))`` with ``u = m / sqrt(F + rho * mean(F))``, and 0.2 of that for a vector or a single value.

    Args:
        momentum: ``m``; the result takes its memory.
        terms: Whose products' sum is ``F``. A single term without tensors knows no scale: ``u`` then has the root mean
            square 1, and so it has where ``F`` is zero.
        relative_damping: rho.

    Returns:
        A tensor of the momentum's shape, zero where the momentum is.
    """
    tiny = torch.finfo(momentum.dtype).tiny
    largest = momentum.abs().amax().clamp_min(tiny)
    if any(term for term in terms):
        diagonal = diagonal_of(terms, momentum, 0.0)
        mean = diagonal.mean()
        root = diagonal.add_(mean * relative_damping).sqrt_()
        momentum = momentum.div_(torch.where(mean > 0, root, largest))
        least = torch.where(mean > 0, torch.ones_like(mean), mean.new_tensor(tiny))
    else:
        momentum, least = momentum.div_(largest), largest.new_tensor(tiny)
    rms = torch.linalg.vector_norm(momentum) / momentum.numel() ** 0.5
    largest_rms = TABLE_RMS if momentum.dim() > 1 else UPDATE_RMS
    return momentum.mul_(largest_rms / torch.maximum(rms, least))


def bound_relative_step(direction: Tensor, lr: float, norm: Tensor, most: float) -> Tensor:
    """``direction``, made shorter where ``lr`` times its Frobenius norm is more than ``most`` times the parameter's.

    Args:
        direction: Of a whole parameter; the result takes its memory.
        lr: Learning rate.
        norm: The parameter's Frobenius norm, 0-dimensional; counted as that of a root mean square of ``LEAST_RMS`` at
            least.
        most: The largest relative step.
    """
    limit = most * norm.clamp_min(LEAST_RMS * direction.numel() ** 0.5)
    return direction.mul_((limit / (abs(lr) * torch.linalg.vector_norm(direction))).clamp_max(1.0))
