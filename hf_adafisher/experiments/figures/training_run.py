"""Training runs of the figures: any that ``hf-adafisher clm`` or ``image`` can do."""

from __future__ import annotations

import contextlib
import re
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset
from transformers import TrainerCallback, TrainingArguments

from hf_adafisher.data.images.dataset import ImageDataset
from hf_adafisher.experiments.figures.command_line import refuse_reserved
from hf_adafisher.experiments.runs import clm_arguments, clm_setup, image_arguments, image_setup
from hf_adafisher.experiments.runs.run import PreparedRun
from hf_adafisher.optimizers.factory.catalog import canonical_name
from hf_adafisher.optimizers.validation.environment import unwrapped
from hf_adafisher.training.option_fields import argument_of
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
"""Default learning rates on the digits: the best ones of docs/results/digits-small."""
PAPER_FORM = {"step_size": "paper", "damping": 0.003, "ema_decay": 0.95, "update_interval": 10}
"""AdaFisher by the paper's rule, whose F a figure may be about, with the numbers of docs/results/digits-small."""
START_ARGUMENTS = ("seed", "data_seed", "per_device_train_batch_size", "gradient_accumulation_steps")
"""Training arguments that decide the start, or the examples of a step; those of model and data do so too."""


def parse_optimizer(text: str) -> tuple[str, list[str]]:
    """Parse ``adam`` or ``adam:learning_rate=0.003,weight_decay=0.1``.

    Returns:
        Name of the optimizer, and its arguments as words of a command line.

    Raises:
        ValueError: The text is neither.
    """
    name, _, options = text.partition(":")
    words = [f"--{pair}" for pair in options.split(",") if pair]
    if not name or not all(re.fullmatch("--[^=]+=.+", word) for word in words):
        raise ValueError(f"{text!r} is no optimizer: write its name, or name:argument=value,argument=value")
    return canonical_name(name), words


def words(settings: Mapping[str, Any]) -> list[str]:
    """Settings as words of a command line."""
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))]


def gives(arguments: Sequence[str], name: str) -> bool:
    """True where words of a command line set this argument."""
    spellings = [f"--{word}" for full in (name, argument_of(name)) for word in (full, full.replace("_", "-"))]
    return any(word.partition("=")[0] in spellings for word in arguments)


def prepare_papers_run(
    task: str, steps: int, output: Path, optimizer: str | None, further: Sequence[str] = ()
) -> PreparedRun:
    """``prepare_run`` for what looks at the paper's F: AdaFisher(W) has its hooks, and the rates that go with them.

    Raises:
        ValueError: As ``prepare_run``; or ``step_size`` is given.
    """
    own = [] if optimizer is None else parse_optimizer(optimizer)[1]
    if gives([*further, *own], "step_size"):
        raise ValueError("step_size is 'paper' here: it is the paper's F, made by hooks, that is looked at")
    settings: dict[str, Any] = {}
    if task != "digits" or optimizer is None:  # by name it has them on the digits
        settings = {**PAPER_FORM, "learning_rate": 0.04 if task == "clm" else 0.02}
    return prepare_run(task, steps, output, optimizer, [*words(settings), *further])


def prepare_run(task: str, steps: int, output: Path, optimizer: str | None, further: Sequence[str] = ()) -> PreparedRun:
    """Prepare the run of one optimizer as its script would, without evaluations and checkpoints.

    Args:
        task: One of ``command_line.TASKS``.
        steps: Number of optimizer steps.
        output: File of the picture; Trainer's own files, if any, go into a folder of that name beside it. An empty one
            is removed with the last reference to the run.
        optimizer: Its name and arguments, as ``prepare_run`` reads them; None for the script's own choice. On the
            digits its default learning rate is the best of those tried there (``DIGITS_LEARNING_RATES``).
        further: Further arguments of the run, ``--name value``; the optimizer's own take precedence.

    Raises:
        ValueError: An argument that the figure reserves, several processes, or an error of the scripts.
    """
    if steps < 1:
        raise ValueError(f"steps is {steps}; it must be at least 1")
    refuse_reserved(task, further)
    name, own = (None, []) if optimizer is None else parse_optimizer(optimizer)
    refuse_reserved(task, own, optimizer or "")
    arguments = ["--report_to", "none"]  # of arguments that are given twice the later one counts
    if name == "schedule_free_adamw":
        arguments += ["--lr_scheduler_type", "constant"]  # it averages weights instead of lowering the rate
    if task == "digits":
        arguments += ["--dataset", "digits"]
        if name in DIGITS_LEARNING_RATES and not gives([*further, *own], "step_size"):
            arguments += ["--learning_rate", str(DIGITS_LEARNING_RATES[name])]
            arguments += words(PAPER_FORM) if name in ("adafisher", "adafisherw") else []
    arguments += [*further, *own]
    if name is not None:
        arguments += [f"--optim={name}"]
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
    """Check that all runs start from the same weights and see the same data.

    Args:
        runs: By the labels of their optimizers.

    Raises:
        ValueError: Two runs differ; the message names the argument.
    """
    (first, wanted), *others = ((label, _start_arguments(run)) for label, run in runs.items())
    for label, own in others:
        for name, value in own.items():
            if value != wanted[name]:
                raise ValueError(
                    f"{label} has {name}={value}, where {first} has {wanted[name]}: optimizers are compared from the "
                    f"same weights on the same data; give --{name} once, for all of them"
                )
        if not _same_state(runs[label].model.state_dict(), runs[first].model.state_dict()):
            raise ValueError(f"{label} starts from other weights than {first}")


