"""Option dataclasses: everything that names an option, its default or its range takes it from there."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import HfArgumentParser

from hf_adafisher import AdaFisherTrainingArguments, AdaFisherW, available_optimizers, create_optimizer
from hf_adafisher.optimizers.base.options import (
    BETA,
    Count,
    Flag,
    FloatingDtype,
    OneOf,
    OptimizerOptions,
    Size,
    UnitInterval,
    option,
    options_in_use,
)
from hf_adafisher.optimizers.factory.catalog import optimizer_record
from hf_adafisher.optimizers.factory.optimizer_table import as_json, as_text
from hf_adafisher.training.option_fields import OptionArguments, argument_of, options_with_arguments
from tests.cases import mlp

CPU: dict[str, Any] = {"use_cpu": True, "report_to": "none"}
OWN = [name for name in available_optimizers() if optimizer_record(name).options_class is not None]
WRONG: dict[type, list[Any]] = {
    Size: [-1.0, math.nan, math.inf, "a lot", True],
    UnitInterval: [-0.1, 1.5, math.nan, "0.5"],
    Count: [0, 1.5, True, "3"],
    Flag: [1, "yes", None],
    FloatingDtype: ["int32", "float8_e4m3fn", "half precision", 16],
    OneOf: ["cube", 1, None],
}


def options_of(name: str) -> type[OptimizerOptions]:
    """The option dataclass of an optimizer by name."""
    found = optimizer_record(name).options_class
    assert found is not None
    return found


def defaults_of(name: str, **given: Any) -> dict[str, Any]:
    """The options of the class, where some are given."""
    options = options_of(name)(**given)
    return {option: getattr(options, option) for option in options.specifications()}


def another_value(name: str, option: str) -> Any:
    """A value in the option's range that is not its default; intervals stay multiples of each other."""
    default, allowed = defaults_of(name)[option], options_of(name).specifications()[option].range
    kind = type(allowed)
    if isinstance(allowed, OneOf):
        return next(word for word in allowed.words if word != default)
    if kind is Count:
        return default * 2 if option != "update_interval" else default // 2
    return {Size: 0.7, UnitInterval: 0.25, Flag: default is False, FloatingDtype: "bfloat16"}[kind]


EACH = pytest.mark.parametrize(
    ("name", "option"), [(name, option) for name in OWN for option in options_of(name).defaults()]
)
"""Every option of every optimizer of this package."""


def test_the_optimizers_with_options_of_their_own() -> None:
    assert OWN == ["adafisher", "adafisherw", "spectral-adafisher", "kfac"]


@pytest.mark.parametrize("name", OWN)
def test_a_constructors_signature_is_its_dataclass(name: str) -> None:
    parameters = list(inspect.signature(optimizer_record(name).cls.__init__).parameters.values())
    assert [parameter.name for parameter in parameters[:3]] == ["self", "model", "params"]
    assert {p.name: p.default for p in parameters[3:]} == options_of(name).defaults()
    assert [p.name for p in parameters[3:]] == [f.name for f in dataclasses.fields(options_of(name))]
    assert all(parameter.kind is parameter.KEYWORD_ONLY for parameter in parameters[3:])


@EACH
def test_every_argument_of_a_constructor_reaches_its_group(name: str, option: str) -> None:
    value = another_value(name, option)
    optimizer = optimizer_record(name).cls(mlp(3, 2), **{option: value})  # type: ignore[call-arg]
    specification = options_of(name).specifications()[option]
    assert (option in optimizer.param_groups[0]) == specification.in_groups
    if specification.in_groups:
        assert optimizer.param_groups[0][option] == value
        group, expected = optimizer.param_groups[0], defaults_of(name, **{option: value})
        assert {key: group[key] for key in expected if key in group} == {
            key: kept for key, kept in expected.items() if key in group
        }


@EACH
def test_values_outside_the_range_are_refused_everywhere(name: str, option: str, tmp_path: Path) -> None:
    model, specification = mlp(3, 2), options_of(name).specifications()[option]
    wrong = WRONG[type(specification.range)] + ([0.0] if getattr(specification.range, "positive", False) else [])
    for value in wrong:
        message = f"{option} must .*got {value!r}|{option} must .*got {value}"
        with pytest.raises(ValueError, match=message):
            options_of(name)(**{option: value})
        with pytest.raises(ValueError, match=message):
            optimizer_record(name).cls(model, **{option: value})  # type: ignore[call-arg]
        if specification.in_groups:
            with pytest.raises(ValueError, match=message):
                create_optimizer(name, model).add_param_group({"params": [], option: value})
        if option not in ("lr", "weight_decay") and not (isinstance(value, float) and not math.isfinite(value)):
            text = f"{option}={value!r}"  # neither of them can be written there
            with pytest.raises(ValueError, match=message):
                AdaFisherTrainingArguments(str(tmp_path), optim=name, optim_args=text, **CPU)
    assert not model[0]._forward_hooks


