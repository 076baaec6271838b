"""The commands of ``hf-adafisher`` as modules, and what their runs leave."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any


def load_command(name: str) -> Any:
    """The module ``hf_adafisher.cli.NAME``."""
    return importlib.import_module(f"hf_adafisher.cli.{name}")


def read_results(output: Path) -> dict[str, Any]:
    """results.json, which must be strict JSON."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads((output / "results.json").read_text(), parse_constant=refuse)


SCRIPTS = {
    "compare_fisher": "figures fisher-accuracy",
    "plot_curvature": "figures curvature",
    "plot_factors": "figures factors",
    "plot_loss_landscape": "figures landscape",
    "plot_fisher_histogram": "figures fisher-histogram",
    "run_image_classification": "image",
}
"""The scripts of earlier versions, and the subcommands that they became."""


def as_command(line: str) -> str:
    """A command line of an earlier version, as committed results have it, as it is written now."""
    for script, command in SCRIPTS.items():
        line = line.replace(f"python scripts/{script}.py ", f"hf-adafisher {command} ")
    return line


def folder_of(output_dir: Path, name: str) -> Path:
    """The folder of the cell of this name."""
    return {name_of(path.parent): path.parent for path in output_dir.glob("*/command.json")}[name]


def name_of(folder: Path) -> str:
    """The name of the cell in this folder."""
    return json.loads((folder / "command.json").read_text())["name"]
