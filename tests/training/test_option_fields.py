"""Names of the package's training arguments: they collide with nobody's, and the short ones still work."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import inspect
import pickle
import pkgutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from transformers import HfArgumentParser, Seq2SeqTrainingArguments, TrainingArguments

from hf_adafisher import AdaFisherTrainingArguments, available_optimizers
from hf_adafisher.training.option_fields import options_with_arguments, short_names

CPU = {"use_cpu": True, "report_to": "none"}
OPTIONS = sorted({name for optim in available_optimizers() for name in options_with_arguments(optim)})
SOME = {"beta": 0.8, "ema_decay": 0.7, "momentum_dtype": "float32", "damping": 0.3, "relative_damping": 0.2}
VALUES: dict[str, Any] = {**SOME, "update_interval": 7, "step_size": "paper", "log_curvature": False}


@dataclass
class OtherArguments(TrainingArguments):
    """Arguments of somebody else, with a `beta` and a learning rate, as TRL's have."""

    beta: float = field(default=0.1, metadata={"help": "Theirs."})
    learning_rate: float = field(default=1e-6, metadata={"help": "Theirs."})
    logging_steps: float = field(default=7, metadata={"help": "Theirs."})


@dataclass
class OursFirst(AdaFisherTrainingArguments, OtherArguments):
    pass


@dataclass
class OursLast(OtherArguments, AdaFisherTrainingArguments):
    pass


@dataclass
class Deeper(OursLast):
    """A subclass of a joined class, with a default of its own."""

    learning_rate: float | None = field(default=0.3, metadata={"help": "Mine."})


@dataclass
class MyArguments(AdaFisherTrainingArguments):
    """Ours with other defaults."""

    optim: str = "spectral-adafisher"
    learning_rate: float | None = 0.5
    weight_decay: float = 0.2
    logging_steps: float = 9


def own_fields(arguments: type) -> set[str]:
    """Names that a class adds to those of `TrainingArguments`."""
    return {f.name for f in dataclasses.fields(arguments)} - {f.name for f in dataclasses.fields(TrainingArguments)}


def configurations() -> list[type[Any]]:
    """Every dataclass of transformers' and TRL's arguments, the experimental ones included."""
    trl = pytest.importorskip("trl")
    found: dict[str, type[Any]] = {"Seq2SeqTrainingArguments": Seq2SeqTrainingArguments}
    for module in pkgutil.walk_packages(trl.__path__, "trl."):
        if module.name.endswith("_config"):
            found |= vars(importlib.import_module(module.name))
    return [one for one in found.values() if isinstance(one, type) and dataclasses.is_dataclass(one)]


def test_no_other_arguments_class_has_a_field_of_ours() -> None:
    ours = own_fields(AdaFisherTrainingArguments)
    others = configurations()
    assert len(others) > 20 and len(ours) == len(VALUES) and all(name.startswith("adafisher_") for name in ours)
    assert not {(one.__name__, name) for one in others for name in ours & own_fields(one)}
    theirs = {name for one in others for name in own_fields(one)}
    assert theirs & set(short_names(AdaFisherTrainingArguments)) == {"beta"}  # why there are prefixes


def test_every_configuration_keeps_its_own_fields_beside_ours() -> None:
    """Joined in either order: names, types, defaults and options of the command line."""
    for other in configurations():
        if not issubclass(other, TrainingArguments) or other is TrainingArguments:
            continue
        for bases in ((AdaFisherTrainingArguments, other), (other, AdaFisherTrainingArguments)):
            joined = {f.name: f for f in dataclasses.fields(dataclass(type("Joined", bases, {})))}
            for theirs in dataclasses.fields(other):
                if theirs.name not in ("optim", "learning_rate"):
                    mine = joined[theirs.name]
                    assert (mine.default, mine.default_factory) == (theirs.default, theirs.default_factory)
            assert joined["optim"].default == "adafisherw" and joined["learning_rate"].default is None
        HfArgumentParser(dataclass(type("Joined", bases, {})))  # which an option given twice would stop


def test_short_names_are_those_of_the_fields(tmp_path: Path) -> None:
    assert set(OPTIONS) | {"log_curvature"} == set(VALUES) == set(short_names(AdaFisherTrainingArguments))
    for optim in ("adafisherw", "spectral-adafisher", "sgd"):
        short, full = (
            AdaFisherTrainingArguments(
                str(tmp_path), optim=optim, **{prefix + name: value for name, value in VALUES.items()}, **CPU
            )
            for prefix in ("", "adafisher_")
        )
        assert short == full
        assert all(getattr(short, f"adafisher_{name}") == value for name, value in VALUES.items())
        assert not short.to_dict().keys() & VALUES.keys()


@pytest.mark.parametrize("prefix", ["--", "--adafisher_", "--adafisher-"])
def test_a_command_line_takes_both(prefix: str, tmp_path: Path) -> None:
    words = [f"{prefix}damping=0.3", f"{prefix}step_size=paper" if "_" in prefix else f"{prefix}step-size=paper"]
    words += [f"{prefix}log_curvature=false"] if prefix != "--adafisher-" else [f"{prefix}log-curvature=false"]
    parser = HfArgumentParser(AdaFisherTrainingArguments)
    (found,) = parser.parse_args_into_dataclasses([f"--output_dir={tmp_path}", "--use_cpu=true", *words])
    assert found.optimizer_options() == {"damping": 0.3, "step_size": "paper"}
    assert found.adafisher_log_curvature is False


