"""The training run behind a figure: any that ``run_clm.py`` or ``run_image_classification.py`` can do."""

from __future__ import annotations

import argparse
import contextlib
import logging
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset
from transformers import TrainerCallback, TrainingArguments

from hf_adafisher.data.images.dataset import ImageDataset
from hf_adafisher.experiments.command_line import StrictParser
from hf_adafisher.experiments.drawing import require_matplotlib
from hf_adafisher.experiments.figures.free_arguments import TASKS, refuse_decided
from hf_adafisher.experiments.runs import clm_arguments, clm_setup, image_arguments, image_setup
from hf_adafisher.experiments.runs.run import PreparedRun
from hf_adafisher.optimizers.validation.checks import unwrapped
from hf_adafisher.training.trainer import AdaFisherTrainer

DIGITS_LEARNING_RATES = {
    "adafisher": 0.01,
    "adafisherw": 0.04,
    "spectral-adafisher": 0.01,
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
START_ARGUMENTS = ("seed", "data_seed", "per_device_train_batch_size", "gradient_accumulation_steps")
"""Arguments of training that decide the start, or which examples a step sees; those of model and data come on top."""


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

    @property
    def words(self) -> list[str]:
        """The arguments as words of a command line."""
        return [f"--{key}={value}" for key, value in self.arguments.items()]


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
    parser = StrictParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Every other argument is the run's, as its script knows it: --model, --dataset, --seed and so on.",
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
        output: the picture; Trainer's own files, if any, go into a folder of that name beside it. An empty one is
            removed when the run is no longer held.
        optimizer: None for the script's own choice. On the digits its default learning rate is the best of those
            tried there (``DIGITS_LEARNING_RATES``).
        further: further arguments of the run, ``--name value``; the optimizer's own count before them.

    Raises:
        ValueError: an argument that the figure decides by itself, several processes, and what the scripts raise.
    """
    if steps < 1:
        raise ValueError(f"steps is {steps}; it must be at least 1")
    refuse_decided(task, further)
    arguments = ["--report_to", "none"]  # of arguments that are given twice the later one counts
    if optimizer is not None and optimizer.name == "schedule_free_adamw":
        arguments += ["--lr_scheduler_type", "constant"]  # it averages weights instead of lowering the rate
    if task == "digits":
        arguments += ["--dataset", "digits"]
        if optimizer is not None and optimizer.name in DIGITS_LEARNING_RATES:
            arguments += ["--learning_rate", str(DIGITS_LEARNING_RATES[optimizer.name])]
    arguments += further
    if optimizer is not None:
        refuse_decided(task, optimizer.words, optimizer.label)
        arguments += [*optimizer.words, f"--optim={optimizer.name}"]
    folder = output.with_name(f"{output.stem}_run")
    arguments += ["--max_steps", str(steps), "--output_dir", str(folder)]
    arguments += ["--eval_strategy", "no", "--save_strategy", "no"]
    run = _prepare(task, arguments)
    weakref.finalize(run, _remove_if_empty, folder)
    return run


def _prepare(task: str, arguments: Sequence[str]) -> PreparedRun:
    if task == "clm":
        of_text = clm_arguments.parse_clm_arguments(arguments)
        _check_alone(of_text[-1])
        return clm_setup.prepare_clm_run(*of_text)
    of_images = image_arguments.parse_image_arguments(arguments)
    _check_alone(of_images[-1])
    return image_setup.prepare_image_run(*of_images)


def _check_alone(training: TrainingArguments) -> None:
    if training.world_size > 1:
        raise ValueError("figures are made by one process: start this without torchrun")


def _remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):  # it is not empty, or was never made
        folder.rmdir()


def check_same_start(runs: Mapping[str, PreparedRun]) -> None:
    """Raises ValueError, which names the argument, unless all start from the same weights and see the same data.

    Args:
        runs: by their optimizers' labels.
    """
    (first, wanted), *others = ((label, _decisive(run)) for label, run in runs.items())
    for label, own in others:
        for name, value in own.items():
            if value != wanted[name]:
                raise ValueError(
                    f"{label} has {name}={value}, where {first} has {wanted[name]}: optimizers are compared from the "
                    f"same weights on the same data; give --{name} once, for all of them"
                )
        if not _same_state(runs[label].model.state_dict(), runs[first].model.state_dict()):
            raise ValueError(f"{label} starts from other weights than {first}")


def _decisive(run: PreparedRun) -> dict[str, Any]:
    """All arguments that decide where training starts and what it sees."""
    common = {name: getattr(run.training_args, name) for name in START_ARGUMENTS}
    return {**asdict(run.model_args), **asdict(run.data_args), **common}


def _same_state(own: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return own.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in own.items())


def fixed_batches(trainer: AdaFisherTrainer, dataset: Dataset, examples: int) -> list[dict[str, Any]]:
    """The same examples in the same order every time, without augmentation, evenly spread over the data set.

    Args:
        trainer: makes batches of its evaluation size, on its device.
        dataset: one of the run's ``datasets``.
        examples: how many, at most.
    """
    if isinstance(dataset, ImageDataset):  # random crops are the data set's; all else is done by the train collator
        dataset = ImageDataset(dataset.split, dataset.image_size, crop_ratio=dataset.crop_ratio)
    size = len(dataset)  # type: ignore[arg-type]
    count = min(examples, size)
    positions = [index * size // count for index in range(count)]
    drops, trainer.args.dataloader_drop_last = trainer.args.dataloader_drop_last, False
    try:
        return [trainer._prepare_inputs(batch) for batch in trainer.get_test_dataloader(Subset(dataset, positions))]
    finally:
        trainer.args.dataloader_drop_last = drops


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
            self.function(step, getattr(model, "module", model), unwrapped(optimizer))


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
