"""Training arguments: parsing, defaults, and what is refused or warned about."""

from __future__ import annotations

import dataclasses
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
from torch import nn
from transformers import HfArgumentParser, TrainingArguments
from transformers.training_args import OptimizerNames

from hf_adafisher import AdaFisherTrainingArguments, available_optimizers, create_optimizer
from hf_adafisher.optimizers.factory.catalog import optimizer_record
from hf_adafisher.training.option_fields import argument_of, options_with_arguments

CPU = {"use_cpu": True, "report_to": "none"}


def parse(tmp_path: Path, *arguments: str) -> AdaFisherTrainingArguments:
    parser = HfArgumentParser(AdaFisherTrainingArguments)
    (parsed,) = parser.parse_args_into_dataclasses(["--output_dir", str(tmp_path), "--use_cpu", "true", *arguments])
    return parsed


@pytest.mark.parametrize("name", [*available_optimizers(), "adamw_torch", "adagrad", "adamw_torch_fused", "rmsprop"])
def test_every_name_parses_and_survives(name: str, tmp_path: Path) -> None:
    arguments = parse(tmp_path, "--optim", name, "--damping", "0.5")
    assert arguments.optim == name
    for copy in (pickle.loads(pickle.dumps(arguments)), dataclasses.replace(arguments, max_steps=3)):
        assert copy.optim == name and copy.adafisher_damping == 0.5
    assert arguments.to_dict()["optim"] == arguments.to_sanitized_dict()["optim"] == name


def test_a_json_file_is_parsed(tmp_path: Path) -> None:
    parser = HfArgumentParser(AdaFisherTrainingArguments)
    given = {"optim": "adafisher", "adafisher_step_size": "paper", "adafisher_update_interval": 3}
    (arguments,) = parser.parse_dict({"output_dir": str(tmp_path), **given, **CPU})
    assert arguments.optimizer_options() == {"step_size": "paper", "update_interval": 3}


@pytest.mark.parametrize(
    ("optim", "expected"),
    [
        ("adafisherw", 0.004),
        ("adafisher", 0.004),
        ("spectral-adafisher", 0.01),
        ("adamw", 5e-5),
        ("adamw_torch", 5e-5),
        (OptimizerNames.RMSPROP, 5e-5),
        ("lamb", 1e-2),
        ("lars", 3.0),
        ("muon", 0.02),
        (OptimizerNames.ADAFACTOR, 1e-2),
        (OptimizerNames.SCHEDULE_FREE_ADAMW, 2.5e-3),
    ],
)
def test_the_default_learning_rate_depends_on_the_optimizer(optim: Any, expected: float, tmp_path: Path) -> None:
    arguments = AdaFisherTrainingArguments(str(tmp_path), optim=optim, **CPU)
    assert arguments.learning_rate == expected
    assert AdaFisherTrainingArguments(str(tmp_path), optim=optim, learning_rate=0.5, **CPU).learning_rate == 0.5


@pytest.mark.parametrize("optim", ["adafisher", "adafisherw"])
def test_each_form_has_its_own_defaults(optim: str, tmp_path: Path) -> None:
    """They belong together: with ``step_size="paper"`` all are the paper's, also where one is given otherwise."""

    def options(**given: Any) -> dict[str, Any]:
        arguments = AdaFisherTrainingArguments(str(tmp_path), optim=optim, **given, **CPU)
        optimizer = create_optimizer(
            optim, nn.Linear(2, 2), lr=arguments.learning_rate, **arguments.optimizer_options()
        )
        group = optimizer.param_groups[0]
        return {name: group[name] for name in ("lr", "damping", "ema_decay", "update_interval", "step_size")}

    root = {"lr": 0.004, "damping": 0.1, "ema_decay": 0.95, "update_interval": 1, "step_size": "root"}
    paper = {"lr": 1e-3, "damping": 1e-3, "ema_decay": 0.8, "update_interval": 100, "step_size": "paper"}
    assert options() == options(step_size="root") == root
    assert options(step_size="paper") == options(optim_args="step_size=paper") == paper
    own = {"learning_rate": 0.3, "damping": 0.5, "ema_decay": 0.6}
    for form, defaults in (("root", root), ("paper", paper)):
        assert options(step_size=form, **own) == {**defaults, "lr": 0.3, "damping": 0.5, "ema_decay": 0.6}
    assert options(step_size="paper", update_interval=7) == {**paper, "update_interval": 7}


