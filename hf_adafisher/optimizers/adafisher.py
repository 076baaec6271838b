"""AdaFisher and AdaFisherW (ICLR 2025, arXiv 2405.16397)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from hf_adafisher.optimizers.base.gradient_statistics import GradientStatistics
from hf_adafisher.optimizers.base.hooked import ParamsT
from hf_adafisher.optimizers.base.kronecker_diagonal import KroneckerDiagonalOptimizer
from hf_adafisher.optimizers.base.options import (
    BETA,
    EMA_DECAY,
    LEARNING_RATE,
    MOMENTUM_DTYPE,
    UPDATE_INTERVAL,
    WEIGHT_DECAY,
    Flag,
    OneOf,
    OptimizerOptions,
    Option,
    Size,
    option,
)
from hf_adafisher.optimizers.base.statistics import FactorStatistics
from hf_adafisher.optimizers.blocks import update_in_blocks
from hf_adafisher.optimizers.compiled import CompiledUpdate
from hf_adafisher.optimizers.sharding import is_split, local_part
from hf_adafisher.optimizers.update import Block, StepCoefficients, step_coefficients
from hf_adafisher.optimizers.validation.training_modes import Needs

DAMPING = Option(
    Size(positive=True, why=": it is the smallest value that the momentum is divided by"),
    "damping of the diagonal: added to the normalised one (paper), in units of its mean (root)",
    symbol="lambda",
)
STEP_SIZE = Option(
    OneOf(("paper", "root")),
    "the paper's division by the normalised diagonal, with hooks, or that by the root of the gradient's own",
    on_resume="fixed",
    shared=True,
)
COMPILED = Option(Flag(), "update large parameters with kernels made by torch.compile", in_groups=False)

STEP_SIZE_DEFAULTS: dict[str, dict[str, Any]] = {
    "paper": {"lr": 1e-3, "damping": 1e-3, "ema_decay": 0.8, "update_interval": 100},
    "root": {"lr": 4e-3, "damping": 0.1, "ema_decay": 0.95, "update_interval": 1},
}
"""Defaults of the options that mean something else, or want another value, in each form."""


@dataclass(frozen=True)
class AdaFisherOptions(OptimizerOptions):
    """Options of AdaFisher(W); None stands for the form's own default (``STEP_SIZE_DEFAULTS``)."""

    lr: float | None = option(None, LEARNING_RATE)
    beta: float = option(0.9, BETA, argument=True)
    damping: float | None = option(None, DAMPING, argument=True, identifies=True)
    ema_decay: float | None = option(None, EMA_DECAY, argument=True)
    update_interval: int | None = option(None, UPDATE_INTERVAL, argument=True, identifies=True)
    weight_decay: float = option(0.0, WEIGHT_DECAY)
    step_size: str = option("paper", STEP_SIZE, argument=True)
    momentum_dtype: torch.dtype | str | None = option(None, MOMENTUM_DTYPE, argument=True)
    compiled: bool = option(False, COMPILED)

    @property
    def needs(self) -> Needs:  # type: ignore[override]
        """Hooks are needed by the paper's form alone."""
        return Needs.SHAPES if self.step_size == "root" else Needs.LAYERS | Needs.SHAPES

    def __post_init__(self) -> None:
        STEP_SIZE.range.check("step_size", self.step_size)
        for name, default in STEP_SIZE_DEFAULTS[self.step_size].items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, default)
        super().__post_init__()
        if self.step_size == "root" and self.update_interval != 1:
            raise ValueError(
                f"update_interval={self.update_interval} belongs to step_size='paper': with 'root' factors are taken "
                "from every step's gradient, which costs next to nothing. Leave update_interval out"
            )


