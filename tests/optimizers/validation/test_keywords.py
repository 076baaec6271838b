"""Keywords that an optimizer does not have, which users of others are used to."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from hf_adafisher import AdaFisher, AdaFisherW, SpectralAdaFisher
from hf_adafisher.optimizers.baselines.kfac import KFAC

MODEL = nn.Linear(3, 2)


@pytest.mark.parametrize(
    ("cls", "given", "advice"),
    [
        (AdaFisherW, {"betas": (0.9, 0.999)}, "write beta=betas[0]; its options are model, params, lr, beta, "),
        (AdaFisher, {"betas": (0.9, 0.999)}, "write beta=betas[0]; "),
        (SpectralAdaFisher, {"betas": (0.9, 0.999)}, "write beta=betas[0]; "),
        (KFAC, {"betas": (0.9, 0.999)}, "write momentum=betas[0]; "),
        (AdaFisherW, {"eps": 1e-8}, "write damping=...; "),
        (SpectralAdaFisher, {"eps": 1e-8}, "write relative_damping=...; "),
        (AdaFisherW, {"learning_rate": 1e-3}, "write lr=...; "),
        (AdaFisherW, {"lr": 0.1, "dampin": 0.1}, "write damping=...; "),
        (AdaFisherW, {"zzz": 0.1}, "its options are model, params, lr"),
    ],
)
def test_the_error_names_the_class_and_the_right_option(cls: type[Any], given: dict[str, Any], advice: str) -> None:
    wrong = [*given][-1]
    with pytest.raises(TypeError) as error:
        cls(MODEL, **given)
    assert str(error.value).startswith(f"{cls.__name__} has no option {wrong!r}") and advice in str(error.value)


def test_constructors_of_subclasses_have_their_own_keywords() -> None:
    class Mine(AdaFisherW):
        def __init__(self, model: nn.Module, extra: int = 0, **options: Any) -> None:
            super().__init__(model, **options)
            self.extra = extra

    class Exact(AdaFisherW):
        def __init__(self, model: nn.Module, *, rate: float) -> None:
            super().__init__(model, lr=rate)

    assert Mine(MODEL, extra=3, lr=0.1).extra == 3 and Exact(MODEL, rate=0.1).param_groups[0]["lr"] == 0.1
    with pytest.raises(TypeError, match="Exact has no option 'ratte': write rate="):
        Exact(MODEL, ratte=0.1)  # type: ignore[call-arg]
