"""Picture of several optimizers' trajectories over the loss of a plane."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from hf_adafisher.experiments.drawing import DASHES, SEQUENTIAL, Style, empty_figure, optimizer_styles

COLOUR_MAP = f"{SEQUENTIAL}_r"
"""Light for low losses, so that the lines, which end there, stand out."""
LEVELS = 16
_CLIPPED_SHARE = 0.2
_MARKS = 8
"""Approximate number of marks on a line."""
_HALF_WIDTH = 103
"""Number of the legend's characters that fit into half of the figure."""
_TURN = 30.0
"""Angle between the view and the steepest ascent, in degrees."""
Grid = tuple[np.ndarray, np.ndarray, np.ndarray]


def contour_levels(losses: np.ndarray, start: float, count: int = LEVELS) -> np.ndarray:
    """Contour levels, spaced geometrically above the lowest loss.

    Their heights above the lowest loss grow by equal factors, from a hundredth of the highest one's. A fifth of the
    grid exceeds the highest level, which is at least the loss at the start: a corner that diverges hides no valley.

    Args:
        losses: Losses of the grid; those that are not finite do not count.
        start: Loss at the start of the trajectories.
        count: Number of levels, at least 3.

    Returns:
        Ascending losses, shape (count,).
    """
    finite = losses[np.isfinite(losses)]
    low, high = finite.min(), np.quantile(finite, 1 - _CLIPPED_SHARE)
    high = max(high, start) if np.isfinite(start) else high
    if not high > low:
        high = low + max(abs(low), 1.0) * 1e-6
    return np.concatenate([[low], low + (high - low) * np.geomspace(0.01, 1.0, count - 1)])


def draw_landscape(numbers: Mapping[str, Any]) -> Any:
    """Draw contours of the losses with the trajectories, and beside them the surface with the trajectories on it.

    A white star marks the start, a large mark the end of each trajectory. The surface is cut off at the highest level.
    The legend has the true losses of both beside those in the plane: weights off the plane may have quite another
    loss than their projection, so that a path may seem to climb where its loss fell. For a model with running
    statistics (BatchNorm), the legend names those of the plane's losses.

    Args:
        numbers: Result of ``trace_landscape``, or the content of the JSON file.

    Returns:
        A figure of matplotlib.
    """
    from matplotlib.colors import BoundaryNorm
    from matplotlib.patches import Patch

    xs, ys, losses = (np.array(numbers["grid"][key], dtype=float) for key in ("x", "y", "loss"))
    grid = (xs, ys, losses)
    paths = {label: _Path(path) for label, path in numbers["optimizers"].items()}
    levels = contour_levels(losses, next(iter(paths.values())).loss[0])
    look: Style = {"cmap": COLOUR_MAP, "norm": BoundaryNorm(levels, 256, extend="max")}
    figure = empty_figure((12, 5.4))
    cells = figure.add_gridspec(1, 2, width_ratios=(1.15, 1))
    flat = figure.add_subplot(cells[0])
    lifted = figure.add_subplot(cells[1], projection="3d", computed_zorder=False)
    filled = _draw_contours(flat, grid, levels, look)
    bar = figure.colorbar(filled, ax=flat, pad=0.02, fraction=0.05)
    bar.set_ticks(levels[::2], labels=[f"{level:.3g}" for level in levels[::2]])
    bar.set_label(f"{numbers['loss_label']}, levels closer near the lowest")
    _draw_surface(lifted, grid, levels, look)
    styles = optimizer_styles(paths)
    for index, (label, path) in enumerate(paths.items()):
        dashes = {"linestyle": DASHES[index % len(DASHES)]}  # where one path lies on another, both are seen
        path.draw(flat, lifted, levels[-1], styles[label] | dashes, label)
    _mark_start(flat, lifted, next(iter(paths.values())), levels[-1])
    flat.set_xlabel(numbers["plane"]["axes"][0], fontsize=9)
    flat.set_ylabel(numbers["plane"]["axes"][1], fontsize=9)
    lifted.set(xlabel="first axis", ylabel="second axis")
    lifted.set_title(f"height: {numbers['loss_label']}", fontsize=9)  # a label of the axis would meet the colour bar
    handles, labels = flat.get_legend_handles_labels()
    if numbers["plane"]["buffers"] is not None:
        handles.append(Patch(facecolor=filled.cmap(0.5), edgecolor="black"))
        labels.append(f"in this plane: {numbers['plane']['buffers']}; at ends: their own")
    columns = 2 if max(map(len, labels)) <= _HALF_WIDTH else 1
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=8)
    figure.suptitle(_title(numbers), fontsize=11)
    return figure


