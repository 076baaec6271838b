"""Loss against learning rate for several comparisons side by side, as it is or relative to each optimizer's best."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from hf_adafisher.experiments.drawing import (
    COLOURS,
    GREY_LINE,
    coloured_lines,
    label_line_ends,
    name_the_grey,
    new_figure,
    optimizer_styles,
    plain_text,
    save_figure,
)
from hf_adafisher.experiments.report.results import FORM

METRIC = "validation loss"
RATE = "learning rate"
BAND = math.log(1.02)
"""Height of the band of forgiveness in nats: 2 % of perplexity."""
REACH = 8.0
"""Learning rates are shown from an eighth of an optimizer's best to eight times of it: a factor of 64."""


def read_cells(folder: Path, seeds: Sequence[int] | None = None, metric: str = METRIC) -> pd.DataFrame:
    """Read the runs of a comparison from its ``cells.csv``, which a report writes and an archive holds.

    Args:
        folder: Of a comparison or an archive.
        seeds: Only runs with these; None: all.
        metric: Column of a loss.

    Returns:
        A row for each run: ``optimizer`` (with its form where an optimizer has several, ``adafisherw (paper)``),
        ``setting`` (the other arguments as text), ``learning rate`` (nan: the default), ``seed``, and ``loss``, which
        is infinite for runs that diverged or failed.

    Raises:
        ValueError: There is no ``cells.csv`` there, or no run of these seeds, or no such column.
    """
    path = folder / "cells.csv"
    if not path.is_file():
        raise ValueError(f"{path} does not exist: give the folder of a comparison whose report was written")
    table = pd.read_csv(path)
    if not {"optim", "seed", "status", metric} <= set(table.columns):
        raise ValueError(f"{path} has no optimizers, seeds and states, or no {metric}")
    chosen = table if seeds is None else table[table["seed"].isin(seeds)]
    if chosen[metric].notna().sum() == 0:
        raise ValueError(f"{path} has no finished run with seeds {seeds}: it has {sorted(set(table['seed']))}")
    optimizer = chosen["optim"]
    arguments = [name for name in _arguments(table) if name not in ("optim", "learning_rate", "seed", FORM)]
    if FORM in table:
        forms = chosen[FORM].map(lambda form: "" if pd.isna(form) else f" ({form})")
        optimizer = optimizer + forms
    texts = [
        ", ".join(f"{name}={row[name]}" for name in arguments if not pd.isna(row[name])) for _, row in chosen.iterrows()
    ]
    completed = (chosen["status"] == "completed") & chosen[metric].notna()
    rates = chosen["learning_rate"] if "learning_rate" in chosen else pd.Series(math.nan, chosen.index)
    loss = chosen[metric].where(completed, math.inf)
    found = {"optimizer": optimizer, "setting": texts, RATE: rates, "seed": chosen["seed"], "loss": loss}
    return pd.DataFrame(found).reset_index(drop=True)


def _arguments(table: pd.DataFrame) -> list[str]:
    """Names of the columns that are arguments of the runs, which stand between the folder and the state."""
    names = list(table.columns)
    return names[names.index("folder") + 1 if "folder" in names else 1 : names.index("status")]


def read_rates(folder: Path, seeds: Sequence[int]) -> dict[str, pd.DataFrame]:
    """Read the loss by learning rate of every optimizer, with its other arguments as in its best runs.

    Args:
        folder: Of a comparison or an archive.
        seeds: Runs with these alone; a rate counts where one of them ran.

    Returns:
        By optimizer, a row for each learning rate in ascending order: ``learning rate``, ``mean``, ``low`` and
        ``high`` of the loss over the seeds (infinite if one of them diverged or failed) and the number of ``seeds``.

    Raises:
        ValueError: See ``read_cells``; or no run says its learning rate.
    """
    cells = read_cells(folder, seeds).dropna(subset=[RATE])
    if cells.empty:
        raise ValueError(f"{folder / 'cells.csv'} has no learning rates")
    groups = cells.groupby(["optimizer", "setting", RATE])["loss"]
    points = groups.agg(mean="mean", low="min", high="max", seeds="size").reset_index()
    found = {}
    for optimizer, rows in points.groupby("optimizer"):
        most = rows[rows["seeds"] == rows["seeds"].max()]
        best = most.loc[most["mean"].idxmin(), "setting"]
        line = rows[rows["setting"] == best].sort_values(RATE)
        found[str(optimizer)] = line.drop(columns=["optimizer", "setting"]).reset_index(drop=True)
    return found


def relative_to_best(line: pd.DataFrame) -> pd.DataFrame:
    """Divide rates by the best one and subtract its mean loss; rows further away than ``REACH`` are left out.

    Args:
        line: Of ``read_rates``, with one finite mean at least.
    """
    best = line.loc[line["mean"].idxmin()]
    moved = line.assign(**{key: line[key] - best["mean"] for key in ("mean", "low", "high")})
    moved[RATE] = line[RATE] / best[RATE]
    return moved[moved[RATE].between(1 / REACH * 0.999, REACH * 1.001)].reset_index(drop=True)


def forgiven_factor(line: pd.DataFrame) -> tuple[float, bool]:
    """Largest rate over smallest around the best one whose mean is within ``BAND``, between rates by interpolation.

    Args:
        line: Of ``relative_to_best``.

    Returns:
        The factor, and whether it is a lower bound, since the band reaches an end of the rates that were tried.
    """
    logs, means = np.log(line[RATE].to_numpy()), line["mean"].to_numpy()
    centre, ends, open_end = int(np.argmin(means)), [], False
    for way in (-1, 1):
        index = centre
        while 0 <= index + way < len(means) and means[index + way] <= BAND * (1 + 1e-9):
            index += way
        end = logs[index]
        if 0 <= index + way < len(means):
            share = (BAND - means[index]) / (means[index + way] - means[index])  # 0 where the next one diverged
            end += share * (logs[index + way] - logs[index])
        else:
            open_end = True
        ends.append(end)
    return float(np.exp(ends[1] - ends[0])), open_end


