"""What a run leaves behind: a strict JSON file and a picture of its losses."""

from __future__ import annotations

import json
import logging
import math
import os
import platform
from collections.abc import Sequence
from enum import Enum
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from hf_adafisher import __version__

logger = logging.getLogger(__name__)


def software_versions() -> dict[str, str]:
    """Returns the versions of Python and of the libraries that a result depends on."""
    libraries = ("torch", "transformers", "accelerate", "datasets", "tokenizers")
    return {
        "python": platform.python_version(),
        "hf_adafisher": __version__,
        **{name: metadata.version(name) for name in libraries},
    }


def hardware() -> dict[str, Any]:
    """Returns what the run was timed on."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    device = str(accelerator or "cpu")
    if device.startswith("cuda"):
        device = torch.cuda.get_device_name()
    return {
        "platform": platform.platform(),
        "device": device,
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
    }


def json_ready(value: Any) -> Any:
    """Returns `value` as strict JSON can hold it: non-finite numbers become None, unknown objects text."""
    if isinstance(value, Enum):
        return json_ready(value.value)
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): json_ready(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [json_ready(item) for item in value]
    return str(value)


def write_json(path: Path, value: Any) -> None:
    """Writes strict JSON: no NaN or Infinity, which JSON does not have; they become null."""
    partial = path.with_name(path.name + ".partial")  # a killed run must not leave half a result
    partial.write_text(json.dumps(json_ready(value), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(partial, path)


def loss_curve(log_history: Sequence[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Returns the steps and finite values at which Trainer logged `key` ("loss", "eval_loss")."""
    points = [(entry["step"], entry[key]) for entry in log_history if key in entry and math.isfinite(entry[key])]
    return [step for step, _ in points], [value for _, value in points]


def write_learning_curves(path: Path, runs: dict[str, Sequence[dict[str, Any]]], title: str = "") -> bool:
    """Draws training (thin) and validation loss (dots) over optimizer steps, one colour per run.

    Args:
        path: PNG file to write.
        runs: label of each run, and its `trainer.state.log_history`.
        title: of the picture.

    Returns:
        False if matplotlib is not installed: then nothing is drawn, and a warning says so.
    """
    axes = _new_axes(path)
    if axes is None:
        return False
    for index, (label, history) in enumerate(runs.items()):
        axes.plot(
            *loss_curve(history, "loss"),
            color=f"C{index}",
            alpha=0.5,
            linewidth=1,
            label=f"{label}, training",
        )
        axes.plot(
            *loss_curve(history, "eval_loss"),
            color=f"C{index}",
            marker="o",
            markersize=4,
            label=f"{label}, validation",
        )
    axes.set(xlabel="optimizer step", ylabel="loss (nats per token)", title=title)
    return _save(axes, path)


def _new_axes(path: Path) -> Any:
    """The axes of a new picture, or None, with a warning, where matplotlib is missing."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        logger.warning(
            "matplotlib is not installed, so %s was not drawn; install it with: pip install matplotlib", path
        )
        return None
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)  # no pyplot: that would pick a window system and keep global state
    return figure.add_subplot()


def _save(axes: Any, path: Path) -> bool:
    axes.grid(alpha=0.3)
    axes.legend()
    axes.figure.savefig(path, dpi=120)
    return True