class _Path:
    """Drawing of one optimizer's trajectory."""

    def __init__(self, numbers: Mapping[str, Any]) -> None:
        self.x, self.y, self.loss = (np.array(numbers[key], dtype=float) for key in ("x", "y", "loss_in_plane"))
        self.start, self.end = numbers["loss_of_snapshot"][0], numbers["loss_of_snapshot"][-1]
        self.outside = numbers["variance_outside_of_plane"]

    def draw(self, flat: Any, lifted: Any, top: float, style: Style, name: str) -> None:
        """Draw line, marks and end on both panels; the legend has the share of variance outside of the plane."""
        from matplotlib.patheffects import Normal, Stroke

        label = f"{name}: loss at its end {_number(self.end)}, in this plane {_number(self.loss[-1])}"
        if self.outside is not None and np.isfinite(self.outside):
            label += f"; {self.outside:.0%} of its variance lies outside"
        style = style | {"path_effects": [Stroke(linewidth=3.5, foreground="white"), Normal()], "linewidth": 1.8}
        style |= {"markevery": max(len(self.x) // _MARKS, 1), "zorder": 5}
        end = style | {"markersize": 10, "markeredgecolor": "black", "zorder": 7, "path_effects": []}
        heights = np.minimum(self.loss, top)
        for axes, points, more in ((flat, (self.x, self.y), {"label": label}), (lifted, (self.x, self.y, heights), {})):
            axes.plot(*points, **style, **more)
            axes.plot(*(values[-1:] for values in points), **end)


def _number(value: float | None) -> str:
    return "not finite" if value is None or not np.isfinite(value) else f"{value:.3g}"


def _mark_start(flat: Any, lifted: Any, path: _Path, top: float) -> None:
    star: Style = {"marker": "*", "markersize": 17, "color": "white", "markeredgecolor": "black", "zorder": 8}
    star["linestyle"] = "none"
    label = f"start of all: loss {_number(path.start)}, in this plane {_number(path.loss[0])}"
    flat.plot(path.x[:1], path.y[:1], label=label, **star)
    lifted.plot(path.x[:1], path.y[:1], np.minimum(path.loss[:1], top), **star)


def _title(numbers: Mapping[str, Any]) -> str:
    last = max(max(path["steps"]) for path in numbers["optimizers"].values())
    model = numbers["model"]
    name = model.get("name", model["type"])
    return (
        f"{numbers['corpus']}, {name} ({model['parameters']:,} parameters), {last} steps; "
        f"mean loss of {numbers['examples']} training examples"
    )


def _draw_contours(axes: Any, grid: Grid, levels: np.ndarray, look: Style) -> Any:
    xs, ys, losses = grid
    masked = np.ma.masked_invalid(losses)
    axes.set_facecolor("0.75")  # seen where losses are masked
    filled = axes.contourf(xs, ys, masked, levels=levels, extend="max", **look)
    axes.contour(xs, ys, masked, levels=levels, colors="black", linewidths=0.3, alpha=0.5)
    if np.ma.getmaskarray(masked).any():
        axes.set_title("grey: the loss is not finite", fontsize=9)
    return filled


def _draw_surface(axes: Any, grid: Grid, levels: np.ndarray, look: Style) -> None:
    xs, ys, losses = grid
    heights = np.where(np.isfinite(losses), np.minimum(losses, levels[-1]), np.nan)
    axes.plot_surface(
        *np.meshgrid(xs, ys), heights, rstride=1, cstride=1, linewidth=0, antialiased=False, zorder=1, **look
    )
    # Seen from where the surface is low, so that its hills stand behind the valley.
    rises = np.nan_to_num(heights - np.nanmean(heights))
    across, along = (np.sum(rises.mean(axis) * np.linspace(-1, 1, rises.shape[1 - axis])) for axis in (0, 1))
    axes.view_init(elev=38, azim=np.degrees(np.arctan2(-along, -across)) + _TURN)
    axes.set_box_aspect((1.25, 1.25, 0.8), zoom=0.95)
    for axis in "xyz":
        axes.locator_params(axis=axis, nbins=5)