def test_ranges_take_their_ends() -> None:
    Size().check("x", 0)
    Size(positive=True, optional=True).check("x", None)
    Size().check("x", torch.tensor(0.5))
    UnitInterval().check("x", 0)
    UnitInterval(closed=True).check("x", 1)
    Count("steps").check("x", 1)
    FloatingDtype("its own").check("x", None)
    for refused, value in ((UnitInterval(), 1), (Size(), None), (UnitInterval(closed=True), 1.01)):
        with pytest.raises(ValueError, match="x must"):
            refused.check("x", value)


@pytest.mark.parametrize("value", [torch.bfloat16, "bfloat16", "torch.bfloat16"])
def test_groups_hold_dtypes_as_words(value: Any) -> None:
    assert (
        create_optimizer("adafisherw", mlp(3, 2), momentum_dtype=value).param_groups[0]["momentum_dtype"] == "bfloat16"
    )


@EACH
def test_options_that_all_groups_share(name: str, option: str) -> None:
    if not options_of(name).specifications()[option].in_groups:
        return
    model = mlp(3, 4, 2)
    groups: list[dict[str, Any]] = [{"params": model[0].parameters()}, {"params": model[2].parameters()}]
    groups[1][option] = another_value(name, option)
    if options_of(name).specifications()[option].shared:
        with pytest.raises(
            ValueError,
            match=f"{option} must be the same in all parameter groups|{option}=.* of a parameter group differs",
        ):
            optimizer_record(name).cls(model, groups)
    else:
        assert optimizer_record(name).cls(model, groups).param_groups[1][option] == groups[1][option]


@EACH
def test_a_checkpoint_does_to_an_option_as_it_says(name: str, option: str, caplog: pytest.LogCaptureFixture) -> None:
    specification, model = options_of(name).specifications()[option], mlp(3, 2)
    if not specification.in_groups:
        return
    value, cls = another_value(name, option), optimizer_record(name).cls
    saved = cls(model, **{option: value}).state_dict()  # type: ignore[call-arg]
    optimizer = cls(model)
    caplog.clear()
    if specification.on_resume == "fixed":
        with pytest.raises(
            ValueError, match=f"{option}={value} and this optimizer built with .*build it with the same"
        ):
            optimizer.load_state_dict(saved)
        return
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0][option] == value
    warned = f"({option}: {defaults_of(name)[option]} -> {value})" in caplog.text
    assert warned == (specification.on_resume == "warned")
    assert specification.on_resume in ("warned", "silent")


@EACH
def test_a_checkpoint_without_an_option_that_identifies_the_optimizer_is_refused(name: str, option: str) -> None:
    """Any other is newer than the checkpoint, and stays as it is."""
    specification, model = options_of(name).specifications()[option], mlp(3, 2)
    if not specification.in_groups:
        return
    optimizer, saved = optimizer_record(name).cls(model), optimizer_record(name).cls(model).state_dict()
    del saved["param_groups"][0][option]
    if specification.identifies:
        with pytest.raises(ValueError, match="this checkpoint was not written by"):
            optimizer.load_state_dict(saved)
    else:
        optimizer.load_state_dict(saved)
        assert optimizer.param_groups[0][option] == defaults_of(name)[option]


def test_training_arguments_are_those_of_the_dataclasses(tmp_path: Path) -> None:
    fields = {f.name: f for f in dataclasses.fields(OptionArguments)}
    assert set(fields) == {argument_of(name) for optim in OWN for name in options_with_arguments(optim)}
    help_text = " ".join(HfArgumentParser(AdaFisherTrainingArguments).format_help().split())
    for name in {name for optim in OWN for name in options_with_arguments(optim)}:
        argument = fields[argument_of(name)]
        users = [optim for optim in OWN if name in options_with_arguments(optim)]
        assert argument.default is None  # which leaves it to the optimizer
        for optim in users:
            specification = options_of(optim).specifications()[name]
            shown = argument.metadata["help"]
            assert optim in shown and specification.help in shown and str(specification.range) in shown
            assert specification.symbol in shown
            assert f"Default: {optimizer_record(optim).option_defaults()[name]}" in shown
        assert " ".join(argument.metadata["help"].split()) in help_text
    for optim in OWN:
        for name in options_with_arguments(optim):
            value = another_value(optim, name)
            form = {"step_size": "paper"} if name == "update_interval" else {}
            arguments = AdaFisherTrainingArguments(str(tmp_path), optim=optim, **form, **{name: value}, **CPU)
            assert arguments.optimizer_options() == {**form, name: value}
    assert options_with_arguments("adamw") == options_with_arguments("adamw_torch") == ()


