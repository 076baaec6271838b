"""From settings to all that the picture shows: the plane of several optimizers' trajectories and its losses."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from hf_adafisher.experiments.figures.buffers import load_buffers, refresh_statistics, running_norms
from hf_adafisher.experiments.figures.landscape import (
    Plane,
    Projection,
    flat_weights,
    grid_axes,
    losses_at,
    principal_plane,
)
from hf_adafisher.experiments.figures.landscape_directions import normalized_plane, random_directions, read_directions
from hf_adafisher.experiments.figures.landscape_trajectories import (
    LandscapeSettings,
    Trajectory,
    prepare_optimizers,
    train,
)
from hf_adafisher.experiments.figures.runs import fixed_batches, mean_loss
from hf_adafisher.experiments.runs.run import PreparedRun
from hf_adafisher.training.trainer import AdaFisherTrainer


def trace_landscape(settings: LandscapeSettings) -> dict[str, Any]:
    """Trains every optimizer, chooses the plane, and evaluates its losses.

    Returns:
        What ``landscape_picture.draw_landscape`` draws and the JSON file holds; losses that are not finite are nan.

    Raises:
        ValueError: see ``LandscapeSettings`` and ``runs.prepare_run``, all before any training; trajectories that span
            no plane, or a plane without any finite loss.
    """
    runs = prepare_optimizers(settings)
    labels, first = list(runs), next(iter(runs.values()))
    told = {
        "task": settings.task,
        "corpus": first.describe()["corpus"]["name"],
        "model": first.describe()["model"],
        "seed": first.training_args.seed,
        "loss_label": first.loss_label,
    }
    check_statistics(settings, first)
    model: nn.Module = copy.deepcopy(first.model)  # before Trainer, which may change how the model is called
    directions = given_directions(settings, model)
    judge: AdaFisherTrainer | None = None
    trajectories: dict[str, Trajectory] = {}
    for label in labels:
        trainer, trajectories[label] = train(runs.pop(label), settings, label)
        judge = judge or trainer
    assert judge is not None
    model.to(judge.args.device)
    load_buffers(model, trajectories[labels[0]].buffers[-1])
    plane = choose_plane(settings, model, directions, list(trajectories.values()))
    return {**told, **measure(settings, judge, model, plane, trajectories)}


def check_statistics(settings: LandscapeSettings, run: PreparedRun) -> None:
    """Raises ValueError where BatchNorm's statistics would be those of single examples, which have no variance."""
    sizes = {"--examples": settings.examples, "--per_device_eval_batch_size": run.training_args.eval_batch_size}
    for name, size in sizes.items():
        if size < 2 and running_norms(run.model):
            raise ValueError(f"{name} is {size}; with BatchNorm, which needs a variance, it must be at least 2")


def given_directions(settings: LandscapeSettings, model: nn.Module) -> list[Tensor] | None:
    """The directions of the plane before filter normalisation; None if they come from the trajectories."""
    if settings.plane == "pca":
        return None
    if settings.plane == "random":
        return random_directions(flat_weights(model).numel(), settings.plane_seed)
    return read_directions(Path(settings.plane), model)


def choose_plane(
    settings: LandscapeSettings, model: nn.Module, directions: list[Tensor] | None, trajectories: Sequence[Trajectory]
) -> Plane:
    """The principal plane of all trajectories, or that of given directions around the end of the first one."""
    if directions is None:
        start = None if settings.origin == "mean" else trajectories[0].points[0]
        return principal_plane([trajectory.points for trajectory in trajectories], start)
    return normalized_plane(model, trajectories[0].points[-1], directions)


