"""Factors of a model's parameters: from recorded samples to averages in the state, and on to terms of the diagonal."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hf_adafisher.fisher.diagonals import INPUT, DiagonalTerm
from hf_adafisher.fisher.gradient import gradient_term, with_gradient_sums
from hf_adafisher.fisher.parameter_uses import (
    ON_GRADIENT,
    ParameterUse,
    find_parameter_uses,
    needs_gradient_factors,
    terms_of,
)
from hf_adafisher.fisher.recorder import FactorRecorder, Sample
from hf_adafisher.optimizers.base.tracker import StatisticsTracker
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

        So do gradient factors those of a module that turned out not to know all uses of its weight. The two have
        different scales, so they are never averaged with each other.
        """
        if self.use.tracked is not None:
            if bool(state[ON_GRADIENT].item()) != self.from_gradient:
                for use in uses:
                    use.reset_(state, self.param.shape)
            state[ON_GRADIENT].fill_(float(self.from_gradient))
        self.use.update_(state, self.factors, self.param.shape, self.group["ema_decay"])


@dataclass(eq=False)
class ParameterEntry:
    """One trained parameter with its uses, and the terms of its diagonal until the averages change.

    Attributes:
        param: The parameter.
        uses: Its uses by modules, at least one; none where it moves without factors.
        sharded: Whether FSDP2 has sharded it.
        terms: Terms of its diagonal; empty until they are asked for.
        provisional: Whether the terms are those of the current gradient, since there are no averages yet.
        local_terms: Part of the terms that belongs to this process's shard; empty until it is asked for.
    """

    param: Any
    uses: tuple[ParameterUse, ...]
    sharded: bool
    terms: list[DiagonalTerm] = field(default_factory=list)
    provisional: bool = False
    local_terms: list[DiagonalTerm] = field(default_factory=list)