@pytest.mark.parametrize("step_size", ["paper", "root"])
def test_none_is_the_default_of_the_form_also_in_a_group(step_size: str) -> None:
    model = mlp(3, 4, 2)
    optimizer = AdaFisherW(model, [{"params": model[0].parameters(), "damping": None}], step_size=step_size, lr=None)
    optimizer.add_param_group({"params": model[2].parameters(), "ema_decay": None, "lr": 0.5})
    expected = defaults_of("adafisherw", step_size=step_size)
    for group, lr in zip(optimizer.param_groups, (expected["lr"], 0.5), strict=True):
        assert {key: group[key] for key in ("damping", "ema_decay", "update_interval")} == {
            key: expected[key] for key in ("damping", "ema_decay", "update_interval")
        }
        assert group["lr"] == lr


def test_options_of_both_intervals_are_checked_together(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"inverse_interval must be a multiple of update_interval.*got 15"):
        AdaFisherTrainingArguments(str(tmp_path), optim="kfac", optim_args="inverse_interval=15", **CPU)


def test_lists_describe_every_option() -> None:
    listed = {entry["name"]: entry["options"] for entry in json.loads(as_json())}
    text = as_text()
    for name in available_optimizers():
        record = optimizer_record(name)
        assert list(listed[name]) == list(record.options_class.defaults() if record.options_class else ())
        for option_name, described in listed[name].items():
            specification = options_of(name).specifications()[option_name]
            assert described["help"] == specification.help and described["range"] == str(specification.range)
            given = {"lr": record.learning_rate.value} | {key: here.value for key, here in record.defaults.items()}
            assert described["default"] == defaults_of(name, **given)[option_name]
            assert f"option {option_name}: {specification.help}" in text


@pytest.mark.parametrize("name", OWN)
def test_options_in_use_are_those_of_the_groups(name: str) -> None:
    optimizer = create_optimizer(name, mlp(3, 2), lr=0.5, weight_decay=0.25)
    shown = options_in_use(optimizer, lr=0.125)
    assert tuple(shown) == options_of(name).names(in_groups=True)
    assert (shown["lr"], shown["weight_decay"]) == (0.125, 0.25)
    assert options_in_use(create_optimizer("adamw", mlp(3, 2))) == {}


def test_declared_attributes_can_differ_by_optimizer() -> None:
    @dataclasses.dataclass(frozen=True)
    class Options(OptimizerOptions):
        """Two uses of one specification."""

        beta: float = option(0.5, BETA)
        second: float = option(0.25, BETA, symbol="beta_2", on_resume="silent")

    assert Options.defaults() == {"beta": 0.5, "second": 0.25}
    assert Options.names(on_resume="silent") == ("second",)
    assert [specification.symbol for specification in Options.specifications().values()] == ["beta", "beta_2"]
    with pytest.raises(ValueError, match=r"second must lie in \[0, 1\), got 1.0"):
        Options(second=1.0)


@EACH
def test_a_class_docstring_names_the_option_with_its_default(name: str, option: str) -> None:
    if name == "adafisherw":  # refers to AdaFisher's
        return
    documented = inspect.getdoc(optimizer_record(name).cls) or ""
    entry = re.search(rf"^    {option}: (.*?)(?=^    \w|^\w)", documented, flags=re.MULTILINE | re.DOTALL)
    assert entry, f"{option} is not described"
    told = re.search(r"Default ([^\s:;,]+?)\.?(?=[\s:;,]|$)", entry.group(1))
    default = defaults_of(name)[option]
    assert (None if told is None else ast.literal_eval(told.group(1))) == default


FACTORED = {"beta", "ema_decay", "momentum_dtype"}


@pytest.mark.parametrize(
    ("name", "marks"),
    [
        (
            "adafisher",
            {
                "identifies": {"damping", "ema_decay", "update_interval"},
                "argument": FACTORED | {"damping", "update_interval", "step_size"},
                "shared": {"update_interval", "step_size"},
                "fixed": {"step_size"},
            },
        ),
        (
            "spectral-adafisher",
            {
                "identifies": {"relative_damping", "ema_decay"},
                "argument": FACTORED | {"relative_damping"},
                "shared": set(),
            },
        ),
        (
            "kfac",
            {
                "identifies": {"damping", "stat_decay", "inverse_interval", "kl_clip"},
                "shared": {"update_interval", "inverse_interval", "kl_clip", "max_factor_dim"},
                "fixed": {"max_factor_dim"},
            },
        ),
    ],
)
def test_what_checkpoints_and_arguments_rely_on(name: str, marks: dict[str, set[str]]) -> None:
    """Checkpoints of earlier versions tell their optimizer by the first."""
    own = options_of(name)
    assert set(own.names(identifies=True)) == marks["identifies"]
    assert set(own.names(argument=True)) == marks.get("argument", set())
    assert set(own.names(shared=True)) == marks.get("shared", {"update_interval"})
    assert set(own.names(on_resume="fixed")) == marks.get("fixed", set())
    assert own.names(on_resume="silent") == ("lr",)
    assert own.names(in_groups=False) == (("compiled",) if name == "adafisher" else ())
