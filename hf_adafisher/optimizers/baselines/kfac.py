"""K-FAC (Martens and Grosse 2015, arXiv 1503.05671; for convolutions Grosse and Martens 2016, arXiv 1602.01407)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from hf_adafisher.fisher.averages import statistics_dtype
from hf_adafisher.optimizers.base.hooked import CountsLossTerms, HookedOptimizer, ParamsT
from hf_adafisher.optimizers.baselines.kfac_blocks import READY, Block
from hf_adafisher.optimizers.baselines.kfac_curvature import KroneckerStatistics, check_kfac_options
from hf_adafisher.optimizers.diagnostics.coverage import ParameterCoverage, owner_names
from hf_adafisher.optimizers.validation.checks import KFAC_KEYS, refuse_shards

PLAIN = "plain SGD"


class KFAC(CountsLossTerms, HookedOptimizer):
    """SGD with momentum along the gradient preconditioned by a damped Kronecker-factored Fisher.

    For a layer with inputs ``x`` (a last entry 1 for the bias) and output gradients ``g``

        ``A = mean of x x^T over all positions``        ``G = sum of g g^T over the positions of one term of the loss``
        ``v <- momentum v + nu (A + pi sqrt(damping) I)^-1 (x) (G + sqrt(damping) / pi I)^-1 grad + weight_decay theta``
        ``theta <- theta - lr v``

    with ``pi = sqrt((tr A / dim A) / (tr G / dim G))``. ``A`` and ``G`` are averaged over time (bias-corrected) every
    ``update_interval`` steps and inverted every ``inverse_interval`` steps, both from the first step on. ``g`` are the
    gradients of the training loss itself: this is the empirical Fisher, which the K-FAC baseline of the AdaFisher paper
    uses too, not the one with labels drawn from the model. Weight decay is added to the preconditioned gradient, as it
    is where a preconditioner rewrites ``p.grad`` and ``torch.optim.SGD`` makes the step.

    Which parameters: the weight and bias of ``Linear``, transformers' ``Conv1D`` and ungrouped convolutions (over
    patches); ``Embedding``, whose ``A`` is diagonal, since its inputs are one-hot. A side longer than
    ``max_factor_dim`` keeps the diagonal of its factor alone, a head over a vocabulary for example. A weight that
    several modules share (GPT-2's embedding and head) gets the one Kronecker product with the partial traces of the sum
    of their products; its modules' biases do not join it. All other parameters (normalisation layers, grouped
    convolutions, class tokens, position tables that are no module's, biases without a weight beside them) take plain
    SGD steps with momentum and the same learning rate; ``coverage`` and a warning name them.

    An Embedding that is looked up once for the whole batch (GPT-2's positions) shows output gradients that are sums
    over the examples of one backward. Their sum of ``g g^T`` has the same expectation where examples are independent,
    but how a batch is split into micro-batches or processes is seen in it; nothing else depends on that.

    ``lr`` and ``damping`` belong together, and both belong to the scale of the loss: ``damping`` and ``kl_clip``
    are compared with the Fisher of one term of it, ``G`` being the sum over all positions divided by
    ``loss_terms``. The defaults are this package's; they train tiny models of its tests, and everything else
    needs a scan.

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
        kl_clip: Scale the preconditioned gradients of all blocks alike by
            ``nu = min(1, sqrt(kl_clip / sum lr^2 <preconditioned, gradient>))``; None does not. Default 1e-3, as in
            kfac-pytorch (Pauloski et al. 2021), after Ba, Grosse and Martens 2017.
        max_factor_dim: Longest side that gets a full factor, >= 1. Default 8192.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: An option is outside its range, a parameter does not belong to the model, nothing is trainable, or
            the model is wrapped or split in a way that hides layers or parameters: all that AdaFisher refuses, and
            FSDP2, since a factor needs the whole of its layer. DistributedDataParallel is supported.

    Example:
        >>> import torch
        >>> from hf_adafisher.optimizers.baselines.kfac import KFAC
        >>> model = torch.nn.Linear(4, 2)
        >>> with KFAC(model, lr=1e-2) as optimizer:
        ...     model(torch.randn(8, 4)).square().mean().backward()
        ...     _ = optimizer.step()
    """

    checkpoint_keys = KFAC_KEYS
    momentum_key = "momentum_buffer"
    supports_shards = False
    compared_on_load = (
        "momentum",
        "damping",
        "stat_decay",
        "update_interval",
        "inverse_interval",
        "weight_decay",
        "kl_clip",
    )
    _statistics: KroneckerStatistics

    def __init__(
        self,
        model: nn.Module,
        params: ParamsT | None = None,
        *,
        lr: float = 3e-2,
        momentum: float = 0.9,
        damping: float = 1e-2,  # lambda
        stat_decay: float = 0.95,
        update_interval: int = 10,  # T_cov
        inverse_interval: int = 100,  # T_inv
        weight_decay: float = 0.0,
        kl_clip: float | None = 1e-3,
        max_factor_dim: int = 8192,
    ) -> None:
        self._kl_factor = 1.0
        defaults: dict[str, Any] = {
            "lr": lr,
            "momentum": momentum,
            "damping": damping,
            "stat_decay": stat_decay,
            "update_interval": update_interval,
            "inverse_interval": inverse_interval,
            "weight_decay": weight_decay,
            "kl_clip": kl_clip,
            "max_factor_dim": max_factor_dim,
        }
        super().__init__(model, params, defaults)

    def _new_tracker(self) -> KroneckerStatistics:
        return KroneckerStatistics(self.model, type(self).__name__)

    def _check_group(self, group: dict[str, Any], first: dict[str, Any]) -> None:
        check_kfac_options(group, first, type(self).__name__)

    def _with_gradient(self) -> Iterator[tuple[dict[str, Any], Tensor, Tensor]]:
        for group, p, grad in super()._with_gradient():
            refuse_shards([p], type(self).__name__)  # FSDP2 replaces parameters after the optimizer was built
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
        # Whether a multiple of the interval lies between the step this refresh was meant for and the present one.
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
        """The preconditioned gradient of each parameter in a block that has inverses; notes the KL factor."""
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
        """Keys and shapes of a parameter's state; they depend on the model and ``max_factor_dim`` alone."""
        block = self._statistics.block_of_weight(p)
        return {self.momentum_key: tuple(p.shape)} | ({} if block is None else block.state_shapes())

    def _state_of(self, p: Any) -> dict[str, Tensor]:
        """The parameter's state, created at its first gradient; a weight's holds the factors of its block."""
        state = self.state[p]
        if not state:
            state[self.momentum_key] = torch.zeros_like(p, memory_format=torch.preserve_format)
            block = self._statistics.block_of_weight(p)
            state.update({} if block is None else _new_factors(block))
        return state

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a state; the given dictionary is neither changed nor shared.

        The saved options replace those of the constructor, with a warning, but ``max_factor_dim`` must be the same.

        Raises:
            ValueError: The checkpoint is another optimizer's or another model's, or its ``max_factor_dim`` differs.
        """
        for group in state_dict["param_groups"]:
            saved, own = group.get("max_factor_dim"), self.param_groups[0]["max_factor_dim"]
            if saved not in (None, own):
                raise ValueError(
                    f"the checkpoint was written with max_factor_dim={saved} and this optimizer built with {own}, "
                    "which decides the shapes of the factors: build it with the same value"
                )
        super().load_state_dict(state_dict)

    def coverage(self) -> list[ParameterCoverage]:
        """For every trainable parameter: its rule or ``"plain SGD"``, its modules, its share of all values.

        A rule is followed by the factors that are diagonal because of ``max_factor_dim``. After the first step, layers
        that recorded nothing show as plain SGD.
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

    def _is_bypassed(self, block: Block) -> bool:
        state = self.state.get(block.weight)
        return bool(state) and not block.has_statistics(state)  # type: ignore[arg-type]

    def curvature_summary(self) -> dict[str, float]:
        """A few numbers for logs.

        Returns:
            ``plain_share``: share of values that take plain SGD steps; ``kl_factor``: ``nu`` of the last step;
            ``refreshes``, ``dropped_refreshes``: how often factors were updated, and not updated for being non-finite.
        """
        first = self.param_groups[0]
        return {
            "plain_share": sum(row.share for row in self.coverage() if row.rule == PLAIN),
            "kl_factor": self._kl_factor,
            "refreshes": float(first["refreshes"]),
            "dropped_refreshes": float(first["dropped_refreshes"]),
        }


def _new_factors(block: Block) -> dict[str, Tensor]:
    """Empty factors and inverses; statistics are float32 whatever the model's dtype (float64 for float64)."""
    p = block.weight
    return {
        key: torch.zeros(shape, dtype=statistics_dtype(p.dtype), device=p.device)
        if shape
        else torch.zeros((), dtype=torch.float64, device="cpu")
        for key, shape in block.state_shapes().items()
    }
