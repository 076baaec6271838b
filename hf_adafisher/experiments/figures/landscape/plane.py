"""Planes through weight space: principal components of trajectories, random or given directions, projections, grids.

A point of the plane is ``centre + x * direction_1 + y * direction_2``, where centre and directions are vectors of all
d trainable parameters, flattened and concatenated in the order of ``named_parameters``.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from hf_adafisher.experiments.figures.landscape.model_state import trainable
from hf_adafisher.fisher.layers.linear import Conv1DRule
from hf_adafisher.fisher.layers.norm import ScaleAndShiftRule
from hf_adafisher.fisher.layers.registry import find_rule

MARGIN = 0.25
"""Margin around the trajectories, on each side, as a share of their extent along the axis."""
_CHUNK = 1 << 22
"""Largest number of values that are held in float64 at a time."""
_ON_A_LINE = 1e-10
"""Ratio of the second variance to the first below which trajectories have no plane; rounding to float32 is far less."""


@dataclass(frozen=True)
class Projection:
    """Coordinates of points in a plane, and their distances from it.

    Attributes:
        coordinates: (x, y) of the nearest point of the plane, shape (points, 2), float64.
        outside: Share, in [0, 1], of the points' variance (around their own mean) that is not in the plane; nan for
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
        centre: Point with the coordinates (0, 0), shape (d,), float32.
        directions: Directions of the two axes, shape (2, d), float32; not necessarily orthogonal or of length 1.
        explained: Share of the trajectories' variance (or squared distances, see ``principal_plane``) along each axis;
            None if the plane does not come from them.
    """

    centre: Tensor
    directions: Tensor
    explained: tuple[float, float] | None = None

    def vector(self, x: float, y: float) -> Tensor:
        """Weights at a point, shape (d,)."""
        return self.centre.add(self.directions[0], alpha=x).add_(self.directions[1], alpha=y)

    def project(self, points: Tensor) -> Projection:
        """Project by least squares: the (x, y) that minimise ``||point - vector(x, y)||``.

        Args:
            points: Shape (points, d).
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


def principal_plane(trajectories: Sequence[Tensor], start: Tensor | None = None) -> Plane:
    """Plane of the first two principal components of the points of all trajectories.

    Its directions are orthonormal, so that x and y are Euclidean distances in weight space. Without a start, its centre
    is the mean of all points, and it maximises their variance in the plane. With one, it goes through the start and
    maximises the points' squared distances from there, each trajectory's divided by their sum: otherwise the longest
    one alone would determine the plane.

    With the centred (and divided) points as the rows of X, shape (n, d), the eigenvectors u of the small matrix
    ``X X^T`` give the directions, ``X^T u / ||X^T u||``, without any matrix of size (d, d). A direction's sign makes
    the coordinate of largest magnitude among the rows of X positive.

    Args:
        trajectories: Each of shape (points, d).
        start: The centre, shape (d,).

    Raises:
        ValueError: The points do not span a plane.
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
    """Coordinates along both axes of a grid around trajectories.

    Args:
        coordinates: Coordinates of each trajectory, shape (points, 2).
        points: Number of points on each axis.
        extent: Reach at least from -extent to extent; 0 for the trajectories and a margin of ``MARGIN`` alone.

    Returns:
        x and y, each of shape (points,), ascending.
    """
    every = torch.cat(list(coordinates)).numpy()
    low, high = every.min(0), every.max(0)
    margin = MARGIN * np.where(high > low, high - low, 1.0)
    low, high = low - margin, high + margin
    if extent:
        low, high = np.minimum(low, -extent), np.maximum(high, extent)
    return np.linspace(low[0], high[0], points), np.linspace(low[1], high[1], points)


def scalar_products(directions: Tensor) -> Tensor:
    """Scalar products of the directions, shape (2, 2), float64."""
    metric = torch.zeros(2, 2, dtype=torch.float64)
    for part in _slices(directions):
        columns = directions[:, part].double()
        metric += columns @ columns.T
    return metric


def _slices(points: Tensor, count: int | None = None) -> Iterator[slice]:
    """Slices of the columns, so that float64 copies of as many rows stay small."""
    width = max(_CHUNK // max(count or len(points), 1), 1)
    return (slice(start, start + width) for start in range(0, points.shape[1], width))


def normalized_plane(model: nn.Module, centre: Tensor, directions: Sequence[Tensor]) -> Plane:
    """Plane of two given directions, filter-normalised, around given weights.

    Args:
        model: See ``filter_normalized``.
        centre: The weights, shape (d,).
        directions: Two directions, each of shape (d,).

    Raises:
        ValueError: The normalised directions do not span a plane.
    """
    plane = Plane(centre, torch.stack([filter_normalized(model, centre, direction) for direction in directions]))
    check_independent(plane.directions, "after filter normalisation ")
    return plane


def filter_normalized(model: nn.Module, weights: Tensor, direction: Tensor) -> Tensor:
    """Scale each filter of a direction to the norm of the same filter of the weights.

    ``d_ij <- d_ij / ||d_ij|| * ||theta_ij||`` for the j-th filter of the i-th parameter (Li et al. 2018, section 4,
    arXiv 1712.09913), so that a step of length 1 is comparable between layers. A filter holds all weights of one
    output: a row of a linear layer's or an embedding's weight, a column of a transposed one's (transformers' Conv1D,
    transposed convolutions), a convolution's kernels for one output channel. The direction is zero for biases and
    every other vector, and for the parameters of norm layers, as in that paper's pictures.

    Args:
        model: Model with the names and shapes of the parameters; its values are not used.
        weights: Weights theta, shape (d,).
        direction: Direction d, shape (d,).

    Returns:
        A new vector of shape (d,).
    """
    result, start, axes = torch.zeros_like(direction), 0, _filter_axes(model)
    for name, parameter in trainable(model).items():
        part, axis = slice(start, start + parameter.numel()), axes[name]
        start = part.stop
        if axis is not None:
            others = [other for other in range(parameter.dim()) if other != axis]
            own, target = (vector[part].view(parameter.shape) for vector in (direction, weights))
            length = torch.linalg.vector_norm(own, dim=others, keepdim=True)
            scale = torch.linalg.vector_norm(target, dim=others, keepdim=True) / length.where(length > 0, 1.0)
            result[part] = (own * scale).reshape(-1)
    return result


def random_directions(size: int, seed: int) -> list[Tensor]:
    """Draw two vectors of independent standard normal numbers, each of shape (size,)."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=generator) for _ in range(2)]


