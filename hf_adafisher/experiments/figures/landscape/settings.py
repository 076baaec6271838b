"""Settings of the loss landscape."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hf_adafisher.experiments.figures.command_line import require_at_least

SNAPSHOTS = 50
"""Default number of snapshots along each trajectory, approximately."""
ORIGINS = ("start", "mean")


@dataclass(frozen=True)
class LandscapeSettings:
    """Settings of the training runs, the plane and the grid.

    Attributes:
        task: One of ``reserved_arguments.TASKS``.
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
