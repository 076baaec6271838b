"""What K-FAC knows about a model: its Kronecker blocks and what was recorded for them; and what K-FAC refuses."""

from __future__ import annotations

import logging
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from hf_adafisher.fisher.recorder import FactorRecorder, Sample
from hf_adafisher.optimizers.base.tracker import StatisticsTracker
from hf_adafisher.optimizers.baselines.kfac_blocks import Block, find_blocks, moment_rules
from hf_adafisher.optimizers.validation.checks import (
    check_count,
    check_decay,
    check_real,
    check_shared,
    check_size,
    refuse_shards,
)

logger = logging.getLogger(__name__)

SHARED_OPTIONS = ("update_interval", "inverse_interval", "kl_clip", "max_factor_dim")
"""Options that all parameter groups have in common."""


class KroneckerStatistics(StatisticsTracker):
    """The blocks of a model, and what was recorded for them.

    Attributes:
        max_factor_dim: Longest side that gets a full factor; to be set before parameters are tracked.
        blocks: The Kronecker blocks of the tracked parameters.
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
        cut = [block.weight for block in self.blocks if "diagonal" in block.rule_name]
        if cut:
            logger.warning(
                "K-FAC keeps a diagonal factor on the side of %s that is longer than max_factor_dim=%d.",
                self.describe(cut),
                self.max_factor_dim,
            )

    def map_parameters(self) -> None:
        """Look the names and the blocks of all parameters up in the model again."""
        self.blocks = find_blocks(self.recorder.tracked if self.is_tracking else [])
        self._of_weight = {id(block.weight): block for block in self.blocks}
        self._of = self._of_weight | {id(block.bias): block for block in self.blocks if block.bias is not None}
        super().map_parameters()

    def forget(self) -> None:
        """Nothing is derived from the averages but what the state holds."""

    def block_of(self, p: Any) -> Block | None:
        """The block that a parameter is in."""
        return self._of.get(id(p))

    def block_of_weight(self, p: Any) -> Block | None:
        """The block whose weight a parameter is, so that its state holds the factors."""
        return self._of_weight.get(id(p))

    def without_statistics(self, states: Mapping[Any, Mapping[str, Tensor]]) -> Iterable[int]:
        """Ids of the weights of blocks that train and have no statistics in the optimizer's state."""
        for block in self.blocks:
            state = states.get(block.weight)
            if block.weight.requires_grad and not (state and block.has_statistics(state)):
                yield id(block.weight)

    def collect_first(self) -> Sample | None:
        """What was recorded for newcomers since the last call; None if anything of it is not finite."""
        sample = self.recorder.flush()
        return None if sample.non_finite else sample

    def collect(self, gradients: Sequence[tuple[Any, Tensor, Tensor]]) -> Sample | None:
        """What was recorded since the last call; None if anything of it is not finite."""
        sample = self.recorder.flush()
        if sample.non_finite:
            self._warn_dropped(sample.non_finite)
            return None
        self._silent = self._check_not_compiled(sample, ((p, grad) for _, p, grad in gradients))
        return sample

    def note_bypassed(self, gradients: Sequence[tuple[Any, Tensor, Tensor]], known: Container[int]) -> None:
        """Say once which parameters of blocks have a gradient, but no statistics (``known`` are ids of weights)."""
        bypassed, kept = [], []
        for _, p, grad in gradients:
            block = self.block_of(p)
            if block is not None and id(block.weight) not in known and bool(grad.any()):
                bypassed.append(p)
            elif block is not None and id(p) in self._silent:
                kept.append(p)
        self._warn_bypassed(bypassed, "plain SGD is used")
        self._warn_bypassed(kept, "their averages stay as they are")


def check_kfac_options(group: Mapping[str, Any], first: Mapping[str, Any], kind: str) -> None:
    """Check the options and the parameters of one parameter group.

    Args:
        group: The group.
        first: The optimizer's first group.
        kind: The optimizer's name, for the messages.

    Raises:
        ValueError: An option is outside its range, a parameter is complex or sharded.
    """
    check_size("lr", group["lr"])
    check_size("damping", group["damping"], positive=True, why=": it keeps the factors invertible")
    check_size("weight_decay", group["weight_decay"])
    check_decay("momentum", group["momentum"])
    check_decay("stat_decay", group["stat_decay"])
    check_count("update_interval", group["update_interval"], "steps")
    check_count("inverse_interval", group["inverse_interval"], "steps")
    check_count("max_factor_dim", group["max_factor_dim"], "entries")
    if group["inverse_interval"] % group["update_interval"]:
        raise ValueError(
            f"inverse_interval must be a multiple of update_interval, since factors change only then: "
            f"got {group['inverse_interval']} with update_interval={group['update_interval']}"
        )
    if group["kl_clip"] is not None:
        check_size("kl_clip", group["kl_clip"], positive=True, why="; None clips nothing")
    for name in SHARED_OPTIONS:
        check_shared(name, group, first)
    check_real(group["params"], kind)
    refuse_shards(group["params"], kind)
