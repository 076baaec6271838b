"""SpectralAdaFisher: the polar factor of the whitened momentum for hidden matrices, a diagonal's root for the rest."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hf_adafisher.fisher.averages import statistics_dtype
from hf_adafisher.fisher.parameter_uses import ParameterUse
from hf_adafisher.optimizers.base.gradient_statistics import GradientStatistics
from hf_adafisher.optimizers.base.hooked import ParamsT
from hf_adafisher.optimizers.base.kronecker_diagonal import KroneckerDiagonalOptimizer, Member
from hf_adafisher.optimizers.base.options import (
    BETA,
    EMA_DECAY,
    LEARNING_RATE,
    MOMENTUM_DTYPE,
    WEIGHT_DECAY,
    Flag,
    FloatingDtype,
    OptimizerOptions,
    Option,
    Size,
    dtype_option,
    option,
)
from hf_adafisher.optimizers.sharding import full_tensor, local_part, local_values
from hf_adafisher.optimizers.update import (
    UPDATE_RMS,
    DirectionSize,
    root_coefficients,
    root_factors,
    root_move_,
    spectral_directions,
)
from hf_adafisher.optimizers.validation.training_modes import Needs

logger = logging.getLogger(__name__)

BATCH_VALUES = 1 << 24
"""At most this many values are orthogonalised at once (one matrix, where it has more)."""
SPECTRAL_SIZE = DirectionSize(UPDATE_RMS, exact=True, bounded=True)
"""Size of a hidden matrix's direction."""

RELATIVE_DAMPING = Option(
    Size(
        positive=True,
        why=": it is what a row or a column without any gradient is divided by, in units of the average",
    ),
    "damping of the metric and of the diagonal, in units of their means",
    symbol="rho",
)
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

    needs: ClassVar[Needs] = Needs.SHAPES

    lr: float = option(1e-2, LEARNING_RATE, symbol="")
    beta: float = option(0.9, BETA, argument=True)
    relative_damping: float = option(0.1, RELATIVE_DAMPING, argument=True, identifies=True)
    ema_decay: float = option(0.95, EMA_DECAY, argument=True)
    weight_decay: float = option(0.0, WEIGHT_DECAY)
    nesterov: bool = option(True, NESTEROV)
    max_relative_step: float | None = option(0.05, MAX_RELATIVE_STEP)
    spectral_heads: bool = option(False, SPECTRAL_HEADS)
    momentum_dtype: torch.dtype | str | None = option(None, MOMENTUM_DTYPE, argument=True)
    polar_dtype: torch.dtype | str | None = option(None, POLAR_DTYPE)


