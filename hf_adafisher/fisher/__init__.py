"""The diagonal Kronecker Fisher: layer rules, hooks, averages. Knows torch only."""

from hf_adafisher.fisher.averages import FactorSums, MovingAverage, min_max_normalize
from hf_adafisher.fisher.layers import LayerRule, find_rule, register_layer
from hf_adafisher.fisher.recorder import FactorRecorder

__all__ = [
    "FactorRecorder",
    "FactorSums",
    "LayerRule",
    "MovingAverage",
    "find_rule",
    "min_max_normalize",
    "register_layer",
]
