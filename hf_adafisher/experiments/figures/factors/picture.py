"""Pictures of Kronecker factors: disks and spectra of one layer, and diagonal dominance of all layers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from hf_adafisher.experiments.drawing import COLOURS, Style, empty_figure, new_figure, save_figure
from hf_adafisher.experiments.figures.factors.full_factors import SIDES, SYMBOLS, DiagonalDominance
from hf_adafisher.experiments.figures.factors.study import DrawnFactor, FactorStudy, MeasuredLayer
from hf_adafisher.experiments.report.tables import Table
from hf_adafisher.fisher.diagonals import INPUT

_LAYERS = 60
"""Largest number of layers in the picture of all layers; the JSON has the others too."""
_RESOLUTION = 1e-8
"""Smallest eigenvalue to show, relative to the largest; below are rounding errors of float32 sums."""
_NAMES = {INPUT: "inputs", SIDES[1]: "output gradients"}
_UNITS = {INPUT: "squared input", SIDES[1]: "squared gradient, nats²"}
_MANY = 500
"""Largest number of marks that the SVG has as vectors."""


def write_factor_pictures(study: FactorStudy, output: Path) -> list[Path]:
    """Draw the layer's disks and spectra and, if all layers were measured, their shares of energy.

    Args:
        study: The factors.
        output: SVG or PNG; the numbers stand beside it as JSON, and the picture of all layers as ``NAME_layers``.

    Returns:
        The files.

    Raises:
        ImportError: matplotlib is not installed.
    """
    files = save_figure(layer_figure(study), output, study_numbers(study))
    if study.settings.all_layers:
        step = max(study.layers)
        figure = layers_figure(study.layers[step], f"{study.title}, step {step}")
        rows = [_layer_numbers(layer) for layer in study.layers[step]]
        path = output.with_name(f"{output.stem}_layers{output.suffix}")
        files += save_figure(figure, path, {"title": study.title, "step": step, "layers": rows})
    return files


def layer_table(layers: Sequence[MeasuredLayer]) -> Table:
    """Table of the diagonal dominance of every layer's factors, shares in percent."""
    columns = ["layer", "kind", "positions"]
    for symbol in SYMBOLS.values():
        columns += [f"d of {symbol}", f"{symbol} on its diagonal (if independent)"]
        columns += [f"rows of {symbol} dominated", f"rms correlation of {symbol}"]
    rows = []
    for layer in layers:
        cells = [layer.name, layer.kind, f"{layer.positions:,}"]
        for side in SIDES:
            found = layer.dominance.get(side)
            cells += [str(layer.dimensions[side]), *(("-",) * 3 if found is None else _cells(found))]
        rows.append([*cells, layer.note])
    return Table([*columns, "note"], rows)


def _cells(found: DiagonalDominance) -> tuple[str, str, str]:
    shares = f"{_percent(found.energy_share)} ({_percent(found.independent_share)})"
    return shares, _percent(found.dominant_rows), _number(found.mean_correlation)


def study_numbers(study: FactorStudy) -> dict[str, Any]:
    """Numbers of the pictures for the JSON; eigenvalues and disks in units of the factor (see the axes)."""
    settings, names = study.settings, ("steps", "examples", "noise", "max_dim", "all_layers", "disks")
    options = {"layer": study.layer, **{name: getattr(settings, name) for name in names}}
    return {
        "title": study.title,
        "options": options,
        "examples": study.examples,
        "factors": [_factor_numbers(factor, study.settings.disks) for factor in study.drawn],
        "layers": {str(step): [_layer_numbers(layer) for layer in rows] for step, rows in study.layers.items()},
        "skipped": dict(study.skipped),
    }


def _factor_numbers(factor: DrawnFactor, disks: int) -> dict[str, Any]:
    spectrum, drawn = factor.spectrum, _largest(factor, disks)
    noisy = spectrum.noisy
    return {
        "step": factor.step,
        "factor": SYMBOLS[factor.side],
        "diagonal_by_nature": factor.by_nature,
        **asdict(factor.dominance),
        "kaiser_line": spectrum.kaiser,
        "eigenvalues_above": spectrum.above(spectrum.eigenvalues),
        "noise_sigma": spectrum.sigma,
        "noisy_eigenvalues_above": None if noisy is None else spectrum.above(noisy),
        "noisy_eigenvalues_below_zero": None if noisy is None else int((noisy < 0.0).sum()),
        "leading_shift": spectrum.leading_shift,
        "eigenvalues": spectrum.eigenvalues.tolist(),
        "noisy_eigenvalues": None if noisy is None else noisy.tolist(),
        "diagonal": spectrum.diagonal.tolist(),
        "disks_drawn": {"centres": factor.centres[drawn].tolist(), "radii": factor.radii[drawn].tolist()},
    }


