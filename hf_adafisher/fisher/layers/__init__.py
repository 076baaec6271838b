"""One file per layer family, one small rule per layer class."""

from hf_adafisher.fisher.layers import conv, embedding, linear, norm  # noqa: F401  (importing registers the rules)
from hf_adafisher.fisher.layers.registry import LayerRule, find_rule, register_layer

__all__ = ["LayerRule", "find_rule", "register_layer"]
