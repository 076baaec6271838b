"""One picture of loss against learning rate for several comparisons, such as from scratch and of fine-tuning."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from hf_adafisher.experiments.drawing import line_style, new_figure, plain_text, save_figure

METRIC = "validation loss"


def read_rates(folder: Path, seed: int) -> dict[str, dict[str, float]]:
    """Read the validation loss by learning rate of every optimizer of a comparison, from its ``cells.csv``.

    Args:
        folder: Folder of the comparison.
        seed: Runs with this seed alone, that of the sweep.

    Returns:
        By optimizer, losses by learning rate in ascending order; runs without a loss are left out.

    Raises:
        ValueError: There is no ``cells.csv`` there, or no such run in it.
    """
    path = folder / "cells.csv"
    if not path.is_file():
        raise ValueError(f"{path} does not exist: give the folder of a comparison whose report was written")
    table = pd.read_csv(path)
    if not {"optim", "learning_rate", METRIC} <= set(table.columns):
        raise ValueError(f"{path} has no learning rates, or no {METRIC}")
    chosen = table[(table["seed"] == seed) & table[METRIC].notna()].sort_values("learning_rate")
    if chosen.empty:
        raise ValueError(f"{path} has no finished run with seed {seed}: it has {sorted(set(table['seed']))}")
    return {
        str(optim): {f"{rate:g}": float(loss) for rate, loss in zip(rows["learning_rate"], rows[METRIC], strict=True)}
        for optim, rows in chosen.groupby("optim")
    }


def draw_rates(folders: Sequence[Path], titles: Sequence[str], output: Path, seed: int = 0) -> list[Path]:
    """Draw a panel for each comparison; PNG, SVG and the numbers as JSON.

    Args:
        folders: Folders of the comparisons.
        titles: Title of each panel.
        output: PNG.
        seed: See ``read_rates``.

    Returns:
        The files written.
    """
    panels = dict(zip(titles, (read_rates(folder, seed) for folder in folders), strict=True))
    names = sorted({optim for panel in panels.values() for optim in panel})
    figure, axes = new_figure(1, len(panels), (5.0 * len(panels), 4.0), sharey=False)
    for axis, (title, panel) in zip(axes, panels.items(), strict=True):
        for optim, losses in panel.items():
            style: dict[str, Any] = line_style(names.index(optim))
            axis.plot([float(rate) for rate in losses], list(losses.values()), label=plain_text(optim), **style)
        axis.set(xscale="log", xlabel="learning rate", ylabel=f"{METRIC} (nats)", title=plain_text(title))
        axis.legend()
    return save_figure(figure, output, {"metric": METRIC, "seed": seed, "panels": panels})