class SpectralAdaFisher(KroneckerDiagonalOptimizer):
    """Hidden matrices by the polar factor of their whitened momentum, all else by the root of a diagonal; no hooks.

    A hidden matrix (of Linear, transformers' Conv1D, or a convolution seen as ``(out, in * kernel)``) with momentum
    ``M`` (one step ahead, Nesterov's) moves by the metric that the momentum's own rows and columns make:

        ``r_i = mean_j M_ij^2 ,  c_j = mean_i M_ij^2``
        ``a = (r / mean(r) + rho)^-1/2 ,  b = (c / mean(c) + rho)^-1/2``      (``rho``: ``relative_damping``)
        ``O = a * polar(a * M * b) * b``                                      (rows by ``a``, columns by ``b``)
        ``theta <- theta - lr * 0.2 O / rms(O) - lr * weight_decay * theta``

    ``polar`` is four Newton-Schulz iterations (``hf_adafisher.optimizers.polar.polar_factor``). Updates have a root
    mean square of 0.2, about that of Adam's, as in Moonlight (Liu et al., 2025, arXiv 2502.16982).

    Everything else (embeddings, heads, norms, biases) moves as under ``AdaFisherW(step_size="root")``: by the same
    momentum over the root of the second moment of its gradient, which every step averages (``ema_decay``; of a matrix
    with at most 8 rows or columns, as of a vector, whole):

        ``u = m^ / sqrt(F + rho * mean(F)) ,  F = row means (x) column means / mean of grad^2;  of a vector grad^2``
        ``theta <- theta - lr * s u / max(s, rms(u)) - lr * weight_decay * theta``

    with ``s = 1`` for embeddings and output layers, and 0.2 for all others (vectors, position tables that are no
    embeddings, class tokens, grouped convolutions). A single value moves by the sign of its
    momentum. The state is one tensor of the parameter's size, and but for hidden matrices a few vectors.

    No step moves a parameter with more than one axis, hidden matrix or not, by more than ``max_relative_step`` of its
    norm, ``lr ||d|| <= max_relative_step * ||theta||`` over all values, decay left out (a root mean square of theta
    below 0.02 counts as 0.02). This holds large learning rates back while weights are small, early in training, and
    leaves those of fine-tuning as they are. Fromage (Bernstein et al., 2020, arXiv 2002.03432) and LAMB make every step
    relative; here it is a bound.

    Nothing is read but gradients, so that any Trainer, ``torch.compile`` and functional transforms work as they do with
    AdamW; the model is needed to tell hidden matrices, embeddings and output layers apart (``coverage()`` lists them).
    Scaling the gradients of all steps alike changes nothing. An update of a hidden matrix has its full size whatever
    the size of the momentum, also where gradients have become exactly zero: freeze what should rest.

    Under FSDP2 every process gathers the momentum of one batch of hidden matrices at a time and makes the whole update,
    of which it keeps its part; of other parameters it communicates row and column sums and norms.

    ``torch.optim.lr_scheduler.OneCycleLR`` needs ``cycle_momentum=False``: there are no ``betas`` to cycle.

    Args:
        model: The module to train.
        params: Parameters, named parameters or parameter groups, as for every torch optimizer; each must belong to
            ``model``. Default: all trainable parameters. Groups may set every option below.
        lr: Learning rate, >= 0. Default 0.01, for weights that start at random; runs of a few hundred steps take 0.02.
        beta: Decay of the first moment, in [0, 1). Default 0.9.
        relative_damping: rho, > 0: what is added to factors, and to F, in units of their means. Default 0.1.
        ema_decay: Decay of the factors' moving average, in [0, 1). Default 0.95.
        weight_decay: Decoupled weight decay, >= 0. Default 0.
        nesterov: Look one step ahead with the momentum. Default True.
        max_relative_step: The largest step of a parameter with more than one axis, in units of its norm, > 0; None for
            no bound. Default 0.05.
        spectral_heads: Treat output layers, and embeddings tied to them, as hidden matrices. Default False. (Their
            factors stay in the state, unused.)
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
    damping_option = "relative_damping"
    divides_by_root = True
    _warned_of_heads = False
    _statistics: GradientStatistics

    def __init__(
        self,
        model: nn.Module,
        params: ParamsT | None = None,
        *,
        lr: float = SpectralAdaFisherOptions.lr,
        beta: float = SpectralAdaFisherOptions.beta,
        relative_damping: float = SpectralAdaFisherOptions.relative_damping,
        ema_decay: float = SpectralAdaFisherOptions.ema_decay,
        weight_decay: float = SpectralAdaFisherOptions.weight_decay,
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
            weight_decay=weight_decay,
            nesterov=nesterov,
            max_relative_step=max_relative_step,
            spectral_heads=spectral_heads,
            momentum_dtype=momentum_dtype,
            polar_dtype=polar_dtype,
        )
        super().__init__(model, params, options)

    def _new_tracker(self) -> GradientStatistics:
        return GradientStatistics(self.model, type(self).__name__, hidden_factors=False)

    def _track(self) -> None:
        super()._track()
        asked = [p for group in self.param_groups if group["spectral_heads"] for p in group["params"]]
        if asked and not self._warned_of_heads and not any(self._statistics.is_head(p) for p in asked):
            self._warned_of_heads = True
            logger.warning("spectral_heads=True changes nothing: no output layer is in the groups that set it.")

    def _uses_of(self, group: Mapping[str, Any], p: Tensor) -> Sequence[ParameterUse]:
        return () if self._statistics.is_matrix(p, group["spectral_heads"]) else super()._uses_of(group, p)

    def _update_parameters(self) -> None:
        matrices: dict[Any, list[Member]] = {}
        others = []
        for member in self._members():
            p, group = member.param, member.group
            if self._statistics.is_matrix(p, group["spectral_heads"]):
                kind = id(group), member.step, p.device, p.dtype, p.shape[0], p.shape[1:].numel()
                matrices.setdefault(kind, []).append(member)
            else:
                others.append(member)
        self._move_by_root(others)
        for (*_, rows, columns), alike in matrices.items():
            most = max(1, BATCH_VALUES // max(rows * columns, 1))
            for first in range(0, len(alike), most):
                self._move_matrices(alike[first : first + most])

    def _move_matrices(self, members: Sequence[Member]) -> None:
        """Move hidden matrices of one group, age and shape, seen as rows and columns."""
        group = members[0].group
        momenta = [momentum.flatten(1) for momentum in self._momenta(members)]
        directions = spectral_directions(momenta, group["relative_damping"], dtype_option(group, "polar_dtype"))
        self._move(members, directions)

    def _momenta(self, members: Sequence[Member]) -> list[Tensor]:
        """Update the first moments; return those of whole matrices, a step ahead if asked, in the statistics' dtype.

        Their scale does not matter, and so they are not bias-corrected.
        """
        group, dtype = members[0].group, statistics_dtype(members[0].param.dtype)
        rest, found = 1.0 - group["beta"], []
        for member in members:
            exp_avg, grad = local_part(member.exp_avg), local_part(member.grad)
            exp_avg.lerp_(grad.to(exp_avg.dtype), rest)
            momentum = member.exp_avg.to(dtype)
            found.append(full_tensor(momentum.lerp(member.grad.to(dtype), rest) if group["nesterov"] else momentum))
        return found

    def _move(self, members: Sequence[Member], directions: Tensor) -> None:
        """Move hidden matrices along the directions of the whole, which are of the size of spectral ones by then."""
        params, c = [member.param for member in members], root_coefficients(members[0].group, members[0].step, True)
        norms = [full_tensor(torch.linalg.vector_norm(p.detach(), dtype=directions.dtype)) for p in params]
        squares = torch.stack([torch.linalg.vector_norm(directions, dim=(1, 2)), torch.stack(norms)]).square()
        sizes = [SPECTRAL_SIZE] * len(params)
        factors = root_factors(squares, [p.numel() for p in params], sizes, c)
        local = [local_values(d.reshape(p.shape), p) for d, p in zip(directions, params, strict=True)]
        root_move_([local_part(p) for p in params], local, factors.unbind(), c)
        squares = squares[0] * factors.square()
        self._last_steps.update((id(p), (squares, i)) for i, p in enumerate(params))