def _layer_numbers(layer: MeasuredLayer) -> dict[str, Any]:
    factors = {SYMBOLS[side]: asdict(found) for side, found in layer.dominance.items()}
    dimensions = {SYMBOLS[side]: size for side, size in layer.dimensions.items()}
    about = {"layer": layer.name, "kind": layer.kind, "positions": layer.positions, "dimensions": dimensions}
    return {**about, "factors": factors, "note": layer.note}


def _largest(factor: DrawnFactor, disks: int) -> torch.Tensor:
    """Indices of the disks to draw: those with the largest radii."""
    return factor.radii.argsort(descending=True, stable=True)[:disks]


def _percent(share: float) -> str:
    return "-" if math.isnan(share) else f"{share:.1%}"


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3f}"


def layer_figure(study: FactorStudy) -> Any:
    """Draw a row for each step and factor: disks in the complex plane on the left, the spectrum on the right."""
    rows = len(study.drawn)
    figure, panels = new_figure(rows, 2, (11.5, 3.4 * rows + 0.9), sharey=False)
    figure.suptitle(f"Kronecker factors of {study.layer}\n{study.title}, {study.examples:,} examples", fontsize=11)
    for factor, left, right in zip(study.drawn, panels[::2], panels[1::2], strict=True):
        _draw_disks(left, factor, study.settings.disks)
        _draw_spectrum(right, factor)
    handles: dict[str, Any] = {}
    for axes in panels[::2]:
        handles |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=len(handles), fontsize=8)
    return figure


def _draw_disks(axes: Any, factor: DrawnFactor, disks: int) -> None:
    """Draw disks that reach zero with dashes: their rows are not dominated by their diagonal entry."""
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Circle

    drawn = _largest(factor, disks)
    reaching = (factor.radii >= factor.centres)[drawn]
    for group, colour, dash, label in (
        (reaching, COLOURS[5], "--", "disks that reach zero"),
        (~reaching, COLOURS[0], "-", "disks that do not"),
    ):
        places = drawn[group]
        pairs = zip(factor.centres[places].tolist(), factor.radii[places].tolist(), strict=True)
        circles = [Circle((centre, 0.0), radius) for centre, radius in pairs]
        style: Style = {"facecolor": "none", "edgecolor": colour, "linestyle": dash, "linewidth": 0.7, "alpha": 0.6}
        axes.add_collection(PatchCollection(circles, **style))
        axes.plot([], [], dash, color=colour, label=label)
    _draw_real_axis(axes, factor)
    axes.set_aspect("equal", adjustable="datalim")
    axes.autoscale_view()
    found = factor.dominance
    size = f"{found.dimension:,} × {found.dimension:,}" + (", diagonal by nature" if factor.by_nature else "")
    shown = "" if len(drawn) == len(factor.centres) else f", the {len(drawn)} largest disks"
    title = f"step {factor.step}: {SYMBOLS[factor.side]} of the {_NAMES[factor.side]}, {size}{shown}\n"
    title += f"rows dominated by their diagonal: {_percent(found.dominant_rows)}, "
    title += f"rms correlation: {_number(found.mean_correlation)}"
    axes.set_title(title, fontsize=9)
    axes.set(xlabel=f"real part ({_UNITS[factor.side]})", ylabel="imaginary part")


def _draw_real_axis(axes: Any, factor: DrawnFactor) -> None:
    """Draw the eigenvalues with and without noise, and the centres of all disks."""
    spectrum = factor.spectrum
    zero, pixels = torch.zeros(len(factor.centres)), {"rasterized": len(factor.centres) > _MANY}
    style = {"color": COLOURS[1], "markersize": 6, "zorder": 3, **pixels}
    axes.plot(spectrum.eigenvalues, zero, "x", label="eigenvalues", **style)
    if spectrum.noisy is not None:
        style = {"color": COLOURS[4], "markersize": 7, "markerfacecolor": "none", "markeredgewidth": 0.7, **pixels}
        axes.plot(spectrum.noisy, zero, "o", label="eigenvalues with noise", zorder=2, **style)
    style = {"color": COLOURS[2], "markersize": 11, "zorder": 4, **pixels}
    axes.plot(factor.centres, zero, "|", label="centres: diagonal entries", **style)
    axes.axvline(0.0, color="black", linewidth=0.8)


