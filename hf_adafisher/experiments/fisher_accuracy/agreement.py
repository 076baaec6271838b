"""How well estimates of the Fisher's diagonal agree with the exact one: layers, means over layers, means over seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_adafisher.experiments.figures.histogram import weights_by_layer
from hf_adafisher.experiments.fisher_accuracy.correlations import log_pearson, log_scale, spearman
from hf_adafisher.experiments.fisher_accuracy.exact_fisher import ExactFisher

ESTIMATES = {
    "fisher": "AdaFisher F~",
    "product": "S (x) H",
    "second_moment": "Adam v",
    "kfac": "K-FAC",
}
"""By the key in the JSON file: what AdaFisher divides by, the same without normalisation and damping, Adam's
bias-corrected moving average of squared gradients, and what K-FAC divides by, which depends on its damping.

The last three are in the unit of the exact diagonal, one term of the loss, so that their scales can be compared with
it: see ``fisher_comparison.in_units_of_a_term``."""
HALVES = "halves"
CONTROLS = {
    "exact_window": "exact, averaged as F~",
    "second_moment_window": "v, averaged as F~",
    "product_unscaled": "S (x) H, unscaled",
    "kfac_weaker": "K-FAC, damping / 100",
    "kfac_stronger": "K-FAC, damping x 100",
}
"""What tells causes apart, by the key in the JSON file.

F~, ``S (x) H`` and K-FAC average over the steps on which AdaFisher refreshes, with its decay; Adam's v over all steps,
with its own; the exact diagonal is that of the last weights. So the first two controls are the exact empirical diagonal
of the mini-batches of AdaFisher's steps, and the square of their gradients, both averaged as F~ is.

``S (x) H, unscaled`` has not been brought to the sum over a layer's positions, layer by layer; it has the same ranks
within a layer, and others between layers. The last two say how much K-FAC's column owes to a damping that nobody
tuned."""
AGAINST_WINDOW = {
    "fisher_against_window": ("fisher", "F~ against exact, averaged as F~"),
    "product_against_window": ("product", "S (x) H against exact, averaged as F~"),
}
"""Estimates that are held against that control, by the key in the JSON file: examples, weights and window are the same,
and what is left is the Kronecker form (and for F~ the normalisation)."""
WINDOW = "exact_window"
MEASURES: dict[str, Callable[[Tensor, Tensor], float]] = {
    "spearman": spearman,
    "log_pearson": log_pearson,
    "log_scale": log_scale,
}
SCALE_SPREAD = "scale_spread"
TOGETHER = "all values together"

Agreement = dict[str, dict[str, float]]
"""Measures of each estimate and control, and of the two halves of the examples with each other."""
OverSeeds = dict[str, dict[str, dict[str, float | None]]]
"""By estimate and measure: ``mean``, ``sd`` and ``seeds``, see ``over_seeds``."""


@dataclass(frozen=True)
class LayerAgreement:
    """One layer's weight.

    Attributes:
        layer: name of the module, or what stands for several.
        values: how many.
        measures: see ``Agreement``; an estimate that does not exist for this layer is left out.
    """

    layer: str
    values: int
    measures: Agreement

    @property
    def complete(self) -> bool:
        """Whether it is one layer, and has all estimates."""
        return self.layer != TOGETHER and all(name in self.measures for name in ESTIMATES)


@dataclass(frozen=True)
class LayerAverage:
    """One layer's weight, or all together, over several seeds.

    Attributes:
        layer: as in ``LayerAgreement``.
        values: how many; of all together the fewest in any seed.
        seeds: how many have this row at all.
        measures: see ``over_seeds``.
    """

    layer: str
    values: int
    seeds: int
    measures: OverSeeds


def compare_layers(
    model: nn.Module, exact: ExactFisher, estimates: Mapping[str, Mapping[int, Tensor]]
) -> list[LayerAgreement]:
    """A row for every trainable weight (a tied one has one row), then one of all values together.

    The last row concatenates the values of those layers that have all of ``ESTIMATES`` (not those of normalisation,
    of which K-FAC has no block), as they are: F~ as AdaFisher divides by it, each layer normalised by itself; ``S (x)
    H``, v and K-FAC in the unit of one term of the loss. Controls enter it that all these layers have.

    Args:
        model: whose parameters these are.
        exact: their exact diagonals.
        estimates: by the keys of ``ESTIMATES`` and ``CONTROLS``, and ``id(parameter)``.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    rows, complete, seen = [], [], set()
    for layer, weight in weights_by_layer(model).items():
        key = id(weight)
        if key in seen or key not in estimates["fisher"]:
            continue
        seen.add(key)
        known = {name: values[key].cpu() for name, values in estimates.items() if key in values}
        truth = [diagonals[names[key]].cpu() for diagonals in (exact.diagonals, *exact.halves)]
        rows.append(LayerAgreement(layer, weight.numel(), measured(known, *truth)))
        if rows[-1].complete:
            complete.append((known, truth))
    if complete:
        shared = [name for name in (*ESTIMATES, *CONTROLS) if all(name in known for known, _ in complete)]
        known = {name: torch.cat([k[name].reshape(-1) for k, _ in complete]) for name in shared}
        truth = [torch.cat([t[i].reshape(-1) for _, t in complete]) for i in range(3)]
        rows.append(LayerAgreement(TOGETHER, len(truth[0]), measured(known, *truth)))
    return rows


