"""Moving average of exact diagonals, over the same examples and steps as AdaFisher's factors."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_adafisher.experiments.fisher_accuracy.exact_fisher import exact_fisher
from hf_adafisher.fisher.averages import MovingAverage

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