def draw_rates(
    folders: Sequence[Path],
    titles: Sequence[str],
    output: Path,
    seeds: Sequence[int] = (0,),
    *,
    relative: bool = False,
) -> list[Path]:
    """Draw a panel for each comparison: mean loss and its band over the seeds against the learning rate.

    Six optimizers a panel have a colour, the others are grey. A cross at the top is a rate at which a run diverged or
    failed, or whose loss lies above the frame.

    Args:
        folders: Of comparisons or archives.
        titles: Title of each panel.
        output: SVG or PNG; the numbers stand beside it as JSON.
        seeds: See ``read_rates``.
        relative: Draw the forgiveness of a wrong rate: rates relative to each optimizer's best one, losses above the
            best one's, with the band of 2 % of perplexity.

    Returns:
        The files written.

    Raises:
        ValueError: See ``read_rates``.
    """
    found = {title: read_rates(folder, seeds) for folder, title in zip(folders, titles, strict=True)}
    panels = {title: _ranked(lines) for title, lines in found.items()}
    figure, all_axes = new_figure(1, len(panels), (5.6 * len(panels), 4.4), sharey=False)
    styles = optimizer_styles(name for lines in panels.values() for name in lines)
    numbers: dict[str, Any] = {}
    grey: dict[str, None] = {}
    for axes, (title, lines) in zip(all_axes, panels.items(), strict=True):
        coloured = coloured_lines(list(lines))
        grey |= dict.fromkeys(name for name in lines if name not in coloured)
        drawn = {name: relative_to_best(line) if relative else line for name, line in lines.items()}
        _draw_lines(axes, drawn, {name: styles[name] if name in coloured else GREY_LINE for name in drawn})
        axes.set(xscale="log", title=plain_text(title), xlabel=RATE, ylabel=f"{METRIC} (nats)")
        numbers[title] = {name: line.to_dict("list") for name, line in drawn.items()}
        if relative:
            _mark_band(axes)
            for name, line in drawn.items():
                factor, bound = forgiven_factor(line)
                numbers[title][name] |= {"factor within 2 % of perplexity": factor, "at least": bound}
    name_the_grey(figure, list(grey))
    for axes, title, lines in zip(all_axes, panels, panels.values(), strict=True):
        _label(axes, coloured_lines(list(lines)), numbers[title], styles, relative=relative)
    return save_figure(figure, output, {"metric": METRIC, "seeds": list(seeds), "panels": numbers})


def _ranked(lines: Mapping[str, pd.DataFrame]) -> dict[str, pd.DataFrame]:
    """Lines with a finite loss, the lowest first."""
    lowest = {name: line["mean"].min() for name, line in lines.items()}
    return {name: lines[name] for name in sorted(lines, key=lowest.__getitem__) if math.isfinite(lowest[name])}


def _draw_lines(axes: Any, lines: Mapping[str, pd.DataFrame], styles: Mapping[str, Mapping[str, Any]]) -> None:
    means = np.concatenate([line["mean"].to_numpy() for line in lines.values()])
    finite = means[np.isfinite(means)]
    tops = [line["mean"].min() for line in lines.values()]
    low, high = finite.min(), max(float(np.quantile(finite, 0.8)), *tops)
    room = 0.1 * (high - low) or 0.1
    axes.set_ylim(low - room, high + room)
    for name, line in lines.items():
        inside = line["mean"] <= high + room
        shown, style = line[inside], styles[name]
        axes.plot(shown[RATE], shown["mean"], label=plain_text(name), **style)
        if (shown["high"] > shown["low"]).any() and style is not GREY_LINE:
            axes.fill_between(shown[RATE], shown["low"], shown["high"], color=style["color"], alpha=0.15, linewidth=0)
        lost = line.loc[~inside, RATE]
        for crosses in axes.plot(lost, [high + room] * len(lost), "x", color=style["color"], clip_on=False):
            crosses.set_in_layout(False)


def _mark_band(axes: Any) -> None:
    axes.axhspan(0.0, BAND, color=COLOURS[2], alpha=0.18, linewidth=0)
    axes.set_xscale("log", base=2)
    axes.set(xlim=(1 / REACH / 1.1, REACH * 1.1), xlabel=f"{RATE} / best {RATE}", ylabel="loss above the best (nats)")
    axes.set_xticks([2.0**power for power in range(-3, 4)], ["1/8", "1/4", "1/2", "1", "2", "4", "8"])
    axes.minorticks_off()
    axes.text(1 / REACH / 1.05, BAND, "2 % of perplexity", fontsize=8, va="bottom")


def _label(axes: Any, names: Sequence[str], lines: Mapping[str, Any], styles: Any, *, relative: bool) -> None:
    """Name lines at their right ends inside the frame; relative ones with the factor that they forgive."""
    top, ends = axes.get_ylim()[1], []
    for name in names:
        line = lines[name]
        x, y = next(point for point in zip(line[RATE][::-1], line["mean"][::-1], strict=True) if point[1] <= top)
        text = name
        if relative:
            bound = "≥ " if line["at least"] else ""
            text += f"  {bound}{line['factor within 2 % of perplexity']:.2g}×"
        ends.append((x, y, text, styles[name]["color"]))
    label_line_ends(axes, ends)
