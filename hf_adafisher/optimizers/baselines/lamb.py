"""LAMB as its paper has it."""

from __future__ import annotations

import math

import pytorch_optimizer


class Lamb(pytorch_optimizer.Lamb):
    """pytorch_optimizer's Lamb with the weight's own norm in the trust ratio (Algorithm 2 with ``phi(z) = z``).

    The library caps that norm at 10, which makes the steps of larger weights smaller than ``lr`` times their norm.
    """

    clamp = math.inf
