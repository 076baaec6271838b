"""Training arguments: parsing, defaults, and what is refused or warned about."""

from __future__ import annotations

import dataclasses
import pickle
from pathlib import Path
from typing import Any

import pytest
from transformers import HfArgumentParser, TrainingArguments
from transformers.training_args import OptimizerNames

from hf_adafisher import AdaFisherTrainingArguments, available_optimizers

CPU = {"use_cpu": True, "report_to": "none"}


def parse(tmp_path: Path, *arguments: str) -> AdaFisherTrainingArguments:
    parser = HfArgumentParser(AdaFisherTrainingArguments)
    (parsed,) = parser.parse_args_into_dataclasses(["--output_dir", str(tmp_path), "--use_cpu", "true", *arguments])
    return parsed


@pytest.mark.parametrize("name", [*available_optimizers(), "adamw_torch", "adafactor", "adamw_torch_fused", "rmsprop"])
def test_every_name_parses_and_survives(name: str, tmp_path: Path) -> None:
    arguments = parse(tmp_path, "--optim", name, "--damping", "0.5")
    assert arguments.optim == name
    for copy in (pickle.loads(pickle.dumps(arguments)), dataclasses.replace(arguments, max_steps=3)):
        assert copy.optim == name and copy.damping == 0.5
    assert arguments.to_dict()["optim"] == arguments.to_sanitized_dict()["optim"] == name


def test_a_json_file_is_parsed(tmp_path: Path) -> None:
    parser = HfArgumentParser(AdaFisherTrainingArguments)
    (arguments,) = parser.parse_dict({"output_dir": str(tmp_path), "optim": "adafisher", "update_interval": 3, **CPU})
    assert arguments.optimizer_options()["update_interval"] == 3


@pytest.mark.parametrize(
    ("optim", "expected"),
    [
        ("adafisherw", 0.04),
        ("adafisher", 0.04),
        ("adamw", 5e-5),
        ("adamw_torch", 5e-5),
        (OptimizerNames.ADAFACTOR, 5e-5),
    ],
)
def test_the_default_learning_rate_depends_on_the_optimizer(optim: Any, expected: float, tmp_path: Path) -> None:
    arguments = AdaFisherTrainingArguments(str(tmp_path), optim=optim, **CPU)
    assert arguments.learning_rate == expected
    assert AdaFisherTrainingArguments(str(tmp_path), optim=optim, learning_rate=0.5, **CPU).learning_rate == 0.5


def test_defaults_are_those_of_the_docstring_and_of_training_arguments(tmp_path: Path) -> None:
    ours, theirs = AdaFisherTrainingArguments(str(tmp_path), **CPU), TrainingArguments(str(tmp_path), **CPU)
    assert (ours.beta, ours.damping, ours.ema_decay, ours.update_interval) == (0.9, 3e-3, 0.95, 10)
    changed = {f.name for f in dataclasses.fields(theirs) if getattr(ours, f.name) != getattr(theirs, f.name)}
    assert changed - {"logging_dir"} == {"optim", "learning_rate"}


def test_optim_args_are_read_as_python_values(tmp_path: Path) -> None:
    def options(optim: str, text: str) -> dict[str, Any]:
        return AdaFisherTrainingArguments(str(tmp_path), optim=optim, optim_args=text, **CPU).optimizer_options()

    assert options("sgd", "momentum=0.5, nesterov=true") == {"momentum": 0.5, "nesterov": True}
    assert options("adamw", "betas=(0.8, 0.9)") == {"betas": (0.8, 0.9), "eps": 1e-8}
    assert options("adafisherw", "damping=0.5")["damping"] == 0.5
    for wrong in ("momentum", "momentum=", "0.9", "momentum=f(1)"):
        with pytest.raises(ValueError, match="key=value,key=value"):
            options("sgd", wrong)


def test_adam_settings_reach_adam(tmp_path: Path) -> None:
    arguments = AdaFisherTrainingArguments(str(tmp_path), optim="adam", adam_beta2=0.95, adam_epsilon=1e-6, **CPU)
    assert arguments.optimizer_options() == {"betas": (0.9, 0.95), "eps": 1e-6}


def test_settings_of_another_optimizer_are_pointed_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    AdaFisherTrainingArguments(str(tmp_path), optim="adafisherw", adam_beta1=0.8, **CPU)
    assert "optim=adafisherw does not use adam_beta1" in caplog.text
    caplog.clear()
    AdaFisherTrainingArguments(str(tmp_path), optim="adamw_torch", damping=0.5, update_interval=3, **CPU)
    assert "optim=adamw_torch does not use damping, update_interval" in caplog.text
    AdaFisherTrainingArguments(str(tmp_path), optim="sgd", damping=0.5, adam_beta1=0.8, **CPU)
    assert "optim=sgd does not use damping, adam_beta1" in caplog.text
    caplog.clear()
    AdaFisherTrainingArguments(str(tmp_path), optim="adafisherw", damping=0.5, **CPU)
    AdaFisherTrainingArguments(str(tmp_path), optim="adamw", adam_beta1=0.8, **CPU)
    assert not caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"damping": 0.0}, "damping must be finite and > 0, got 0.0"),
        ({"beta": 1.0}, r"beta must lie in \[0, 1\), got 1.0"),
        ({"update_interval": 0}, "update_interval must be a whole number of steps >= 1, got 0"),
        ({"learning_rate": float("nan")}, "lr must be finite"),
        ({"optim_args": "damping=-1"}, "damping must be finite and > 0, got -1"),
        ({"optim_args": "dampin=1"}, r"no option 'dampin', did you mean 'damping'\?"),
        ({"optim": "sgd", "optim_args": "betas=(0.9, 0.99)"}, "sgd has no option 'betas'.*momentum"),
    ],
)
def test_options_are_checked_before_any_work(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        AdaFisherTrainingArguments(str(tmp_path), **options, **CPU)


def test_unknown_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"unknown optim 'adafsherw', did you mean 'adafisherw'\?; available: .*adamw_torch"
    ):
        AdaFisherTrainingArguments(str(tmp_path), optim="adafsherw", **CPU)


def test_set_optimizer_takes_every_name(tmp_path: Path) -> None:
    arguments = AdaFisherTrainingArguments(str(tmp_path), optim="adamw", **CPU)
    assert arguments.set_optimizer("adafisherw", learning_rate=0.1) is arguments
    assert (arguments.optim, arguments.learning_rate) == ("adafisherw", 0.1)
    assert arguments.set_optimizer("adafactor").optim == "adafactor"
    assert arguments.set_optimizer("adafisher").learning_rate == 0.04
    assert arguments.set_optimizer("adamw").learning_rate == 5e-5
    with pytest.raises(ValueError, match=r"unknown optim 'adafishrw', did you mean 'adafisherw'"):
        arguments.set_optimizer("adafishrw")
    with pytest.raises(ValueError, match="no option 'dampin'"):
        arguments.set_optimizer("adafisherw", args="dampin=3")
