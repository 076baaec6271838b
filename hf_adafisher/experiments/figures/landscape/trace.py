"""Trajectories of several optimizers, their plane, and its losses: all numbers of the picture."""

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

from hf_adafisher.experiments.figures.landscape.model_state import (
    batch_norms_with_statistics,
    flat_weights,
    load_buffers,
    losses_at,
    refresh_statistics,
)
from hf_adafisher.experiments.figures.landscape.plane import (
    Plane,
    Projection,
    grid_axes,
    normalized_plane,
    principal_plane,
    random_directions,
    read_directions,
)
from hf_adafisher.experiments.figures.landscape.trajectories import (
    LandscapeSettings,
    Trajectory,
    prepare_optimizers,
    train,
)
from hf_adafisher.experiments.figures.training_run import fixed_batches, mean_loss
from hf_adafisher.experiments.runs.run import PreparedRun
from hf_adafisher.training.trainer import AdaFisherTrainer


def trace_landscape(settings: LandscapeSettings) -> dict[str, Any]:
    """Train every optimizer, choose the plane, and evaluate its losses.

    Returns:
        The numbers that ``draw_landscape`` draws and the JSON file holds; losses that are not finite are nan.

    Raises:
        ValueError: See ``LandscapeSettings`` and ``prepare_run``, all before any training; trajectories that span no
            plane, or a plane without any finite loss.
    """
    runs = prepare_optimizers(settings)
    labels, first = list(runs), next(iter(runs.values()))
    provenance = {
        "task": settings.task,
        "corpus": first.describe()["corpus"]["name"],
        "model": first.describe()["model"],
        "seed": first.training_args.seed,
        "loss_label": first.loss_label,
    }
    check_statistics(settings, first)
    model: nn.Module = copy.deepcopy(first.model)  # before Trainer, which may change how the model is called
    directions = given_directions(settings, model)
    evaluator: AdaFisherTrainer | None = None
    trajectories: dict[str, Trajectory] = {}
    for label in labels:
        trainer, trajectories[label] = train(runs.pop(label), settings, label)
        evaluator = evaluator or trainer
    assert evaluator is not None
    model.to(evaluator.args.device)
    load_buffers(model, trajectories[labels[0]].buffers[-1])
    plane = choose_plane(settings, model, directions, list(trajectories.values()))
    return {**provenance, **evaluate_plane(settings, evaluator, model, plane, trajectories)}


def check_statistics(settings: LandscapeSettings, run: PreparedRun) -> None:
    """Refuse batches of one example, which have no variance, for a model with BatchNorm."""
    sizes = {"--examples": settings.examples, "--per_device_eval_batch_size": run.training_args.eval_batch_size}
    for name, size in sizes.items():
        if size < 2 and batch_norms_with_statistics(run.model):
            raise ValueError(f"{name} is {size}; with BatchNorm, which needs a variance, it must be at least 2")


def given_directions(settings: LandscapeSettings, model: nn.Module) -> list[Tensor] | None:
    """Directions of the plane before filter normalisation; None if they come from the trajectories."""
    if settings.plane == "pca":
        return None
    if settings.plane == "random":
        return random_directions(flat_weights(model).numel(), settings.plane_seed)
    return read_directions(Path(settings.plane), model)


def choose_plane(
    settings: LandscapeSettings, model: nn.Module, directions: list[Tensor] | None, trajectories: Sequence[Trajectory]
) -> Plane:
    """Principal plane of all trajectories, or plane of given directions around the end of the first one."""
    if directions is None:
        start = None if settings.origin == "mean" else trajectories[0].points[0]
        return principal_plane([trajectory.points for trajectory in trajectories], start)
    return normalized_plane(model, trajectories[0].points[-1], directions)


def evaluate_plane(
    settings: LandscapeSettings,
    evaluator: AdaFisherTrainer,
    model: nn.Module,
    plane: Plane,
    trajectories: Mapping[str, Trajectory],
) -> dict[str, Any]:
    """Evaluate losses on the grid, at the projections of the trajectories, and of the snapshots themselves.

    Args:
        settings: Settings of the figure.
        evaluator: Trainer that computes losses.
        model: Model with the buffers to use in the plane, except for BatchNorm's running statistics, which every point
            has of the figure's examples. Its weights are not touched.
        plane: Plane of the figure.
        trajectories: By the optimizers' labels.

    Raises:
        ValueError: No loss on the grid is finite.
    """
    projections = {label: plane.project(trajectory.points) for label, trajectory in trajectories.items()}
    extent = settings.extent if settings.extent is not None else float(plane.explained is None)
    xs, ys = grid_axes([found.coordinates for found in projections.values()], settings.grid, extent)
    vectors: list[Callable[[], Tensor]] = [partial(plane.vector, float(x), float(y)) for y in ys for x in xs]
    for found in projections.values():
        vectors += [partial(plane.vector, x, y) for x, y in found.coordinates.tolist()]
    batches = fixed_batches(evaluator, cast(Any, evaluator.train_dataset), settings.examples)
    jobs = settings.jobs or (torch.get_num_threads() if evaluator.args.device.type == "cpu" else 1)
    more: Any = {"jobs": jobs, "progress": not evaluator.args.disable_tqdm}
    loss = partial(loss_in_plane, evaluator, batches)
    losses = iter(losses_at(model, vectors, loss, label="grid of losses", **more))
    vectors = [point.clone for trajectory in trajectories.values() for point in trajectory.points]
    buffers = [buffers for trajectory in trajectories.values() for buffers in trajectory.buffers]
    loss = partial(mean_loss, evaluator, batches=batches)
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
        "plane": {**_describe_plane(settings, plane), "buffers": _describe_buffers(settings, model, trajectories)},
        "grid": {"x": xs.tolist(), "y": ys.tolist(), "loss": surface},
        "optimizers": paths,
    }


def loss_in_plane(evaluator: AdaFisherTrainer, batches: Sequence[dict[str, Any]], model: nn.Module) -> float:
    """Mean loss of weights off the trajectories, with running statistics recomputed from the batches."""
    if batch_norms_with_statistics(model):  # a single example may have no variance
        several = [[batch] for batch in batches if len(batch["labels"]) > 1]
        refresh_statistics(model, [partial(mean_loss, evaluator, batches=batch) for batch in several])
    return mean_loss(evaluator, model, batches)


def _path(
    trajectory: Trajectory, found: Projection, in_plane: Sequence[float], of_snapshots: Sequence[float]
) -> dict[str, Any]:
    """Numbers of one optimizer."""
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


def _describe_plane(settings: LandscapeSettings, plane: Plane) -> dict[str, Any]:
    if plane.explained is None:
        kind = f"two random directions (seed {settings.plane_seed})" if settings.plane == "random" else settings.plane
        word = "random" if settings.plane == "random" else "given"
        return {
            "kind": f"{kind}, filter-normalised; zero for vectors (biases) and norm layers",
            "centre": f"end of {settings.optimizers[0]}",
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


def _describe_buffers(
    settings: LandscapeSettings, model: nn.Module, trajectories: Mapping[str, Trajectory]
) -> str | None:
    """Description of the buffers of the losses in the plane; None where training changes none."""
    norms = batch_norms_with_statistics(model)
    others = any(
        not torch.equal(value, trajectory.buffers[0][name])
        for trajectory in trajectories.values()
        for name, value in trajectory.buffers[-1].items()
        if name.rpartition(".")[0] not in norms
    )
    parts = ["BatchNorm statistics of these examples at every point"] if norms else []
    parts += [f"buffers of the end of {settings.optimizers[0]}"] if others else []
    return ", ".join(parts) or None
