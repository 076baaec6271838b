"""Space of a hyperparameter search around an optimizer's own learning rate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers.hyperparameter_search import ALL_HYPERPARAMETER_SEARCH_BACKENDS
from transformers.trainer_utils import HPSearchBackend

REACH = 10.0
"""The space reaches from a tenth of the learning rate to ten times of it."""


class _WithRates:
    """An Optuna trial that suggests learning rates between other bounds than it is asked for."""

    def __init__(self, trial: Any, low: float, high: float) -> None:
        self._trial, self._bounds = trial, (low, high)

    def suggest_float(self, name: str, low: float, high: float, **options: Any) -> float:
        low, high = self._bounds if name == "learning_rate" else (low, high)
        return self._trial.suggest_float(name, low, high, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._trial, name)


def space_around(rate: float, backend: Callable[[], Any]) -> Callable[[Any], dict[str, Any]]:
    """Return Trainer's default space, with learning rates from a tenth of ``rate`` to ten times of it, logarithmic.

    Args:
        rate: Learning rate in the middle.
        backend: Returns the search's backend, which is known when the space is asked for.
    """
    low, high = rate / REACH, rate * REACH

    def space(trial: Any) -> dict[str, Any]:
        kind = backend()
        default = ALL_HYPERPARAMETER_SEARCH_BACKENDS[kind]().default_hp_space
        if kind == HPSearchBackend.OPTUNA:
            return default(_WithRates(trial, low, high))
        found = default(trial)
        if kind == HPSearchBackend.RAY:
            from ray import tune

            found["learning_rate"] = tune.loguniform(low, high)
        else:
            found["parameters"]["learning_rate"] = {"distribution": "log_uniform_values", "min": low, "max": high}
        return found

    return space
