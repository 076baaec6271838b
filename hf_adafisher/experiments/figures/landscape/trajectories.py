"""Trajectories of the loss landscape: settings, training runs and their snapshots."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback

from hf_adafisher.experiments.figures.command_line import require_at_least
from hf_adafisher.experiments.figures.landscape.model_state import copy_buffers, flat_weights
from hf_adafisher.experiments.figures.training_run import StepCallback, check_same_start, prepare_run
from hf_adafisher.experiments.runs.callbacks import StopOnDivergence
from hf_adafisher.experiments.runs.run import PreparedRun
from hf_adafisher.training.trainer import AdaFisherTrainer

SNAPSHOTS = 50
"""Default number of snapshots along each trajectory, approximately."""
ORIGINS = ("start", "mean")


@dataclass(frozen=True)
class LandscapeSettings:
    """Settings of the training runs, the plane and the grid.

    Attributes:
        task: One of ``command_line.TASKS``.
        output: File of the picture.
        optimizers: As ``prepare_run`` reads them, all different. The first one's end is the centre of planes that
            do not come from the trajectories. The losses of the snapshots themselves have their own buffers; those in
            the plane have BatchNorm statistics of the examples at every point, and the first one's other buffers.
        steps: Number of optimizer steps, at least 2.
        every: Steps between two snapshots of the weights, from 1 to half of the steps; None for about 50 snapshots.
        grid: Points on each axis of the grid of losses, at least 2.
        plane: "pca", the principal components of all trajectories; "random", two random directions with filter
            normalisation; or a file with two directions, see ``directions.read_directions``.
        origin: Centre of a plane of principal components, see ``plane.principal_plane``: the "start" of all runs, or
            the "mean" of all snapshots, with the closest fit but at a distance from start and ends; None for the start.
            For "pca" only.
        plane_seed: Seed of the random directions.
        extent: Smallest reach of the grid from the centre, in units of the directions; None for 0 with "pca" and 1
            otherwise, as in Li et al. (2018).
        examples: Number of training examples of the mean loss, without augmentation; at least 1, or all if there are
            fewer.
        jobs: Number of threads that compute losses, at least 1; more than cores do not help. None for torch's number
            of threads on the CPU, and 1 elsewhere. Results do not depend on it.
        snapshot_memory: Largest memory of the snapshots, in GiB.
        further: Arguments of the runs.

    Raises:
        ValueError: A value outside its range.
        FileNotFoundError: The file of directions does not exist.
    """

    task: str
    output: Path
    optimizers: Sequence[str]
    steps: int = 100
    every: int | None = None
    grid: int = 25
    plane: str = "pca"
    origin: str | None = None
    plane_seed: int = 0
    extent: float | None = None
    examples: int = 256
    jobs: int | None = None
    snapshot_memory: float = 2.0
    further: Sequence[str] = ()

    def __post_init__(self) -> None:
        require_at_least(self, steps=2, every=1, grid=2, examples=1, jobs=1)
        if self.every is not None and self.every > self.steps // 2:
            raise ValueError(f"--every is {self.every}; with {self.steps} steps it must be at most {self.steps // 2}")
        if self.extent is not None and not 0 <= self.extent < float("inf"):
            raise ValueError(f"--extent is {self.extent}; it must be a number of at least 0")
        if not self.snapshot_memory > 0:
            raise ValueError(f"--snapshot_memory is {self.snapshot_memory}; it must be more than 0 GiB")
        if self.plane not in ("pca", "random") and not Path(self.plane).is_file():
            raise FileNotFoundError(f"--plane is {self.plane!r}, and no such file exists: pca, random, or a .pt file")
        if self.origin not in (None, *ORIGINS):
            raise ValueError(f"--origin is {self.origin!r}; it must be one of {', '.join(ORIGINS)}")
        if self.origin is not None and self.plane != "pca":
            raise ValueError("--origin is for --plane pca; with another, the first optimizer's end is the centre")
        twice = sorted({name for name in self.optimizers if self.optimizers.count(name) > 1})
        if not self.optimizers or twice:
            raise ValueError(f"--optimizers has {twice[0]} twice" if twice else "--optimizers needs at least one name")

    @property
    def snapshot_steps(self) -> list[int]:
        """Steps of the snapshots: 0, the start, every ``every`` steps, and the last step."""
        every = self.every or max(1, min(round(self.steps / SNAPSHOTS), self.steps // 2))
        return sorted({*range(0, self.steps, every), self.steps})


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