def _start_arguments(run: PreparedRun) -> dict[str, Any]:
    """Arguments that decide the start of training and its examples."""
    common = {name: getattr(run.training_args, name) for name in START_ARGUMENTS}
    return {**asdict(run.model_args), **asdict(run.data_args), **common}


def _same_state(own: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return own.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in own.items())


def fixed_batches(trainer: AdaFisherTrainer, dataset: Dataset, examples: int) -> list[dict[str, Any]]:
    """Batches of fixed examples in a fixed order, without augmentation, evenly spread over the data set.

    Args:
        trainer: Source of the batch size (that of evaluation), the collator and the device.
        dataset: One of the run's ``datasets``.
        examples: Largest number of examples.
    """
    if isinstance(dataset, ImageDataset):  # random crops are the data set's; all else is done by the train collator
        dataset = ImageDataset(dataset.split, dataset.image_size, crop_ratio=dataset.crop_ratio)
    size = len(dataset)  # type: ignore[arg-type]
    count = min(examples, size)
    positions = [index * size // count for index in range(count)]
    drops, trainer.args.dataloader_drop_last = trainer.args.dataloader_drop_last, False
    try:
        return list(trainer.get_test_dataloader(Subset(dataset, positions)))
    finally:
        trainer.args.dataloader_drop_last = drops


def mean_loss(trainer: AdaFisherTrainer, model: nn.Module, batches: Sequence[dict[str, Any]]) -> float:
    """Mean loss over the examples of all batches, in the model's present mode."""
    total, count = 0.0, 0
    with torch.no_grad(), trainer.compute_loss_context_manager():
        for batch in batches:
            examples = len(batch["labels"])
            loss = trainer.compute_loss(model, dict(batch))
            assert isinstance(loss, torch.Tensor)  # without return_outputs it is one
            total += loss.item() * examples
            count += examples
    return total / max(count, 1)


class StepCallback(TrainerCallback):
    """Calls a function after chosen optimizer steps, before their gradients are reset.

    Args:
        steps: Numbers of the steps, the first being 1; None for every step.
        function: Called with the step, the model (not wrapped) and the optimizer (not wrapped).
    """

    def __init__(self, steps: Sequence[int] | None, function: Callable[[int, nn.Module, Any], None]) -> None:
        self.steps = None if steps is None else frozenset(steps)
        self.function = function

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Call the function; Trainer counts the step only afterwards."""
        step = state.global_step + 1
        if self.steps is None or step in self.steps:
            optimizer = kwargs["optimizer"]
            model = kwargs["model"]
            self.function(step, getattr(model, "module", model), unwrapped(optimizer))


def trainable_weight(module: nn.Module) -> nn.Parameter | None:
    """Parameter ``weight`` of a module, if it has one that trains."""
    weight = getattr(module, "weight", None)
    return weight if isinstance(weight, nn.Parameter) and weight.requires_grad else None


def weights_by_layer(model: nn.Module) -> dict[str, nn.Parameter]:
    """Trainable weights of at least two values, by the names of the modules that own them."""
    weights = {name: trainable_weight(module) for name, module in model.named_modules() if name}
    return {name: weight for name, weight in weights.items() if weight is not None and weight.numel() > 1}
