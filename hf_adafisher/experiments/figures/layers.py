"""Curvature record of a run, and its picture: maps of layers and steps, and a ranking by relative step size."""

from __future__ import annotations

import fnmatch
import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hf_adafisher.experiments.drawing import COLOURS, SEQUENTIAL, empty_figure, save_figure
from hf_adafisher.optimizers.diagnostics.layer_curvature import NUMBERS
from hf_adafisher.training.curvature_callback import CURVATURE_FILE, read_curvature


@dataclass(frozen=True)
class CurvatureRecord:
    """Curvature record as tables of L layers and T refreshes.

    Attributes:
        layers: Names of the parameters, in the model's order.
        steps: Steps at which the factors were refreshed, ascending.
        tables: Array (L, T) for each of ``NUMBERS``, with nan for missing numbers.
        relative_step: Array (L, T): ``step_gain`` divided by its median over all layers at that refresh. Above 1 a
            layer takes larger steps for the same momentum than the median layer.
        cost: Share of the run's time that recording took; None without any record of it.
    """

    layers: list[str]
    steps: list[int]
    tables: dict[str, np.ndarray]
    relative_step: np.ndarray
    cost: float | None

    def ranking(self) -> list[tuple[str, float]]:
        """Layers and their relative step, largest first: geometric mean over the later half of the refreshes."""
        late = self.relative_step[:, len(self.steps) // 2 :]
        positive = {name: row[row > 0] for name, row in zip(self.layers, late, strict=True)}  # also without nan
        means = {name: float(np.exp(np.log(row).mean())) for name, row in positive.items() if len(row)}
        return sorted(means.items(), key=lambda item: -item[1])

    def select(self, pattern: str) -> CurvatureRecord:
        """Select layers by a pattern of their names (``*``, ``?``, ``[...]``); steps stay relative to the whole model.

        Raises:
            ValueError: No layer fits.
        """
        rows = [row for row, name in enumerate(self.layers) if fnmatch.fnmatchcase(name, pattern)]
        if not rows:
            some = ", ".join(self.layers[:3])
            raise ValueError(f"no layer fits --layers {pattern!r}; there are {len(self.layers)}, such as {some}")
        tables = {key: table[rows] for key, table in self.tables.items()}
        return CurvatureRecord(
            [self.layers[row] for row in rows], self.steps, tables, self.relative_step[rows], self.cost
        )


def load_record(run: Path) -> CurvatureRecord:
    """Load the record of a run.

    Args:
        run: Folder of the run, or the file.

    Raises:
        FileNotFoundError: There is no record.
        ValueError: The record is empty or malformed.
    """
    file = record_file(run)
    lines = read_curvature(file)
    layers = list(dict.fromkeys(name for line in lines for name in line["layers"]))
    if not layers:
        raise ValueError(f"{file} is empty: the run has not refreshed its factors yet")
    tables = {
        key: np.array([[line["layers"].get(name, {}).get(key) for line in lines] for name in layers], dtype=float)
        for key in NUMBERS
    }
    gain = tables["step_gain"]
    middle = [statistics.median([value for value in column if value > 0] or [math.nan]) for column in gain.T]
    seconds = sum(line.get("interval_seconds", 0.0) for line in lines)
    cost = sum(line.get("record_seconds", 0.0) for line in lines) / seconds if seconds else None
    return CurvatureRecord(layers, [line["step"] for line in lines], tables, gain / np.array(middle), cost)


def record_file(run: Path) -> Path:
    """Record in the folder of a run, or the file itself."""
    return run / CURVATURE_FILE if run.is_dir() else run


PICTURE_FILE = "curvature.svg"
BARS = 12
"""Number of layers at either end of the ranking."""
_LABELS = 60
"""Largest number of names below each other."""
_LONGEST = 48
"""Longest name; longer ones are cut in their middle, since both ends distinguish layers."""


def draw_curvature(run: Path, output: Path | None = None, layers: str = "*") -> list[Path]:
    """Draw the record of a run, and print both ends of the ranking.

    Maps of layers (rows, in the model's order) and steps: the median of the damped Fisher, its condition number (which
    normalised factors have in common: then the title says it, and there is no map), the share of values at the floor,
    and the relative step; and a ranking by the last.

    Args:
        run: Folder of the run, or its ``curvature.jsonl``.
        output: SVG or PNG; the numbers stand beside it as JSON. Default: ``curvature.svg`` beside the record.
        layers: Pattern of the names to show.

    Returns:
        The two files.

    Raises:
        FileNotFoundError: There is no record.
        ValueError: The record is empty or malformed, or no layer fits the pattern.
        ImportError: matplotlib is not installed.
    """
    record = load_record(run).select(layers)
    prefix = common_prefix(record.layers)
    figure = draw_record(record, prefix)
    ranking = record.ranking()
    _print_ranking(record, ranking)
    numbers = {
        "layers": record.layers,
        "steps": record.steps,
        **{key: table.tolist() for key, table in record.tables.items()},
        "relative_step": record.relative_step.tolist(),
        "ranking": [{"layer": name, "relative_step": value} for name, value in ranking],
        "share_of_time_recording": record.cost,
    }
    return save_figure(figure, output or record_file(run).with_name(PICTURE_FILE), numbers)


def _print_ranking(record: CurvatureRecord, ranking: Sequence[tuple[str, float]], shown: int = 5) -> None:
    first, last = _ends(ranking, shown)
    print(f"{len(record.layers)} layers, {len(record.steps)} refreshes up to step {record.steps[-1]}")
    for title, some in (("sped up most by the curvature", first), ("held back most", last[::-1])):
        print(f"{title} (step relative to the layer in the middle):")
        for name, value in some:
            print(f"  {value:8.3g}  {name}")
    if record.cost is not None:
        print(f"recording took {100 * record.cost:.2g} % of the run's time")


def _ends(ranking: Sequence[tuple[str, float]], each: int) -> tuple[list[tuple[str, float]], list[tuple[str, float]]]:
    """First and last entries of a ranking, without any overlap."""
    if len(ranking) <= 2 * each:
        middle = (len(ranking) + 1) // 2
        return list(ranking[:middle]), list(ranking[middle:])
    return list(ranking[:each]), list(ranking[-each:])


def common_prefix(names: Sequence[str]) -> str:
    """Common beginning of all names, up to a dot, which the labels leave out."""
    if len(names) < 2:
        return ""
    parts = [name.split(".")[:-1] for name in names]
    shared = itertools.takewhile(lambda column: len(set(column)) == 1, zip(*parts, strict=False))
    return "".join(f"{column[0]}." for column in shared)


# --- drawing ----------------------------------------------------------------------------------


def draw_record(record: CurvatureRecord, prefix: str) -> Any:
    """Draw the maps and the ranking; labels leave ``prefix`` out."""
    rows, tables = len(record.layers), record.tables
    labels = [_short(name.removeprefix(prefix)) for name in record.layers]
    height = min(max(0.17 * min(rows, _LABELS) + 2.0, 5.0), 12.5)
    condition = _positive(tables["condition_number"])
    finite = condition[np.isfinite(condition)]
    alike = finite.size > 0 and finite.max() <= 1.01 * finite.min()
    maps = 4 - alike
    figure = empty_figure((3.4 + 2.6 * maps + 0.11 * max(map(len, labels)), height))
    *panels, bars = figure.subplots(1, maps + 1, width_ratios=[*[1] * maps, 1.15])
    floor, middle = "share of values at the floor\n(F < 2 damping)", "relative step\n(log2; the middle layer has 0)"
    _heat_map(panels[0], record, np.log10(_positive(tables["fisher_median"])), "median of the damped Fisher F\n(log10)")
    if not alike:
        _heat_map(panels[1], record, np.log10(condition), "condition, max F / min F\n(log10)")
    _heat_map(panels[-2], record, tables["floor_share"], floor, limits=(0, 1))
    _heat_map(panels[-1], record, np.log2(_positive(record.relative_step)), middle, centred=True)
    _label_rows(panels[0], labels)
    for axes in panels[1:]:
        axes.set_yticks([])
    _bars(bars, [(_short(name.removeprefix(prefix)), value) for name, value in record.ranking()])
    under = f", names without {prefix!r}" if prefix else ""
    times, what = len(record.steps), f"{rows} layer{'s' * (rows > 1)}"
    title = f"Curvature of {what} over {times} refresh{'es' * (times > 1)}{under}"
    title += f"; max F / min F is {finite.max():.3g} in all of them" if alike else ""
    figure.suptitle(title, fontsize=11)
    return figure


def _short(name: str) -> str:
    if len(name) <= _LONGEST:
        return name
    return f"{name[: _LONGEST // 2]}…{name[-(_LONGEST // 2 - 1) :]}"


def _positive(table: np.ndarray) -> np.ndarray:
    return np.where(table > 0, table, np.nan)


def _heat_map(
    axes: Any,
    record: CurvatureRecord,
    table: np.ndarray,
    title: str,
    *,
    limits: tuple[float, float] | None = None,
    centred: bool = False,
) -> None:
    """Draw rows from the top in the model's order; grey where there is no number."""
    finite = table[np.isfinite(table)]
    if limits is None and finite.size:
        limits = float(finite.min()), float(finite.max())
        if centred:
            widest = max(abs(limits[0]), abs(limits[1]), 0.1)
            limits = -widest, widest
        else:  # at least a decade: rounding must not look like a difference
            room = max(1.0 - (limits[1] - limits[0]), 0.0) / 2
            limits = limits[0] - room, limits[1] + room
    low, high = limits or (0.0, 1.0)
    edges = np.arange(len(record.layers) + 1) - 0.5
    mesh = axes.pcolormesh(
        _edges(record.steps), edges, np.ma.masked_invalid(table), cmap=SEQUENTIAL, vmin=low, vmax=high, rasterized=True
    )
    axes.set_facecolor("0.8")
    axes.set_ylim(len(record.layers) - 0.5, -0.5)
    axes.set_xlabel("optimizer step", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.locator_params(axis="x", nbins=5, integer=True)
    axes.set_title(title, fontsize=9)
    bar = axes.figure.colorbar(mesh, ax=axes, orientation="horizontal", location="bottom", aspect=25, pad=0.01)
    bar.ax.tick_params(labelsize=8)
    bar.ax.locator_params(nbins=5)


def _edges(steps: Sequence[int]) -> np.ndarray:
    """Edges of the refreshes, each from its step to the next one; the last is as long as the one before."""
    last = steps[-1] - steps[-2] if len(steps) > 1 else 1
    return np.array([*steps, steps[-1] + last], dtype=float)


def _label_rows(axes: Any, names: Sequence[str]) -> None:
    stride = math.ceil(len(names) / _LABELS)
    shown = range(0, len(names), stride)
    axes.set_yticks(list(shown), [names[row] for row in shown], fontsize=7)
    if stride > 1:
        axes.set_ylabel(f"layer, in the model's order (every {_ordinal(stride)} is named)", fontsize=9)
    else:
        axes.set_ylabel("layer, in the model's order", fontsize=9)


def _ordinal(number: int) -> str:
    return {2: "second", 3: "third"}.get(number, f"{number}th")


def _bars(axes: Any, ranking: Sequence[tuple[str, float]]) -> None:
    """Draw the layers at both ends, with a gap for those between them."""
    first, last = _ends(ranking, BARS)
    gap = len(first) + len(last) < len(ranking)
    places = [*range(len(first)), *(len(first) + gap + place for place in range(len(last)))]
    some = [*first, *last]
    looks: Sequence[Mapping[str, Any]] = [
        {"color": COLOURS[0]} if value >= 1 else {"color": COLOURS[1], "hatch": "///", "edgecolor": "white"}
        for _, value in some
    ]
    for place, (_, value), look in zip(places, some, looks, strict=True):
        axes.barh(place, value - 1, left=1, height=0.75, linewidth=0, **look)
        side, move = ("left", 3) if value >= 1 else ("right", -3)
        axes.annotate(
            f"{value:.2g}", (value, place), (move, 0), textcoords="offset points", ha=side, va="center", fontsize=7
        )
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log", base=2)
    values = [value for _, value in some] or [1.0]
    axes.set_xlim(min(*values, 0.5) / 1.6, max(*values, 2.0) * 1.6)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_yticks(places, [name for name, _ in some], fontsize=7)
    axes.yaxis.tick_right()
    axes.set_ylim(max(places, default=0) + 0.6, -0.6)
    axes.tick_params(axis="x", labelsize=8)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    axes.set_xlabel("relative step, mean of the later half", fontsize=9)
    axes.set_title("sped up by the curvature,\nand held back (hatched)", fontsize=9)
    if gap:
        words, look = f"{len(ranking) - len(some)} between them", {"facecolor": "white", "edgecolor": "none"}
        axes.text(1, len(first), words, ha="center", va="center", fontsize=8, bbox=look)
