"""Factors of every parameter's own gradient, at every step: for rules that divide by the root of its second moment."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hf_adafisher.fisher.averages import statistics_dtype
from hf_adafisher.fisher.diagonals import DiagonalTerm
from hf_adafisher.fisher.gradient import FactorAxes, GradientDiagonal, gradient_factors
from hf_adafisher.fisher.parameter_uses import ParameterUse, estimated_terms
from hf_adafisher.fisher.recorder import FactorRecorder
from hf_adafisher.optimizers.base.statistics import FactorStatistics
from hf_adafisher.optimizers.factory.param_groups import log_roles, roles
from hf_adafisher.optimizers.sharding import full_tensor
from hf_adafisher.optimizers.update import FULL_RMS, LEAST_DAMPING, SMALL_RMS, DirectionSize, damping_terms

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
        self._layouts: dict[int, FactorLayout] = {}
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

    def direction_size(self, p: Tensor) -> DirectionSize:
        """Size of a parameter's direction by the root of its diagonal.

        1 for hidden matrices, embeddings and output layers; 0.2 for everything else: vectors, what reads pixels or is
        added to features as it is (patch embeddings, first convolutions, position tables, class tokens), and what
        belongs to no Linear, Conv1D, convolution or embedding (``in_proj_weight`` of nn.MultiheadAttention, nn.LSTM).
        The factors of a single value never say anything, and it moves by the sign of its momentum.
        """
        return self._layout_of(p).size

    def average_(self, with_gradient: Iterable[tuple[Mapping[str, Any], Tensor, Tensor, Mapping[str, Tensor]]]) -> None:
        """Take the factors of every gradient into the averages of the states, all in a few calls.

        Those of a gradient that is not finite too: its momentum is not finite by then, as under AdamW. Rows and columns
        share factors, so that one such value spoils the whole matrix.

        Args:
            with_gradient: Parameter group, parameter, gradient and state.
        """
        averages: dict[tuple[float, torch.device], tuple[list[Tensor], list[Tensor]]] = {}
        squares: dict[tuple[float, torch.device, torch.dtype], tuple[list[Tensor], list[Tensor]]] = {}
        weights: dict[float, list[Tensor]] = {}
        for group, p, grad, state in with_gradient:
            layout = self._layout_of(p)
            if not layout.weight_key:
                continue
            decay = group["ema_decay"]
            weights.setdefault(decay, []).append(state[layout.weight_key])
            if not layout.keys:
                continue
            if layout.is_square and not layout.sharded:
                values, samples = squares.setdefault((decay, p.device, grad.dtype), ([], []))
                value = state[layout.keys[0]]
                values.append(value)
                samples.append(grad if grad.dim() == value.dim() else grad.reshape(value.shape))
            else:
                values, samples = averages.setdefault((decay, p.device), ([], []))
                for key, factor in zip(layout.keys, _factors(layout, grad), strict=True):
                    values.append(state[key])
                    samples.append(factor)
        for (decay, _, dtype), (values, samples) in squares.items():
            if dtype != values[0].dtype:
                samples = [sample.to(values[0].dtype) for sample in samples]
            torch._foreach_lerp_(values, torch._foreach_mul(samples, samples), 1.0 - decay)
        for (decay, _), (values, samples) in averages.items():
            torch._foreach_lerp_(values, samples, 1.0 - decay)
        for decay, found in weights.items():
            torch._foreach_mul_(found, decay)
            torch._foreach_add_(found, 1.0 - decay)

    def _layout_of(self, p: Tensor) -> FactorLayout:
        """Layout of a parameter's factors, looked up once."""
        layout = self._layouts.get(id(p))
        if layout is None:
            entry = self.entry_of(p)
            rms = SMALL_RMS if self._roles.get(id(p), "input") == "input" else FULL_RMS
            layout = self._layouts[id(p)] = _new_layout(entry.uses, p, entry.sharded, rms)
        return layout

    def terms(self, p: Tensor, state: Mapping[str, Tensor], grad: Tensor) -> list[DiagonalTerm]:
        """None yet: ``damped_terms`` makes those of all parameters together."""
        return []

    def damped_terms(self, members: Sequence[tuple[Tensor, Mapping[str, Tensor], float]]) -> list[list[DiagonalTerm]]:
        """Terms of ``F + max(rho * mean(F), 1e-16)`` of every parameter; none of a single value, without factors.

        Args:
            members: Parameter, state and relative damping rho.
        """
        found: list[list[DiagonalTerm]] = []
        plain: dict[tuple[torch.device, torch.dtype], list[_Averages]] = {}
        for p, state, rho in members:
            layout, terms = self._layout_of(p), list[DiagonalTerm]()
            if not layout.keys:
                terms.append(())
            elif layout.stacked:
                terms += estimated_terms(self.entry_of(p).uses, state, p.shape)
                terms += damping_terms(terms, rho, p.dim())
            else:
                factors = tuple([state[key].view(shape) for key, shape in zip(layout.keys, layout.shapes, strict=True)])
                weight = state[layout.weight_key].item()
                plain.setdefault((p.device, factors[0].dtype), []).append(_Averages(terms, factors, weight, rho))
            found.append(terms)
        for alike in plain.values():
            _damp_(alike)
        return found

    def known_terms(self, p: Tensor, state: Mapping[str, Tensor], normalize: bool = True) -> list[DiagonalTerm]:
        """Terms of the last step, none where there are no factors: of a single value the step uses a constant."""
        return super().known_terms(p, state, normalize) if self.has_factors(p) else []

    def has_factors(self, p: Tensor) -> bool:
        """False for matrices that keep none, and for single values: their own square says nothing about them."""
        return any(use.diagonal.factor_shapes(p.shape) for use in self.entry_of(p).uses)

    def _averaged_terms(self, p: Tensor, state: Mapping[str, Tensor], normalize: bool) -> list[DiagonalTerm]:
        return estimated_terms(self.entry_of(p).uses, state, p.shape)