def read_directions(path: Path, model: nn.Module) -> list[Tensor]:
    """Read two directions from a file of ``torch.save``: two dictionaries from parameter names to tensors.

    Args:
        path: The file.
        model: Model whose trainable parameters the directions belong to.

    Returns:
        Two vectors of shape (d,), float32, without normalisation.

    Raises:
        ValueError: Another kind of file, other names or shapes than the model's, numbers that are not finite, or
            directions that do not span a plane.
        OSError: The file does not exist.
    """
    try:
        pair = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise ValueError(f"{path} is not a file of torch.save with tensors alone: {error}") from error
    if not (isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(one, dict) for one in pair)):
        raise ValueError(f"{path} must hold two directions: [{{name: tensor, ...}}, {{name: tensor, ...}}]")
    directions, parameters = [], trainable(model)
    for index, given in enumerate(pair, 1):
        wrong = sorted(map(str, set(given) ^ set(parameters)))
        if wrong:
            fault = "is missing" if wrong[0] in parameters else "is no trainable parameter of this model"
            raise ValueError(f"{path}, direction {index}: {wrong[0]!r} {fault}; give exactly the model's parameters")
        for name, parameter in parameters.items():
            shape = tuple(given[name].shape) if isinstance(given[name], Tensor) else type(given[name]).__name__
            if shape != tuple(parameter.shape):
                raise ValueError(
                    f"{path}, direction {index}: {name!r} is {shape}, the model's {tuple(parameter.shape)}: these "
                    "directions are another model's"
                )
        directions.append(torch.cat([given[name].float().reshape(-1) for name in parameters]))
    check_independent(torch.stack(directions), f"{path}: ")
    return directions


def check_independent(directions: Tensor, where: str) -> None:
    """Check that two directions, shape (2, d), span a plane.

    Raises:
        ValueError: They do not; the message begins with ``where``.
    """
    metric = scalar_products(directions)
    squares = metric[0, 0] * metric[1, 1]
    if not (squares > 0 and torch.isfinite(metric).all() and torch.linalg.det(metric) > 1e-8 * squares):
        raise ValueError(f"{where}the two directions are parallel, zero or not finite: they span no plane")


def _filter_axes(model: nn.Module) -> dict[str, int | None]:
    """Filter axis of each trainable parameter; None for parameters whose directions are zero."""
    owners = {id(parameter): module for module in model.modules() for parameter in module.parameters(recurse=False)}
    axes: dict[str, int | None] = {}
    for name, parameter in trainable(model).items():
        module = owners[id(parameter)]
        rule = find_rule(module)
        transposed = isinstance(rule, Conv1DRule) or isinstance(module, nn.modules.conv._ConvTransposeNd)
        is_zero = parameter.dim() < 2 or isinstance(rule, ScaleAndShiftRule)
        axes[name] = None if is_zero else int(transposed)
    return axes
