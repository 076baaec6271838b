"""The training run behind a figure: any that ``run_clm.py`` or ``run_image_classification.py`` can do."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset, Subset
from transformers import TrainerCallback

from hf_adafisher.experiments import clm_arguments, clm_setup, image_arguments, image_setup
from hf_adafisher.experiments.drawing import require_matplotlib
from hf_adafisher.experiments.run import PreparedRun
from hf_adafisher.training.trainer import AdaFisherTrainer

TASKS = {
    "digits": "a small network on scikit-learn's digits",
    "image": "arguments of run_image_classification.py",
    "clm": "arguments of run_clm.py",
}
DIGITS_LEARNING_RATES = {
    "adafisher": 0.01,
    "adafisherw": 0.04,
    "adam": 0.001,
    "adamw": 0.003,
    "sgd": 0.1,
    "kfac": 0.03,
    "shampoo": 0.1,
    "soap": 0.003,
    "muon": 0.06,
    "adahessian": 0.3,
    "sophia": 0.2,
    "lamb": 0.01,
    "lars": 1.0,
    "lion": 0.0003,
    "adafactor": 0.03,
    "schedule_free_adamw": 0.001,
}
"""Where none is given, of an optimizer that trains on the digits: the best of docs/results/digits-small."""
_OWN = ("max_steps", "num_train_epochs", "output_dir", "optim", "resume_from_checkpoint")
"""Arguments of a run that the figure's own script decides."""

START_ARGUMENTS = ("seed", "data_seed", "per_device_train_batch_size", "gradient_accumulation_steps", "max_steps")
"""Arguments of training that decide the start, or which examples a step sees."""


@dataclass(frozen=True)
class OptimizerChoice:
    """An optimizer of a figure.

    Attributes:
        name: one of ``available_optimizers()`` or Trainer's names.
        arguments: the run's arguments that belong to it, such as learning_rate.
    """

    name: str
    arguments: Mapping[str, str]

    @property
    def label(self) -> str:
        """As it was written on the command line."""
        shown = ",".join(f"{key}={value}" for key, value in self.arguments.items())
        return f"{self.name}:{shown}" if shown else self.name


def optimizer_choice(text: str) -> OptimizerChoice:
    """Reads ``adam`` or ``adam:learning_rate=0.003,weight_decay=0.1``.

    Raises:
        ValueError: anything else.
    """
    name, _, options = text.partition(":")
    pairs = [pair.partition("=") for pair in options.split(",") if pair]
    if not name or not all(key and equals and value for key, equals, value in pairs):
        raise ValueError(f"{text!r} is no optimizer: write its name, or name:argument=value,argument=value")
    return OptimizerChoice(name, {key: value for key, _, value in pairs})


def figure_parser(description: str, output: str) -> argparse.ArgumentParser:
    """A parser with the arguments that every figure's script has: --task and --output.

    Use ``parse_known_args``: what it leaves over belongs to the run.

    Args:
        description: the script's docstring.
        output: default of --output.
    """
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Every other argument is the run's, as its script knows it: --model, --dataset, --seed and so on.",
        allow_abbrev=False,
    )
    tasks = "; ".join(f"{name}: {what}" for name, what in TASKS.items())
    parser.add_argument("--task", choices=TASKS, default="digits", help=f"{tasks} (default digits)")
    parser.add_argument(
        "--output", type=Path, default=Path(output), help=f"PNG; SVG and JSON stand beside it (default {output})"
    )
    return parser


def prepare_run(
    task: str, steps: int, output: Path, optimizer: OptimizerChoice | None, further: Sequence[str] = ()
) -> PreparedRun:
    """The run of one optimizer, as its script would prepare it, without evaluations and checkpoints.

    Args:
        task: one of ``TASKS``.
        steps: optimizer steps.
        output: the picture; Trainer's own files, if any, go into a folder of that name beside it.
        optimizer: None for the script's own choice. On the digits its default learning rate is the best of those
            tried there (``DIGITS_LEARNING_RATES``).
        further: further arguments of the run, ``--name value``.

    Raises:
        ValueError: an argument that the figure decides by itself, and what the scripts raise.
    """
    if steps < 1:
        raise ValueError(f"steps is {steps}; it must be at least 1")
    given = {word[2:].partition("=")[0] for word in further if word.startswith("--")}
    taken = sorted(given & set(_OWN))
    if taken:
        raise ValueError(f"--{taken[0]} is not free here: this script decides it")
    arguments = [*further, "--max_steps", str(steps), "--output_dir", str(output.with_suffix("")) + "_run"]
    arguments += ["--eval_strategy", "no", "--save_strategy", "no"]
    if "--report_to" not in arguments:
        arguments += ["--report_to", "none"]
    if optimizer is not None:
        arguments += ["--optim", optimizer.name]
        for key, value in optimizer.arguments.items():
            arguments += [f"--{key}", value]
    if task == "clm":
        return clm_setup.prepare(*clm_arguments.parse_arguments(arguments))
    if task == "digits":
        arguments += ["--dataset", "digits"]
        free = optimizer is not None and "learning_rate" not in given | set(optimizer.arguments)
        if optimizer is not None and free and optimizer.name in DIGITS_LEARNING_RATES:
            arguments += ["--learning_rate", str(DIGITS_LEARNING_RATES[optimizer.name])]
    return image_setup.prepare(*image_arguments.parse_arguments(arguments))


def fixed_batches(trainer: AdaFisherTrainer, dataset: Dataset, examples: int) -> list[dict[str, Any]]:
    """The same examples in the same order every time, without augmentation, evenly spread over the data set.

    Args:
        trainer: makes batches of its evaluation size, on its device.
        dataset: one of the run's ``datasets``.
        examples: how many, at most.
    """
    size = len(dataset)  # type: ignore[arg-type]
    count = min(examples, size)
    positions = [index * size // count for index in range(count)]
    return [trainer._prepare_inputs(batch) for batch in trainer.get_test_dataloader(Subset(dataset, positions))]


def mean_loss(trainer: AdaFisherTrainer, model: torch.nn.Module, batches: Sequence[dict[str, Any]]) -> float:
    """Mean loss over batches, each weighing as much as it has examples; the model's mode is left as it is."""
    total, count = 0.0, 0
    with torch.no_grad(), trainer.compute_loss_context_manager():
        for batch in batches:
            examples = len(batch["labels"])
            loss = trainer.compute_loss(model, dict(batch))
            assert isinstance(loss, torch.Tensor)  # without return_outputs it is one
            total += loss.item() * examples
            count += examples
    return total / max(count, 1)


class AtSteps(TrainerCallback):
    """Calls a function after chosen optimizer steps, while their gradients are still there.

    Args:
        steps: numbers of steps, the first being 1; None for every step.
        function: gets the step, the model (not wrapped) and the optimizer (not wrapped).
    """

    def __init__(self, steps: Sequence[int] | None, function: Callable[[int, torch.nn.Module, Any], None]) -> None:
        self.steps = None if steps is None else frozenset(steps)
        self.function = function

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After the step, before the gradients are reset; Trainer counts it only afterwards."""
        step = state.global_step + 1
        if self.steps is None or step in self.steps:
            optimizer = kwargs["optimizer"]
            model = kwargs["model"]
            self.function(step, getattr(model, "module", model), getattr(optimizer, "optimizer", optimizer))


def run_figure(main: Callable[[], list[Path]]) -> int:
    """What every figure's script does: the exit status, 2 with one line for bad input or a missing extra.

    Args:
        main: does the work and returns the files it wrote.
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