class FactorLayout(NamedTuple):
    """Factors of a parameter's gradient, and the size of its direction.

    Attributes:
        weight_key: State key of the averages' weight; empty where nothing is layout.
        keys: State keys of the factors, none of a single value.
        axes: Their axes.
        shapes: Their shapes in the diagonal.
        is_square: The one factor is the square of the gradient.
        stacked: There is a mean for every matrix of a stack.
        sharded: FSDP2 has sharded the parameter.
        size: Size of its direction.
    """

    weight_key: str
    keys: tuple[str, ...]
    axes: tuple[FactorAxes, ...]
    shapes: tuple[tuple[int, ...], ...]
    is_square: bool
    stacked: bool
    sharded: bool
    size: DirectionSize


def _new_layout(uses: Sequence[ParameterUse], p: Tensor, sharded: bool, rms: float) -> FactorLayout:
    """Layout of a parameter with these uses, one at most."""
    if not uses:
        return FactorLayout("", (), (), (), False, False, sharded, DirectionSize(rms, True, p.dim() > 1))
    (use,) = uses
    assert isinstance(use.diagonal, GradientDiagonal)  # nothing is tracked
    axes, keys = use.diagonal.axes(p.shape), use.factor_keys(p.shape)
    shapes = tuple(a.spread(p.shape) for a in axes)
    is_square = len(axes) == 1 and math.prod(shapes[0]) == p.numel()
    stacked = any(a.stack for a in axes)
    size = DirectionSize(rms, exact=not axes, bounded=p.dim() > 1)
    return FactorLayout(
        use.weight_key, tuple(keys[a.name] for a in axes), axes, shapes, is_square, stacked, sharded, size
    )


class _Averages(NamedTuple):
    """Factors of one parameter: its terms, to be filled; the running averages in its shape; their weight; rho."""

    terms: list[DiagonalTerm]
    factors: DiagonalTerm
    weight: float
    rho: float


def _damp_(averages: Sequence[_Averages]) -> None:
    """Fill in the terms of parameters with one factor, or one for the rows and one for the columns of one matrix."""
    rows = [average.factors[0] for average in averages]
    means = torch.stack(torch._foreach_norm(rows, 1)) / rows[0].new_tensor([row.numel() for row in rows])
    weights = rows[0].new_tensor([average.weight for average in averages])
    damping = (
        (means / weights * means.new_tensor([average.rho for average in averages])).clamp_min(LEAST_DAMPING).unbind()
    )
    rows = list(torch._foreach_div(rows, [average.weight for average in averages]))
    two = [i for i, average in enumerate(averages) if len(average.factors) == 2]
    scales = means.clamp_min(torch.finfo(means.dtype).tiny).unbind()
    columns = torch._foreach_div([averages[i].factors[1] for i in two], [scales[i] for i in two]) if two else ()
    by_index = dict(zip(two, columns, strict=True))
    for i, (average, row) in enumerate(zip(averages, rows, strict=True)):
        term = (row, by_index[i]) if i in by_index else (row,)
        average.terms[:] = [term, (damping[i].reshape([1] * row.dim()),)]


def _factors(layout: FactorLayout, grad: Any) -> Sequence[Tensor]:
    """The gradient's factors in the order of their keys, whole on every process, also of a gradient in shards."""
    if not layout.sharded:
        return gradient_factors(grad, layout.axes)
    squares = grad.to(statistics_dtype(grad.dtype)).square()
    factors = []
    for axes in layout.axes:
        rest = [axis for axis in range(grad.dim()) if axis not in axes.all]
        count = max(torch.Size(grad.shape[axis] for axis in rest).numel(), 1)
        factors.append(full_tensor(squares.sum(rest) if rest else squares) / count)
    return [factor.reshape(axes.sizes(grad.shape)) for factor, axes in zip(factors, layout.axes, strict=True)]
