"""Heat maps of the histograms of a layer's Fisher diagonal and of Adam's second moment."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hf_adafisher.experiments.drawing import COLOURS, SEQUENTIAL, new_figure, save_figure

_SHADES = 1e4
"""Largest ratio of densities in the colour map; smaller densities have its last colour."""


def densities(panel: dict[str, Any], bins_per_decade: int) -> np.ndarray:
    """Share of a row's values in each bin, divided by the bin's width in decades; shape (rows, bins)."""
    rows = panel["rows"]
    counts = np.array([row["counts"] for row in rows], dtype=float)
    totals = np.array([sum(row["counts"]) + row["zeros"] + row["not_finite"] for row in rows], dtype=float)
    return counts / totals[:, None] * bins_per_decade


def draw_histograms(found: dict[str, Any], output: Path) -> list[Path]:
    """Draw both panels as heat maps with the quartiles.

    Args:
        found: Result of ``collect_histograms``.
        output: SVG or PNG; the numbers stand beside it as JSON.

    Returns:
        The two files.

    Raises:
        ValueError: No value of a panel is above zero.
    """
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import MaxNLocator

    shades = []
    for panel in found["panels"]:
        if len(panel["log10_edges"]) < 2:
            raise ValueError(f"no value of {panel['optimizer']} is finite and above zero: there is nothing to draw")
        shades.append(densities(panel, found["bins_per_decade"]))
    top, least = max(s.max() for s in shades), min(s[s > 0].min() for s in shades)
    figure, axes = new_figure(1, 2, (11.5, 5.4))
    scale = LogNorm(max(least, top / _SHADES), top * (1 + 1e-9), clip=True)
    for axis, panel, shade in zip(axes, found["panels"], shades, strict=True):
        steps = [row["step"] for row in panel["rows"]]
        edges = [0, *steps]
        visible = np.ma.masked_equal(shade, 0.0)
        mesh = axis.pcolormesh(
            10.0 ** np.array(panel["log10_edges"]), edges, visible, norm=scale, cmap=SEQUENTIAL, rasterized=True
        )
        _draw_quartiles(axis, panel["rows"])
        axis.set(xscale="log", ylim=(0, found["steps"]))
        axis.set_title(panel_title(panel), fontsize=10)
    fisher, moment = axes
    damping = found["panels"][0]["damping"]
    fisher.axvline(damping, color="black", linestyle=":", linewidth=1.2, label=f"damping λ = {damping:g}")
    fisher.set(xlabel=r"Fisher diagonal $\tilde F$ (normalised, damped; no unit)", ylabel="optimizer step")
    moment.set(xlabel=r"second moment $\hat v$ (bias-corrected; squared loss per squared weight)")
    fisher.yaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(*fisher.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=9)
    figure.colorbar(mesh, ax=axes, label="share of values per decade (blank: none)")
    shape = " x ".join(map(str, found["shape"]))
    figure.suptitle(f"{found['layer']}.weight ({shape}), {found['model']['type']} on {found['corpus']['name']}")
    return save_figure(figure, output, found)


def _draw_quartiles(axis: Any, rows: Sequence[dict[str, Any]]) -> None:
    from matplotlib.patheffects import withStroke

    rows = [row for row in rows if row["quartiles"]]
    halo = [withStroke(linewidth=3.0, foreground="white")]  # visible on both ends of the colour map
    for index, (label, dash) in enumerate((("quartiles", "--"), ("median", "-"), (None, "--")), 1):
        points = [row["quartiles"][index] for row in rows], [row["step"] for row in rows]
        axis.plot(*points, color=COLOURS[1], linestyle=dash, linewidth=1.4, label=label, path_effects=halo)


def panel_title(panel: dict[str, Any]) -> str:
    """Title of a panel: the optimizer, and the values that are not drawn."""
    lines = [f"{panel['optimizer']}, learning rate {panel['learning_rate']:g}"]
    for key, what in (("zeros", "zero"), ("not_finite", "not finite")):
        shares = [row[key] / (sum(row["counts"]) + row["zeros"] + row["not_finite"]) for row in panel["rows"]]
        if max(shares) > 0:
            lines.append(f"{what}, not drawn: {min(shares):.1%} to {max(shares):.1%} of the values")
    if panel["diverged_at"] is not None:
        lines.append(f"diverged at step {panel['diverged_at']}")
    if len(lines) == 1:
        lines.append("all values drawn")
    return "\n".join(lines)


def spread_in_decades(row: dict[str, Any]) -> tuple[float, float]:
    """Interquartile and full range of a row's values, as log10 of the ratios; nan without values."""
    if not row["quartiles"]:
        return math.nan, math.nan
    smallest, first, _, third, largest = row["quartiles"]
    return math.log10(third / first), math.log10(largest / smallest)
