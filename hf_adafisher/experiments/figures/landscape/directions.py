"""Random or given directions in weight space, with filter normalisation."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from hf_adafisher.experiments.figures.landscape.model_state import trainable
from hf_adafisher.experiments.figures.landscape.plane import Plane, scalar_products
from hf_adafisher.fisher.layers.linear import Conv1DRule
from hf_adafisher.fisher.layers.norm import ScaleAndShiftRule
from hf_adafisher.fisher.layers.registry import find_rule


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
