"""How well estimates of the Fisher's diagonal agree with the exact one: layers, means over layers, means over seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_adafisher.experiments.correlations import log_pearson, log_scale, spearman
from hf_adafisher.experiments.exact_fisher import ExactFisher
from hf_adafisher.experiments.figures.histogram import weights_by_layer

ESTIMATES = {
    "fisher": "AdaFisher F~",
    "product": "S (x) H",
    "second_moment": "Adam v",
    "kfac": "K-FAC",
}
"""By the key in the JSON file: what AdaFisher divides by, the same without normalisation and damping, Adam's
bias-corrected moving average of squared gradients, and what K-FAC divides by.

The last three are in the unit of the exact diagonal, one term of the loss, so that their scales can be compared with
it: see ``fisher_comparison.in_units_of_a_term``."""
HALVES = "halves"
MEASURES: dict[str, Callable[[Tensor, Tensor], float]] = {
    "spearman": spearman,
    "log_pearson": log_pearson,
    "log_scale": log_scale,
}
TOGETHER = "all values together"

Agreement = dict[str, dict[str, float]]
"""Measures of each estimate, and of the two halves of the examples with each other."""


@dataclass(frozen=True)
class LayerAgreement:
    """One layer's weight.

    Attributes:
        layer: name of the module, or what stands for several.
        values: how many.
        measures: see :data:`Agreement`; an estimate that does not exist for this layer is left out.
    """

    layer: str
    values: int
    measures: Agreement


def compare_layers(
    model: nn.Module, exact: ExactFisher, estimates: Mapping[str, Mapping[int, Tensor]]
) -> list[LayerAgreement]:
    """A row for every trainable weight (a tied one has one row), then one of all values together.

    Args:
        model: whose parameters these are.
        exact: their exact diagonals.
        estimates: by the keys of :data:`ESTIMATES` and ``id(parameter)``. Only layers that have all of them enter the
            last row.
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
        if len(known) == len(ESTIMATES):
            complete.append((known, truth))
    if complete:
        known = {name: torch.cat([k[name].reshape(-1) for k, _ in complete]) for name in ESTIMATES}
        truth = [torch.cat([t[i].reshape(-1) for _, t in complete]) for i in range(3)]
        rows.append(LayerAgreement(TOGETHER, len(truth[0]), measured(known, *truth)))
    return rows


def measured(known: Mapping[str, Tensor], exact: Tensor, even: Tensor, odd: Tensor) -> Agreement:
    """The measures of every estimate against the exact diagonal, and of its halves against each other."""
    pairs = {name: (known[name], exact) for name in ESTIMATES if name in known} | {HALVES: (even, odd)}
    return {name: {key: measure(*pair) for key, measure in MEASURES.items()} for name, pair in pairs.items()}


def mean_of(rows: Sequence[LayerAgreement]) -> Agreement:
    """Means over the layers that have all estimates, weighted by their sizes; numbers that are nan are left out.

    ``scale_spread`` is the standard deviation of ``log_scale`` over these layers, in decades: how much an estimate
    misjudges layers beside each other. A factor that all layers share, which a learning rate absorbs, is not in it.
    """
    complete = [row for row in rows if row.layer != TOGETHER and len(row.measures) == len(ESTIMATES) + 1]
    found: Agreement = {}
    for name in (*ESTIMATES, HALVES):
        found[name] = {}
        for key in MEASURES:
            pairs = [(row.measures[name][key], row.values) for row in complete]
            pairs = [(value, size) for value, size in pairs if math.isfinite(value)]
            total = sum(size for _, size in pairs)
            found[name][key] = sum(value * size for value, size in pairs) / total if total else math.nan
        scales = [row.measures[name]["log_scale"] for row in complete]
        scales = [scale for scale in scales if math.isfinite(scale)]
        found[name]["scale_spread"] = statistics.pstdev(scales) if scales else math.nan
    return found


def average(rows: Sequence[LayerAgreement]) -> LayerAgreement:
    """One layer's row of several seeds as one."""
    first = rows[0]
    measures = {
        name: {key: statistics.fmean(row.measures[name][key] for row in rows) for key in values}
        for name, values in first.measures.items()
    }
    return LayerAgreement(first.layer, first.values, measures)


def over_seeds(means: Sequence[Agreement]) -> dict[str, dict[str, dict[str, float | None]]]:
    """Mean and standard deviation (n - 1) of every number; None for the latter with one seed."""
    found: dict[str, dict[str, dict[str, float | None]]] = {}
    for name, values in means[0].items():
        found[name] = {}
        for key in values:
            numbers = [mean[name][key] for mean in means]
            spread = statistics.stdev(numbers) if len(numbers) > 1 else None
            found[name][key] = {"mean": statistics.fmean(numbers), "sd": spread}
    return found