def measured(known: Mapping[str, Tensor], exact: Tensor, even: Tensor, odd: Tensor) -> Agreement:
    """The measures of every estimate against the exact diagonal, of its halves against each other, and of two
    estimates against the control that averages exact diagonals.
    """
    pairs = {name: (known[name], exact) for name in (*ESTIMATES, *CONTROLS) if name in known} | {HALVES: (even, odd)}
    if WINDOW in known:
        against = {key: name for key, (name, _) in AGAINST_WINDOW.items() if name in known}
        pairs |= {key: (known[name], known[WINDOW]) for key, name in against.items()}
    return {name: {key: measure(*pair) for key, measure in MEASURES.items()} for name, pair in pairs.items()}


def mean_of(rows: Sequence[LayerAgreement]) -> Agreement:
    """Means over the layers that have all estimates, weighted by their sizes; numbers that are nan are left out.

    ``layers_in_mean`` says over how many layers. An estimate without any number has nan.

    ``scale_spread`` is the standard deviation of ``log_scale`` over these layers, in decades: how much an estimate
    misjudges layers beside each other. A factor that all layers share, which a learning rate absorbs, is not in it.
    """
    found: Agreement = {}
    for name in _names(row.measures for row in rows):
        found[name] = {}
        for key in MEASURES:
            pairs = _numbers(rows, name, key)
            total = sum(size for _, size in pairs)
            found[name][key] = sum(value * size for value, size in pairs) / total if total else math.nan
        scales = [scale for scale, _ in _numbers(rows, name, "log_scale")]
        found[name][SCALE_SPREAD] = statistics.pstdev(scales) if scales else math.nan
    return found


def layers_in_mean(rows: Sequence[LayerAgreement]) -> dict[str, dict[str, int]]:
    """Over how many layers each number of ``mean_of`` is; all that have all estimates, but for nan."""
    names = _names(row.measures for row in rows)
    return {name: {key: len(_numbers(rows, name, key)) for key in MEASURES} for name in names}


def _numbers(rows: Sequence[LayerAgreement], name: str, key: str) -> list[tuple[float, int]]:
    """A measure and the size of every layer that enters its mean."""
    pairs = [(row.measures.get(name, {}).get(key, math.nan), row.values) for row in rows if row.complete]
    return [(value, size) for value, size in pairs if math.isfinite(value)]


def _names(found: Iterable[Mapping[str, object]]) -> list[str]:
    """The estimates and halves, and whatever else any of these has, in the order of the tables."""
    known = {name for each in found for name in each}
    optional = [name for name in (*CONTROLS, *AGAINST_WINDOW) if name in known]
    return [*ESTIMATES, HALVES, *optional]


def average(by_seed: Sequence[Sequence[LayerAgreement]]) -> list[LayerAverage]:
    """The rows of several seeds, of each layer as one; a layer that some seeds do not have is the mean of the others'.

    In the order of the first appearance, all values together last.
    """
    rows: dict[str, list[LayerAgreement]] = {}
    for layers in by_seed:
        for row in layers:
            rows.setdefault(row.layer, []).append(row)
    ordered = sorted(rows.items(), key=lambda item: item[0] == TOGETHER)
    return [
        LayerAverage(layer, min(row.values for row in same), len(same), over_seeds([row.measures for row in same]))
        for layer, same in ordered
    ]


def over_seeds(found: Sequence[Agreement]) -> OverSeeds:
    """Every number over the seeds that have it: ``mean``, ``sd`` (n - 1) and ``seeds``, how many these are.

    A number that is nan, as a rank correlation with a constant is, or that is missing, is in none of them. Without any
    number the mean is nan, and with less than two sd is None.
    """
    averaged: OverSeeds = {}
    for name in dict.fromkeys(name for each in found for name in each):
        averaged[name] = {}
        for key in dict.fromkeys(key for each in found for key in each.get(name, {})):
            numbers = [each.get(name, {}).get(key, math.nan) for each in found]
            numbers = [number for number in numbers if math.isfinite(number)]
            averaged[name][key] = {
                "mean": statistics.fmean(numbers) if numbers else math.nan,
                "sd": statistics.stdev(numbers) if len(numbers) > 1 else None,
                "seeds": len(numbers),
            }
    return averaged
