"""A module whose factors are recorded."""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_adafisher.fisher.diagonals import ParameterDiagonal
from hf_adafisher.fisher.layers import LayerRule


@dataclass(eq=False)
class TrackedModule:
    """A module whose factors are recorded.

    Attributes:
        name: Its name in the model (the first one, where it is shared).
        module: The module itself. Parameters are looked up on it when needed, since wrappers may replace them.
        rule: The rule of its class.
        diagonals: The diagonals of those of its parameters that the optimizer trains.
        matches_rule: Whether a call was found to compute what the rule assumes; None before the first call. The first
            call with finite output decides for good: one that computes something else later is not noticed.
    """

    name: str
    module: nn.Module
    rule: LayerRule
    diagonals: dict[str, ParameterDiagonal]
    matches_rule: bool | None = None

    @property
    def records(self) -> bool:
        """True where its calls compute what the rule assumes, as far as the mode tells: BatchNorm's differ in eval."""
        return self.module.training or not self.rule.needs_training

    def trained_leaves(self) -> list[nn.Parameter]:
        """Its parameters of interest, as they stand in the module now, that a backward can accumulate into."""
        params = [self.module._parameters.get(key) for key in self.diagonals]
        return [p for p in params if p is not None and p.requires_grad and p.is_leaf]

    def holds(self, leaves: Sequence[Tensor]) -> bool:
        """True where these leaves of an earlier call are the module's own, and not lent by ``functional_call``.

        FSDP2 changes them itself: a module of its own holds the shards wherever it does not hold the whole.
        """
        now = [p for p in self.module._parameters.values() if p is not None]
        return any(_is_shard(p) for p in now) or any(leaf is p for leaf in leaves for p in now)

    @functools.cached_property
    def factor_shapes(self) -> tuple[torch.Size, torch.Size]:
        """Shapes of the input factor and of the output-gradient factor."""
        input_shape, output_grad_shape = self.rule.factor_shapes(self.module)
        return torch.Size(input_shape), torch.Size(output_grad_shape)

    @functools.cached_property
    def sums_size(self) -> int:
        """Number of values of both factors, the count and the broadcast flag: its part of the reduced buffer."""
        return sum(shape.numel() for shape in self.factor_shapes) + 2


def _is_shard(p: Tensor) -> bool:
    distributed = sys.modules.get("torch.distributed.tensor")
    return distributed is not None and isinstance(p, distributed.DTensor)
