"""Arguments of every training run, the reader of command lines and of JSON and YAML files, and the help."""

from __future__ import annotations

import argparse
import inspect
import math
import shutil
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.trainer_utils import IntervalStrategy, SchedulerType

from hf_adafisher.experiments.command_line import RunParser, describe_unknown_keys
from hf_adafisher.experiments.settings_files import SUFFIXES, read_settings
from hf_adafisher.training.arguments import AdaFisherTrainingArguments
from hf_adafisher.training.option_fields import PREFIX, OptionArguments

_OTHER_KINDS: dict[type, tuple[str, ...]] = {list: ("list",), dict: ("dict",), type(None): ("None", "Optional")}
"""Values of a file that a command line cannot hold, and parts of the names of types that take them."""


@dataclass
class HubArguments:
    """Access to models of the Hugging Face Hub."""

    model_revision: str = field(
        default="main",
        metadata={"help": "Branch, tag or commit of the models on the Hub.", "aliases": ["--revision"]},
    )
    token: str | None = field(
        default=None, metadata={"help": "Token for private models and data. Default: that of `hf auth login`."}
    )

    def hub(self) -> dict[str, Any]:
        """Return the arguments of ``from_pretrained``."""
        return {"revision": self.model_revision, "token": self.token}


@dataclass
class RunTrainingArguments(AdaFisherTrainingArguments):
    """AdaFisherTrainingArguments with the defaults of an experiment.

    A run trains and evaluates, unless one of ``do_train`` and ``do_eval`` is given alone. A cosine schedule with
    warm-up, log lines every 10 steps, ten evaluations on validation data and four checkpoints per run (the last two are
    kept), and losses logged as they are: by default Trainer replaces a non-finite loss by the average of the others,
    which would hide a diverged run.

    Raises:
        ValueError: ``max_steps`` and ``num_train_epochs`` that leave nothing to train, numbers that are not finite, a
            negative learning rate, a batch without examples.
    """

    do_train: bool = field(
        default=False, metadata={"help": "Train only. Default: train and evaluate, which both together say too."}
    )
    do_eval: bool = field(
        default=False, metadata={"help": "Only evaluate the model as it is, and write eval_results.json."}
    )
    verbose: bool = field(
        default=False, metadata={"help": "Print each log line, and show Trainer's bars instead of one for the run."}
    )
    lr_scheduler_type: SchedulerType | str = field(default="cosine", metadata={"help": "Learning rate schedule."})
    warmup_steps: float = field(default=0.05, metadata={"help": "Warm-up steps, or their share of all if below 1."})
    logging_steps: float = field(default=10, metadata={"help": "Steps between log lines."})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Hide non-finite losses in the log."})
    eval_strategy: IntervalStrategy | str = field(default="steps", metadata={"help": "When to validate."})
    eval_steps: float | None = field(default=0.1, metadata={"help": "Steps between validations, or their share."})
    save_steps: float = field(default=0.25, metadata={"help": "Steps between checkpoints, or their share."})
    # On a machine without an accelerator pinning does nothing but warn.
    dataloader_pin_memory: bool = field(
        default=torch.accelerator.is_available(),
        metadata={"help": "Pin memory for faster copies to a device."},
    )
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints to keep."})
    timing_only: bool = field(
        default=False, metadata={"help": "Only train, to time the steps: nothing is evaluated or saved at the end."}
    )

    curvature_log: bool = field(
        default=False,
        metadata={"help": "Record each layer's curvature, for `hf-adafisher figures curvature`. AdaFisher(W)."},
    )

    def __post_init__(self) -> None:
        if self.timing_only:
            self.eval_strategy = self.save_strategy = "no"
        if not (self.do_train or self.do_eval):
            self.do_train = self.do_eval = True
        elif not self.do_eval:
            self.eval_strategy = "no"  # Trainer would set do_eval
        if not self.do_train and self.resume_from_checkpoint not in (None, "false"):
            raise ValueError(
                "--do_eval alone evaluates the model itself: give the checkpoint as --model_name_or_path, not as "
                "--resume_from_checkpoint"
            )
        check_finite(self)
        if self.learning_rate is not None and self.learning_rate < 0:
            raise ValueError(f"learning_rate is {self.learning_rate}; it must be at least 0")
        for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        super().__post_init__()
        if self.max_steps <= 0 and not (math.isfinite(self.num_train_epochs) and self.num_train_epochs > 0):
            raise ValueError(
                f"nothing to train: max_steps is {self.max_steps}, num_train_epochs {self.num_train_epochs}; "
                "one of them must be positive"
            )


