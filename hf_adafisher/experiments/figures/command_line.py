"""Command lines of the figures: common arguments, arguments that a figure reserves, exit status and messages."""

from __future__ import annotations

import argparse
import inspect
import logging
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from hf_adafisher.experiments.command_line import RunParser, StrictParser
from hf_adafisher.experiments.drawing import require_matplotlib
from hf_adafisher.experiments.runs.clm_arguments import ClmTrainingArguments, DataArguments, ModelArguments
from hf_adafisher.experiments.runs.image_arguments import (
    ImageDataArguments,
    ImageModelArguments,
    ImageTrainingArguments,
)

TASKS = {
    "digits": "a small network on scikit-learn's digits",
    "image": "arguments of hf-adafisher image",
    "clm": "arguments of hf-adafisher clm",
}
_IMAGE = (ImageModelArguments, ImageDataArguments, ImageTrainingArguments)
_ARGUMENTS: dict[str, tuple[type, ...]] = {
    "digits": _IMAGE,
    "image": _IMAGE,
    "clm": (ModelArguments, DataArguments, ClmTrainingArguments),
}
_STEPS = "the figure's --steps says how long the training is"
_NOT_KEPT = "the training of a figure is neither evaluated nor saved"
_RESERVED: dict[str, tuple[str, Any]] = {
    "max_steps": (_STEPS, None),
    "num_train_epochs": (_STEPS, None),
    "output_dir": ("--output says where the figure stands, and the run's own files stand beside it", None),
    "optim": ("the figure's own option names the optimizer", None),
    "resume_from_checkpoint": ("a figure shows a training from its start", None),
    "eval_strategy": (_NOT_KEPT, "no"),
    "save_strategy": (_NOT_KEPT, "no"),
    "load_best_model_at_end": (_NOT_KEPT, False),
    "push_to_hub": (_NOT_KEPT, False),
    "do_eval": (_NOT_KEPT, False),
    "streaming": ("a figure looks at the same examples again and again", False),
    "curvature_log": ("only training runs write that record, for hf-adafisher figures curvature", False),
}
"""The reason by reserved argument, and the only value, if any, that may be given for it."""
_RESERVED_ON_DIGITS: dict[str, tuple[str, Any]] = {
    name: ("--task digits has its own images; --task image takes others", value)
    for name, value in (("dataset", "digits"), ("data_dir", None))
}


def given_arguments(task: str, words: Sequence[str]) -> dict[str, Any]:
    """Values of the arguments among the words of a command line, by their full names.

    The run's own parser finds them, in every spelling that it takes: ``--learning_rate 1``, ``--learning-rate=1``.
    Words that it does not know are left out.

    Args:
        task: One of ``TASKS``.
        words: Words of the command line.
    """
    parser = RunParser(_ARGUMENTS[task])
    parser.set_defaults(**dict.fromkeys(field.name for one in _ARGUMENTS[task] for field in fields(one)))
    found, _ = parser.parse_known_args(list(words))
    return {name: value for name, value in vars(found).items() if value is not None}


def refuse_reserved(task: str, words: Sequence[str], where: str = "") -> None:
    """Refuse reserved arguments.

    Args:
        task: One of ``TASKS``.
        words: Words of the command line.
        where: The optimizer of the figure that they belong to; empty for the command line itself.

    Raises:
        ValueError: A reserved argument is given; the message names it and the reason.
    """
    reserved = {**_RESERVED, **(_RESERVED_ON_DIGITS if task == "digits" else {})}
    for name, value in given_arguments(task, words).items():
        why, only = reserved.get(name, ("", value))
        if value != only:
            place = f" in {where!r}" if where else ""
            raise ValueError(f"--{name} is not free here{place}: {why}")


def figure_parser(description: str, output: str) -> argparse.ArgumentParser:
    """Create a parser with the common arguments ``--task`` and ``--output``.

    Use ``parse_known_args``: the remaining words are arguments of the run.

    Args:
        description: Docstring of the command.
        output: Default of ``--output``.
    """
    parser = StrictParser(
        description=inspect.cleandoc(description),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Every other argument is the run's, as its script knows it: --model, --dataset, --seed and so on.",
    )
    tasks = "; ".join(f"{name}: {what}" for name, what in TASKS.items())
    parser.add_argument("--task", choices=TASKS, default="digits", help=f"{tasks} (default digits)")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path(output),
        help=f"SVG or PNG; its numbers stand beside it as JSON (default {output})",
    )
    return parser


def run_figure(main: Callable[[], list[Path]]) -> int:
    """Run a figure's script and report its files, or one line for bad input or a missing extra.

    Args:
        main: Makes the figure and returns the files that it wrote.

    Returns:
        The exit status: 0, or 2 for an error.
    """
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.INFO)
    for library in ("httpx", "datasets", "matplotlib"):
        logging.getLogger(library).setLevel(logging.WARNING)
    try:
        require_matplotlib()
        files = main()
    except (ValueError, OSError, ImportError) as error:
        logging.error("%s", " ".join(str(error).split()))
        return 2
    print("written: " + ", ".join(str(file) for file in files))
    return 0


def require_at_least(settings: Any, **bounds: int) -> None:
    """Check settings against their lower bounds; None is in range.

    Raises:
        ValueError: A setting is below its bound; the message names the argument.
    """
    for name, bound in bounds.items():
        value = getattr(settings, name)
        if value is not None and value < bound:
            raise ValueError(f"--{name} is {value}; it must be at least {bound}")
