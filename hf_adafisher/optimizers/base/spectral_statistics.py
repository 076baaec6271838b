"""Factors of SpectralAdaFisher: on the scale of the batch's gradient, and the whitening of hidden matrices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_adafisher.fisher.diagonals import OUTPUT_GRAD, DiagonalTerm
from hf_adafisher.fisher.gradient import gradient_estimate, rows_in_use
from hf_adafisher.fisher.parameter_uses import estimated_terms
from hf_adafisher.optimizers.base.statistics import FactorStatistics
from hf_adafisher.optimizers.diagnostics.diagonal_numbers import mean_of_terms
from hf_adafisher.optimizers.factory.param_groups import head_matrices, hidden_matrices, log_roles
from hf_adafisher.optimizers.sharding import full_tensor


class SpectralStatistics(FactorStatistics):
    """Factors whose product estimates the second moment of the batch's gradient, ``sum_n g_n^2 x_n^2``.

    ``H`` is a mean over the ``N`` positions of a refresh as elsewhere, ``S`` the *sum* over them, so that ``S (x) H``
    is ``N`` times the product of the means. ``g`` is the gradient of the loss that is descended.

    Attributes:
        loss_terms: How many terms the loss is the mean of, where ``gradient_scale`` takes factors as if it were one of
            them; 1 where it does not.
    """

    def __init__(self, model: nn.Module, kind: str) -> None:
        super().__init__(model, kind)
        self.loss_terms = 1.0
        self._logged_roles = False

    def map_parameters(self) -> None:
        """Look everything up in the model again, the hidden matrices too."""
        super().map_parameters()
        self._transposed = {id(weight): transposed for weight, transposed in hidden_matrices(self.model)}
        self._heads = {id(weight): transposed for weight, transposed in head_matrices(self.model)}
        self._whitenings: dict[Any, tuple[Tensor, Tensor]] = {}

    def _report_uncovered(self) -> None:
        super()._report_uncovered()
        if not self._logged_roles:
            self._logged_roles = True
            log_roles(self._kind, self.model)

    def is_matrix(self, p: Tensor, heads: bool) -> bool:
        """True for a hidden matrix, and with ``heads`` for the weight of an output layer."""
        return id(p) in self._transposed or (heads and self.is_head(p))

    def is_head(self, p: Tensor) -> bool:
        """True for the weight of an output layer."""
        return id(p) in self._heads

    def mean_of(self, terms: Sequence[DiagonalTerm]) -> float:
        """Mean of the diagonal that these terms make."""
        return mean_of_terms(terms)

    def forget(self) -> None:
        """Forget every cached term, and what was made of it."""
        super().forget()
        self._whitenings.clear()

    def _recorded(self, factors: dict[str, Tensor], positions: float) -> dict[str, Tensor]:
        return {**factors, OUTPUT_GRAD: factors[OUTPUT_GRAD] * (positions / self.loss_terms**2)}

    def _shared(self, factors: dict[str, Tensor]) -> dict[str, Tensor]:
        # The positions are the rows, and the gradient is the batch's already.
        return {**factors, OUTPUT_GRAD: factors[OUTPUT_GRAD] * rows_in_use(factors)}

    def _averaged_terms(self, p: Tensor, state: Mapping[str, Tensor], normalize: bool) -> list[DiagonalTerm]:
        return estimated_terms(self.entry_of(p).uses, state, p.shape)

    def _provisional_term(self, p: Tensor, grad: Tensor) -> DiagonalTerm:
        return gradient_estimate(self.entry_of(p).uses[0].diagonal, full_tensor(grad))

    def whitening(self, p: Tensor, terms: Sequence[DiagonalTerm], group: Mapping[str, float]) -> tuple[Tensor, Tensor]:
        """``a (rows, 1)`` and ``b (1, columns)`` that whiten a hidden matrix, and lead back; kept with the terms.

        They are ``(S / mean(S) + rho)^-e`` and the same of ``H``.

        Several uses of one weight add up to the means of their diagonal along either side.

        Args:
            p: A hidden matrix, or a convolution's weight, whose columns are ``(in, *kernel)``.
            terms: Of ``terms``.
            group: Its parameter group.
        """
        exponents, rho = (group["output_exponent"], group["input_exponent"]), group["relative_damping"]
        key = id(p), exponents, rho
        if key in self._whitenings and not self.entry_of(p).provisional:
            return self._whitenings[key]
        sides = [(term[0].flatten(), term[1].flatten()) for term in terms]
        rows = sum((left * right.mean() for left, right in sides), start=torch.zeros_like(sides[0][0]))
        columns = sum((right * left.mean() for left, right in sides), start=torch.zeros_like(sides[0][1]))
        if self._transposed.get(id(p), self._heads.get(id(p), False)):  # stored as (inputs, outputs)
            exponents = exponents[::-1]
        found = _power(rows, rho, exponents[0])[:, None], _power(columns, rho, exponents[1])[None]
        self._whitenings[key] = found
        return found


def _power(factor: Tensor, rho: float, exponent: float) -> Tensor:
    """``(v / mean(v) + rho)^-exponent``; a factor of zeros carries no shape and gives a constant."""
    mean = factor.mean()
    relative = torch.where(mean > 0, factor / mean, torch.ones_like(factor))
    return relative.add_(rho).pow_(-exponent)
