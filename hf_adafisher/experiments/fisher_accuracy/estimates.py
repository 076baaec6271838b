"""Statistics of K-FAC and Adam and the average of exact diagonals, collected during a run without changing it."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_adafisher.experiments.fisher_accuracy.exact_fisher import count_terms, exact_fisher
from hf_adafisher.fisher.averages import MovingAverage, statistics_dtype
from hf_adafisher.fisher.diagonals import OUTPUT_GRAD
from hf_adafisher.fisher.recorder import FactorRecorder
from hf_adafisher.optimizers.baselines.kfac_blocks import (
    COLUMN_INVERSE,
    ROW_INVERSE,
    KroneckerBlock,
    find_blocks,
    moment_rules,
)

logger = logging.getLogger(__name__)


class ExactAverage:
    """Moving average of the exact empirical diagonals of mini-batches, each at the weights that saw it.

    Fed with the mini-batches of the steps on which AdaFisher refreshes its factors, and with its decay, it differs from
    ``S (x) H`` by the Kronecker form alone: both have the same examples, at the same weights, with the same weight in
    the average. Two more differences are small or absent for most models: these gradients are those of the model in
    evaluation mode, so without dropout, and with BatchNorm's running statistics, which early in training are far from a
    batch's.

    A copy of the model does the work; the model, its gradients and the generators of random numbers stay as they are.

    Args:
        model: Model that is trained, without hooks of others yet.
        decay: Decay of the average, in [0, 1).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self._copy = copy.deepcopy(model)
        self._ids = {name: id(p) for name, p in model.named_parameters()}
        self._batches: list[dict[str, Tensor]] = []
        self._averages: dict[int, MovingAverage] = {}
        self._one_by_one = False
        self._given_up = False

    @torch.no_grad()
    def add(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Keep a micro-batch that the model is about to see, and at a step's first one the weights.

        Labels that are no class numbers (smoothed, mixed) have no exact diagonal: the first of them ends the average,
        with a warning.
        """
        labels = kwargs.get("labels")
        if args or not isinstance(labels, Tensor) or labels.is_floating_point():
            if not self._given_up:
                logger.warning(
                    "no class numbers come with the model's inputs: the average of exact diagonals is left out"
                )
            self._given_up = True
        if self._given_up:
            return
        assert isinstance(labels, Tensor)
        if not self._batches:
            self._copy.load_state_dict(model.state_dict())
        rows = {key: value for key, value in kwargs.items() if isinstance(value, Tensor) and value.dim() > 0}
        self._batches.append({key: value for key, value in rows.items() if len(value) == len(labels)})

    def discard(self) -> None:
        """Drop the micro-batches of a step that does not count."""
        self._batches = []

    def refresh(self) -> None:
        """Average the step's micro-batches in, each term of its loss with the same weight."""
        batches, self._batches = self._batches, []
        if self._given_up or not batches:
            return
        found = exact_fisher(self._copy, batches, one_by_one=self._one_by_one)
        self._one_by_one = found.looped  # one warning is enough
        for name, diagonal in found.diagonals.items():
            key = self._ids[name]
            if key not in self._averages:
                self._averages[key] = MovingAverage([torch.zeros_like(diagonal)], torch.zeros((), dtype=torch.float64))
            self._averages[key].update_([diagonal], self.decay)

    def diagonals(self) -> dict[int, Tensor]:
        """Bias-corrected averages by ``id(parameter)``, of one term of the loss; empty where there is none."""
        return {} if self._given_up else {key: average.mean()[0] for key, average in self._averages.items()}


class KroneckerFactors:
    """Full factors ``A`` and ``G`` of K-FAC's blocks, averaged as K-FAC does, over the steps that are recorded.

    ``A`` and ``G`` are in the unit of one term of the loss, as ``hf_adafisher.optimizers.baselines.kfac.KFAC`` has
    them. Their diagonals are AdaFisher's factors: the diagonal of ``A (x) G``, before any inversion, is ``S (x) H``
    without normalisation times the positions of a layer that serve one term. ``diagonals`` shows the part that is
    K-FAC's alone: it inverts the damped factors as matrices, and divides a single value by one over the diagonal of

        ``(A + pi sqrt(damping) I)^-1 (x) (G + sqrt(damping) / pi I)^-1``

    with ``pi`` as in ``kfac_inverse.split_damping``. Its ranks depend on the damping, without which factors of few
    examples have no inverse. The diagonal of ``A (x) G``, without damping and inversion, has the ranks of ``S (x) H``
    within a layer.

    Args:
        model: Model whose layers get hooks.
        decay: Decay of the moving average, in [0, 1).
        max_factor_dim: Longest side with a full factor; of others the diagonal is kept.
    """

    def __init__(self, model: nn.Module, decay: float, max_factor_dim: int = 2048) -> None:
        params = [p for p in model.parameters() if p.requires_grad]
        rules = moment_rules(model, params, max_factor_dim)
        self.decay = decay
        self.recorder = FactorRecorder(model, params, lambda module: rules.get(id(module)))
        self.blocks = find_blocks(self.recorder.tracked)
        self.states = [_empty_state(block) for block in self.blocks]

    def arm(self, due: bool) -> None:
        """Turn recording of the next step on or off."""
        if due:
            self.recorder.arm()
        else:
            self.recorder.disarm()

    def refresh(self, terms: int) -> bool:
        """Average a step's statistics in, unless they are not finite.

        Args:
            terms: Number of terms in the mean that the loss is.

        Returns:
            False for statistics that are not finite.
        """
        sample = self.recorder.flush()
        if sample.non_finite:
            return False
        for block, state in zip(self.blocks, self.states, strict=True):
            for use in block.uses:
                if use.tracked in sample.factors:
                    means = dict(sample.factors[use.tracked])
                    means[OUTPUT_GRAD] = means[OUTPUT_GRAD] * float(terms) ** 2  # gradients of a term's own loss
                    use.update_(state, means, sample.counts[use.tracked] / terms, self.decay)
        return True

    def diagonals(self, damping: float) -> dict[int, Tensor]:
        """K-FAC's divisor of each value, by ``id(parameter)``, for weights and the biases in their blocks."""
        found: dict[int, Tensor] = {}
        for block, state in zip(self.blocks, self.states, strict=True):
            if block.has_statistics(state):
                block.invert_(state, damping, "a block")
                found |= _split(block, _outer(state[ROW_INVERSE], state[COLUMN_INVERSE]).reciprocal())
        return found

    def products(self) -> dict[int, Tensor]:
        """Diagonal of ``A (x) G`` itself, by ``id(parameter)``: ``S (x) H`` for one term of the loss."""
        found: dict[int, Tensor] = {}
        for block, state in zip(self.blocks, self.states, strict=True):
            if block.has_statistics(state):
                found |= _split(block, _outer(*block.factors(state)))
        return found


def _empty_state(block: KroneckerBlock) -> dict[str, Tensor]:
    dtype, device = statistics_dtype(block.weight.dtype), block.weight.device
    return {
        key: torch.zeros(shape, dtype=dtype, device=device) if shape else torch.zeros((), dtype=torch.float64)
        for key, shape in block.state_shapes().items()
    }


def _outer(rows: Tensor, columns: Tensor) -> Tensor:
    """Diagonal of a Kronecker product as a matrix, from two factors or their diagonals."""
    left, right = (side.diagonal() if side.dim() == 2 else side for side in (rows, columns))
    return torch.outer(left, right)


def _split(block: KroneckerBlock, matrix: Tensor) -> dict[int, Tensor]:
    """Split a matrix of a block's values into those of its weight and, if the block has it, its bias."""
    if block.bias is None:
        return {id(block.weight): matrix.reshape(block.weight.shape)}
    axis = block.uses[0].input_axis
    weight, bias = matrix.split([matrix.shape[axis] - 1, 1], dim=axis)
    return {id(block.weight): weight.reshape(block.weight.shape), id(block.bias): bias.reshape(block.bias.shape)}


class SecondMoments:
    """Adam's moving average of squared gradients, over the gradients of a run of another optimizer.

    They are the gradients that this optimizer gets: clipped, if the run clips.

    Args:
        beta2: Decay of the average, in [0, 1).
    """

    def __init__(self, beta2: float) -> None:
        self.beta2 = beta2
        self._averages: dict[int, MovingAverage] = {}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Average the present gradients of the model's parameters in."""
        for p in model.parameters():
            if p.grad is not None:
                square = p.grad.to(statistics_dtype(p.dtype)).square()
                if id(p) not in self._averages:
                    self._averages[id(p)] = MovingAverage(
                        [torch.zeros_like(square)], torch.zeros((), dtype=torch.float64)
                    )
                self._averages[id(p)].update_([square], self.beta2)

    def moments(self) -> dict[int, Tensor]:
        """Bias-corrected second moments, ``v / (1 - beta2^t)``, by ``id(parameter)``."""
        return {key: average.mean()[0] for key, average in self._averages.items()}


class RunObserver:
    """Collects both during a run of AdaFisher(W), with controls for the steps and decays that they average over.

    AdaFisher's factors and K-FAC's are averages over the steps on which AdaFisher refreshes, with its decay; Adam's
    second moment is one over all steps, with its own. The controls average over AdaFisher's steps with its decay too.

    Use ``after_step`` as the function of a ``StepCallback`` for every step, and ``close`` when training has ended.

    Args:
        model: Model that is trained.
        ema_decay: AdaFisher's decay, for the factors too.
        beta2: Decay of the second moment.
        max_factor_dim: See ``KroneckerFactors``.

    Attributes:
        factors: Factors of K-FAC.
        moments: Second moments of Adam, over all steps.
        window_moments: Squared gradients, averaged as AdaFisher averages its factors.
        window: Exact diagonals of the same mini-batches, averaged in the same way.
        terms: Number of terms of the present step's loss so far.
        last_terms: Number of terms of the loss of the last step that was due.
        last_scale: AdaFisher's ``gradient_scale`` in that step.
    """

    def __init__(self, model: nn.Module, ema_decay: float, beta2: float, max_factor_dim: int) -> None:
        self.window = ExactAverage(model, ema_decay)  # copies the model, so before there are hooks on it
        self.factors = KroneckerFactors(model, ema_decay, max_factor_dim)
        self.moments, self.window_moments = SecondMoments(beta2), SecondMoments(ema_decay)
        self.last_terms, self.last_scale = 0, 1.0
        self.terms = 0
        self._due = True
        self._handle = model.register_forward_pre_hook(self._count, with_kwargs=True)
        self.factors.arm(True)

    def _count(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if module.training and torch.is_grad_enabled():
            if self._due:
                self.window.add(module, args, kwargs)
            labels = kwargs.get("labels")
            if labels is None or labels.is_floating_point():  # smoothed or mixed: those of images
                self.terms += len(next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)))
            else:
                self.terms += count_terms(labels)

    def after_step(self, step: int, model: nn.Module, optimizer: Any) -> None:
        """Average the step's gradients in, and its factors if it was due; then follow the optimizer's schedule."""
        self.moments.update(model)
        if self._due and self.factors.refresh(self.terms):
            self.window_moments.update(model)
            self.window.refresh()
            self.last_terms, self.last_scale = self.terms, optimizer.gradient_scale
        self.window.discard()
        self.terms, self._due = 0, optimizer.refresh_due
        self.factors.arm(self._due)

    def close(self) -> None:
        """Remove every hook."""
        self._handle.remove()
        self.factors.recorder.close()
