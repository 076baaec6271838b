"""Folders of cells by their names, as their records have them."""

from __future__ import annotations

import json
from pathlib import Path


def folder_of(output_dir: Path, name: str) -> Path:
    """The folder of the cell of this name."""
    return {name_of(path.parent): path.parent for path in output_dir.glob("*/command.json")}[name]


def name_of(folder: Path) -> str:
    """The name of the cell in this folder."""
    return json.loads((folder / "command.json").read_text())["name"]
