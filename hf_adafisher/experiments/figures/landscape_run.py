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
    model: nn.Module = copy.deepcopy(first.model)  # before Trainer, which may change how the model is called
    directions = given_directions(settings, model)
    judge: AdaFisherTrainer | None = None
    trajectories: dict[str, Trajectory] = {}
    for label in labels:
        trainer, trajectories[label] = train(runs.pop(label), settings, label)
        judge = judge or trainer
    assert judge is not None
    model.to(judge.args.device)
    for name, buffer in model.named_buffers():
        buffer.copy_(trajectories[labels[0]].buffers[name])
    plane = choose_plane(model, directions, list(trajectories.values()))
    return {**told, **measure(settings, judge, model, plane, trajectories)}


def given_directions(settings: LandscapeSettings, model: nn.Module) -> list[Tensor] | None:
    """The directions of the plane before filter normalisation; None if they come from the trajectories."""
    if settings.plane == "pca":
        return None
    if settings.plane == "random":
        return random_directions(flat_weights(model).numel(), settings.plane_seed)
    return read_directions(Path(settings.plane), model)


def choose_plane(model: nn.Module, directions: list[Tensor] | None, trajectories: Sequence[Trajectory]) -> Plane:
    """The principal plane of all trajectories, or that of given directions around the end of the first one."""
    if directions is None:
        return principal_plane([trajectory.points for trajectory in trajectories])
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
        model: with the buffers to use; its weights are not touched.
        plane: to draw.
        trajectories: by the optimizers' labels.

    Raises:
        ValueError: no loss on the grid is finite.
    """
    projections = {label: plane.project(trajectory.points) for label, trajectory in trajectories.items()}
    extent = settings.extent if settings.extent is not None else float(plane.explained is None)
    xs, ys = grid_axes([found.coordinates for found in projections.values()], settings.grid, extent)
    vectors: list[Callable[[], Tensor]] = [partial(plane.vector, float(x), float(y)) for y in ys for x in xs]
    for label, found in projections.items():
        vectors += [partial(plane.vector, x, y) for x, y in found.coordinates.tolist()]
        vectors += [point.clone for point in trajectories[label].points]
    batches = fixed_batches(judge, cast(Any, judge.train_dataset), settings.examples)
    jobs = settings.jobs or (torch.get_num_threads() if judge.args.device.type == "cpu" else 1)
    quiet = judge.args.disable_tqdm
    loss = partial(_mean_loss, judge, batches)
    losses = iter(losses_at(model, vectors, loss, jobs=jobs, label="grid of losses", progress=not quiet))
    surface = [[next(losses) for _ in xs] for _ in ys]
    if not any(math.isfinite(value) for row in surface for value in row):
        raise ValueError("no loss in this plane is finite: take smaller learning rates or fewer steps")
    paths = {
        label: _path(trajectories[label], found, list(islice(losses, 2 * len(found.coordinates))))
        for label, found in projections.items()
    }
    return {
        "examples": sum(len(batch["labels"]) for batch in batches),
        "plane": _describe(settings, plane),
        "grid": {"x": xs.tolist(), "y": ys.tolist(), "loss": surface},
        "optimizers": paths,
    }


def _mean_loss(judge: AdaFisherTrainer, batches: Sequence[dict[str, Any]], model: nn.Module) -> float:
    return mean_loss(judge, model, batches)


def _path(trajectory: Trajectory, found: Projection, losses: Sequence[float]) -> dict[str, Any]:
    """What is told about one optimizer; ``losses`` are those in the plane, then those of the snapshots."""
    count = len(trajectory.steps)
    return {
        "learning_rate": trajectory.learning_rate,
        "diverged_at": trajectory.diverged_at,
        "variance_outside_of_plane": found.outside,
        "steps": trajectory.steps,
        "x": found.coordinates[:, 0].tolist(),
        "y": found.coordinates[:, 1].tolist(),
        "distance_from_plane": found.distances.tolist(),
        "loss_in_plane": list(losses[:count]),
        "loss_of_snapshot": list(losses[count:]),
        "training": {"step": [step for step, _ in trajectory.losses], "loss": [loss for _, loss in trajectory.losses]},
    }


def _describe(settings: LandscapeSettings, plane: Plane) -> dict[str, Any]:
    first = settings.choices[0].label
    if plane.explained is not None:
        names = [f"principal component {k} ({share:.1%} of the variance)" for k, share in enumerate(plane.explained, 1)]
        return {
            "kind": "principal components of all snapshots of all optimizers",
            "centre": "mean of all snapshots of all optimizers",
            "axes": [f"distance along {name}" for name in names],
            "explained_variance": list(plane.explained),
            "buffers": f"of the end of {first}",
        }
    kind = f"two random directions (seed {settings.plane_seed})" if settings.plane == "random" else settings.plane
    word = "random" if settings.plane == "random" else "given"
    return {
        "kind": f"{kind}, filter-normalised; zero for vectors (biases) and norm layers",
        "centre": f"end of {first}",
        "axes": [f"{word} direction {k} (1: the norm of each filter)" for k in (1, 2)],
        "explained_variance": None,
        "buffers": f"of the end of {first}",
    }
