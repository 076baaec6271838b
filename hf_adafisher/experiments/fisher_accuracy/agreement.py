"""Agreement of estimated Fisher diagonals with the exact one: by layer, averaged over layers, averaged over seeds."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from hf_adafisher.experiments.figures.training_run import weights_by_layer
from hf_adafisher.experiments.fisher_accuracy.exact_fisher import ExactFisher

ESTIMATES = {
    "fisher": "AdaFisher F~",
    "product": "S (x) H",
    "second_moment": "Adam v",
    "kfac": "K-FAC",
}
"""Estimates by their key in the JSON file: AdaFisher's divisor, the same without normalisation and damping, Adam's
bias-corrected moving average of squared gradients, and K-FAC's divisor, which depends on its damping.

The last three are in the unit of the exact diagonal, one term of the loss, so that their scales can be compared with
it: see ``evaluation.in_units_of_a_term``."""
HALVES = "halves"
CONTROLS = {
    "exact_window": "exact, averaged as F~",
    "second_moment_window": "v, averaged as F~",
    "product_unscaled": "S (x) H, unscaled",
    "kfac_weaker": "K-FAC, damping / 100",
    "kfac_stronger": "K-FAC, damping x 100",
}
"""Controls by their key in the JSON file; they separate the causes of a disagreement.

F~, ``S (x) H`` and K-FAC average over the steps on which AdaFisher refreshes, with its decay; Adam's v over all steps,
with its own; the exact diagonal is that of the last weights. So the first two controls are the exact empirical diagonal
of the mini-batches of AdaFisher's steps, and the square of their gradients, both averaged as F~ is.

``S (x) H, unscaled`` is not scaled to the sum over a layer's positions, layer by layer; it has the same ranks within a
layer, and others between layers. The last two show the effect of K-FAC's damping, which is not tuned."""
AGAINST_WINDOW = {
    "fisher_against_window": ("fisher", "F~ against exact, averaged as F~"),
    "product_against_window": ("product", "S (x) H against exact, averaged as F~"),
}
"""Estimates compared with that control, by their key in the JSON file: examples, weights and window are the same, which
leaves the Kronecker form (and for F~ the normalisation)."""
WINDOW = "exact_window"
SCALE_SPREAD = "scale_spread"
TOGETHER = "all values together"

Agreement = dict[str, dict[str, float]]
"""Measures of each estimate and control, and of the two halves of the examples with each other."""
OverSeeds = dict[str, dict[str, dict[str, float | None]]]
"""By estimate and measure: ``mean``, ``sd`` and ``seeds``, see ``over_seeds``."""


def spearman(estimate: Tensor, exact: Tensor) -> float:
    """Spearman's rank correlation, ties with average ranks; nan where one tensor is constant."""
    from scipy.stats import spearmanr

    return _coefficient(spearmanr, estimate.reshape(-1), exact.reshape(-1))


def log_pearson(estimate: Tensor, exact: Tensor) -> float:
    """Pearson's correlation of the logarithms of those values that are above zero in both tensors."""
    from scipy.stats import pearsonr

    estimate, exact = estimate.reshape(-1).double(), exact.reshape(-1).double()
    both = (estimate > 0.0) & (exact > 0.0)
    return _coefficient(pearsonr, estimate[both].log(), exact[both].log())


def _coefficient(correlation: Callable[..., Any], first: Tensor, second: Tensor) -> float:
    if len(first) < 2:
        return math.nan
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="An input array is constant")
        return float(correlation(first.numpy(), second.numpy()).statistic)


def log_scale(estimate: Tensor, exact: Tensor) -> float:
    """``log10(mean(estimate) / mean(exact))``, an estimate's excess in decades; nan where a mean is zero."""
    means = estimate.double().mean().item(), exact.double().mean().item()
    return math.log10(means[0] / means[1]) if min(means) > 0.0 else math.nan


MEASURES: dict[str, Callable[[Tensor, Tensor], float]] = {
    "spearman": spearman,
    "log_pearson": log_pearson,
    "log_scale": log_scale,
}


@dataclass(frozen=True)
class LayerAgreement:
    """Agreement of one layer's weight.

    Attributes:
        layer: Name of the module, or ``TOGETHER`` for all values.
        values: Number of values.
        measures: See ``Agreement``; estimates that do not exist for this layer are left out.
    """

    layer: str
    values: int
    measures: Agreement

    @property
    def complete(self) -> bool:
        """True for a single layer with all estimates."""
        return self.layer != TOGETHER and all(name in self.measures for name in ESTIMATES)


@dataclass(frozen=True)
class LayerAverage:
    """Agreement of one layer's weight, or of all values together, over several seeds.

    Attributes:
        layer: As in ``LayerAgreement``.
        values: Number of values; of all values together the fewest in any seed.
        seeds: Number of seeds with this row.
        measures: See ``over_seeds``.
    """

    layer: str
    values: int
    seeds: int
    measures: OverSeeds


