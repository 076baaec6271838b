"""Full Kronecker factors of a model's layers over a set of examples, without an effect on its training.

AdaFisher keeps their diagonals: ``H = mean x x^T`` of a layer's inputs and ``S = mean g g^T`` of the loss gradients at
its outputs, over all positions (examples times tokens or pixels). Second moments are not centred, so inputs whose mean
is far from zero have large off-diagonal entries.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from hf_adafisher.experiments.figures.factors.diagonal_dominance import DiagonalDominance, measure_dominance
from hf_adafisher.experiments.figures.training_run import trainable_weight
from hf_adafisher.fisher.diagonals import INPUT, OUTPUT_GRAD
from hf_adafisher.fisher.layers import find_rule
from hf_adafisher.fisher.recorder import FactorRecorder
from hf_adafisher.optimizers.baselines.kfac_blocks import MomentRule

SIDES = (INPUT, OUTPUT_GRAD)
SYMBOLS = {INPUT: "H", OUTPUT_GRAD: "S"}
_DIVERGED = "the training has diverged; lower the learning rate or look at an earlier step"


class _FullMoments(MomentRule):
    """Full moments without the bias's constant 1, which AdaFisher keeps apart."""

    def broadcasts_over_batch(self, inputs: Sequence[Tensor]) -> bool:
        return self.rule.broadcasts_over_batch(inputs)


@dataclass(frozen=True)
class FactorLayer:
    """A layer with Kronecker factors.

    Attributes:
        name: Name of the module in the model.
        rule: Rule that records its factors.
        too_long: Sides (``INPUT``, ``OUTPUT_GRAD``) longer than max_dim, of which only the diagonal is kept.
        by_nature: Sides whose factor is diagonal by nature, as the input of an Embedding.
    """

    name: str
    rule: MomentRule
    too_long: frozenset[str]
    by_nature: frozenset[str]


def factor_layers(model: nn.Module, max_dim: int) -> dict[str, FactorLayer]:
    """Layers of a model with full Kronecker factors and a trainable weight, by name.

    Normalisation layers have none (their blocks are diagonal), nor have grouped convolutions.

    Args:
        model: Any model.
        max_dim: Longest side of a factor that is recorded in full.
    """
    layers = {}
    for name, module in model.named_modules():
        rule = find_rule(module)
        shapes = None if rule is None else rule.full_factor_shapes(module)
        if rule is None or shapes is None or trainable_weight(module) is None:
            continue
        by_side = dict(zip(SIDES, shapes, strict=True))
        diagonal = frozenset(side for side, shape in by_side.items() if len(shape) == 1)
        too_long = frozenset(side for side, shape in by_side.items() if shape[0] > max_dim) - diagonal
        kept = [shape[:1] if side in too_long else shape for side, shape in by_side.items()]
        layers[name] = FactorLayer(name, _FullMoments(rule, (kept[0], kept[1]), with_one=False), too_long, diagonal)
    return layers


@dataclass(frozen=True)
class LayerFactors:
    """Both factors of a layer over a set of examples.

    Attributes:
        layer: The layer.
        moments: ``INPUT`` and ``OUTPUT_GRAD``: (d, d), or (d,) for a factor that is diagonal by nature or too long.
        positions: Number of positions that the means are over.
        broadcast: True if the output is shared by a batch, so that gradients are sums over its examples.
    """

    layer: FactorLayer
    moments: Mapping[str, Tensor]
    positions: int
    broadcast: bool

    def dominance(self) -> dict[str, DiagonalDominance]:
        """Diagonal dominance by side, without factors that are too long."""
        sides = [side for side in SIDES if side not in self.layer.too_long]
        return {side: measure_dominance(self.moments[side], self.positions) for side in sides}


def collect_factors(
    model: nn.Module,
    batches: Sequence[Mapping[str, Any]],
    loss_of: Callable[[nn.Module, dict[str, Any]], Tensor],
    max_dim: int,
    only: str | None = None,
    progress: bool = False,
) -> dict[str, LayerFactors]:
    """Compute the full factors of a model in evaluation mode, with gradients of the mean loss over all examples.

    A copy of the model does the work: gradients, buffers, hooks and random numbers of the training do not change.
    Memory: a copy of the weights, their gradients, and ``d^2`` numbers for every factor.

    Args:
        model: Any model.
        batches: Batches with "labels", whose length is the number of examples.
        loss_of: Mean loss over a batch's examples.
        max_dim: See ``factor_layers``.
        only: Name of the one layer to record; None for all.
        progress: Show a progress bar.

    Returns:
        Factors by the layer's name; layers that are not called, or whose output is not that of their class, are left
        out.

    Raises:
        ValueError: The loss or a factor is not finite.
    """
    with torch.random.fork_rng():
        model = copy.deepcopy(model).eval()
        layers = {name: layer for name, layer in factor_layers(model, max_dim).items() if only in (None, name)}
        rules = {id(model.get_submodule(name)): layer.rule for name, layer in layers.items()}
        recorder = FactorRecorder(model, model.parameters(), lambda module: rules.get(id(module)))
        recorder.arm()
        total = sum(len(batch["labels"]) for batch in batches)
        with torch.enable_grad():
            for batch in tqdm(batches, desc="factors", leave=False, disable=not progress):
                loss = loss_of(model, dict(batch)) * (len(batch["labels"]) / total)
                if not bool(loss.isfinite()):
                    raise ValueError(f"the loss is {loss.item()}: {_DIVERGED}")
                loss.backward()
    sample = recorder.flush()
    recorder.close()
    if sample.non_finite:
        raise ValueError(f"the factors of layer {sample.non_finite[0]!r} are not finite: {_DIVERGED}")
    return {
        t.name: LayerFactors(layers[t.name], moments, round(sample.counts[t]), t in sample.broadcast)
        for t, moments in sample.factors.items()
    }
