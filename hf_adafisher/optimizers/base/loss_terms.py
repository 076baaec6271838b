"""Number of terms of the loss, for optimizers that need the size of the batch's gradient."""

from __future__ import annotations

import math


class CountsLossTerms:
    """For optimizers that need the size of the batch's gradient, not only the shape of its statistics."""

    gradient_scale: float
    _loss_terms: float | None = None

    @property
    def loss_terms(self) -> float:
        """Number of terms that the loss of the coming step is the mean of, over all micro-batches and processes.

        Where ``gradient_scale`` is set to what each term's own loss is multiplied by (1 / number of terms, times the
        scale of a loss scaler), statistics are those of one term's loss, and this number tells what the batch's are.
        Default: ``1 / gradient_scale``, and at least 1. A loss scaler hides the number of terms: set both, as
        AdaFisherTrainer does.

        Left alone, a mean loss is taken as a single term, and its statistics are those of the mean.

        Raises:
            ValueError: On setting a value that is not finite and > 0; None gives the default back.
        """
        return max(1.0, 1.0 / self.gradient_scale) if self._loss_terms is None else self._loss_terms

    @loss_terms.setter
    def loss_terms(self, value: float | None) -> None:
        if value is not None and not (math.isfinite(value) and value > 0.0):
            raise ValueError(f"loss_terms must be finite and > 0, or None, got {value}")
        self._loss_terms = None if value is None else float(value)
