"""Full Kronecker factors of a model's layers over a set of examples, and their diagonal dominance (AdaFisher, Fig. 3).

AdaFisher keeps their diagonals: ``H = mean x x^T`` of a layer's inputs and ``S = mean g g^T`` of the loss gradients at
its outputs, over all positions (examples times tokens or pixels). A factor is a second moment: a square matrix (d, d),
symmetric and positive semi-definite, or the vector (d,) of its diagonal where it is diagonal by nature. Second moments
are not centred, so inputs whose mean is far from zero have large off-diagonal entries.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from hf_adafisher.experiments.figures.training_run import trainable_weight
from hf_adafisher.fisher.diagonals import INPUT, OUTPUT_GRAD
from hf_adafisher.fisher.layers import find_rule
from hf_adafisher.fisher.recorder import FactorRecorder
from hf_adafisher.optimizers.baselines.kfac_blocks import MomentRule

_NOISE_SEED = 0


def gershgorin_disks(moment: Tensor) -> tuple[Tensor, Tensor]:
    """Centres and radii of the Gershgorin disks ``D(a_ii, sum_{j != i} |a_ij|)``, whose union holds every eigenvalue.

    Args:
        moment: Square matrix (d, d), or the diagonal (d,) of one that is diagonal.

    Returns:
        Two tensors of shape (d,).
    """
    if moment.dim() == 1:
        return moment, torch.zeros_like(moment)
    return moment.diagonal(), moment.abs().fill_diagonal_(0.0).sum(1)


def energy_share(moment: Tensor) -> float:
    """``sum_i a_ii^2 / ||A||_F^2``: 1 for a diagonal matrix, 1/d for one of equal entries; nan for zeros."""
    if moment.dim() == 1:
        return 1.0 if bool(moment.any()) else math.nan
    total = moment.square().sum().item()
    return moment.diagonal().square().sum().item() / total if total > 0.0 else math.nan


def independent_share(diagonal: Tensor, positions: int) -> float:
    """Share of energy on the diagonal of a factor of independent coordinates: the effect of sampling alone.

    ``N`` positions of independent coordinates with mean zero and these mean squares ``a_ii`` give off-diagonal entries
    of expected square ``a_ii a_jj / N``. Positions of one example are correlated, which makes the share smaller even
    for independent coordinates.

    Args:
        diagonal: Shape (d,).
        positions: Number of positions N, at least 1.
    """
    on_diagonal = diagonal.square().sum().item()
    off_diagonal = (diagonal.sum().item() ** 2 - on_diagonal) / positions
    return on_diagonal / (on_diagonal + off_diagonal) if on_diagonal > 0.0 else math.nan


def mean_correlation(moment: Tensor) -> float:
    """Root mean square of ``a_ij / sqrt(a_ii a_jj)``, i != j: off-diagonal entries relative to the rows' sizes.

    The largest rows dominate ``energy_share``; this is invariant to a rescaling of coordinates. Independent coordinates
    have about ``1 / sqrt(N)``. Rows of zeros are left out; nan with fewer than two others, 0 for a vector (d,).
    """
    if moment.dim() == 1:
        return 0.0
    alive = moment.diagonal() > 0.0
    scale, count = moment.diagonal()[alive].rsqrt(), int(alive.sum())
    squares = (moment[alive][:, alive] * scale[:, None] * scale).square_().fill_diagonal_(0.0)
    return math.sqrt(squares.sum().item() / (count * (count - 1))) if count > 1 else math.nan


@dataclass(frozen=True)
class DiagonalDominance:
    """Diagonal dominance of a factor.

    Attributes:
        dimension: Dimension d of the factor.
        energy_share: See the function ``energy_share``.
        independent_share: See ``independent_share``; 1 for a factor that is diagonal by nature.
        dominant_rows: Share of the rows whose Gershgorin disk does not reach zero; rows of zeros (dead inputs, tokens
            that do not occur) are left out here and in the next.
        radius_ratio: Mean over rows of radius / centre.
        mean_correlation: See the function ``mean_correlation``.
        zero_rows: Number of rows of zeros.
    """

    dimension: int
    energy_share: float
    independent_share: float
    dominant_rows: float
    radius_ratio: float
    mean_correlation: float
    zero_rows: int


def measure_dominance(moment: Tensor, positions: int) -> DiagonalDominance:
    """Measure a second moment (d, d), or the diagonal (d,) of a diagonal one, averaged over ``positions``."""
    moment = moment.double()
    centres, radii = gershgorin_disks(moment)
    alive = centres > 0.0
    ratios = radii[alive] / centres[alive]
    return DiagonalDominance(
        dimension=len(centres),
        energy_share=energy_share(moment),
        independent_share=energy_share(moment) if moment.dim() == 1 else independent_share(centres, positions),
        dominant_rows=(ratios < 1.0).double().mean().item(),
        radius_ratio=ratios.mean().item(),
        mean_correlation=mean_correlation(moment),
        zero_rows=int((~alive).sum()),
    )


def with_noise(moment: Tensor, noise: float) -> tuple[Tensor, float]:
    """Add ``e_ij = e_ji ~ N(0, sigma^2)`` off the diagonal: the matrix stays symmetric and keeps its diagonal.

    The paper takes ``sigma = 1e-3`` for matrices whose diagonals are of order one. Factors are of any size, so here
    ``sigma = noise * mean(diagonal)``.

    Args:
        moment: Shape (d, d).
        noise: Relative size of the noise, at least 0.

    Returns:
        The new matrix and sigma. All calls draw the same noise, scaled by sigma.
    """
    sigma = noise * moment.diagonal().mean().item()
    draws = torch.randn(moment.shape, generator=torch.Generator().manual_seed(_NOISE_SEED), dtype=moment.dtype)
    upper = draws.triu_(1).mul_(sigma)
    return moment + upper + upper.t(), sigma


@dataclass(frozen=True)
class Spectrum:
    """Eigenvalues of a factor, each list falling, shape (d,).

    Attributes:
        eigenvalues: Eigenvalues of the factor.
        noisy: Eigenvalues of ``with_noise``; None for a factor that is diagonal by nature, which gets no noise.
        diagonal: Eigenvalues of the diagonal alone, AdaFisher's approximation.
        sigma: Standard deviation of the noise, in units of the factor.
    """

    eigenvalues: Tensor
    noisy: Tensor | None
    diagonal: Tensor
    sigma: float

    @property
    def kaiser(self) -> float:
        """Kaiser's line: the mean eigenvalue, which is 1 for a correlation matrix."""
        return self.diagonal.mean().item()

    def above(self, values: Tensor) -> int:
        """Number of these eigenvalues above Kaiser's line."""
        return int((values > self.kaiser).sum())

    @property
    def leading_shift(self) -> float:
        """Largest relative change of an eigenvalue above the line under the noise; 0 without noise."""
        kept = self.eigenvalues[: self.above(self.eigenvalues)]
        if self.noisy is None or not len(kept):
            return 0.0
        return ((self.noisy[: len(kept)] - kept).abs() / kept).max().item()


def spectrum_of(moment: Tensor, noise: float) -> Spectrum:
    """Eigenvalues of a second moment (d, d), or of a diagonal one (d,), with and without noise; see the class."""
    moment = moment.double().cpu()
    if moment.dim() == 1:
        falling = moment.sort(descending=True).values
        return Spectrum(falling, None, falling, 0.0)
    noisy, sigma = with_noise(moment, noise)
    eigenvalues, shaken = (torch.linalg.eigvalsh(matrix).flip(0) for matrix in (moment, noisy))
    return Spectrum(eigenvalues, shaken, moment.diagonal().sort(descending=True).values, sigma)


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
