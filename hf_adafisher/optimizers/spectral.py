"""SpectralAdaFisher: steepest descent in the spectral norm of coordinates that the diagonal factors whiten."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hf_adafisher.fisher.averages import statistics_dtype
from hf_adafisher.fisher.diagonals import DiagonalTerm
from hf_adafisher.optimizers.base.hooked import ParamsT
from hf_adafisher.optimizers.base.kronecker_diagonal import KroneckerDiagonalOptimizer, Member
from hf_adafisher.optimizers.base.loss_terms import CountsLossTerms
from hf_adafisher.optimizers.base.options import (
    BETA,
    EMA_DECAY,
    LEARNING_RATE,
    MOMENTUM_DTYPE,
    UPDATE_INTERVAL,
    WEIGHT_DECAY,
    Flag,
    FloatingDtype,
    OptimizerOptions,
    Option,
    Size,
    UnitInterval,
    dtype_option,
    option,
)
from hf_adafisher.optimizers.base.spectral_statistics import SpectralStatistics
from hf_adafisher.optimizers.sharding import full_tensor, local_part, local_values
from hf_adafisher.optimizers.update import bound_relative_step, diagonal_direction, spectral_directions

logger = logging.getLogger(__name__)

BATCH_VALUES = 1 << 24
"""At most this many values are orthogonalised at once (one matrix, where it has more)."""

RELATIVE_DAMPING = Option(
    Size(
        positive=True,
        why=": it is what a row or a column without any gradient is divided by, in units of the average",
    ),
    "damping of the factors and of the diagonal, in units of their means",
    symbol="rho",
)
_EXPONENT = UnitInterval(closed=True, why=": 0.5 is the rule's, 0 leaves the factor out")
INPUT_EXPONENT = Option(_EXPONENT, "exponent of the input factor", symbol="e_H")
OUTPUT_EXPONENT = Option(_EXPONENT, "exponent of the output-gradient factor", symbol="e_S")
NESTEROV = Option(Flag(), "look one step ahead with the momentum")
MAX_RELATIVE_STEP = Option(
    Size(
        positive=True,
        optional=True,
        why=": it is the largest step of a parameter with more than one axis in units of its norm, None for no bound",
    ),
    "largest step of a parameter with more than one axis, in units of its norm",
)
SPECTRAL_HEADS = Option(Flag(), "treat output layers, and embeddings tied to them, as hidden matrices")
POLAR_DTYPE = Option(
    FloatingDtype("bfloat16, on a CPU that of the statistics"), "dtype of the Newton-Schulz iterations"
)


@dataclass(frozen=True)
class SpectralAdaFisherOptions(OptimizerOptions):
    """Options of SpectralAdaFisher."""

    lr: float = option(1e-2, LEARNING_RATE, symbol="")
    beta: float = option(0.9, BETA, argument=True)
    relative_damping: float = option(0.1, RELATIVE_DAMPING, argument=True, identifies=True)
    ema_decay: float = option(0.95, EMA_DECAY, argument=True)
    update_interval: int = option(10, UPDATE_INTERVAL, argument=True, identifies=True)
    weight_decay: float = option(0.0, WEIGHT_DECAY)
    input_exponent: float = option(0.5, INPUT_EXPONENT)
    output_exponent: float = option(0.5, OUTPUT_EXPONENT)
    nesterov: bool = option(True, NESTEROV)
    max_relative_step: float | None = option(0.05, MAX_RELATIVE_STEP)
    spectral_heads: bool = option(False, SPECTRAL_HEADS)
    momentum_dtype: torch.dtype | str | None = option(None, MOMENTUM_DTYPE, argument=True)
    polar_dtype: torch.dtype | str | None = option(None, POLAR_DTYPE)


class SpectralAdaFisher(CountsLossTerms, KroneckerDiagonalOptimizer):
    """AdaFisher's two vectors a layer as the metric of a spectral descent, with decoupled weight decay.

    A hidden matrix (of Linear, transformers' Conv1D, or a convolution seen as ``(out, in * kernel)``) with momentum
    ``M`` (one step ahead, Nesterov's) and averaged factors ``S``, ``H``, which are not min-max normalised, moves by

        ``a = (S / mean(S) + rho)^-e_S ,  b = (H / mean(H) + rho)^-e_H``       (``rho``: ``relative_damping``)
        ``O = a * polar(a * M * b) * b``                                      (rows by ``a``, columns by ``b``)
        ``theta <- theta - lr * 0.2 O / rms(O) - lr * weight_decay * theta``

    With ``e_S = e_H = 1/2`` this is the steepest descent under the norm ``|| S^1/2 dW H^1/2 ||``, the largest singular
    value in coordinates whitened by the diagonal Fisher; with both exponents 0 it is Muon's direction. ``polar`` is
    four Newton-Schulz iterations (``hf_adafisher.optimizers.polar.polar_factor``). Updates have a root mean square
    of 0.2, about that of Adam's, so that AdamW's weight decay and the order of its learning rates carry over.

    Everything else (embeddings, heads, norms, biases) moves by the same momentum over the root of the batch gradient's
    second moment, as the factors estimate it, with c = 1, for parameters of one axis or none c = 0.2:

        ``u = m^ / sqrt(F + rho * mean(F)) ,  F = sum_n g_n^2 (x) mean_n x_n^2``
        ``theta <- theta - lr * c u / max(1, rms(u)) - lr * weight_decay * theta``

    A parameter that no layer rule reaches takes ``F`` from its own gradient: exact for a vector, the row means times
    the column means over the mean for a matrix; that of a single value is unknown, and it moves by the sign of its
    momentum. The state is that of AdaFisher: one tensor of the parameter's size, and a few vectors.

    No step moves a parameter with more than one axis, hidden matrix or not, by more than ``max_relative_step`` of its
    norm, ``lr ||d|| <= max_relative_step * ||theta||`` over all values, decay left out (a root mean square of theta
    below 0.02 counts as 0.02). This holds large learning rates back while weights are small, early in training, and
    leaves those of fine-tuning as they are. Fromage (Bernstein et al., 2020, arXiv 2002.03432) and LAMB make every step
    relative; here it is a bound.

    An update of a hidden matrix has its full size whatever the size of the momentum, also where gradients have become
    exactly zero: freeze what should rest. ``F`` is that of gradients before clipping, momentum is made of clipped ones;
    so everything but hidden matrices takes smaller steps where the gradient is clipped.

    Under FSDP2 every process gathers the momentum of one batch of matrices, or of one other parameter, at a time, and
    the norm of each parameter, and makes the whole update, of which it keeps its part.

    ``torch.optim.lr_scheduler.OneCycleLR`` needs ``cycle_momentum=False``: there are no ``betas`` to cycle.

    Args:
        model: The module to train. Forward hooks are put on its layers for the steps that refresh the factors.
        params: Parameters, named parameters or parameter groups, as for every torch optimizer; each must belong to
            ``model``. Default: all trainable parameters. Groups may set every option below but ``update_interval``.
        lr: Learning rate, >= 0. Default 0.01.
        beta: Decay of the first moment, in [0, 1). Default 0.9.
        relative_damping: rho, > 0: what is added to factors, and to F, in units of their means. Default 0.1.
        ema_decay: Decay of the factors' moving average, in [0, 1). Default 0.95.
        update_interval: T_cov, optimizer steps between two refreshes of the factors, >= 1. Default 10.
        weight_decay: Decoupled weight decay, >= 0. Default 0.
        input_exponent: e_H, in [0, 1]. Default 0.5; 0 leaves the input factor out of the hidden matrices' step.
        output_exponent: e_S, in [0, 1], the same for the output-gradient factor. Default 0.5.
        nesterov: Look one step ahead with the momentum. Default True.
        max_relative_step: The largest step of a parameter with more than one axis, in units of its norm, > 0; None for
            no bound. Default 0.05.
        spectral_heads: Treat output layers, and embeddings tied to them, as hidden matrices. Default False.
        momentum_dtype: Dtype of the first moment, as a torch dtype or its name. Default None: the parameter's own.
        polar_dtype: Dtype of the Newton-Schulz iterations. Default None: bfloat16, on a CPU that of the statistics.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: As ``hf_adafisher.AdaFisher``.

    Example:
        >>> import torch
        >>> from hf_adafisher import SpectralAdaFisher
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
        >>> with SpectralAdaFisher(model, lr=1e-2) as optimizer:
        ...     model(torch.randn(8, 4)).square().mean().backward()
        ...     _ = optimizer.step()
    """

    options_class = SpectralAdaFisherOptions
    decoupled: ClassVar[bool | None] = True
    _warned_of_heads = False
    _statistics: SpectralStatistics

    def __init__(
        self,
        model: nn.Module,
        params: ParamsT | None = None,
        *,
        lr: float = SpectralAdaFisherOptions.lr,
        beta: float = SpectralAdaFisherOptions.beta,
        relative_damping: float = SpectralAdaFisherOptions.relative_damping,
        ema_decay: float = SpectralAdaFisherOptions.ema_decay,
        update_interval: int = SpectralAdaFisherOptions.update_interval,
        weight_decay: float = SpectralAdaFisherOptions.weight_decay,
        input_exponent: float = SpectralAdaFisherOptions.input_exponent,
        output_exponent: float = SpectralAdaFisherOptions.output_exponent,
        nesterov: bool = SpectralAdaFisherOptions.nesterov,
        max_relative_step: float | None = SpectralAdaFisherOptions.max_relative_step,
        spectral_heads: bool = SpectralAdaFisherOptions.spectral_heads,
        momentum_dtype: torch.dtype | str | None = SpectralAdaFisherOptions.momentum_dtype,
        polar_dtype: torch.dtype | str | None = SpectralAdaFisherOptions.polar_dtype,
    ) -> None:
        options = SpectralAdaFisherOptions(
            lr=lr,
            beta=beta,
            relative_damping=relative_damping,
            ema_decay=ema_decay,
            update_interval=update_interval,
            weight_decay=weight_decay,
            input_exponent=input_exponent,
            output_exponent=output_exponent,
            nesterov=nesterov,
            max_relative_step=max_relative_step,
            spectral_heads=spectral_heads,
            momentum_dtype=momentum_dtype,
            polar_dtype=polar_dtype,
        )
        super().__init__(model, params, options)

    def _new_tracker(self) -> SpectralStatistics:
        return SpectralStatistics(self.model, type(self).__name__)

    def _track(self) -> None:
        super()._track()
        asked = [p for group in self.param_groups if group["spectral_heads"] for p in group["params"]]
        if asked and not self._warned_of_heads and not any(self._statistics.is_head(p) for p in asked):
            self._warned_of_heads = True
            logger.warning("spectral_heads=True changes nothing: no output layer is in the groups that set it.")

    def damping_of(self, group: Mapping[str, Any], terms: Sequence[DiagonalTerm]) -> float:
        """``relative_damping`` times the mean of the diagonal that the terms make."""
        return group["relative_damping"] * self._statistics.mean_of(terms)

    def _take_statistics(self, newcomers: bool = False) -> bool | None:
        self._statistics.loss_terms = self.loss_terms
        return super()._take_statistics(newcomers)

    def _update_parameters(self) -> None:
        matrices: dict[Any, list[Member]] = {}
        for member in self._members():
            exp_avg, grad = local_part(member.exp_avg), local_part(member.grad)
            exp_avg.lerp_(grad.to(exp_avg.dtype), 1.0 - member.group["beta"])
            p = member.param
            if self._statistics.is_matrix(p, member.group["spectral_heads"]) and _are_sides(member.terms, p):
                rows, columns = p.shape[0], p.shape[1:].numel()
                shape = min(rows, columns), max(rows, columns), rows > columns
                kind = p.device, statistics_dtype(p.dtype), dtype_option(member.group, "polar_dtype")
                matrices.setdefault((shape, *kind), []).append(member)
            else:
                self._move(member, self._diagonal_step(member))
        for (shape, *_, polar_dtype), alike in matrices.items():
            most = max(1, BATCH_VALUES // max(shape[0] * shape[1], 1))
            for first in range(0, len(alike), most):
                batch = alike[first : first + most]
                for member, direction in zip(batch, self._spectral_steps(batch, polar_dtype), strict=True):
                    self._move(member, direction)

    def _momentum(self, member: Member) -> Tensor:
        """The bias-corrected first moment of the whole parameter, a step ahead if asked, in the dtype of statistics."""
        beta, dtype = member.group["beta"], statistics_dtype(member.param.dtype)
        momentum = member.exp_avg.to(dtype)
        if member.group["nesterov"]:
            momentum = momentum * beta + member.grad.to(dtype) * (1.0 - beta)
        return full_tensor(momentum) / (1.0 - beta**member.step)

    def _diagonal_step(self, member: Member) -> Tensor:
        return diagonal_direction(self._momentum(member), member.terms, member.group["relative_damping"])

    def _spectral_steps(self, members: Sequence[Member], polar_dtype: torch.dtype | None) -> Iterator[Tensor]:
        momenta, whitenings = [], []
        for member in members:
            momenta.append(self._momentum(member).flatten(1))
            whitenings.append(self._statistics.whitening(member.param, member.terms, member.group))
        directions = spectral_directions(momenta, whitenings, polar_dtype)
        for member, direction in zip(members, directions, strict=True):
            yield direction.reshape(member.param.shape)

    def _move(self, member: Member, direction: Tensor) -> None:
        lr, weight_decay, p = float(member.group["lr"]), member.group["weight_decay"], local_part(member.param)
        most = member.group["max_relative_step"]
        if most is not None and p.dim() > 1:
            norm = full_tensor(torch.linalg.vector_norm(member.param.detach(), dtype=direction.dtype))
            direction = bound_relative_step(direction, lr, norm, most)
        direction = local_values(direction, member.param)
        moved = p if p.dtype == direction.dtype else p.to(direction.dtype)
        if weight_decay:
            moved.mul_(1.0 - lr * weight_decay)
        moved.add_(direction, alpha=-lr)
        if moved is not p:
            p.copy_(moved)


def _are_sides(terms: Sequence[DiagonalTerm], p: Tensor) -> bool:
    """True where every term has one factor for the rows and one for the columns (not in grouped convolutions)."""
    return all(len(term) == 2 and term[0].dim() == p.dim() for term in terms)
