"""Public view of a parameter that an optimizer with factors trains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hf_adafisher.fisher.diagonals import DiagonalTerm
from hf_adafisher.fisher.parameter_uses import ON_GRADIENT, ParameterUse


@dataclass(frozen=True)
class TrainedParameter:
    """One parameter as its optimizer sees it; what is in it is not to be changed.

    Attributes:
        name: Name in the model.
        param: The parameter.
        group: Its parameter group.
        state: Its state, empty before its first step.
        uses: Its uses by modules, at least one; none where it moves without factors.
        terms: Terms of its diagonal as the last step used them, none before its first step.
        provisional: Whether these are of the last step's gradient alone, since there are no averages yet.
    """

    name: str
    param: Tensor
    group: Mapping[str, Any]
    state: Mapping[str, Tensor]
    uses: Sequence[ParameterUse]
    terms: Sequence[DiagonalTerm]
    provisional: bool = False

    @property
    def on_gradient_factors(self) -> bool:
        """True where its factors are those of its gradient: no rule reaches it, or its layers recorded nothing."""
        if not self.uses:
            return False
        return self.provisional or self.uses[0].tracked is None or bool(self.state and self.state[ON_GRADIENT].item())