def test_an_interval_belongs_to_the_papers_form(tmp_path: Path) -> None:
    """Before there is a model, with what to do."""
    message = "update_interval=10 belongs to step_size='paper': .* Leave update_interval out"
    with pytest.raises(ValueError, match=message):
        AdaFisherTrainingArguments(str(tmp_path), update_interval=10, **CPU)
    with pytest.raises(ValueError, match=message):
        AdaFisherTrainingArguments(str(tmp_path), optim="adafisher", optim_args="update_interval=10", **CPU)
    with pytest.raises(ValueError, match=message):
        AdaFisherTrainingArguments(str(tmp_path), optim="sgd", update_interval=10, **CPU).set_optimizer("adafisherw")
    AdaFisherTrainingArguments(str(tmp_path), update_interval=1, **CPU)


def test_the_help_has_the_defaults_of_both_forms(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        HfArgumentParser(AdaFisherTrainingArguments).parse_args_into_dataclasses(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "in units of its mean (root) (lambda), > 0. Default: 0.1; 0.001 with step_size=paper." in text
    assert "average (gamma), in [0, 1). Default: 0.95; 0.8 with step_size=paper." in text
    assert ">= 1. Default: 1; 100 with step_size=paper." in text and "Default: 0.004 for AdaFisher(W)" in text


def test_defaults_are_those_of_the_docstring_and_of_training_arguments(tmp_path: Path) -> None:
    ours, theirs = AdaFisherTrainingArguments(str(tmp_path), **CPU), TrainingArguments(str(tmp_path), **CPU)
    own = {name for optim in ("adafisherw", "spectral-adafisher") for name in options_with_arguments(optim)}
    assert own == {
        *("beta", "damping", "relative_damping", "ema_decay", "update_interval", "step_size", "momentum_dtype"),
    }
    assert all(getattr(ours, argument_of(name)) is None for name in own) and ours.optimizer_options() == {}
    changed = {f.name for f in dataclasses.fields(theirs) if getattr(ours, f.name) != getattr(theirs, f.name)}
    assert changed - {"logging_dir"} == {"optim", "learning_rate"}


def test_optim_args_are_read_as_python_values(tmp_path: Path) -> None:
    def options(optim: str, text: str) -> dict[str, Any]:
        return AdaFisherTrainingArguments(str(tmp_path), optim=optim, optim_args=text, **CPU).optimizer_options()

    assert options("sgd", "momentum=0.5, nesterov=true") == {"momentum": 0.5, "nesterov": True}
    assert options("adamw", "betas=(0.8, 0.9)") == {"betas": (0.8, 0.9), "eps": 1e-8}
    assert options("adafisherw", "damping=0.5")["damping"] == 0.5
    assert options("muon", "adamw_lr=1e-3, nesterov=false") == {"adamw_lr": 1e-3, "nesterov": False}
    assert options("soap", "betas=(0.9, 0.95)") == {"betas": (0.9, 0.95)}
    # The quotes of a word are easily lost to the shell.
    assert options("adahessian", "hessian_distribution=gaussian") == {"hessian_distribution": "gaussian"}
    assert options("kfac", "kl_clip=none") == {"kl_clip": None}
    for wrong in ("momentum", "momentum=", "0.9", "momentum=f(1)", "momentum=.5,momentum=.7", "**{'momentum': 1}"):
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
    assert "optim=adamw_torch does not use adafisher_damping, adafisher_update_interval" in caplog.text
    AdaFisherTrainingArguments(str(tmp_path), optim="sgd", damping=0.5, adam_beta1=0.8, **CPU)
    assert "optim=sgd does not use adafisher_damping, adam_beta1" in caplog.text
    caplog.clear()
    AdaFisherTrainingArguments(str(tmp_path), optim="adafisherw", damping=0.5, **CPU)
    AdaFisherTrainingArguments(str(tmp_path), optim="adamw", adam_beta1=0.8, **CPU)
    assert not caplog.text
    for name in available_optimizers():
        caplog.clear()
        others = {"lr_scheduler_type": "constant", **CPU}
        AdaFisherTrainingArguments(str(tmp_path), optim=name, adam_beta2=0.8, beta=0.5, **others)
        factored = dict.fromkeys(("adafisher", "adafisherw", "spectral-adafisher"), "adam_beta2")
        ignored = {**factored, "adam": "adafisher_beta", "adamw": "adafisher_beta"}
        assert f"optim={name} does not use {ignored.get(name, 'adafisher_beta, adam_beta2')}: " in caplog.text


def test_spectral_has_a_damping_of_its_own(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Neither optimizer takes the other's for its own, and each gets what belongs to it."""
    spectral = AdaFisherTrainingArguments(str(tmp_path), optim="spectral-adafisher", relative_damping=0.5, **CPU)
    ours = AdaFisherTrainingArguments(str(tmp_path), optim="adafisherw", damping=0.5, **CPU)
    assert not caplog.text
    assert spectral.optimizer_options() == {"relative_damping": 0.5}
    assert ours.optimizer_options() == {"damping": 0.5}
    AdaFisherTrainingArguments(str(tmp_path), optim="spectral-adafisher", damping=0.5, **CPU)
    assert "optim=spectral-adafisher does not use adafisher_damping: these settings have no effect." in caplog.text
    caplog.clear()
    for name in ("adafisher", "adafisherw", "sgd", "adamw_torch"):
        AdaFisherTrainingArguments(str(tmp_path), optim=name, relative_damping=0.5, **CPU)
        assert f"optim={name} does not use adafisher_relative_damping: these settings have no effect." in caplog.text


def test_spectral_options_of_its_own_are_given_as_words(tmp_path: Path) -> None:
    """Beside those that are arguments, but an option has one value."""
    text = "nesterov=false, max_relative_step=none, relative_damping=0.3"
    words = ["--optim", "spectral-adafisher", "--optim_args", text, "--beta", "0.8"]
    options = parse(tmp_path, *words).optimizer_options()
    assert (options["nesterov"], options["max_relative_step"], options["beta"]) == (False, None, 0.8)
    assert options["relative_damping"] == 0.3
    assert parse(tmp_path, *words, "--relative_damping", "0.3").optimizer_options() == options
    with pytest.raises(ValueError, match=r"relative_damping is 0\.2 as an argument and 0\.3 in optim_args"):
        parse(tmp_path, *words, "--relative_damping", "0.2")


def test_kfacs_own_damping_is_pointed_to(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The fields are AdaFisher's, whose defaults are not K-FAC's."""
    AdaFisherTrainingArguments(str(tmp_path), optim="kfac", damping=0.5, ema_decay=0.1, **CPU)
    assert (
        "does not use adafisher_ema_decay, adafisher_damping: these settings have no effect (its own are options: "
        in (caplog.text)
    )
    arguments = AdaFisherTrainingArguments(str(tmp_path), optim="kfac", optim_args="damping=0.5", **CPU)
    assert arguments.optimizer_options() == {"damping": 0.5}


def test_schedule_free_wants_a_constant_schedule(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for schedule in ("constant", "constant_with_warmup"):
        AdaFisherTrainingArguments(str(tmp_path), optim="schedule_free_adamw", lr_scheduler_type=schedule, **CPU)
    AdaFisherTrainingArguments(str(tmp_path), optim="adamw", **CPU)
    assert not caplog.text
    AdaFisherTrainingArguments(str(tmp_path), optim="schedule_free_adamw", **CPU)
    assert "lr_scheduler_type=linear lowers it too: use constant or constant_with_warmup" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"torch_compile": True}, "torch_compile: its graphs have no second derivatives"),
        (
            {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}},
            "reentrant activation checkpointing: .*Set use_reentrant to False",
        ),
        (
            {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"preserve_rng_state": True}},
            "reentrant activation checkpointing",
        ),
    ],
)
def test_what_has_no_second_derivatives_is_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    for name in available_optimizers():
        if optimizer_record(name).create_graph:
            with pytest.raises(ValueError, match=f"optim={name} does not support {message}"):
                AdaFisherTrainingArguments(str(tmp_path), optim=name, **options, **CPU)
        else:
            AdaFisherTrainingArguments(str(tmp_path), optim=name, **options, **CPU)
    for allowed in ({"use_reentrant": False}, {"every_n_layers": 2}, None):
        kept = {"activation_checkpointing": True, "activation_checkpointing_kwargs": allowed}
        AdaFisherTrainingArguments(str(tmp_path), optim="adahessian", **kept, **CPU)


def test_modes_that_take_parameters_apart_are_refused_by_what_needs_them_whole(tmp_path: Path) -> None:
    modes: tuple[tuple[str, str, dict[str, Any]], ...] = (
        ("DeepSpeed", "deepspeed: ", {"deepspeed": {"zero_optimization": {"stage": 2}}}),
        ("FSDP1", "FSDP1: ", {"fsdp": True, "fsdp_config": {"version": 1}}),
        ("FSDP2", "fsdp: ", {"fsdp": True, "fsdp_config": {}}),
        ("fp16", "fp16: ", {"fp16": True}),
    )
    for name in available_optimizers():
        for mode, word, settings in modes:
            arguments = AdaFisherTrainingArguments(str(tmp_path), **CPU)
            for key, value in settings.items():
                setattr(arguments, key, value)
            if mode in optimizer_record(name).refuses:
                with pytest.raises(ValueError, match=f"optim={name} does not support {word}"):
                    arguments.set_optimizer(name)
            else:
                arguments.set_optimizer(name)


def test_a_missing_library_is_known_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    with pytest.raises(ImportError, match=r'lion.*pip install "hf_adafisher\[baselines\]"'):
        AdaFisherTrainingArguments(str(tmp_path), optim="lion", **CPU)


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
        (
            {"optim": "spectral-adafisher", "relative_damping": 0.0},
            "relative_damping must be finite and > 0, got 0.0",
        ),
        ({"optim": "spectral-adafisher", "beta": 1.0}, r"beta must lie in \[0, 1\), got 1.0"),
        (
            {"optim": "spectral-adafisher", "optim_args": "input_exponent=0.5"},
            "spectral-adafisher has no option 'input_exponent'",
        ),
        ({"optim": "spectral-adafisher", "optim_args": "nesterov=1"}, "nesterov must be True or False, got 1"),
        (
            {"optim": "spectral-adafisher", "optim_args": "damping=1"},
            r"spectral-adafisher has no option 'damping', did you mean 'relative_damping'\?",
        ),
        ({"optim": "lars", "optim_args": "vectorlr=1"}, r"no option 'vectorlr', did you mean 'vector_lr'\?.*momentum"),
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


def test_hyphens_and_underscores_in_names_are_the_same(tmp_path: Path) -> None:
    arguments = AdaFisherTrainingArguments(str(tmp_path), optim="spectral_adafisher", **CPU)
    assert (arguments.optim, arguments.learning_rate) == ("spectral-adafisher", 0.01)
    arguments.optim = "schedule-free-adamw"  # as a hyperparameter search does
    assert arguments.optim == arguments.to_dict()["optim"] == "schedule_free_adamw"
    assert arguments.set_optimizer("spectral_adafisher").optim == "spectral-adafisher"
    parsed = HfArgumentParser(AdaFisherTrainingArguments).parse_args_into_dataclasses(
        ["--output_dir", str(tmp_path), "--optim", "spectral_adafisher", "--adafisher_beta", "0.8", "--use_cpu"]
    )[0]
    assert (parsed.optim, parsed.optimizer_options()) == ("spectral-adafisher", {"beta": 0.8})


def test_set_optimizer_takes_every_name(tmp_path: Path) -> None:
    arguments = AdaFisherTrainingArguments(str(tmp_path), optim="adamw", **CPU)
    assert arguments.set_optimizer("adafisherw", learning_rate=0.1) is arguments
    assert (arguments.optim, arguments.learning_rate) == ("adafisherw", 0.1)
    assert arguments.set_optimizer("adafactor").optim == "adafactor"
    assert arguments.set_optimizer("adafisher").learning_rate == 0.004
    assert arguments.set_optimizer("adamw").learning_rate == 5e-5
    with pytest.raises(ValueError, match=r"unknown optim 'adafishrw', did you mean 'adafisherw'"):
        arguments.set_optimizer("adafishrw")
    with pytest.raises(ValueError, match="no option 'dampin'"):
        arguments.set_optimizer("adafisherw", args="dampin=3")
