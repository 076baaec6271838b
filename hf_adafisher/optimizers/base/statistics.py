"""The curvature of a model's parameters: which modules use them, what was recorded, what their diagonal is made of."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hf_adafisher.fisher.diagonals import DiagonalTerm
from hf_adafisher.fisher.parameter_uses import (
    ON_GRADIENT,
    ParameterUse,
    find_parameter_uses,
    gradient_term,
    needs_gradient_factors,
    terms_of,
    with_gradient_sums,
)
from hf_adafisher.fisher.recorder import FactorRecorder
from hf_adafisher.optimizers.base.tracker import StatisticsTracker
from hf_adafisher.optimizers.layout import Parts
from hf_adafisher.optimizers.sharding import full_tensor, is_sharded, is_split, local_terms

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FactorUpdate:
    """New factors for one use of one parameter, recorded by its module or taken from its gradient."""

    group: Mapping[str, Any]
    param: Tensor
    use: ParameterUse
    factors: Mapping[str, Tensor]
    from_gradient: bool

    def apply(self, state: Mapping[str, Tensor], uses: Sequence[ParameterUse]) -> None:
        """Take the factors into the averages of ``state``; a module's first statistics replace gradient factors.

        The two have different scales, so they are never averaged with each other.
        """
        if self.use.tracked is not None:
            if state[ON_GRADIENT].item() and not self.from_gradient:
                for use in uses:
                    use.reset_(state, self.param.shape)
            state[ON_GRADIENT].fill_(float(self.from_gradient))
        self.use.update_(state, self.factors, self.param.shape, self.group["ema_decay"])


class FactorStatistics(StatisticsTracker):
    """Bookkeeping between the recorder, which knows modules, and the optimizer's state, which knows parameters."""

    def _new_recorder(self) -> FactorRecorder:
        return FactorRecorder(self.model, self._params)

    def _report_uncovered(self) -> None:
        orphans = [p for p in self._params if self.uses_of(p)[0].tracked is None]
        if orphans:
            logger.warning("No layer rule reaches %s; gradient factors are used instead.", self.describe(orphans))

    def map_parameters(self) -> None:
        """Look the names, the owners and the uses of all parameters up in the model again."""
        self._owners = {
            id(p): (module, key)
            for module in self.model.modules()
            for key, p in module._parameters.items()
            if p is not None
        }
        self._uses = find_parameter_uses(self._params, self.recorder.tracked if self.recorder else [])
        super().map_parameters()

    def forget(self) -> None:
        """Forget every cached term, and what was made of it: the averages have changed."""
        self._terms: dict[int, list[DiagonalTerm]] = {}
        self._local_terms: dict[int, list[DiagonalTerm]] = {}
        self._provisional: set[int] = set()
        self.parts: dict[int, Parts] = {}

    def uses_of(self, p: Any) -> tuple[ParameterUse, ...]:
        """All uses of a tracked parameter, at least one."""
        if id(p) not in self._uses:
            self._follow_replaced_parameters()
        if id(p) not in self._uses:
            raise RuntimeError(
                f"{self.name_of(p)} was put into param_groups by hand: use add_param_group, or build a new optimizer"
            )
        return self._uses[id(p)]

    def _follow_replaced_parameters(self) -> None:
        """FSDP2 replaces the parameters by sharded ones but keeps the modules: look the new ones up there."""
        self._params = [getattr(*self._owners[id(p)]) if id(p) in self._owners else p for p in self._params]
        self.map_parameters()

    def terms(self, p: Tensor, state: Mapping[str, Tensor], grad: Tensor) -> list[DiagonalTerm]:
        """The normalised factors of every use of ``p``, kept until the next refresh.

        Before the first statistics (a layer first used between two refreshes) they come from the current gradient.
        """
        key = id(p)
        if key not in self._terms:
            self._terms[key] = self._averaged_terms(p, state, normalize=True)
        if not self._terms[key] or key in self._provisional:
            self._provisional.add(key)
            self._terms[key] = [self._provisional_term(p, grad)]
        return self._terms[key]

    def _averaged_terms(self, p: Tensor, state: Mapping[str, Tensor], normalize: bool) -> list[DiagonalTerm]:
        """What the averages give, empty while there are none."""
        return terms_of(self.uses_of(p), state, p.shape, normalize)

    def _provisional_term(self, p: Tensor, grad: Tensor) -> DiagonalTerm:
        """What stands in for them: the current gradient's."""
        return gradient_term(self.uses_of(p), full_tensor(grad))

    def local_terms(self, p: Tensor, state: Mapping[str, Tensor], grad: Tensor) -> list[DiagonalTerm]:
        """The part of ``terms`` that belongs to this process's part of ``p``: all of it, unless FSDP2 shards it."""
        terms = self.terms(p, state, grad)
        if not is_sharded(p):
            return terms
        if is_split(terms, p):
            return local_terms(terms, p)  # as large as the weight: not to be kept
        key = id(p)
        if key not in self._local_terms or key in self._provisional:
            self._local_terms[key] = local_terms(terms, p)
        return self._local_terms[key]

    def known_terms(self, p: Tensor, state: Mapping[str, Tensor], normalize: bool = True) -> list[DiagonalTerm]:
        """The terms that the last step used, else those of the averages; empty while nothing is known.

        With ``normalize=False`` those of the averages, not normalised.
        """
        used = self._terms.get(id(p)) if normalize else None
        return used or self._averaged_terms(p, state, normalize)

    def _recorded(self, factors: dict[str, Tensor], positions: float) -> dict[str, Tensor]:
        """The factors to be averaged, given the means over this many positions."""
        return factors

    def _shared(self, factors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The same, given those of a table whose rows served the whole batch, from its own gradient."""
        return factors

    def collect(
        self,
        with_gradient: Iterable[tuple[Mapping[str, Any], Tensor, Tensor]],
        state_of: Callable[[Mapping[str, Any], Tensor], Mapping[str, Tensor]],
    ) -> list[FactorUpdate] | None:
        """What was recorded since the last call, for every parameter that has a gradient.

        A parameter whose modules never recorded anything gets the factors of its gradient, in the form of its first
        use. One whose modules recorded something earlier keeps their averages.

        Under FSDP2 a parameter on gradient factors, and a table whose rows served the whole batch, gathers its full
        gradient on every process here, and so it does in the steps before its first statistics: memory for one such
        gradient at a time, and an all-gather.

        Args:
            with_gradient: Parameter group, parameter and gradient.
            state_of: The optimizer's state of a parameter, given its group too.

        Returns:
            The updates to make, none where the step had nothing but zero gradients; None if anything is not finite.
        """
        assert self.recorder is not None
        sample = self.recorder.flush()
        with_gradient = list(with_gradient)
        silent = self._check_not_compiled(sample, ((p, grad) for _, p, grad in with_gradient))
        recorded, fallbacks, kept, informative = [], [], [], bool(sample.factors)
        for group, p, grad in with_gradient:
            uses = self.uses_of(p)
            used = [use for use in uses if use.tracked in sample.factors]
            for use in used:
                assert use.tracked is not None
                factors = sample.factors[use.tracked]
                if use.tracked in sample.broadcast and len(uses) == 1:
                    factors = self._shared(with_gradient_sums(use.diagonal, factors, full_tensor(grad)))
                else:
                    factors = self._recorded(factors, sample.counts[use.tracked])
                recorded.append(FactorUpdate(group, p, use, factors, False))
            if not used and needs_gradient_factors(uses, state_of(group, p), p.shape):
                full = full_tensor(grad)
                informative = informative or bool(full.any())
                fallbacks.append(FactorUpdate(group, p, uses[0], uses[0].diagonal.from_gradient(full), True))
            elif id(p) in silent:
                kept.append(p)
        self._warn_bypassed(kept, "their averages stay as they are")
        if not informative and not sample.non_finite:
            return []  # zeros everywhere: distributed checkpoints make such a step to initialise states
        from_gradients = [*fallbacks, *(u for u in recorded if u.use.tracked in sample.broadcast)]
        if sample.non_finite or not all(bool(f.isfinite().all()) for u in from_gradients for f in u.factors.values()):
            self._warn_dropped(sample.non_finite)
            return None
        bypassed = [update.param for update in fallbacks if update.use.tracked is not None]
        self._warn_bypassed(bypassed, "gradient factors are used")
        return recorded + fallbacks
