"""The learning curves of training runs as a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
