"""What a run leaves behind: a strict JSON file and pictures of its losses and accuracies."""

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


def software_versions(more: Sequence[str] = ()) -> dict[str, str]:
    """Returns the versions of Python and of the libraries that a result depends on.

    Args:
        more: further libraries, which need not be installed.
    """
    libraries = ("torch", "transformers", "accelerate", "datasets", "tokenizers")
    installed = {name: version for name in more if (version := _version(name)) is not None}
    return {
        "python": platform.python_version(),
        "hf_adafisher": __version__,
        **{name: metadata.version(name) for name in libraries},
        **installed,
    }


def _version(library: str) -> str | None:
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return None


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


def write_learning_curves(
    path: Path,
    runs: dict[str, Sequence[dict[str, Any]]],
    title: str = "",
    *,
    loss_label: str = "loss (nats per token)",
) -> bool:
    """Draws training (thin) and validation loss (dots) over optimizer steps, one colour per run.

    Where validation accuracies were logged, a second panel shows them.

    Args:
        path: PNG file to write.
        runs: label of each run, and its `trainer.state.log_history`.
        title: of the picture.
        loss_label: what the losses' axis says.

    Returns:
        False if matplotlib is not installed: then nothing is drawn, and a warning says so.
    """
    accuracies = [
        (key, name)
        for key, name in (("eval_accuracy", "accuracy"), ("eval_top5_accuracy", "top-5 accuracy"))
        if any(loss_curve(history, key)[0] for history in runs.values())
    ]
    panels = new_panels(path, 2 if accuracies else 1)
    if panels is None:
        return False
    for index, (label, history) in enumerate(runs.items()):
        look = {"color": f"C{index}"}
        panels[0].plot(*loss_curve(history, "loss"), **look, alpha=0.5, linewidth=1, label=f"{label}, training")
        dots = {**look, "marker": "o", "markersize": 4}
        panels[0].plot(*loss_curve(history, "eval_loss"), **dots, label=f"{label}, validation")
        for (key, name), dash in zip(accuracies, ("-", ":"), strict=False):
            panels[1].plot(*loss_curve(history, key), **dots, linestyle=dash, label=f"{label}, {name}")
    panels[0].set(ylabel=loss_label, title=title)
    panels[-1].set_xlabel("optimizer step")
    if accuracies:
        panels[1].set_ylabel("validation accuracy")
    for axes in panels:
        axes.grid(alpha=0.3)
        axes.legend()
    panels[0].figure.savefig(path, dpi=120)
    return True


def new_panels(path: Path, rows: int = 1, size: tuple[float, float] | None = None) -> list[Any] | None:
    """The axes of a new picture, one below the other, or None, with a warning, where matplotlib is missing."""
    try:
        figure = empty_figure(size or (7, 4.5 + 3 * (rows - 1)))
    except ImportError:
        logger.warning(
            "matplotlib is not installed, so %s was not drawn; install it with: pip install matplotlib", path
        )
        return None
    return list(figure.subplots(rows, 1, squeeze=False, sharex=True).flat)


def empty_figure(size: tuple[float, float]) -> Any:
    """A figure of ``size`` inches without axes.

    Raises:
        ImportError: matplotlib is not installed; the message says how to install it.
    """
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)  # no pyplot: that would pick a window system and keep global state
    return figure


def require_matplotlib() -> None:
    """Ask before the work whose result is to be drawn.

    Raises:
        ImportError: matplotlib is not installed; the message says how to install it.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError(
            'pictures need matplotlib, which is not installed: pip install "hf_adafisher[plots]"'
        ) from error