def compare_layers(
    model: nn.Module, exact: ExactFisher, estimates: Mapping[str, Mapping[int, Tensor]]
) -> list[LayerAgreement]:
    """Compare every trainable weight (a tied one has one row), then all values together.

    The last row concatenates the values of those layers that have all of ``ESTIMATES`` (not those of normalisation,
    of which K-FAC has no block), as they are: F~ as AdaFisher divides by it, each layer normalised by itself; ``S (x)
    H``, v and K-FAC in the unit of one term of the loss. Controls enter it that all these layers have.

    Args:
        model: Owner of the parameters.
        exact: Their exact diagonals.
        estimates: By the keys of ``ESTIMATES`` and ``CONTROLS``, and ``id(parameter)``.
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
        rows.append(LayerAgreement(layer, weight.numel(), measure_agreement(known, *truth)))
        if rows[-1].complete:
            complete.append((known, truth))
    if complete:
        shared = [name for name in (*ESTIMATES, *CONTROLS) if all(name in known for known, _ in complete)]
        known = {name: torch.cat([k[name].reshape(-1) for k, _ in complete]) for name in shared}
        truth = [torch.cat([t[i].reshape(-1) for _, t in complete]) for i in range(3)]
        rows.append(LayerAgreement(TOGETHER, len(truth[0]), measure_agreement(known, *truth)))
    return rows


def measure_agreement(known: Mapping[str, Tensor], exact: Tensor, even: Tensor, odd: Tensor) -> Agreement:
    """Compare estimates with the exact diagonal, its halves with each other, and two estimates with ``WINDOW``."""
    pairs = {name: (known[name], exact) for name in (*ESTIMATES, *CONTROLS) if name in known} | {HALVES: (even, odd)}
    if WINDOW in known:
        against = {key: name for key, (name, _) in AGAINST_WINDOW.items() if name in known}
        pairs |= {key: (known[name], known[WINDOW]) for key, name in against.items()}
    return {name: {key: measure(*pair) for key, measure in MEASURES.items()} for name, pair in pairs.items()}


def mean_of(rows: Sequence[LayerAgreement]) -> Agreement:
    """Means over the layers that have all estimates, weighted by their sizes, without values that are not finite.

    ``layers_in_mean`` counts the layers. An estimate without any number has nan.

    ``scale_spread`` is the standard deviation of ``log_scale`` over these layers, in decades: an estimate's error in
    the relative scale of layers. A factor common to all layers, which a learning rate absorbs, is not in it.
    """
    numbers, sizes = _complete_layers(rows)
    means = numbers.mul(sizes, axis=0).sum() / numbers.notna().mul(sizes, axis=0).sum()
    spreads = numbers.xs("log_scale", axis=1, level=1).std(ddof=0)
    return {name: {**measures, SCALE_SPREAD: float(spreads[name])} for name, measures in _nested(means).items()}


def layers_in_mean(rows: Sequence[LayerAgreement]) -> dict[str, dict[str, int]]:
    """Number of layers in each mean of ``mean_of``."""
    return _nested(_complete_layers(rows)[0].count())


def _complete_layers(rows: Sequence[LayerAgreement]) -> tuple[pd.DataFrame, pd.Series]:
    """Numbers by complete layer and (estimate, measure), in the order of the tables; and the layers' sizes."""
    known = {name for row in rows for name in row.measures}
    names = [*ESTIMATES, HALVES, *(name for name in (*CONTROLS, *AGAINST_WINDOW) if name in known)]
    complete = [row for row in rows if row.complete]
    columns = pd.MultiIndex.from_product([names, MEASURES])
    return _numbers(row.measures for row in complete).reindex(columns=columns), pd.Series([r.values for r in complete])


def _numbers(each: Iterable[Agreement]) -> pd.DataFrame:
    """One line per agreement, one column per (estimate, measure); nan for what is missing or not finite."""
    lines = [{(name, key): x for name, of in one.items() for key, x in of.items()} for one in each]
    return pd.DataFrame(lines, dtype=float).replace([math.inf, -math.inf], math.nan)


def _nested(numbers: pd.Series) -> dict[str, dict[str, Any]]:
    """Numbers by (estimate, measure) as a dictionary of dictionaries, of Python's own types."""
    return {str(name): of.droplevel(0).to_dict() for name, of in numbers.groupby(level=0, sort=False)}


def average(by_seed: Sequence[Sequence[LayerAgreement]]) -> list[LayerAverage]:
    """Average each layer's rows over the seeds that have it, in order of first appearance, all values together last."""
    rows: dict[str, list[LayerAgreement]] = {}
    for layers in by_seed:
        for row in layers:
            rows.setdefault(row.layer, []).append(row)
    return [
        LayerAverage(layer, min(row.values for row in same), len(same), over_seeds([row.measures for row in same]))
        for layer, same in sorted(rows.items(), key=lambda item: item[0] == TOGETHER)
    ]


def over_seeds(by_seed: Sequence[Agreement]) -> OverSeeds:
    """``mean``, ``sd`` (n - 1) and ``seeds``, the number of seeds, of every number over the seeds that have it.

    A number that is nan, as a rank correlation with a constant is, or missing counts for no seed. Without any number
    the mean is nan, and with less than two ``sd`` is None.
    """
    statistics = _numbers(by_seed).agg(["mean", "std", "count"])
    found: OverSeeds = {}
    for (name, key), (mean, deviation, count) in statistics.items():
        spread = {"mean": float(mean), "sd": float(deviation) if count > 1 else None, "seeds": int(count)}
        found.setdefault(name, {})[key] = spread
    return found
