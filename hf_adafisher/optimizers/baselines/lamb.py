"""LAMB (You et al. 2020, arXiv 1904.00962)."""

from __future__ import annotations

import math

import pytorch_optimizer


class Lamb(pytorch_optimizer.Lamb):
    """LAMB of pytorch_optimizer with the unclipped weight norm in the trust ratio (Algorithm 2, ``phi(z) = z``).

    The library clips the norm at 10, so that the steps of larger weights are shorter than ``lr`` times their norm.
    """

    clamp = math.inf
