"""AdaFisher and AdaFisherW (ICLR 2025, arXiv 2405.16397)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from hf_adafisher.fisher.diagonals import DiagonalTerm
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
    OptimizerOptions,
    Option,
    Size,
    option,
)
from hf_adafisher.optimizers.blocks import update_in_blocks
from hf_adafisher.optimizers.compiled import CompiledUpdate
from hf_adafisher.optimizers.sharding import is_split, local_part
from hf_adafisher.optimizers.update import Block, StepCoefficients, step_coefficients

DAMPING = Option(
    Size(positive=True, why=": it is the smallest value that the momentum is divided by"),
    "damping of the normalised Fisher diagonal, to be tuned together with the learning rate",
    symbol="lambda",
)
COMPILED = Option(Flag(), "update large parameters with kernels made by torch.compile", in_groups=False)


@dataclass(frozen=True)
class AdaFisherOptions(OptimizerOptions):
    """Options of AdaFisher(W); the defaults are the paper's."""

    lr: float = option(1e-3, LEARNING_RATE)
    beta: float = option(0.9, BETA, argument=True)
    damping: float = option(1e-3, DAMPING, argument=True, identifies=True)
    ema_decay: float = option(0.8, EMA_DECAY, argument=True)
    update_interval: int = option(100, UPDATE_INTERVAL, argument=True, identifies=True)
    weight_decay: float = option(0.0, WEIGHT_DECAY)
    momentum_dtype: torch.dtype | str | None = option(None, MOMENTUM_DTYPE, argument=True)
    compiled: bool = option(False, COMPILED)


class AdaFisher(KroneckerDiagonalOptimizer):
    """Momentum divided by a damped diagonal Kronecker Fisher, with L2 regularisation in the gradient.

    For a layer with inputs ``x`` and output gradients ``g`` the factors ``h = mean(x^2)`` and ``s = mean(g^2)`` over
    all positions are averaged over time every ``update_interval`` steps, and each weight is updated by

        ``F = minmax(S) (x) minmax(H) + damping``        (Eq. 4; vectors are normalised to [0, 1])
        ``m <- beta m + (1 - beta) (grad + weight_decay * theta)``
        ``theta <- theta - lr * m / (1 - beta^t) / F``

    ``F`` is never stored: the state is one tensor of the parameter's size (``exp_avg``) and a few vectors.
    A parameter that no layer rule reaches takes its factors from its own gradient (row and column means of grad^2).

    Because F lies in [damping, 1 + damping], ``lr`` and ``damping`` belong together: the largest step is
    ``lr / damping * m``. The defaults are the paper's; those of ``create_optimizer`` and
    ``AdaFisherTrainingArguments`` are a better start for training language models from scratch.

    ``torch.optim.lr_scheduler.OneCycleLR`` needs ``cycle_momentum=False``: there are no ``betas`` to cycle.

    Args:
        model: The module to train. Forward hooks are put on its layers for the steps that refresh the factors.
        params: Parameters, named parameters or parameter groups, as for every torch optimizer; each must belong to
            ``model``. Default: all trainable parameters. Groups may set every option below but ``update_interval``.
        lr: Learning rate alpha, >= 0. Default 1e-3.
        beta: Decay of the first moment, in [0, 1). Default 0.9.
        damping: lambda, > 0. Default 1e-3.
        ema_decay: Decay gamma of the factors' moving average, in [0, 1). Default 0.8.
        update_interval: T_cov, optimizer steps between two refreshes of the factors, >= 1. Default 100.
        weight_decay: kappa, >= 0. Default 0.
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
        lr: float = AdaFisherOptions.lr,
        beta: float = AdaFisherOptions.beta,
        damping: float = AdaFisherOptions.damping,
        ema_decay: float = AdaFisherOptions.ema_decay,
        update_interval: int = AdaFisherOptions.update_interval,
        weight_decay: float = AdaFisherOptions.weight_decay,
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
            momentum_dtype=momentum_dtype,
            compiled=compiled,
        )
        self._compiled = CompiledUpdate() if options.compiled else None
        super().__init__(model, params, options)

    def damping_of(self, group: Mapping[str, Any], terms: Sequence[DiagonalTerm]) -> float:
        """The group's ``damping``, whatever the terms are."""
        return group["damping"]

    def _update_parameters(self) -> None:
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

    ``theta <- theta - lr (m^ / F + weight_decay * theta)``, and the gradient alone enters ``m``. Arguments, defaults
    and errors are those of ``AdaFisher``, also ``cycle_momentum=False`` for ``OneCycleLR``. This is the form for
    transformers.
    """

    decoupled = True