def test_an_object_has_both_names(tmp_path: Path) -> None:
    """A hyperparameter search sets attributes of the arguments, by whatever name its space has."""
    found = AdaFisherTrainingArguments(str(tmp_path), **CPU)
    assert hasattr(found, "damping") and found.damping is None
    found.damping = 0.3
    assert found.damping == found.adafisher_damping == found.optimizer_options()["damping"] == 0.3
    assert "damping" not in vars(found)
    for twin in (copy.deepcopy(found), pickle.loads(pickle.dumps(found)), dataclasses.replace(found)):
        assert twin.damping == 0.3 and twin == found
    assert dataclasses.replace(found, adafisher_damping=0.5).damping == 0.5
    with pytest.raises(AttributeError, match="no attribute 'dampin'"):
        found.dampin  # noqa: B018


def test_two_values_of_one_argument_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"damping=0\.3 and adafisher_damping=0\.5 are one argument: give adafisher_damping only"
    ):
        AdaFisherTrainingArguments(str(tmp_path), damping=0.3, adafisher_damping=0.5, **CPU)
    for given in ({"adafisher_damping": 0.3}, {"adafisher_damping": None}):
        assert AdaFisherTrainingArguments(str(tmp_path), damping=0.3, **given, **CPU).damping == 0.3
    assert AdaFisherTrainingArguments(str(tmp_path), damping=None, adafisher_damping=0.3, **CPU).damping == 0.3
    with pytest.raises(ValueError, match=r"damping must be finite and > 0, got 0\.0"):
        AdaFisherTrainingArguments(str(tmp_path), damping=0.0, **CPU)
    with pytest.raises(TypeError, match="dampin"):
        AdaFisherTrainingArguments(str(tmp_path), dampin=0.3, **CPU)


@pytest.mark.parametrize("joined", [OursFirst, OursLast, Deeper])
def test_what_another_class_calls_by_a_short_name_is_its_own(joined: type[Any], tmp_path: Path) -> None:
    found = joined(str(tmp_path), **CPU)
    assert (found.beta, found.optim, found.optimizer_options()) == (0.1, "adafisherw", {})
    found = joined(str(tmp_path), beta=0.3, adafisher_beta=0.8, damping=0.2, **CPU)
    assert (found.beta, found.adafisher_beta) == (0.3, 0.8)
    assert found.optimizer_options() == {"beta": 0.8, "damping": 0.2}
    found.beta = 0.4
    assert (found.beta, found.adafisher_beta) == (0.4, 0.8)
    words = [f"--output_dir={tmp_path}", "--use_cpu=true", "--beta=0.5", "--damping=0.1"]
    (found,) = HfArgumentParser(joined).parse_args_into_dataclasses(words)
    assert (found.beta, found.adafisher_beta, found.adafisher_damping) == (0.5, None, 0.1)


def test_the_bases_may_stand_in_either_order_and_defaults_of_a_subclass_stay(tmp_path: Path) -> None:
    first, last = OursFirst(str(tmp_path), **CPU), OursLast(str(tmp_path), **CPU)
    assert first.to_dict() == last.to_dict()
    assert first.learning_rate == 1e-6  # theirs, which is AdamW's, and so AdaFisherW's
    assert first.logging_steps == 7  # and ours has only what it inherits
    assert Deeper(str(tmp_path), **CPU).learning_rate == 0.3
    for bases in ((MyArguments, OtherArguments), (OtherArguments, MyArguments)):
        found = dataclass(type("Joined", bases, {}))(str(tmp_path), **CPU)
        assert (found.optim, found.learning_rate, found.weight_decay) == ("spectral-adafisher", 0.5, 0.2)
        assert found.logging_steps == (9 if bases[0] is MyArguments else 7)


@pytest.mark.parametrize(
    "bases", [(AdaFisherTrainingArguments, OtherArguments), (OtherArguments, AdaFisherTrainingArguments)]
)
def test_a_joined_class_that_is_no_dataclass_is_an_error(bases: tuple[type, ...], tmp_path: Path) -> None:
    """It would have the constructor, and the defaults, of its first base alone."""
    with pytest.raises(TypeError, match="since it is no dataclass: write @dataclass above class Bare"):
        type("Bare", bases, {})(str(tmp_path), **CPU)
    assert type("Single", (AdaFisherTrainingArguments,), {})(str(tmp_path), damping=0.3, **CPU).damping == 0.3


def test_a_field_of_a_subclass_keeps_its_name(tmp_path: Path) -> None:
    @dataclass
    class Mine(AdaFisherTrainingArguments):
        beta: int = 3

    found = Mine(str(tmp_path), **CPU)
    assert (found.beta, found.adafisher_beta) == (3, None)
    assert Mine(str(tmp_path), beta=4, adafisher_beta=0.5, **CPU).optimizer_options() == {"beta": 0.5}


def test_the_signature_is_that_of_the_fields() -> None:
    for arguments in (AdaFisherTrainingArguments, OursFirst):
        assert [*inspect.signature(arguments).parameters] == [f.name for f in dataclasses.fields(arguments) if f.init]
