"""The command lines in ``scripts/`` as modules, and what their runs leave."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

SCRIPTS = Path(__file__).parents[1] / "scripts"


def load_script(name: str) -> Any:
    """The module of ``scripts/NAME.py``, new in every call."""
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read_results(output: Path) -> dict[str, Any]:
    """results.json, which must be strict JSON."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads((output / "results.json").read_text(), parse_constant=refuse)
