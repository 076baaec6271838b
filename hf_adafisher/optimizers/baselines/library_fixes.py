"""LAMB (You et al. 2020, arXiv 1904.00962) and Muon (Jordan et al. 2024) of pytorch_optimizer, each with one change."""

from __future__ import annotations

import math

import pytorch_optimizer
from pytorch_optimizer.base.type import ParamGroup
from pytorch_optimizer.optimizer.utils.matrix import zero_power_via_newton_schulz_5
from torch import Tensor


class Lamb(pytorch_optimizer.Lamb):
    """LAMB of pytorch_optimizer with the unclipped weight norm in the trust ratio (Algorithm 2, ``phi(z) = z``).

    The library clips the norm at 10, so that the steps of larger weights are shorter than ``lr`` times their norm.
    """

    clamp = math.inf


class Muon(pytorch_optimizer.Muon):
    """Muon of pytorch_optimizer whose Newton-Schulz iterations keep the updates' dtype on a CPU.

    The library iterates in bfloat16, which is for a GPU's speed: on a CPU without instructions for it a step takes
    several times as long, and no comparison at equal time would be fair.
    """

    @staticmethod
    def _orthogonalize(group: ParamGroup, updates: list[Tensor]) -> list[Tensor]:
        if updates[0].device.type != "cpu" or group["ns_method"] != "newton_schulz":
            found: list[Tensor] = pytorch_optimizer.Muon._orthogonalize(group, updates)
            return found
        return [
            zero_power_via_newton_schulz_5(
                update.flatten(1), num_steps=group["ns_steps"], weights=group["ns_coeffs"], dtype=update.dtype
            )
            for update in updates
        ]