def parse_dataclasses(types: tuple[type, ...], argv: Sequence[str] | None = None) -> tuple[Any, ...]:
    """Parse the command line; a single argument that ends in .json or .yaml is a file with the same names as keys.

    Args:
        types: Dataclasses whose fields are the arguments.
        argv: Arguments without the program's name (default: ``sys.argv[1:]``).

    Returns:
        An object of each type.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: An unknown name, a value of another type, or one out of its range.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = RunParser(types)
    if len(argv) == 1 and argv[0].lower().endswith(SUFFIXES):
        objects = tuple(parser.parse_dict(_read_arguments(argv[0], types, parser)))
    else:
        objects = parser.parse_into(argv)
    for one in objects:
        check_finite(one)
    return objects


def check_finite(arguments: Any) -> None:
    """Raise ValueError if a number in a dataclass is NaN or infinite."""
    for one in fields(arguments):
        value = getattr(arguments, one.name, None)
        if one.init and isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{one.name} is {value}; it must be finite")


def _read_arguments(path: str, types: tuple[type, ...], parser: RunParser) -> dict[str, Any]:
    if not Path(path).is_file():
        raise FileNotFoundError(f"configuration file {path!r} does not exist; give the path of a JSON or YAML file")
    given = read_settings(Path(path))
    if not isinstance(given, dict):
        raise ValueError(f"{path} must hold an object, the names of arguments with their values")
    kinds = {one.name: str(one.type) for type_ in types for one in fields(type_) if one.init}
    known = {**dict(zip(kinds, kinds, strict=True)), **parser.aliases()}
    unknown = [str(key) for key in given if key not in known]
    if unknown:
        raise ValueError(f"{path}: {describe_unknown_keys(unknown, known)}")
    twice = [key for key in given if known[key] != key and known[key] in given]
    if twice:
        raise ValueError(f"{path}: {twice[0]} and {known[twice[0]]} are one argument: give {known[twice[0]]} only")
    words, others = {}, {}
    for key, value in given.items():
        name, other_kinds = known[key], _OTHER_KINDS.get(type(value))
        if other_kinds is None:
            words[name] = f"--{name}={str(value).lower() if isinstance(value, bool) else value}"
        elif not any(kind in kinds[name] for kind in other_kinds):
            raise ValueError(f"{path}: {key} must be a number, a text, true or false, got {value!r}")
        else:
            others[name] = value
    try:  # as on a command line, where every value has the type of its argument
        typed = vars(parser.parse_known_args(list(words.values()))[0])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return {**others, **{name: typed[name] for name in words}}


_USUAL = (
    "max_steps", "weight_decay", "gradient_accumulation_steps", "seed", "bf16", "gradient_checkpointing",
    "dataloader_num_workers", "report_to", "resume_from_checkpoint", "push_to_hub",
)  # fmt: skip
"""Arguments of Trainer's that most runs need."""
_KNOWN = (
    "output_dir", "optim", "learning_rate", "num_train_epochs", "do_train", "do_eval", "per_device_train_batch_size",
    "per_device_eval_batch_size",
)  # fmt: skip
"""Arguments of Trainer's that have a line of their own; others stand together with their new defaults."""
_COLUMN, _WIDTH = 40, 120


def show_help(argv: Sequence[str] | None, program: str, about: str, groups: Mapping[str, type]) -> bool:
    """Print the help if a command line asks for it: ``--help``, or ``--help_all`` for every argument.

    Args:
        argv: Arguments (default: those of the process).
        program: Name of the command.
        about: Purpose and examples.
        groups: Dataclasses of the arguments, by the titles of their groups.

    Returns:
        True if it was printed.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if "--help_all" in words or "--help-all" in words:
        types = tuple(groups.values())
        options: dict[str, Any] = {"prog": program, "formatter_class": argparse.RawDescriptionHelpFormatter}
        print(RunParser(types, description=about, **options).format_help())
        return True
    if "--help" in words or "-h" in words:
        print("\n".join(_lines(program, about, groups)))
        return True
    return False


def _lines(program: str, about: str, groups: Mapping[str, type]) -> Iterator[str]:
    yield f"usage: {program} [--ARGUMENT VALUE ...]   or   {program} FILE   with them as JSON or YAML"
    yield from ["", about.strip()]
    options = [one.name for one in fields(OptionArguments)]
    short = [name.removeprefix(PREFIX) for name in options]  # as every command takes them
    others = [one.name for one in fields(TrainingArguments) if one.name not in _KNOWN]
    changed: dict[str, Any] = {}
    for title, type_ in groups.items():
        yield from ["", f"{title}:"]
        for one in _own_fields(type_):
            if one.name in others:
                changed[one.name] = one.default
            elif one.name not in options:
                yield from _argument(one)
    defaults = ", ".join(f"--{name} {value}" for name, value in changed.items())
    yield from ["", *_wrapped(f"Defaults that are not Trainer's: {defaults}.")]
    yield from _wrapped(f"Options of the optimizers (`hf-adafisher list` explains them): {_names(short)}.")
    yield from _wrapped(
        f"Trainer's own arguments work too, such as {_names(_USUAL)}. --help_all lists and explains all of them."
    )


def _own_fields(type_: type) -> list[Field[Any]]:
    """Fields that this package declares, or declares anew with another default."""
    names: list[str] = []
    for base in type_.__mro__:
        if base.__module__.startswith("hf_adafisher."):
            names += inspect.get_annotations(base)
    found = {one.name: one for one in fields(type_)}
    return [found[name] for name in dict.fromkeys(names) if name in found]


def _argument(one: Field[Any]) -> list[str]:
    """Names, default, and the first sentence of the help of an argument."""
    further = [name for name in one.metadata.get("aliases", []) if "-" not in name.removeprefix("--")]
    names = ", ".join([f"--{one.name}", *further])
    first, *rest = str(one.metadata.get("help", "")).split(". ")
    default = "" if one.default in (None, False) or isinstance(one.default, type) else f" (default {one.default})"
    if not default:  # it may stand in words
        default = "".join(f". {sentence}" for sentence in rest if sentence.startswith("Default"))
    text = f"{first.rstrip('.')}{default}"
    lines = textwrap.wrap(text, _width() - _COLUMN) or [""]
    head = f"  {names}"
    if len(head) >= _COLUMN:
        return [head, *(" " * _COLUMN + line for line in lines)]
    return [f"{head:<{_COLUMN}}{lines[0]}", *(" " * _COLUMN + line for line in lines[1:])]


def _names(names: Sequence[str]) -> str:
    return ", ".join(f"--{name}" for name in names)


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, _width())


def _width() -> int:
    return min(shutil.get_terminal_size((_WIDTH, 24)).columns, _WIDTH)
