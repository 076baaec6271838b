"""Several optimizers trained from one start on the same data, and the weights they pass through."""

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

from hf_adafisher.experiments.figures.buffers import flat_buffers
from hf_adafisher.experiments.figures.landscape import flat_weights
from hf_adafisher.experiments.figures.runs import (
    AtSteps,
    OptimizerChoice,
    check_same_start,
    optimizer_choice,
    prepare_run,
)
from hf_adafisher.experiments.runs.callbacks import StopOnDivergence
from hf_adafisher.experiments.runs.run import PreparedRun
from hf_adafisher.training.trainer import AdaFisherTrainer

logger = logging.getLogger(__name__)

SNAPSHOTS = 50
"""About so many along each trajectory, unless told otherwise."""
ORIGINS = ("start", "mean")


@dataclass(frozen=True)
class LandscapeSettings:
    """What to train and what to draw.

    Attributes:
        task: one of ``runs.TASKS``.
        output: the picture.
        optimizers: as ``runs.optimizer_choice`` reads them; no two alike. The first one's end is the centre of planes
            that do not come from the trajectories. The losses of the snapshots themselves have their own buffers;
            those in the plane have BatchNorm statistics of the examples at every point, and the first one's other ones.
        steps: optimizer steps, at least 2.
        every: steps between two snapshots of the weights, from 1 to half of the steps; None for about 50 snapshots.
        grid: points on each axis of the grid of losses, at least 2.
        plane: "pca": the principal components of all trajectories; "random": two random directions with
            filter normalisation; else a file with two directions, see ``landscape_directions.read_directions``.
        origin: what a plane of principal components goes through, see ``landscape.principal_plane``: the "start" of
            all, or the "mean" of all snapshots, in which it follows them closest but may pass the start, and where each
            ends, at a distance; None for the start. For "pca" only.
        plane_seed: of the random directions.
        extent: the grid reaches at least so far from the centre, in units of the directions; None for 0 with "pca" and
            1 otherwise, as in Li et al. (2018).
        examples: training examples, without augmentation, whose mean loss is drawn; at least 1, or all if there are
            fewer.
        jobs: threads that compute losses, at least 1; more than cores do not help. None for as many as torch would use
            for one computation on the CPU, and 1 elsewhere. Results do not depend on it.
        snapshot_memory: GiB, at most, that the snapshots may take.
        further: arguments of the run.

    Raises:
        ValueError: a value outside its range.
        FileNotFoundError: no such file of directions.
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
        least = {"steps": 2, "every": 1, "grid": 2, "examples": 1, "jobs": 1}
        for name, bound in least.items():
            value = getattr(self, name)
            if value is not None and value < bound:
                raise ValueError(f"--{name} is {value}; it must be at least {bound}")
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
        labels = [choice.label for choice in self.choices]
        twice = sorted({label for label in labels if labels.count(label) > 1})
        if not labels or twice:
            raise ValueError(f"--optimizers has {twice[0]} twice" if twice else "--optimizers needs at least one name")

    @property
    def choices(self) -> list[OptimizerChoice]:
        """The optimizers."""
        return [optimizer_choice(text) for text in self.optimizers]

    @property
    def snapshot_steps(self) -> list[int]:
        """When the weights are kept: 0, the start, every so many steps, and the last step."""
        every = self.every or max(1, min(round(self.steps / SNAPSHOTS), self.steps // 2))
        return sorted({*range(0, self.steps, every), self.steps})


@dataclass(frozen=True)
class Trajectory:
    """One optimizer's way through the space of all weights.

    Attributes:
        steps: numbers of the steps of the snapshots; the first is 0.
        points: the weights, shape (snapshots, d), float32, on the CPU: those that gradients are taken at.
        losses: step and training loss, of its own batch, at each step.
        diverged_at: step at which the loss or a weight was found not to be finite, or None; later snapshots are
            left out.
        buffers: of the model at each snapshot, on the CPU; those that do not change are shared.
        learning_rate: the largest of the schedule.
    """

    steps: list[int]
    points: Tensor
    losses: list[tuple[int, float]]
    diverged_at: int | None
    buffers: list[dict[str, Tensor]]
    learning_rate: float


def prepare_optimizers(settings: LandscapeSettings) -> dict[str, PreparedRun]:
    """The run of each optimizer by its label, all inputs checked: same start, same data, snapshots that fit.

    Raises:
        ValueError: an argument of one optimizer that would let it start elsewhere or see other data, snapshots that
            would take too much memory, several processes.
    """
    further = ["--logging_steps", "1", *settings.further]
    runs = {
        choice.label: prepare_run(settings.task, settings.steps, settings.output, choice, further)
        for choice in settings.choices
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
    """Trains one optimizer and keeps its snapshots; also returns its trainer, without the optimizer."""
    wanted, steps, start = frozenset(settings.snapshot_steps), [0], flat_weights(run.model)
    buffers = [flat_buffers(run.model)]
    points = torch.empty(len(wanted), start.numel())
    points[0] = start
    watch = StopOnDivergence()
    with tqdm(total=settings.steps, desc=f"{label}: steps", disable=run.training_args.disable_tqdm) as bar:

        def keep(step: int, model: nn.Module, optimizer: Any) -> None:
            bar.update()
            if step in wanted:
                points[len(steps)] = flat_weights(model)
                buffers.append(flat_buffers(run.model, buffers[-1]))
                steps.append(step)

        trainer = run.new_trainer([AtSteps(None, keep), watch])
        for callback in (ProgressCallback, PrinterCallback):  # they show a line for every step
            trainer.remove_callback(callback)
        trainer.train()
    bad = [index for index in range(len(steps)) if not _finite(points[index], *buffers[index].values())]
    count = bad[0] if bad else len(steps)
    diverged_at = steps[bad[0]] if bad else watch.diverged_at
    if diverged_at is not None:
        logger.warning("%s diverged by step %d: its trajectory ends at step %d", label, diverged_at, steps[count - 1])
    trainer.optimizer = trainer.lr_scheduler = None  # as large as the weights, and not needed any more
    losses = [(int(entry["step"]), entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    rate = float(run.training_args.learning_rate or 0.0)
    return trainer, Trajectory(steps[:count], points[:count], losses, diverged_at, buffers[:count], rate)


def _finite(*tensors: Tensor) -> bool:
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)
