"""Uses of parameters by modules, and the factors that each use keeps in the optimizer's state."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_adafisher.fisher.averages import MovingAverage, statistics_dtype
from hf_adafisher.fisher.diagonals import DiagonalTerm, ParameterDiagonal
from hf_adafisher.fisher.gradient import gradient_diagonal, on_gradient_scale
from hf_adafisher.fisher.tracked_module import TrackedModule


@dataclass(frozen=True)
class ParameterUse:
    """One use of a parameter: by a tracked module, or by no rule at all (``tracked`` is None: gradient factors).

    Attributes:
        diagonal: How factors become the parameter's diagonal.
        tracked: The module whose statistics feed the factors.
        suffix: Ending of this use's state keys: empty for the first use, ``_1`` for the second.
    """

    diagonal: ParameterDiagonal
    tracked: TrackedModule | None
    suffix: str = ""

    def factor_keys(self, shape: torch.Size) -> dict[str, str]:
        """State key of each factor by the factor's name."""
        return {name: name + self.suffix for name in self.diagonal.factor_shapes(shape)}

    @property
    def weight_key(self) -> str:
        """State key of the moving average's weight."""
        return "factor_weight" + self.suffix

    def new_state(self, param: Tensor) -> dict[str, Tensor]:
        """Empty factors of this use; statistics are float32 whatever the model's dtype (float64 for float64)."""
        dtype, keys = statistics_dtype(param.dtype), self.factor_keys(param.shape)
        shapes = self.diagonal.factor_shapes(param.shape)
        state = {key: torch.zeros(shapes[name], dtype=dtype, device=param.device) for name, key in keys.items()}
        return {**state, self.weight_key: torch.zeros((), dtype=torch.float64, device="cpu")}

    def average(self, state: Mapping[str, Tensor], shape: torch.Size) -> MovingAverage:
        """The moving average over this use's tensors in ``state``."""
        return MovingAverage([state[key] for key in self.factor_keys(shape).values()], state[self.weight_key])

    def reset_(self, state: Mapping[str, Tensor], shape: torch.Size) -> None:
        """Forget what was averaged so far."""
        for key in (*self.factor_keys(shape).values(), self.weight_key):
            state[key].zero_()

    def update_(
        self, state: Mapping[str, Tensor], factors: Mapping[str, Tensor], shape: torch.Size, decay: float
    ) -> None:
        """Take in the factors of one refresh."""
        self.average(state, shape).update_([factors[name] for name in self.diagonal.factor_shapes(shape)], decay)


ON_GRADIENT = "on_gradient"
"""State key: 1 while a parameter that has a rule lives on gradient factors, since its modules recorded nothing."""


def new_state(uses: Sequence[ParameterUse], param: Tensor) -> dict[str, Tensor]:
    """Empty factors of all uses of a parameter; the keys depend on the model alone, never on the data."""
    state: dict[str, Tensor] = {}
    for use in uses:
        state.update(use.new_state(param))
    if uses and uses[0].tracked is not None:
        state[ON_GRADIENT] = torch.zeros((), device="cpu")
    return state


def find_parameter_uses(
    params: Iterable[nn.Parameter], tracked: Sequence[TrackedModule], owners: Mapping[int, tuple[nn.Module, str]]
) -> dict[int, tuple[ParameterUse, ...]]:
    """All uses of each parameter by ``id(parameter)``; a parameter that no tracked module owns has a gradient use.

    Args:
        params: The parameters.
        tracked: The modules that may use them.
        owners: The module and the name in it of every parameter of the model, by ``id(parameter)``.
    """
    users: dict[int, list[tuple[ParameterDiagonal, TrackedModule]]] = {}
    for module in tracked:
        for name, diagonal in module.diagonals.items():
            users.setdefault(id(getattr(module.module, name)), []).append((diagonal, module))
    uses = {}
    for p in params:
        found: Sequence[tuple[ParameterDiagonal, TrackedModule | None]] = users.get(id(p), ())
        found = found or [(gradient_diagonal(*owners.get(id(p), (None, ""))), None)]
        uses[id(p)] = tuple(
            ParameterUse(diagonal, module, f"_{i}" if i else "") for i, (diagonal, module) in enumerate(found)
        )
    return uses


def terms_of(
    uses: Sequence[ParameterUse], state: Mapping[str, Tensor], shape: torch.Size, normalize: bool = True
) -> list[DiagonalTerm]:
    """The spread factors of every use that has statistics; empty while none has."""
    terms = []
    for use in uses:
        average = use.average(state, shape)
        if not average.is_empty:
            factors = dict(zip(use.diagonal.factor_shapes(shape), average.mean(), strict=True))
            terms.append(use.diagonal.expand(factors, shape, normalize))
    return terms


def needs_gradient_factors(uses: Sequence[ParameterUse], state: Mapping[str, Tensor], shape: torch.Size) -> bool:
    """True where a parameter whose modules recorded nothing at a refresh takes the factors of its gradient."""
    if not uses:  # it moves without factors
        return False
    if uses[0].tracked is None or state[ON_GRADIENT].item():
        return True
    return all(use.average(state, shape).is_empty for use in uses)


def estimated_terms(uses: Sequence[ParameterUse], state: Mapping[str, Tensor], shape: torch.Size) -> list[DiagonalTerm]:
    """Terms of gradient factors, which multiply to an estimate of ``grad^2``."""
    return [on_gradient_scale(term) for term in terms_of(uses, state, shape, normalize=False)]