class FactorStatistics(StatisticsTracker):
    """Bookkeeping between the recorder, which knows modules, and the optimizer's state, which knows parameters."""

    def _new_recorder(self) -> FactorRecorder:
        return FactorRecorder(self.model, self._params)

    def _report_uncovered(self) -> None:
        orphans = [p for p in self._params if self._is_uncovered(p)]
        if orphans:
            logger.warning("No layer rule reaches %s; gradient factors are used instead.", self.describe(orphans))

    def _is_uncovered(self, p: Tensor) -> bool:
        """True for a parameter that no layer rule reaches, although one is wanted."""
        return self.entry_of(p).uses[0].tracked is None

    def map_parameters(self) -> None:
        """Look the names, the owners and the uses of all parameters up in the model again."""
        super().map_parameters()
        self._owners = {
            id(p): (module, key)
            for module in self.model.modules()
            for key, p in module._parameters.items()
            if p is not None
        }
        uses = find_parameter_uses(self._params, self.recorder.tracked if self.is_tracking else [], self._owners)
        self._entries = {id(p): ParameterEntry(p, uses[id(p)], is_sharded(p)) for p in self._params}

    def forget(self) -> None:
        """Forget every cached term: the averages have changed."""
        for entry in self._entries.values():
            entry.terms, entry.provisional, entry.local_terms = [], False, []

    def entry_of(self, p: Any) -> ParameterEntry:
        """Entry of a trained parameter. Raises RuntimeError for one that was put into ``param_groups`` by hand."""
        if id(p) not in self._entries:
            self._follow_replaced_parameters()
        if id(p) not in self._entries:
            raise RuntimeError(
                f"{self.name_of(p)} was put into param_groups by hand: use add_param_group, or build a new optimizer"
            )
        return self._entries[id(p)]

    def _follow_replaced_parameters(self) -> None:
        """FSDP2 replaces the parameters by sharded ones but keeps the modules: look the new ones up there."""
        self._params = [getattr(*self._owners[id(p)]) if id(p) in self._owners else p for p in self._params]
        self.map_parameters()

    def terms(self, p: Tensor, state: Mapping[str, Tensor], grad: Tensor) -> list[DiagonalTerm]:
        """Terms of the diagonal, one a use of ``p``, kept until the next refresh; none where it moves without factors.

        Before the first statistics (a layer first used between two refreshes) they come from the current gradient.
        """
        entry = self.entry_of(p)
        if not entry.uses:
            return []
        if not entry.terms:
            entry.terms = self._averaged_terms(p, state, normalize=True)
            entry.provisional = not entry.terms
        if entry.provisional:
            entry.terms = [self._provisional_term(p, grad)]
        return entry.terms

    def local_terms(self, p: Tensor, terms: Sequence[DiagonalTerm]) -> list[DiagonalTerm]:
        """Part of these ``terms`` that belongs to this process's part of ``p``, which FSDP2 shards."""
        entry = self.entry_of(p)
        if entry.provisional or is_split(terms, p):
            return local_terms(terms, p)  # the latter are as large as the weight: not to be kept
        entry.local_terms = entry.local_terms or local_terms(terms, p)
        return entry.local_terms

    def _averaged_terms(self, p: Tensor, state: Mapping[str, Tensor], normalize: bool) -> list[DiagonalTerm]:
        """Terms from the averages, none while there are none."""
        return terms_of(self.entry_of(p).uses, state, p.shape, normalize)

    def _provisional_term(self, p: Tensor, grad: Tensor) -> DiagonalTerm:
        """Term from the current gradient, which stands in for them."""
        return gradient_term(self.entry_of(p).uses[0].diagonal, full_tensor(grad))

    def known_terms(self, p: Tensor, state: Mapping[str, Tensor], normalize: bool = True) -> list[DiagonalTerm]:
        """Terms that the last step used, else those of the averages; none while nothing is known.

        With ``normalize=False`` those of the averages, not normalised.
        """
        used = self.entry_of(p).terms if normalize else []
        return used or self._averaged_terms(p, state, normalize)

    def has_factors(self, p: Tensor) -> bool:
        """True for a parameter whose diagonal comes from factors, now or after its first gradient."""
        return bool(self.entry_of(p).uses)

    def without_statistics(self, states: Mapping[Any, Mapping[str, Tensor]]) -> Iterable[int]:
        """Ids of trained parameters that a rule reaches, and that have no statistics in the optimizer's state."""
        for p in self._params:
            state, uses = states.get(p), self.entry_of(p).uses
            empty = not state or all(use.average(state, p.shape).is_empty for use in uses)
            if empty and p.requires_grad and uses and uses[0].tracked is not None:
                yield id(p)

    def collect_first(
        self, with_gradient: Iterable[tuple[Mapping[str, Any], Tensor, Tensor]], newcomers: Collection[int]
    ) -> list[FactorUpdate]:
        """Collect the first statistics of newcomers, between two refreshes; nothing if they are not finite."""
        sample = self.recorder.flush()
        if sample.non_finite:
            return []
        with_gradient = list(with_gradient)
        self._find_hidden_uses(sample, with_gradient)
        found = [(group, p, grad) for group, p, grad in with_gradient if id(p) in newcomers]
        return [update for group, p, grad in found for update in self._recorded_updates(sample, group, p, grad)]

    def _recorded_updates(
        self, sample: Sample, group: Mapping[str, Any], p: Tensor, grad: Tensor
    ) -> Iterator[FactorUpdate]:
        """Of every use of a parameter whose module recorded something."""
        uses = self.entry_of(p).uses
        for use in uses:
            if use.tracked in sample.factors:
                assert use.tracked is not None
                factors: Mapping[str, Tensor] = sample.factors[use.tracked]
                if use.tracked in sample.broadcast and len(uses) == 1:
                    factors = with_gradient_sums(use.diagonal, factors, full_tensor(grad))
                yield FactorUpdate(group, p, use, factors, False)

    def _find_hidden_uses(
        self, sample: Sample, with_gradient: Sequence[tuple[Mapping[str, Any], Tensor, Tensor]]
    ) -> set[int]:
        """Ids of tables with a gradient in rows that were no input: they also serve as something else than a table.

        A head made of ``F.linear(hidden, table.weight)`` is no call of a module. Its rows that were never looked up
        would have the smallest factor and take the largest step, so the table gets gradient factors from now on.
        """
        found = []
        for _, p, grad in with_gradient:
            uses = self.entry_of(p).uses
            tracked = uses[0].tracked if len(uses) == 1 else None
            if tracked in sample.factors and tracked.rule.input_numbers_rows:
                unseen = sample.factors[tracked][INPUT] == 0
                rows = torch.linalg.vector_norm(full_tensor(grad), float("inf"), dim=1)
                if bool((unseen & (rows > 0)).any()):
                    tracked.matches_rule = False
                    del sample.factors[tracked]
                    found.append(p)
        if found:
            self._warned_bypassed.update(id(p) for p in found)
            logger.warning(
                "%s has a gradient in rows that were no input of its embedding, so it is also used without a module "
                "(F.linear(hidden, embedding.weight)); gradient factors are used instead. Tie it to the weight of an "
                "nn.Linear to have both uses recorded.",
                self.describe(found),
            )
        return {id(p) for p in found}

    def _has_missed(
        self, sample: Sample, gradients: Mapping[int, Tensor], states: Mapping[Any, Mapping[str, Tensor]]
    ) -> bool:
        """True where a parameter with recorded statistics was not used since the last step."""
        for p in self._params:
            state, uses, grad = states.get(p), self.entry_of(p).uses, gradients.get(id(p))
            if not state or not p.requires_grad or any(use.tracked in sample.factors for use in uses):
                continue
            # Of a shard a process knows only its own zeros.
            unused = grad is None or not (is_sharded(grad) or bool(grad.any()))
            if unused and not needs_gradient_factors(uses, state, p.shape):
                return True
        return False

    def collect(
        self,
        with_gradient: Iterable[tuple[Mapping[str, Any], Tensor, Tensor]],
        state_of: Callable[[Mapping[str, Any], Tensor], Mapping[str, Tensor]],
        states: Mapping[Any, Mapping[str, Tensor]],
    ) -> list[FactorUpdate] | None:
        """Collect what was recorded since the last call, for every parameter that has a gradient.

        A parameter whose modules never recorded anything gets the factors of its gradient, in the form of its first
        use. One whose modules recorded something earlier keeps their averages.

        Under FSDP2 a parameter on gradient factors, and a table whose rows served the whole batch, gathers its full
        gradient on every process here, and so it does in the steps before its first statistics: memory for one such
        gradient at a time, and an all-gather.

        Args:
            with_gradient: Parameter group, parameter and gradient.
            state_of: The optimizer's state of a parameter, given its group too.
            states: The states that there are.

        Returns:
            The updates to make, none where the step had nothing but zero gradients; None if anything is not finite.
        """
        sample = self.recorder.flush()
        with_gradient = list(with_gradient)
        silent = self._check_not_compiled(sample, ((p, grad) for _, p, grad in with_gradient))
        self.missed = self._has_missed(sample, {id(p): grad for _, p, grad in with_gradient}, states)
        hidden = self._find_hidden_uses(sample, with_gradient)
        recorded: list[FactorUpdate] = []
        fallbacks, kept, informative = [], [], bool(sample.factors)
        for group, p, grad in with_gradient:
            uses = self.entry_of(p).uses
            used = list(self._recorded_updates(sample, group, p, grad))
            recorded += used
            if not used and (id(p) in hidden or needs_gradient_factors(uses, state_of(group, p), p.shape)):
                full = full_tensor(grad)
                informative = informative or bool(full.any())
                fallbacks.append(FactorUpdate(group, p, uses[0], uses[0].diagonal.from_gradient(full), True))
            elif id(p) in silent:
                kept.append(p)
        if kept:
            self._warn_bypassed(kept, "their averages stay as they are")
        if not informative and not sample.non_finite:
            return []  # zeros everywhere: distributed checkpoints make such a step to initialise states
        from_gradients = [*fallbacks, *(u for u in recorded if u.use.tracked in sample.broadcast)]
        if sample.non_finite or not all(bool(f.isfinite().all()) for u in from_gradients for f in u.factors.values()):
            self._warn_dropped(sample.non_finite)
            return None
        bypassed = [update.param for update in fallbacks if update.use.tracked is not None]
        if bypassed:
            self._warn_bypassed(bypassed, "gradient factors are used")
        return recorded + fallbacks