class AdaFisher(KroneckerDiagonalOptimizer):
    """Momentum divided by a diagonal Kronecker Fisher, or by the root of one, with L2 regularisation in the gradient.

    ``step_size="paper"``, the class's default, is the method as published. For a layer with inputs ``x`` and output
    gradients ``g`` the factors ``h = mean(x^2)`` and ``s = mean(g^2)`` over all positions, recorded by hooks, are
    averaged over time every ``update_interval`` steps, and each weight is updated by

        ``F = minmax(S) (x) minmax(H) + damping``        (Eq. 4; vectors are normalised to [0, 1])
        ``m <- beta m + (1 - beta) (grad + weight_decay * theta)``
        ``theta <- theta - lr * m / (1 - beta^t) / F``

    Because F lies in [damping, 1 + damping], ``lr`` and ``damping`` belong together: the largest step is
    ``lr / damping * m``. A parameter that no layer rule reaches takes its factors from its own gradient.

    ``step_size="root"``, the default of ``create_optimizer`` and ``AdaFisherTrainingArguments``, is for people who come
    from AdamW: its learning rates carry over, and nothing is read but gradients, at every step and without hooks.

        ``R, C``: averages (``ema_decay``) of the mean squares of the gradient's rows and columns
        ``F = R (x) C / mean(R) + max(damping * mean(R), 1e-16)``     (of vectors the average of ``grad^2`` for R C)
        ``u = m^ / sqrt(F)``                                          (``m^`` bias-corrected, a step ahead: Nesterov)
        ``theta <- theta - lr * s u / max(s, rms(u))``               (weight decay as in the class; never in F)

    with ``s = 1`` for hidden matrices, embeddings and output layers and 0.2 for everything else (vectors, the first
    convolution, position tables and tokens that are no embeddings, grouped convolutions, and weights of no Linear,
    Conv1D, convolution or embedding, as ``in_proj_weight`` of nn.MultiheadAttention). Matrices with at most 8 rows or
    columns count as vectors, kernels of at most 8 as inputs, and matrices of a stack have R and C of their own, but one
    mean and one size in common. A parameter with more than one axis moves by at most 5 % of its norm (a root mean
    square below 0.02 counts as 0.02), a single value by the sign of its momentum. The factors are Adafactor's (Shazeer
    and Stern, 2018, arXiv 1804.04235); docs/step_sizes.md says what they, the sizes and the bound are worth, and why
    the hooks' are not used here.

    ``F`` of a matrix is never stored: the state is one tensor of the parameter's size (``exp_avg``) and a few vectors.

    ``torch.optim.lr_scheduler.OneCycleLR`` needs ``cycle_momentum=False``: there are no ``betas`` to cycle.

    Args:
        model: The module to train. In the paper's form forward hooks are put on its layers for the steps that refresh
            the factors.
        params: Parameters, named parameters or parameter groups, as for every torch optimizer; each must belong to
            ``model``. Default: all trainable parameters. Groups may set every option below but ``update_interval``,
            ``step_size`` and ``compiled``.
        lr: Learning rate alpha, >= 0. Default 1e-3, with "root" 4e-3 (for fine-tuning AdamW's).
        beta: Decay of the first moment, in [0, 1). Default 0.9.
        damping: lambda, > 0. Default 1e-3, with "root" 0.1, in units of the diagonal's mean.
        ema_decay: Decay gamma of the factors' moving average, in [0, 1). Default 0.8, with "root" 0.95.
        update_interval: T_cov, optimizer steps between two refreshes of the factors, >= 1. Default 100; "root" takes
            them at every step and nothing else.
        weight_decay: kappa, >= 0. Default 0.
        step_size: The form, ``"paper"`` or ``"root"``. Default "paper".
        momentum_dtype: Dtype of the first moment, as a torch dtype or its name. Default None: the parameter's own;
            ``"float32"`` is worth its memory where the weights are bfloat16. Factors are float32 in any case.
        compiled: Update large parameters with kernels made by ``torch.compile``: faster steps, after some seconds of
            compiling in the first one. Default False. Where no compiler works, one warning says so, and the update is
            the same as without; so it is for parameters that FSDP2 has sharded.

    Raises:
        TypeError: ``model`` is not a module (``AdaFisherW(model.parameters())``).
        ValueError: An option is outside its range, a parameter does not belong to the model, nothing is trainable, or
            the model is wrapped or split in a way that hides layers or parameters (DataParallel, FSDP1, DeepSpeed,
            tensor, context or pipeline parallelism).

    Example:
        >>> import torch
        >>> from hf_adafisher import AdaFisherW
        >>> model = torch.nn.Linear(4, 2)
        >>> with AdaFisherW(model, lr=1e-3) as optimizer:
        ...     model(torch.randn(8, 4)).square().mean().backward()
        ...     _ = optimizer.step()
    """

    options_class = AdaFisherOptions
    decoupled: ClassVar[bool | None] = False

    def __init__(
        self,
        model: nn.Module,
        params: ParamsT | None = None,
        *,
        lr: float | None = AdaFisherOptions.lr,
        beta: float = AdaFisherOptions.beta,
        damping: float | None = AdaFisherOptions.damping,
        ema_decay: float | None = AdaFisherOptions.ema_decay,
        update_interval: int | None = AdaFisherOptions.update_interval,
        weight_decay: float = AdaFisherOptions.weight_decay,
        step_size: str = AdaFisherOptions.step_size,
        momentum_dtype: torch.dtype | str | None = AdaFisherOptions.momentum_dtype,
        compiled: bool = AdaFisherOptions.compiled,
    ) -> None:
        options = AdaFisherOptions(
            lr=lr,
            beta=beta,
            damping=damping,
            ema_decay=ema_decay,
            update_interval=update_interval,
            weight_decay=weight_decay,
            step_size=step_size,
            momentum_dtype=momentum_dtype,
            compiled=compiled,
        )
        self.step_size = options.step_size
        self.divides_by_root = options.step_size == "root"
        self._compiled = CompiledUpdate() if options.compiled else None
        super().__init__(model, params, options)

    def _new_tracker(self) -> FactorStatistics:
        if self.divides_by_root:
            return GradientStatistics(self.model, type(self).__name__, hidden_factors=True)
        return super()._new_tracker()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of the model's parameters; its ``step_size``, if it has one, must be the optimizer's.

        Raises:
            ValueError: As ``HookedOptimizer.add_param_group``, or for another ``step_size``.
        """
        asked = param_group.get("step_size", self.step_size) if isinstance(param_group, dict) else self.step_size
        STEP_SIZE.range.check("step_size", asked)
        if asked != self.step_size:  # the constructor's group too: factors and defaults are of one form
            raise ValueError(
                f"step_size={asked!r} of a parameter group differs from the optimizer's {self.step_size!r}: all groups "
                "move in one form, which is given to the constructor"
            )
        super().add_param_group(param_group)

    def _update_parameters(self) -> None:
        if self.divides_by_root:
            self._move_by_root(self._members(), self._compiled)
            return
        batches: dict[tuple[int, int], tuple[StepCoefficients, list[Block]]] = {}
        for member in self._members():
            key = id(member.group), member.step
            if key not in batches:
                batches[key] = step_coefficients(member.group, member.step, bool(self.decoupled)), []
            coefficients, blocks = batches[key]
            block = Block(member.param, member.grad, member.exp_avg, member.terms)
            if member.sharded:
                terms = self._statistics.local_terms(member.param, member.terms)
                param, grad, exp_avg = (local_part(tensor) for tensor in block[:3])
                block = Block(param, grad, exp_avg, terms)
                if is_split(member.terms, member.param):  # terms as large as the weight do not wait for the others
                    update_in_blocks([block], coefficients)
                else:
                    blocks.append(block)
            elif self._compiled is not None and self._compiled.supports(block):
                self._compiled.update_(block, coefficients)
            else:
                blocks.append(block)
        for coefficients, blocks in batches.values():
            update_in_blocks(blocks, coefficients)


class AdaFisherW(AdaFisher):
    """AdaFisher with decoupled weight decay, as AdamW is to Adam.

    ``theta <- theta - lr (d + weight_decay * theta)`` with the direction ``d`` of ``AdaFisher``, and the gradient alone
    enters ``m``. Arguments, defaults and errors are those of ``AdaFisher``, also ``cycle_momentum=False`` for
    ``OneCycleLR``. This is the form for transformers.
    """

    decoupled = True