def _draw_spectrum(axes: Any, factor: DrawnFactor) -> None:
    spectrum, found = factor.spectrum, factor.dominance
    lines: list[tuple[Any, str, dict[str, Any]]] = [
        (spectrum.diagonal, "the diagonal alone", {"color": COLOURS[2], "linestyle": ":", "linewidth": 2.0}),
        (spectrum.eigenvalues, "eigenvalues", {"color": COLOURS[1], "linestyle": "-", "linewidth": 1.6}),
    ]
    if spectrum.noisy is not None:
        below = int((spectrum.noisy < 0.0).sum())
        label = f"with noise, sigma {spectrum.sigma:.1e}" + (f" ({below} below zero)" if below else "")
        lines.append((spectrum.noisy, label, {"color": COLOURS[4], "linestyle": "--", "linewidth": 1.1}))
    top = max(float(values[0]) for values, *_ in lines)
    for values, label, style in lines:
        shown = values[values > _RESOLUTION * top]
        marker = "." if len(values) <= 64 else ""
        axes.plot(range(1, len(shown) + 1), shown, label=label, marker=marker, **style)
    kept = spectrum.above(spectrum.eigenvalues)
    axes.axhline(spectrum.kaiser, color="grey", linewidth=1.0, label=f"mean eigenvalue (Kaiser): {kept} above")
    if top > 0.0:
        axes.set_yscale("log")
    title = f"{_percent(found.energy_share)} of the energy on the diagonal"
    if not factor.by_nature:
        title += f" ({_percent(found.independent_share)} if independent)\n"
        title += f"noise moves the eigenvalues above the line by at most {spectrum.leading_shift:.2%}"
    axes.set_title(title, fontsize=9)
    axes.set(xlabel="rank of the eigenvalue", ylabel=_UNITS[factor.side])
    axes.legend(fontsize=7, loc="best")


def layers_figure(layers: Sequence[MeasuredLayer], title: str) -> Any:
    """Draw two bars a layer, one for each factor, with a black tick for independent coordinates."""
    shown = layers[:_LAYERS]
    figure = empty_figure((9.0, 1.6 + 0.46 * len(shown)))
    axes = figure.subplots()
    styles: Mapping[str, dict[str, Any]] = dict(
        zip(SIDES, ({"color": COLOURS[0]}, {"color": COLOURS[5], "hatch": "////", "edgecolor": "white"}), strict=True)
    )
    for side, offset in zip(SIDES, (-0.2, 0.2), strict=True):
        bars = [(place + offset, layer.dominance.get(side)) for place, layer in enumerate(shown)]
        found = [(place, measure) for place, measure in bars if measure is not None and measure.energy_share >= 0.0]
        places = [place for place, _ in found]
        axes.barh(
            places,
            [measure.energy_share for _, measure in found],
            height=0.36,
            label=f"{SYMBOLS[side]} of the {_NAMES[side]}",
            **styles[side],
        )
        ticks = [measure.independent_share for _, measure in found]
        label = "if coordinates were independent" if side == SIDES[-1] else None
        axes.plot(ticks, places, "|", color="black", markersize=11, markeredgewidth=2.0, label=label)
        for place, measure in bars:
            if measure is None:
                text = f"{SYMBOLS[side]} longer than --max_dim"
                axes.text(0.01, place, text, va="center", fontsize=7, color="dimgrey")
    names = [f"{layer.name}  {layer.dimensions[SIDES[0]]}→{layer.dimensions[SIDES[1]]}" for layer in shown]
    axes.set_yticks(range(len(shown)), names, fontsize=8)
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.set_xlim(0.0, 1.02)
    axes.grid(axis="x", alpha=0.3)
    more = f" (the first {len(shown)} of {len(layers)} layers)" if len(shown) < len(layers) else ""
    axes.set(xlabel=r"share of the energy on the diagonal, $\sum a_{ii}^2\ /\ \sum a_{ij}^2$")
    figure.suptitle(f"How diagonal are the Kronecker factors?{more}\n{title}", fontsize=11)
    figure.legend(loc="outside lower center", ncols=3, fontsize=8)
    return figure
