"""Pictures of a run: learning curves, and the confusion matrix, readable for ten classes and for a hundred."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hf_adafisher.experiments.drawing import new_panels, optimizer_styles, plain_text
from hf_adafisher.experiments.outputs import replacing

ACCURACIES = (("eval_accuracy", "accuracy", "-"), ("eval_top5_accuracy", "top-5 accuracy", ":"))


def write_learning_curves(
    path: Path,
    runs: dict[str, Sequence[dict[str, Any]]],
    title: str = "",
    *,
    loss_label: str = "loss (nats per token)",
) -> bool:
    """Draw training (thin) and validation loss (dots) over optimizer steps, one colour per run.

    Where validation accuracies were logged, a second panel shows them.

    Args:
        path: PNG file to write.
        runs: Label of each run, and its ``trainer.state.log_history``.
        title: Of the picture.
        loss_label: Label of the losses' axis.

    Returns:
        False if matplotlib is not installed: then nothing is drawn, and a warning says so.
    """
    accuracies = [entry for entry in ACCURACIES if any(_logged(history, entry[0])[0] for history in runs.values())]
    panels = new_panels(path, 2 if accuracies else 1)
    if panels is None:
        return False
    styles = optimizer_styles(runs)
    for label, history in runs.items():
        colour = {"color": styles[label]["color"]}
        dots = {**colour, "marker": "o", "markersize": 4}
        panels[0].plot(
            *_logged(history, "loss"), **colour, alpha=0.5, linewidth=1, label=f"{plain_text(label)}, training"
        )
        panels[0].plot(*_logged(history, "eval_loss"), **dots, label=f"{plain_text(label)}, validation")
        for key, name, dash in accuracies:
            panels[1].plot(*_logged(history, key), **dots, linestyle=dash, label=f"{plain_text(label)}, {name}")
    panels[0].set(ylabel=loss_label, title=plain_text(title))
    panels[-1].set_xlabel("optimizer step")
    if accuracies:
        panels[1].set_ylabel("validation accuracy")
    for axes in panels:
        axes.grid(alpha=0.3)
        axes.legend()
    with replacing(path) as partial:
        panels[0].figure.savefig(partial, dpi=120)
    return True


def _logged(log_history: Sequence[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Steps and finite values at which Trainer logged ``key``."""
    points = [(entry["step"], entry[key]) for entry in log_history if key in entry and math.isfinite(entry[key])]
    return [step for step, _ in points], [value for _, value in points]


_WITH_NUMBERS = 20
"""Largest number of classes with a number in each cell."""
_WITH_NAMES = 200
"""Largest number of classes with names at the axes."""
_LONGEST_NAME = 24


def write_confusion_matrix(
    path: Path, counts: Sequence[Sequence[int]] | np.ndarray, class_names: Sequence[str], title: str = ""
) -> bool:
    """Draw a confusion matrix, true classes by row, coloured by the share of the row.

    Args:
        path: PNG file to write.
        counts: Shape (classes, classes).
        class_names: In the order of their numbers.
        title: Of the picture; the accuracy is added.

    Returns:
        False if matplotlib is not installed: then nothing is drawn, and a warning says so.
    """
    matrix = np.asarray(counts)
    classes, total = len(class_names), int(matrix.sum())
    side = float(np.clip(2.5 + 0.42 * min(classes, 20) + 0.13 * max(min(classes, 100) - 20, 0), 4.5, 22.0))
    panels = new_panels(path, size=(side + 0.8, side))
    if panels is None:
        return False
    axes = panels[0]
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    picture = axes.imshow(shares, cmap="Blues", vmin=0.0, vmax=1.0, interpolation="nearest")
    axes.figure.colorbar(picture, ax=axes, fraction=0.046, label="share of the true class")
    if classes <= _WITH_NUMBERS:
        for row, column in np.argwhere(matrix):
            colour = "white" if shares[row, column] > 0.6 else "black"
            axes.text(column, row, str(matrix[row, column]), ha="center", va="center", color=colour, fontsize=8)
    if classes <= _WITH_NAMES:
        short = (name if len(name) <= _LONGEST_NAME else name[: _LONGEST_NAME - 1] + "…" for name in class_names)
        names = list(map(plain_text, short))
        size = 9 if classes <= _WITH_NUMBERS else 6 if classes <= 100 else 4
        axes.set_xticks(range(classes), names, rotation=90, fontsize=size)
        axes.set_yticks(range(classes), names, fontsize=size)
    correct = f"accuracy {np.trace(matrix) / total:.2%} of {total:,} images" if total else "no images"
    axes.set(
        xlabel="predicted class", ylabel="true class", title=f"{plain_text(title)}: {correct}" if title else correct
    )
    with replacing(path) as partial:
        axes.figure.savefig(partial, dpi=120, bbox_inches="tight")  # or labels beside a square picture are cut
    return True
