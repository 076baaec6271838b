"""Muon (Jordan et al. 2024)."""

from __future__ import annotations

import pytorch_optimizer
from pytorch_optimizer.base.type import ParamGroup
from pytorch_optimizer.optimizer.utils.matrix import zero_power_via_newton_schulz_5
from torch import Tensor


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
