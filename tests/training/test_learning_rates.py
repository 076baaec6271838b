"""Learning rates: defaults beside other arguments, warnings of far ones, the space of a search."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM
from transformers.trainer_utils import HPSearchBackend

from hf_adafisher import AdaFisherTrainer
from hf_adafisher.optimizers.factory.learning_rates import default_learning_rate, warn_of_learning_rate
from hf_adafisher.training.hyperparameters import space_around
from tests.model_zoo import family
from tests.training.test_option_fields import OtherArguments, OursFirst
from tests.training_helper import make_trainer

RECORD = family("gpt2")


def warnings_of(folder: Path, caplog: pytest.LogCaptureFixture, **options: Any) -> list[str]:
    """What is said when an optimizer is built twice."""
    caplog.clear()
    trainer = make_trainer(folder, RECORD, **options)
    for _ in range(2):
        trainer.create_optimizer()
    return [entry.getMessage() for entry in caplog.records]


@pytest.mark.parametrize(
    ("options", "low", "high"),
    [
        ({"optim": "adafisherw"}, 0.004 / 20, 0.004 * 20),
        ({"optim": "adafisher"}, 0.004 / 20, 0.004 * 20),
        ({"optim": "spectral-adafisher"}, 0.01 / 20, 0.01 * 20),
        ({"optim": "lamb"}, 0.01 / 20, 0.01 * 20),
        ({"optim": "adafisherw", "adafisher_step_size": "paper"}, 1e-3 / 20, 1e-3 * 20),
        ({"optim": "adafisherw", "optim_args": "step_size=paper,damping=0.3"}, 0.3 / 20, 0.3 * 20),
    ],
)
def test_a_learning_rate_far_from_the_usual_ones_is_one_warning(
    options: dict[str, Any], low: float, high: float, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for rate, side in ((low / 1.01, "below"), (high * 1.01, "above"), (0.0, "below")):
        said = warnings_of(tmp_path, caplog, learning_rate=rate, **options)
        assert (
            len(said) == 1 and f"optim={options['optim']} runs with learning_rate={rate}, more than 20 times" in said[0]
        )
        assert f"20 times {side} its usual ones (" in said[0] and said[0].endswith("set learning_rate.")
    for rate in (low * 1.01, (low * high) ** 0.5, high / 1.01):
        assert not warnings_of(tmp_path, caplog, learning_rate=rate, **options)


@pytest.mark.parametrize(
    ("weights", "low", "high"), [("", 0.004 / 20, 0.08), ("some/model", 5e-5 / 20, 1e-3), (None, 5e-5 / 20, 0.08)]
)
def test_usual_rates_are_those_for_the_models_weights(
    weights: str | None, low: float, high: float, caplog: pytest.LogCaptureFixture
) -> None:
    """New ones, pretrained ones, and those of which nothing is known."""
    for rate, far in ((low / 1.01, True), (low * 1.01, False), (high / 1.01, False), (high * 1.01, True)):
        caplog.clear()
        warn_of_learning_rate("adafisherw", {}, rate, weights=weights)
        assert len(caplog.records) == far


def test_the_warning_has_the_usual_rates(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (said,) = warnings_of(tmp_path, caplog, learning_rate=1e-6)
    assert "learning_rate=1e-06" in said and "(0.004 from scratch)" in said
    (said,) = warnings_of(tmp_path, caplog, learning_rate=2e-5, step_size="paper")
    assert "learning_rate=2e-05" in said and "(0.001 the damping)" in said


@pytest.mark.parametrize(("optim", "rate"), [("sgd", 1.0), ("adamw", 3e-3), ("adamw_torch", 1e-7), ("adamw", 1e-7)])
def test_rates_of_optimizers_without_one_of_their_own_are_their_users_affair(
    optim: str, rate: float, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert not warnings_of(tmp_path, caplog, optim=optim, learning_rate=rate)


@pytest.mark.parametrize("arguments", [OtherArguments, OursFirst])
def test_the_default_of_other_arguments_is_usual(
    arguments: type[Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """DPO's 1e-6 is a rate for AdamW, and so for AdaFisherW, with or without the package's arguments."""
    for rate, far in ((1e-6, False), (1e-6 / 19, False), (1e-6 / 21, True)):
        said = warnings_of(tmp_path, caplog, kind=AdaFisherTrainer, arguments=arguments, learning_rate=rate)
        assert any("more than 20 times below its usual ones (1e-06 by these" in text for text in said) == far
        assert len(said) == far + (arguments is OtherArguments)


def test_defaults_follow_those_of_other_arguments() -> None:
    assert default_learning_rate("adafisherw") == 0.004 and default_learning_rate("adamw_torch") == 5e-5
    assert default_learning_rate("adafisherw", {}, 1e-6) == 1e-6 == default_learning_rate("adamw_torch", {}, 1e-6)
    assert default_learning_rate("spectral-adafisher", {}, 1e-6) == 3e-6
    assert default_learning_rate("adafisherw", {"step_size": "paper"}, 1e-6) == 1e-3
    assert default_learning_rate("lamb", {}, 1e-6) == 0.01 and default_learning_rate("sgd", {}, 1e-6) == 1e-6


@pytest.mark.parametrize("given", [{"max_grad_norm": 0.0}, {"max_grad_norm": None}])
def test_the_papers_form_without_clipping_is_one_warning(
    given: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for optim in ("adafisher", "adafisherw"):
        said = warnings_of(tmp_path, caplog, optim=optim, step_size="paper", **given)
        assert (
            len(said) == 1 and f"max_grad_norm={given['max_grad_norm']}" in said[0] and "set max_grad_norm" in said[0]
        )
        assert not warnings_of(tmp_path, caplog, optim=optim, step_size="paper", max_grad_norm=0.5)
        assert not warnings_of(tmp_path, caplog, optim=optim, **given)
    assert not warnings_of(tmp_path, caplog, optim="adamw_torch", **given)


@pytest.mark.parametrize("pretrained", [False, True])
@pytest.mark.parametrize(
    ("options", "scratch", "tuning"),
    [
        ({}, 0.004, 5e-5),
        ({"optim": "spectral-adafisher"}, 0.01, 1.5e-4),
        ({"step_size": "paper", "damping": 0.01}, 0.01, 0.01),
        ({"arguments": OursFirst}, 1e-6, 1e-6),
        ({"optim": "adamw"}, None, None),
    ],
)
def test_a_search_without_a_space_goes_around_the_optimizers_own_rate(
    pretrained: bool,
    options: dict[str, Any],
    scratch: float | None,
    tuning: float | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Trainer's default space ends at 1e-4. All else of it stays."""
    optuna = pytest.importorskip("optuna")
    RECORD.build().save_pretrained(tmp_path / "weights")
    start = AutoModelForCausalLM.from_pretrained if pretrained else lambda _: RECORD.build()
    trainer = make_trainer(
        tmp_path, RECORD, kind=AdaFisherTrainer, model_init=lambda: start(tmp_path / "weights"), **options
    )
    asked: dict[str, tuple[Any, ...]] = {}
    found: list[dict[str, Any]] = []
    fixed = {"num_train_epochs": 2, "seed": 3, "per_device_train_batch_size": 4}

    class Trial(optuna.trial.FixedTrial):
        def suggest_float(self, name: str, low: float, high: float, **more: Any) -> float:
            asked[name] = (low, high, more)
            return low

    def run(self: Any, trainer: Any, *args: Any, **kwargs: Any) -> None:
        found.append(trainer.hp_space(Trial(fixed)))

    monkeypatch.setattr("transformers.hyperparameter_search.OptunaBackend.run", run)
    trainer.hyperparameter_search(backend="optuna", n_trials=1)
    rate = tuning if pretrained else scratch
    low, high = (1e-6, 1e-4) if rate is None else (rate / 10, rate * 10)
    assert asked == {"learning_rate": (pytest.approx(low), pytest.approx(high), {"log": True})}
    assert found == [{"learning_rate": pytest.approx(low), **fixed}]
    given = object()
    monkeypatch.setattr("transformers.hyperparameter_search.OptunaBackend.run", lambda self, *args, **kwargs: None)
    trainer.hyperparameter_search(given, backend="optuna")
    assert trainer.hp_space is given


def test_the_space_of_other_backends_has_the_same_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = {"parameters": {"learning_rate": {"min": 1e-6, "max": 1e-4}, "seed": {"min": 1}}, "method": "random"}
    monkeypatch.setattr("transformers.hyperparameter_search.WandbBackend.default_hp_space", lambda self, trial: kept)
    found = space_around(0.02, lambda: HPSearchBackend.WANDB)(None)
    bounds = {"distribution": "log_uniform_values", "min": pytest.approx(0.002), "max": pytest.approx(0.2)}
    assert found == {"parameters": {"learning_rate": bounds, "seed": {"min": 1}}, "method": "random"}
    pytest.importorskip("ray.tune")
    rates = space_around(0.02, lambda: HPSearchBackend.RAY)(None)["learning_rate"]
    assert (rates.lower, rates.upper) == (pytest.approx(0.002), pytest.approx(0.2))
