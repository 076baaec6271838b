"""Statistics of K-FAC: the Kronecker blocks of a model and their samples."""

from __future__ import annotations

import logging
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from hf_adafisher.fisher.recorder import FactorRecorder, Sample
from hf_adafisher.optimizers.base.tracker import StatisticsTracker
from hf_adafisher.optimizers.baselines.kfac_blocks import KroneckerBlock, find_blocks, moment_rules

logger = logging.getLogger(__name__)


class KroneckerStatistics(StatisticsTracker):
    """Tracker of the Kronecker blocks of a model and their statistics.

    Attributes:
        max_factor_dim: Longest side with a full factor; set it before parameters are tracked.
        blocks: Kronecker blocks of the tracked parameters.
    """

    max_factor_dim: int
    _silent: set[int]

    def _new_recorder(self) -> FactorRecorder:
        rules = moment_rules(self.model, self._params, self.max_factor_dim)
        return FactorRecorder(self.model, self._params, lambda module: rules.get(id(module)))

    def _report_uncovered(self) -> None:
        plain = [p for p in self._params if self.block_of(p) is None and p.requires_grad]
        if plain:
            logger.warning("K-FAC preconditions nothing of %s; plain SGD is used instead.", self.describe(plain))
        long = [block.weight for block in self.blocks if "diagonal" in block.rule_name]
        if long:
            logger.warning(
                "K-FAC keeps a diagonal factor on the side of %s that is longer than max_factor_dim=%d.",
                self.describe(long),
                self.max_factor_dim,
            )

    def map_parameters(self) -> None:
        """Update the names and the blocks of all parameters from the model."""
        self.blocks = find_blocks(self.recorder.tracked if self.is_tracking else [])
        self._of_weight = {id(block.weight): block for block in self.blocks}
        self._of = self._of_weight | {id(block.bias): block for block in self.blocks if block.bias is not None}
        super().map_parameters()

    def forget(self) -> None:
        """Do nothing: all values derived from the averages are in the state."""

    def block_of(self, p: Any) -> KroneckerBlock | None:
        """KroneckerBlock that contains a parameter, or None."""
        return self._of.get(id(p))

    def block_of_weight(self, p: Any) -> KroneckerBlock | None:
        """KroneckerBlock with this parameter as its weight, whose state holds the factors, or None."""
        return self._of_weight.get(id(p))

    def without_statistics(self, states: Mapping[Any, Mapping[str, Tensor]]) -> Iterable[int]:
        """Ids of the weights of blocks that train and have no statistics in the optimizer's state."""
        for block in self.blocks:
            state = states.get(block.weight)
            if block.weight.requires_grad and not (state and block.has_statistics(state)):
                yield id(block.weight)

    def collect_first(self) -> Sample | None:
        """Collect the first statistics of newcomers; None if they are not finite."""
        sample = self.recorder.flush()
        return None if sample.non_finite else sample

    def collect(self, gradients: Sequence[tuple[Any, Tensor, Tensor]]) -> Sample | None:
        """Statistics recorded since the last call; None, with a warning, if any of them is not finite."""
        sample = self.recorder.flush()
        if sample.non_finite:
            self._warn_dropped(sample.non_finite)
            return None
        self._silent = self._check_not_compiled(sample, ((p, grad) for _, p, grad in gradients))
        return sample

    def note_bypassed(self, gradients: Sequence[tuple[Any, Tensor, Tensor]], known: Container[int]) -> None:
        """Warn once of parameters of blocks that have a gradient but no statistics.

        Args:
            gradients: Group, parameter and gradient of every parameter with a gradient.
            known: Ids of the weights with statistics.
        """
        bypassed, kept = [], []
        for _, p, grad in gradients:
            block = self.block_of(p)
            if block is not None and id(block.weight) not in known and bool(grad.any()):
                bypassed.append(p)
            elif block is not None and id(p) in self._silent:
                kept.append(p)
        self._warn_bypassed(bypassed, "plain SGD is used")
        self._warn_bypassed(kept, "their averages stay as they are")
