"""Trajectories through weight space of several optimizers, trained from one start on the same data."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback

from hf_adafisher.experiments.figures.landscape.model_state import copy_buffers, flat_weights
from hf_adafisher.experiments.figures.landscape.settings import LandscapeSettings
from hf_adafisher.experiments.figures.training_run import StepCallback, check_same_start, prepare_run
from hf_adafisher.experiments.runs.callbacks import StopOnDivergence
from hf_adafisher.experiments.runs.run import PreparedRun
from hf_adafisher.training.trainer import AdaFisherTrainer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trajectory:
    """One optimizer's trajectory through weight space.

    Attributes:
        steps: Steps of the snapshots; the first is 0.
        points: Weights, shape (snapshots, d), float32, on the CPU.
        losses: Step and training loss, of its own batch, at each step.
        diverged_at: First step with a loss or weight that is not finite, or None; later snapshots are left out.
        buffers: Buffers of the model at each snapshot, on the CPU; those that do not change are shared.
        learning_rate: Largest learning rate of the schedule.
    """

    steps: list[int]
    points: Tensor
    losses: list[tuple[int, float]]
    diverged_at: int | None
    buffers: list[dict[str, Tensor]]
    learning_rate: float


def prepare_optimizers(settings: LandscapeSettings) -> dict[str, PreparedRun]:
    """Prepare the run of each optimizer, by its label, and check start, data and the snapshots' memory.

    Raises:
        ValueError: An argument of one optimizer changes its start or its data, the snapshots take too much memory, or
            there are several processes.
    """
    further = ["--logging_steps", "1", *settings.further]
    runs = {
        optimizer: prepare_run(settings.task, settings.steps, settings.output, optimizer, further)
        for optimizer in settings.optimizers
    }
    check_same_start(runs)
    model = next(iter(runs.values())).model
    start = flat_weights(model)
    count = len(runs) * len(settings.snapshot_steps)
    need = count * sum(kept.nbytes for kept in (start, *model.buffers())) / 2**30
    if need > settings.snapshot_memory:
        raise ValueError(
            f"{count} snapshots of {start.numel():,} parameters take {need:.2f} GiB, more than --snapshot_memory "
            f"{settings.snapshot_memory:g}: keep fewer (a larger --every), or allow more memory"
        )
    return runs


def train(run: PreparedRun, settings: LandscapeSettings, label: str) -> tuple[AdaFisherTrainer, Trajectory]:
    """Train one optimizer and keep its snapshots; return its trainer, without the optimizer, and its trajectory."""
    wanted, steps, start = frozenset(settings.snapshot_steps), [0], flat_weights(run.model)
    buffers = [copy_buffers(run.model)]
    points = torch.empty(len(wanted), start.numel())
    points[0] = start
    watch = StopOnDivergence()
    with tqdm(total=settings.steps, desc=f"{label}: steps", disable=run.training_args.disable_tqdm) as bar:

        def take_snapshot(step: int, model: nn.Module, optimizer: Any) -> None:
            bar.update()
            if step in wanted:
                points[len(steps)] = flat_weights(model)
                buffers.append(copy_buffers(run.model, buffers[-1]))
                steps.append(step)

        trainer = run.new_trainer([StepCallback(None, take_snapshot), watch])
        for callback in (ProgressCallback, PrinterCallback):  # a line for every step
            trainer.remove_callback(callback)
        trainer.train()
    bad = [index for index in range(len(steps)) if not _finite(points[index], *buffers[index].values())]
    count = bad[0] if bad else len(steps)
    diverged_at = steps[bad[0]] if bad else watch.diverged_at
    if diverged_at is not None:
        logger.warning("%s diverged by step %d: its trajectory ends at step %d", label, diverged_at, steps[count - 1])
    trainer.optimizer = trainer.lr_scheduler = None  # frees as much memory as the weights take
    losses = [(int(entry["step"]), entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    rate = float(run.training_args.learning_rate or 0.0)
    return trainer, Trajectory(steps[:count], points[:count], losses, diverged_at, buffers[:count], rate)


def _finite(*tensors: Tensor) -> bool:
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)