def measure(
    settings: LandscapeSettings,
    judge: AdaFisherTrainer,
    model: nn.Module,
    plane: Plane,
    trajectories: Mapping[str, Trajectory],
) -> dict[str, Any]:
    """The losses on the grid, where the trajectories are projected to, and of the snapshots themselves.

    Args:
        settings: what to draw.
        judge: computes losses.
        model: with the buffers to use in the plane, but for BatchNorm's running statistics: there every point has those
            of the figure's examples. Its weights are not touched.
        plane: to draw.
        trajectories: by the optimizers' labels.

    Raises:
        ValueError: no loss on the grid is finite.
    """
    projections = {label: plane.project(trajectory.points) for label, trajectory in trajectories.items()}
    extent = settings.extent if settings.extent is not None else float(plane.explained is None)
    xs, ys = grid_axes([found.coordinates for found in projections.values()], settings.grid, extent)
    vectors: list[Callable[[], Tensor]] = [partial(plane.vector, float(x), float(y)) for y in ys for x in xs]
    for found in projections.values():
        vectors += [partial(plane.vector, x, y) for x, y in found.coordinates.tolist()]
    batches = fixed_batches(judge, cast(Any, judge.train_dataset), settings.examples)
    jobs = settings.jobs or (torch.get_num_threads() if judge.args.device.type == "cpu" else 1)
    quiet = judge.args.disable_tqdm
    more: Any = {"jobs": jobs, "progress": not quiet}
    losses = iter(losses_at(model, vectors, partial(_loss_in_plane, judge, batches), label="grid of losses", **more))
    vectors = [point.clone for trajectory in trajectories.values() for point in trajectory.points]
    buffers = [buffers for trajectory in trajectories.values() for buffers in trajectory.buffers]
    loss = partial(_mean_loss, judge, batches)
    true = iter(losses_at(model, vectors, loss, buffers=buffers, label="losses of snapshots", **more))
    surface = [[next(losses) for _ in xs] for _ in ys]
    if not any(math.isfinite(value) for row in surface for value in row):
        raise ValueError("no loss in this plane is finite: take smaller learning rates or fewer steps")
    paths = {
        label: _path(
            trajectories[label], found, *(list(islice(each, len(found.coordinates))) for each in (losses, true))
        )
        for label, found in projections.items()
    }
    return {
        "examples": sum(len(batch["labels"]) for batch in batches),
        "plane": {**_describe(settings, plane), "buffers": _whose_buffers(settings, model, trajectories)},
        "grid": {"x": xs.tolist(), "y": ys.tolist(), "loss": surface},
        "optimizers": paths,
    }


def _mean_loss(judge: AdaFisherTrainer, batches: Sequence[dict[str, Any]], model: nn.Module) -> float:
    return mean_loss(judge, model, batches)


def _loss_in_plane(judge: AdaFisherTrainer, batches: Sequence[dict[str, Any]], model: nn.Module) -> float:
    """Of weights that no training passed through, whose running statistics nobody knows."""
    if running_norms(model):  # a single example may have no variance
        several = [[batch] for batch in batches if len(batch["labels"]) > 1]
        refresh_statistics(model, [partial(_mean_loss, judge, batch) for batch in several])
    return mean_loss(judge, model, batches)


def _path(
    trajectory: Trajectory, found: Projection, in_plane: Sequence[float], of_snapshots: Sequence[float]
) -> dict[str, Any]:
    """What is told about one optimizer."""
    return {
        "learning_rate": trajectory.learning_rate,
        "diverged_at": trajectory.diverged_at,
        "variance_outside_of_plane": found.outside,
        "steps": trajectory.steps,
        "x": found.coordinates[:, 0].tolist(),
        "y": found.coordinates[:, 1].tolist(),
        "distance_from_plane": found.distances.tolist(),
        "loss_in_plane": list(in_plane),
        "loss_of_snapshot": list(of_snapshots),
        "training": {"step": [step for step, _ in trajectory.losses], "loss": [loss for _, loss in trajectory.losses]},
    }


def _describe(settings: LandscapeSettings, plane: Plane) -> dict[str, Any]:
    if plane.explained is None:
        kind = f"two random directions (seed {settings.plane_seed})" if settings.plane == "random" else settings.plane
        word = "random" if settings.plane == "random" else "given"
        return {
            "kind": f"{kind}, filter-normalised; zero for vectors (biases) and norm layers",
            "centre": f"end of {settings.choices[0].label}",
            "axes": [f"{word} direction {k} (1: the norm of each filter)" for k in (1, 2)],
            "explained": None,
        }
    if settings.origin == "mean":
        centre, spread, short = "mean of all snapshots of all optimizers", "variance of all snapshots", "the variance"
    else:
        centre, short = "start of all optimizers", "squared distances"
        spread = f"{short} of all snapshots from the start, those of each optimizer divided by their sum"
    shares = enumerate(plane.explained, 1)
    return {
        "kind": f"principal components of the {spread}",
        "centre": centre,
        "axes": [f"distance along principal component {k} ({share:.1%} of {short})" for k, share in shares],
        "explained": list(plane.explained),
    }


def _whose_buffers(settings: LandscapeSettings, model: nn.Module, trajectories: Mapping[str, Trajectory]) -> str | None:
    """Those of the losses in the plane; None where training changes none."""
    norms = running_norms(model)
    others = any(
        not torch.equal(value, trajectory.buffers[0][name])
        for trajectory in trajectories.values()
        for name, value in trajectory.buffers[-1].items()
        if name.rpartition(".")[0] not in norms
    )
    told = ["BatchNorm statistics of these examples at every point"] if norms else []
    told += [f"buffers of the end of {settings.choices[0].label}"] if others else []
    return ", ".join(told) or None
