"""The full Kronecker factors of a model's layers over a set of examples, without a trace in its training.

They are those that AdaFisher keeps the diagonals of: ``H = mean x x^T`` of a layer's inputs and ``S = mean g g^T`` of
the loss gradients at its outputs, over all positions (examples times tokens or pixels). Second moments are not centred,
so inputs whose mean is far from zero have much off the diagonal.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from hf_adafisher.experiments.figures.dominance import Dominance, measure_dominance
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
    """A layer that has Kronecker factors.

    Attributes:
        name: the module's name in the model.
        rule: how its factors are recorded.
        cut: sides (``INPUT``, ``OUTPUT_GRAD``) longer than max_dim, of which only the diagonal is kept.
        by_nature: sides that have nothing but a diagonal, as the input of an Embedding.
    """

    name: str
    rule: MomentRule
    cut: frozenset[str]
    by_nature: frozenset[str]


def factor_layers(model: nn.Module, max_dim: int) -> dict[str, FactorLayer]:
    """The layers of a model that have full Kronecker factors and a trainable weight, by name.

    Normalisation layers have none (their blocks are diagonal), nor have grouped convolutions.

    Args:
        model: any.
        max_dim: longest side of a factor of which more than the diagonal is recorded.
    """
    layers = {}
    for name, module in model.named_modules():
        weight, rule = module._parameters.get("weight"), find_rule(module)
        shapes = None if rule is None else rule.full_factor_shapes(module)
        if rule is None or shapes is None or weight is None or not weight.requires_grad:
            continue
        by_side = dict(zip(SIDES, shapes, strict=True))
        diagonal = frozenset(side for side, shape in by_side.items() if len(shape) == 1)
        cut = frozenset(side for side, shape in by_side.items() if shape[0] > max_dim) - diagonal
        kept = [shape[:1] if side in cut else shape for side, shape in by_side.items()]
        layers[name] = FactorLayer(name, _FullMoments(rule, (kept[0], kept[1]), with_one=False), cut, diagonal)
    return layers


@dataclass(frozen=True)
class LayerFactors:
    """Both factors of a layer over a set of examples.

    Attributes:
        layer: which.
        moments: ``INPUT`` and ``OUTPUT_GRAD``: (d, d), or (d,) where the factor is diagonal by nature or cut.
        positions: what the means are over.
        broadcast: the output served a whole batch at once, so gradients are sums over a batch's examples.
    """

    layer: FactorLayer
    moments: Mapping[str, Tensor]
    positions: int
    broadcast: bool

    def measured(self) -> dict[str, Dominance]:
        """By side; without those that are cut."""
        sides = [side for side in SIDES if side not in self.layer.cut]
        return {side: measure_dominance(self.moments[side], self.positions) for side in sides}


def collect_factors(
    model: nn.Module,
    batches: Sequence[Mapping[str, Any]],
    loss_of: Callable[[nn.Module, dict[str, Any]], Tensor],
    max_dim: int,
    only: str | None = None,
    progress: bool = False,
) -> dict[str, LayerFactors]:
    """Takes the full factors of a model in evaluation mode, with gradients of the mean loss over all examples.

    It works on a copy: gradients, buffers, hooks and random numbers of the training go on as if it had not been.
    Memory: a copy of the weights, their gradients, and ``d^2`` numbers for every factor.

    Args:
        model: any.
        batches: with "labels", whose length is the number of examples.
        loss_of: the mean loss over a batch's examples.
        max_dim: see ``factor_layers``.
        only: name of the one layer to record; None for all.
        progress: whether to show a bar.

    Returns:
        By name; layers that were not called, or compute something else than their class, are left out.

    Raises:
        ValueError: the loss or a factor is not finite.
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
