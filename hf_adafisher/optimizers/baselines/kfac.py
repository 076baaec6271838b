"""K-FAC (Martens and Grosse 2015, arXiv 1503.05671; for convolutions Grosse and Martens 2016, arXiv 1602.01407)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hf_adafisher.fisher.averages import statistics_dtype
from hf_adafisher.optimizers.base.hooked import HookedOptimizer, ParamsT
from hf_adafisher.optimizers.base.options import (
    EMA_DECAY,
    LEARNING_RATE,
    UPDATE_INTERVAL,
    WEIGHT_DECAY,
    Count,
    OptimizerOptions,
    Option,
    Size,
    UnitInterval,
    option,
)
from hf_adafisher.optimizers.baselines.kfac_blocks import READY, KroneckerBlock
from hf_adafisher.optimizers.baselines.kfac_curvature import KroneckerStatistics
from hf_adafisher.optimizers.diagnostics.coverage import ParameterCoverage, owner_names
from hf_adafisher.optimizers.validation.models import check_parameters
from hf_adafisher.optimizers.validation.training_modes import Needs

PLAIN = "plain SGD"

MOMENTUM = Option(UnitInterval(), "decay of the momentum")
DAMPING = Option(
    Size(positive=True, why=": it keeps the factors invertible"), "damping of the factors", symbol="lambda"
)
INVERSE_INTERVAL = Option(
    Count("steps"), "optimizer steps between two inversions of the factors", symbol="T_inv", shared=True
)
KL_CLIP = Option(
    Size(positive=True, optional=True, why="; None clips nothing"),
    "bound of the step in the metric of the Fisher",
    shared=True,
)
MAX_FACTOR_DIM = Option(Count("entries"), "longest side that gets a full factor", shared=True, on_resume="fixed")


@dataclass(frozen=True)
class KFACOptions(OptimizerOptions):
    """Options of K-FAC.

    Raises:
        ValueError: A value is outside its range, or the intervals do not fit each other.
    """

    needs: ClassVar[Needs] = Needs.LAYERS | Needs.SHAPES | Needs.WHOLE_PARAMETERS

    lr: float = option(3e-2, LEARNING_RATE, symbol="")
    momentum: float = option(0.9, MOMENTUM)
    damping: float = option(1e-2, DAMPING, identifies=True)
    stat_decay: float = option(0.95, EMA_DECAY, symbol="")
    update_interval: int = option(10, UPDATE_INTERVAL)
    inverse_interval: int = option(100, INVERSE_INTERVAL, identifies=True)
    weight_decay: float = option(0.0, WEIGHT_DECAY, symbol="")
    kl_clip: float | None = option(1e-3, KL_CLIP, identifies=True)
    max_factor_dim: int = option(8192, MAX_FACTOR_DIM)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.inverse_interval % self.update_interval:
            raise ValueError(
                f"inverse_interval must be a multiple of update_interval, since factors change only then: "
                f"got {self.inverse_interval} with update_interval={self.update_interval}"
            )


class KFAC(HookedOptimizer):
    """K-FAC: SGD with momentum on gradients preconditioned by a damped Kronecker-factored Fisher.

    For a layer with inputs ``x`` (a last entry 1 for the bias) and output gradients ``g``

        ``A = mean of x x^T over all positions``        ``G = sum of g g^T over the positions of one term of the loss``
        ``v <- momentum v + nu (A + pi sqrt(damping) I)^-1 (x) (G + sqrt(damping) / pi I)^-1 grad + weight_decay theta``
        ``theta <- theta - lr v``

    with ``pi = sqrt((tr A / dim A) / (tr G / dim G))``. Moving averages of ``A`` and ``G`` (bias-corrected) are updated
    every ``update_interval`` steps and inverted every ``inverse_interval`` steps, both from the first step on. ``g``
    are gradients of the training loss, so this is the empirical Fisher, as in the K-FAC baseline of the AdaFisher
    paper. Weight decay is added to the preconditioned gradient, as if a preconditioner rewrote ``p.grad`` for
    ``torch.optim.SGD``.

    Preconditioned parameters are weights and biases of ``Linear``, transformers' ``Conv1D`` and ungrouped convolutions
    (over patches), and the weight of ``Embedding``, whose ``A`` is diagonal since its inputs are one-hot. A side longer
    than ``max_factor_dim``, such as a vocabulary, gets a diagonal factor. A weight that several modules share, such as
    GPT-2's embedding and head, gets one Kronecker product with the partial traces of the sum of their products; biases
    of these modules are not part of it.

    All other parameters take plain SGD steps with momentum and the same learning rate: normalisation layers, grouped
    convolutions, class tokens, position tables outside modules, biases without a weight. ``coverage`` and a warning
    name them.

    An Embedding that is looked up once for the complete batch, such as GPT-2's positions, has output gradients that are
    sums over the examples of one backward pass. Its ``G`` has the same expectation for independent examples, but it
    depends on the split of a batch into micro-batches or processes. Nothing else does.

    ``lr`` and ``damping`` must be tuned together, for the scale of the loss: ``damping`` and ``kl_clip`` are compared
    with the Fisher of one term of the loss, where ``G`` is the sum over all positions divided by ``loss_terms``. The
    defaults are those of this package and train the tiny models of its tests; other models need a scan.

    Args:
        model: The module to train. Forward hooks are put on its layers for the steps that refresh the factors.
        params: Parameters, named parameters or parameter groups; each must belong to ``model``. Default: all trainable
            parameters. Groups may set every option but those of the hooks: both intervals, ``kl_clip`` and
            ``max_factor_dim``. Where a weight and its bias are in two groups, the weight's says ``damping`` and
            ``stat_decay``.
        lr: Learning rate, >= 0. Default 3e-2.
        momentum: In [0, 1). Default 0.9.
        damping: lambda, > 0; read whenever inverses are computed. Default 1e-2.
        stat_decay: Decay of the factors' moving average, in [0, 1). Default 0.95.
        update_interval: T_cov, optimizer steps between two refreshes of the factors, >= 1. Default 10.
        inverse_interval: T_inv, optimizer steps between two inversions, a multiple of ``update_interval``. Default 100.
            A layer that is first used in between is inverted at its first step.
        weight_decay: >= 0. Default 0.
        kl_clip: Scale the preconditioned gradients of all blocks by
            ``nu = min(1, sqrt(kl_clip / sum lr^2 <preconditioned, gradient>))``; None does not. Default 1e-3, as in
            kfac-pytorch (Pauloski et al. 2021), after Ba, Grosse and Martens 2017.
        max_factor_dim: Longest side that gets a full factor, >= 1. Default 8192.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: An option is outside its range, a parameter does not belong to the model, nothing is trainable, or
            the model is wrapped or split in a way that hides layers or parameters: all that AdaFisher refuses, and
            FSDP2, since a factor needs its complete layer. DistributedDataParallel is supported.

    Example:
        >>> import torch
        >>> from hf_adafisher.optimizers.baselines.kfac import KFAC
        >>> model = torch.nn.Linear(4, 2)
        >>> with KFAC(model, lr=1e-2) as optimizer:
        ...     model(torch.randn(8, 4)).square().mean().backward()
        ...     _ = optimizer.step()
    """

    options_class = KFACOptions
    momentum_key = "momentum_buffer"
    _statistics: KroneckerStatistics
    _loss_terms: float | None = None

    def __init__(
        self,
        model: nn.Module,
        params: ParamsT | None = None,
        *,
        lr: float = KFACOptions.lr,
        momentum: float = KFACOptions.momentum,
        damping: float = KFACOptions.damping,
        stat_decay: float = KFACOptions.stat_decay,
        update_interval: int = KFACOptions.update_interval,
        inverse_interval: int = KFACOptions.inverse_interval,
        weight_decay: float = KFACOptions.weight_decay,
        kl_clip: float | None = KFACOptions.kl_clip,
        max_factor_dim: int = KFACOptions.max_factor_dim,
    ) -> None:
        self._kl_factor = 1.0
        options = KFACOptions(
            lr=lr,
            momentum=momentum,
            damping=damping,
            stat_decay=stat_decay,
            update_interval=update_interval,
            inverse_interval=inverse_interval,
            weight_decay=weight_decay,
            kl_clip=kl_clip,
            max_factor_dim=max_factor_dim,
        )
        super().__init__(model, params, options)

    @property
    def loss_terms(self) -> float:
        """Number of terms that the loss of the coming step is the mean of, over all micro-batches and processes.

        Where ``gradient_scale`` is set to what each term's own loss is multiplied by (1 / number of terms, times the
        scale of a loss scaler), ``G`` is that of one term's loss, which this number tells from the batch's.
        Default: ``1 / gradient_scale``, and at least 1. A loss scaler hides the number of terms: set both, as
        AdaFisherTrainer does.

        Left alone, a mean loss is taken as a single term, and its statistics are those of the mean.

        Raises:
            ValueError: On setting a value that is not finite and > 0; None gives the default back.
        """
        return max(1.0, 1.0 / self.gradient_scale) if self._loss_terms is None else self._loss_terms

    @loss_terms.setter
    def loss_terms(self, value: float | None) -> None:
        if value is not None and not (math.isfinite(value) and value > 0.0):
            raise ValueError(f"loss_terms must be finite and > 0, or None, got {value}")
        self._loss_terms = None if value is None else float(value)

    def _new_tracker(self) -> KroneckerStatistics:
        return KroneckerStatistics(self.model, type(self).__name__)

    def _with_gradient(self) -> Iterator[tuple[dict[str, Any], Tensor, Tensor]]:
        for group, p, grad in super()._with_gradient():
            check_parameters([p], type(self).__name__, self.needs)  # FSDP2 replaces them after it was built
            yield group, p, grad

    def _track(self) -> None:
        self._statistics.max_factor_dim = self.param_groups[0]["max_factor_dim"]
        super()._track()
        for block in self._statistics.blocks:  # one that has changed, since a bias has joined it, starts again
            state, shapes = self.state.get(block.weight), block.state_shapes()
            if state and any(key not in state or tuple(state[key].shape) != shapes[key] for key in shapes):
                state.update(_new_factors(block))

    def _take_statistics(self, newcomers: bool = False) -> bool | None:
        gradients = list(self._with_gradient())
        sample = self._statistics.collect_first() if newcomers else self._statistics.collect(gradients)
        if sample is None:
            return None
        first, groups = self.param_groups[0], {id(p): group for group in self.param_groups for p in group["params"]}
        # True if a multiple of the interval lies between the step this refresh was meant for and the present one.
        inversion_due = first["steps"] // first["inverse_interval"] * first["inverse_interval"] >= first["next_refresh"]
        known = set()
        for block in self._statistics.blocks:
            group, used = groups[id(block.weight)], [use for use in block.uses if use.tracked in sample.factors]
            state = self._state_of(block.weight) if used else self.state.get(block.weight)
            if not state:
                continue
            for use in used:
                per_term = sample.counts[use.tracked] / self.loss_terms
                use.update_(state, sample.factors[use.tracked], per_term, group["stat_decay"])
            if block.has_statistics(state):
                known.add(id(block.weight))
                if sample.factors and (inversion_due or not state[READY].item()):
                    block.invert_(state, group["damping"], self._statistics.name_of(block.weight))
        if not newcomers:
            self._statistics.note_bypassed(gradients, known)
        return bool(sample.factors)

    def _update_parameters(self) -> None:
        members = list(self._with_gradient())
        directions = self._preconditioned(members)
        for group, p, grad in members:
            direction = directions.get(id(p))
            direction = grad if direction is None else direction * self._kl_factor
            buffer = self._state_of(p)[self.momentum_key]
            if group["weight_decay"]:
                direction = direction.add(p, alpha=group["weight_decay"])
            buffer.mul_(group["momentum"]).add_(direction)
            p.add_(buffer, alpha=-float(group["lr"]))

    def _preconditioned(self, members: list[tuple[dict[str, Any], Tensor, Tensor]]) -> dict[int, Tensor]:
        """Preconditioned gradients by ``id`` of the parameter, for blocks with inverses; sets the KL factor."""
        grads, rates = {id(p): grad for _, p, grad in members}, {id(p): float(g["lr"]) for g, p, _ in members}
        directions: dict[int, Tensor] = {}
        for block in self._statistics.blocks:
            state = self.state.get(block.weight, {})
            weight, bias = grads.get(id(block.weight)), grads.get(id(block.bias))
            if state and state[READY].item() and (weight is not None or bias is not None):
                of_weight, of_bias = block.precondition(state, weight, bias)
                if weight is not None:
                    directions[id(block.weight)] = of_weight
                if bias is not None and of_bias is not None:
                    directions[id(block.bias)] = of_bias
        clip, self._kl_factor = self.param_groups[0]["kl_clip"], 1.0
        if clip is not None and directions:
            products = [rates[key] ** 2 * torch.sum(d * grads[key]).cpu() for key, d in directions.items()]
            total = abs(float(torch.stack(products).sum()))
            # At lr = 0, where a warm-up starts, no size can be told: nothing may enter the momentum then.
            self._kl_factor = min(1.0, math.sqrt(clip / total)) if total != 0.0 else 0.0
        return directions

    def state_shapes(self, p: Any) -> dict[str, tuple[int, ...]]:
        """Shapes by state key of a parameter; they depend on the model and ``max_factor_dim`` only."""
        block = self._statistics.block_of_weight(p)
        return {self.momentum_key: tuple(p.shape)} | ({} if block is None else block.state_shapes())

    def _state_of(self, p: Any) -> dict[str, Tensor]:
        """State of a parameter, created at its first gradient; that of a weight holds the factors of its block."""
        state = self.state[p]
        if not state:
            state[self.momentum_key] = torch.zeros_like(p, memory_format=torch.preserve_format)
            block = self._statistics.block_of_weight(p)
            state.update({} if block is None else _new_factors(block))
        return state

    def coverage(self) -> list[ParameterCoverage]:
        """Coverage of every trainable parameter: its rule or ``"plain SGD"``, its modules, its share of all values.

        The rule names factors that are diagonal because of ``max_factor_dim``. After the first step, layers without
        statistics are listed as plain SGD.
        """
        params, owners = [p for p in self._params() if p.requires_grad], owner_names(self.model)
        total = max(sum(p.numel() for p in params), 1)
        rows = []
        for p in params:
            block = self._statistics.block_of(p)
            rule = PLAIN if block is None or self._is_bypassed(block) else block.rule_name
            name = self._statistics.name_of(p)
            rows.append(ParameterCoverage(name, rule, tuple(owners.get(id(p), ())), p.numel(), p.numel() / total))
        return rows

    def _is_bypassed(self, block: KroneckerBlock) -> bool:
        state = self.state.get(block.weight)
        return bool(state) and not block.has_statistics(state)  # type: ignore[arg-type]

    def curvature_summary(self) -> dict[str, float]:
        """Summarize the curvature for logs.

        Returns:
            ``plain_share``, the share of values that take plain SGD steps; ``kl_factor``, the ``nu`` of the last step;
            ``refreshes``, the number of updates of the factors; ``dropped_refreshes``, the number of updates omitted
            because of non-finite statistics.
        """
        first = self.param_groups[0]
        return {
            "plain_share": sum(row.share for row in self.coverage() if row.rule == PLAIN),
            "kl_factor": self._kl_factor,
            "refreshes": float(first["refreshes"]),
            "dropped_refreshes": float(first["dropped_refreshes"]),
        }


def _new_factors(block: KroneckerBlock) -> dict[str, Tensor]:
    """Zero factors and inverses of a block, in float32, or float64 for float64 parameters."""
    p = block.weight
    return {
        key: torch.zeros(shape, dtype=statistics_dtype(p.dtype), device=p.device)
        if shape
        else torch.zeros((), dtype=torch.float64, device="cpu")
        for key, shape in block.state_shapes().items()
    }
