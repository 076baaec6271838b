"""The loss in a plane through the space of all weights: the plane, trajectories in it, and the loss at its points.

A point of the plane is ``centre + x * direction_1 + y * direction_2``, where centre and directions are vectors of all
d trainable parameters, flattened in the order of ``named_parameters`` and one after the other.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from hf_adafisher.experiments.figures.buffers import load_buffers

MARGIN = 0.25
"""Room around the trajectories, on each side, as a share of their extent along the axis."""
_CHUNK = 1 << 22
"""Numbers that are held in float64 at a time."""
_ON_A_LINE = 1e-10
"""Second variance over the first below which trajectories have no plane; rounding to float32 stays far below."""


@dataclass(frozen=True)
class Projection:
    """Where points lie in a plane, and how far from it.

    Attributes:
        coordinates: (x, y) of the nearest point of the plane, shape (points, 2), float64.
        outside: share, in [0, 1], of the points' variance (around their own mean) that is not in the plane; nan for
            points that are all the same.
        distances: Euclidean distance of each point from the plane, shape (points,), float64.
    """

    coordinates: Tensor
    outside: float
    distances: Tensor


@dataclass(frozen=True)
class Plane:
    """A plane through weight space.

    Attributes:
        centre: point with the coordinates (0, 0), shape (d,), float32.
        directions: of the two axes, shape (2, d), float32; not necessarily orthogonal or of length 1.
        explained: how much of the trajectories lies along each axis, as shares of what ``principal_plane`` holds
            most of; None if the plane does not come from them.
    """

    centre: Tensor
    directions: Tensor
    explained: tuple[float, float] | None = None

    def vector(self, x: float, y: float) -> Tensor:
        """The weights at a point, shape (d,)."""
        return self.centre.add(self.directions[0], alpha=x).add_(self.directions[1], alpha=y)

    def project(self, points: Tensor) -> Projection:
        """Least squares: the (x, y) that minimise ``||point - vector(x, y)||``.

        Args:
            points: shape (points, d).
        """
        metric = scalar_products(self.directions)
        moments = torch.zeros(len(points), 2, dtype=torch.float64)
        for part in _slices(points):
            moments += (points[:, part].double() - self.centre[part].double()) @ self.directions[:, part].double().T
        coordinates = torch.linalg.solve(metric, moments.T).T
        total, outside, squares = 0.0, 0.0, torch.zeros(len(points), dtype=torch.float64)
        for part in _slices(points):
            values = points[:, part].double()
            rest = values - self.centre[part].double() - coordinates @ self.directions[:, part].double()
            squares += rest.square().sum(1)
            outside += (rest - rest.mean(0)).square().sum().item()
            total += (values - values.mean(0)).square().sum().item()
        return Projection(coordinates, outside / total if total else float("nan"), squares.sqrt())


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable parameters by name; one with several names (tied weights) has its first."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def flat_weights(model: nn.Module) -> Tensor:
    """A copy of the trainable parameters in one float32 vector on the CPU, shape (d,)."""
    parts = [parameter.detach().to("cpu", torch.float32).reshape(-1) for parameter in trainable(model).values()]
    return torch.cat([torch.empty(0), *parts])


def load_weights(model: nn.Module, vector: Tensor) -> None:
    """Gives the trainable parameters these values: the inverse of ``flat_weights``."""
    parameters = list(trainable(model).values())
    with torch.no_grad():
        for parameter, part in zip(parameters, vector.split([p.numel() for p in parameters]), strict=True):
            parameter.copy_(part.view_as(parameter))


def principal_plane(trajectories: Sequence[Tensor], start: Tensor | None = None) -> Plane:
    """The plane that holds most of all points of all trajectories: their principal components.

    Its directions are orthonormal, so that x and y are Euclidean distances in weight space. Without a start, its centre
    is the mean of all points, and it holds most of their variance. With one, it goes through the start and holds most
    of the points' squared distances from there, each trajectory's divided by their sum: or else one that goes far
    would have the plane for itself.

    With the centred (and divided) points as the rows of X, shape (n, d), the eigenvectors u of the small matrix
    ``X X^T`` give the directions, ``X^T u / ||X^T u||``; nothing of size (d, d) is made. A direction's sign is that
    with which the row of X of its largest absolute coordinate has a positive one.

    Args:
        trajectories: each of shape (points, d).
        start: the centre, shape (d,).

    Raises:
        ValueError: points that do not span a plane.
    """
    count, size = sum(map(len, trajectories)), trajectories[0].shape[1]
    parts = list(_slices(trajectories[0], count))
    if start is None:
        means = [torch.cat([points[:, part] for points in trajectories]).double().mean(0) for part in parts]
        centre, scales = torch.cat(means), [1.0] * len(trajectories)
    else:
        centre = start.double()
        sizes = [sum((p[:, part].double() - centre[part]).square().sum() for part in parts) for p in trajectories]
        scales = [float(size) ** -0.5 if size else 0.0 for size in sizes]

    def rows(part: slice) -> Tensor:
        own = zip(trajectories, scales, strict=True)
        return torch.cat([(points[:, part].double() - centre[part]) * scale for points, scale in own])

    gram = torch.zeros(count, count, dtype=torch.float64)
    for part in parts:
        gram += rows(part) @ rows(part).T
    values, vectors = torch.linalg.eigh(gram)
    values, vectors = values.flip(0)[:2], vectors.flip(1)[:, :2]
    if count < 3 or not values[1] > _ON_A_LINE * values[0]:
        raise ValueError(
            "the trajectories lie on a line, or do not move at all, so that no plane is theirs: take more steps, "
            "larger learning rates, further optimizers, or --plane random"
        )
    vectors *= vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()
    directions = torch.empty(2, size)
    for part in parts:
        directions[:, part] = ((vectors.T @ rows(part)) / values.sqrt()[:, None]).float()
    first, second = (values / gram.trace()).tolist()
    return Plane(centre.float(), directions, (first, second))


def grid_axes(coordinates: Sequence[Tensor], points: int, extent: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """The numbers along both axes of a grid around trajectories.

    Args:
        coordinates: of each trajectory, shape (points, 2).
        points: on each axis.
        extent: reach at least from -extent to extent; 0 for the trajectories and a margin of ``MARGIN`` alone.

    Returns:
        x and y, each of shape (points,), ascending.
    """
    every = torch.cat(list(coordinates)).numpy()
    low, high = every.min(0), every.max(0)
    room = MARGIN * np.where(high > low, high - low, 1.0)
    low, high = low - room, high + room
    if extent:
        low, high = np.minimum(low, -extent), np.maximum(high, extent)
    return np.linspace(low[0], high[0], points), np.linspace(low[1], high[1], points)


def losses_at(
    model: nn.Module,
    vectors: Sequence[Callable[[], Tensor]],
    loss: Callable[[nn.Module], float],
    *,
    buffers: Sequence[Mapping[str, Tensor]] | None = None,
    jobs: int = 1,
    label: str = "losses",
    progress: bool = True,
) -> list[float]:
    """The loss of a model with given weights, for many of them.

    Every job is a thread that works on a copy of its own in evaluation mode, so the model itself is not touched, and
    torch computes with one thread in each of them: losses do not depend on the number of jobs. Threads, not processes:
    torch lets others work while it computes, and a new process would first import everything again.

    Args:
        model: its frozen parameters are used as they are.
        vectors: each gives the trainable parameters, shape (d,).
        loss: of a model; called by several threads at a time, on different models.
        buffers: those (BatchNorm's running statistics) that go with each vector; None for the model's own with all.
        jobs: threads.
        label: of the progress bar.
        progress: show it.

    Returns:
        One loss for each vector, in their order; some may be infinite or nan.
    """
    copies = [copy.deepcopy(model).eval() for _ in range(min(jobs, len(vectors)))]
    results = [float("nan")] * len(vectors)

    def work(index: int) -> int:
        own = copies.pop()
        try:
            load_weights(own, vectors[index]())
            if buffers is not None:
                load_buffers(own, buffers[index])
            results[index] = float(loss(own))
        finally:
            copies.append(own)
        return index

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # threads that start later take it over
    pool = ThreadPoolExecutor(max(len(copies), 1))
    try:
        futures = [pool.submit(work, index) for index in range(len(vectors))]
        for future in tqdm(as_completed(futures), desc=label, total=len(futures), disable=not progress):
            future.result()
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)
    return results


def scalar_products(directions: Tensor) -> Tensor:
    """Scalar products of the directions, shape (2, 2), float64."""
    metric = torch.zeros(2, 2, dtype=torch.float64)
    for part in _slices(directions):
        columns = directions[:, part].double()
        metric += columns @ columns.T
    return metric


def _slices(points: Tensor, count: int | None = None) -> Iterator[slice]:
    """Parts of the columns, so that float64 copies of as many rows stay small."""
    width = max(_CHUNK // max(count or len(points), 1), 1)
    return (slice(start, start + width) for start in range(0, points.shape[1], width))
