"""Factors of every parameter's own gradient, at every step: for rules that divide by the root of its second moment."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_adafisher.fisher.averages import statistics_dtype
from hf_adafisher.fisher.diagonals import DiagonalTerm
from hf_adafisher.fisher.gradient import gradient_estimate
from hf_adafisher.fisher.parameter_uses import estimated_terms
from hf_adafisher.fisher.recorder import FactorRecorder
from hf_adafisher.optimizers.base.statistics import FactorStatistics, FactorUpdate
from hf_adafisher.optimizers.factory.param_groups import log_roles, roles
from hf_adafisher.optimizers.sharding import full_tensor, is_sharded
from hf_adafisher.optimizers.update import LONG_RMS, SHORT_RMS, UPDATE_RMS, DirectionSize

_MATRICES = ("hidden matrix", "input")


class GradientStatistics(FactorStatistics):
    """Row and column means of the squared gradient of matrices, the squared gradient of vectors; no hooks.

    Terms are on the scale of ``grad^2`` (Adafactor's estimate), not normalised. Under FSDP2 rows and columns are summed
    over the shards: a process communicates vectors.

    Args:
        model: The model that the optimizer was given.
        kind: The optimizer's name, for messages.
        hidden_factors: Whether hidden matrices and the first convolution have factors; otherwise they keep none.
    """

    def __init__(self, model: nn.Module, kind: str, hidden_factors: bool) -> None:
        super().__init__(model, kind)
        self._hidden_factors = hidden_factors
        self._logged_roles = False

    def _new_recorder(self) -> FactorRecorder:
        return FactorRecorder(self.model, [])

    def map_parameters(self) -> None:
        """Look everything up in the model again, the roles too."""
        super().map_parameters()
        self._roles = roles(self.model)
        for p in self._params:
            if self._roles.get(id(p)) in _MATRICES and not self._hidden_factors:
                self._entries[id(p)].uses = ()

    def _report_uncovered(self) -> None:
        if not self._logged_roles:
            self._logged_roles = True
            log_roles(self._kind, self.model)

    def is_matrix(self, p: Tensor, heads: bool) -> bool:
        """True for a hidden matrix and the first convolution, and with ``heads`` for the weight of an output layer."""
        return self._roles.get(id(p)) in _MATRICES or (heads and self.is_head(p))

    def is_head(self, p: Tensor) -> bool:
        """True for the weight of an output layer."""
        return self._roles.get(id(p)) in ("head", "table and head")

    def direction_size(self, p: Tensor, known: bool) -> DirectionSize:
        """Largest root mean square of a parameter's direction by the root of its diagonal.

        1 for embeddings and output layers, 0.2 for hidden matrices and vectors, 0.05 for everything else.

        Args:
            p: The parameter.
            known: It has factors. Those of a single value never say anything, and it moves by the sign of its momentum.
        """
        role = self._roles.get(id(p))
        if role in ("table", "head", "table and head"):
            rms = LONG_RMS
        else:
            rms = UPDATE_RMS if p.dim() < 2 or role == "hidden matrix" else SHORT_RMS
        return DirectionSize(rms, exact=not known, bounded=p.dim() > 1)

    def collect(
        self,
        with_gradient: Iterable[tuple[Mapping[str, Any], Tensor, Tensor]],
        state_of: Callable[[Mapping[str, Any], Tensor], Mapping[str, Tensor]],
        states: Mapping[Any, Mapping[str, Tensor]],
    ) -> list[FactorUpdate]:
        """Collect the factors of every gradient; those that are not finite too, as the momentum is not by then."""
        return [
            FactorUpdate(group, p, use, _factors(use.diagonal, grad), True)
            for group, p, grad in with_gradient
            for use in self.entry_of(p).uses
        ]

    def known_terms(self, p: Tensor, state: Mapping[str, Tensor], normalize: bool = True) -> list[DiagonalTerm]:
        """Terms of the last step, none where there are no factors: of a single value the step uses a constant."""
        return super().known_terms(p, state, normalize) if self.has_factors(p) else []

    def has_factors(self, p: Tensor) -> bool:
        """False for matrices that keep none, and for single values: their own square says nothing about them."""
        return any(use.diagonal.factor_shapes(p.shape) for use in self.entry_of(p).uses)

    def _averaged_terms(self, p: Tensor, state: Mapping[str, Tensor], normalize: bool) -> list[DiagonalTerm]:
        return estimated_terms(self.entry_of(p).uses, state, p.shape)

    def _provisional_term(self, p: Tensor, grad: Tensor) -> DiagonalTerm:
        return gradient_estimate(self.entry_of(p).uses[0].diagonal, full_tensor(grad))


def _factors(diagonal: Any, grad: Any) -> dict[str, Tensor]:
    """The gradient's factors, whole on every process, also where FSDP2 has sharded the gradient."""
    if not is_sharded(grad):
        return diagonal.from_gradient(grad)
    squares, factors = grad.to(statistics_dtype(grad.dtype)).square(), {}
    for axes in diagonal.axes(grad.shape):
        rest = [axis for axis in range(grad.dim()) if axis not in axes.all]
        count = max(torch.Size(grad.shape[axis] for axis in rest).numel(), 1)
        factors[axes.name] = full_tensor(squares.sum(rest) if rest else squares) / count
    return factors
