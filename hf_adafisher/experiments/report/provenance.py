"""Provenance of a report: the comparison's settings and step times, the software and machines of its cells."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from hf_adafisher.experiments.comparison.cell_process import load_result
from hf_adafisher.experiments.comparison.protocol import Comparison
from hf_adafisher.experiments.report.results import CellResult
from hf_adafisher.experiments.report.tables import Table

_MACHINE = ("platform", "device", "cpu_count", "torch_threads")


def settings_table(comparison: Comparison) -> Table:
    """Tabulate the arguments that all cells share, the seeds and the budget."""
    config = comparison.config
    seeds = dict.fromkeys(str(cell.settings["seed"]) for cell in comparison.cells if "seed" in cell.settings)
    settings = {
        "task": config.get("task", "clm"),
        "seeds": ", ".join(seeds) or "as the cells say",
        "budget": config.get("budget") or "as the cells say",
        **config.get("common", {}),
    }
    return Table(["setting", "value"], [[key, _text(value)] for key, value in settings.items()])


def software_table(comparison: Comparison, results: Sequence[CellResult]) -> Table:
    """Tabulate versions, hardware and the model; several values where the cells differ."""
    found: dict[str, dict[str, None]] = {}
    for result in results:
        content = load_result(comparison.output_dir / result.cell) or {}
        machine = {key: value for key, value in content.get("hardware", {}).items() if key in _MACHINE}
        model = {f"model {key}": value for key, value in content.get("model", {}).items()}
        corpus = {"corpus": content.get("corpus", {}).get("source")}
        for key, value in {**content.get("versions", {}), **machine, **model, **corpus}.items():
            if value is not None:
                found.setdefault(key, {})[_text(value)] = None
    return Table(["what", "value"], [[key, "; ".join(values)] for key, values in found.items()])


def step_time_table(comparison: Comparison) -> Table:
    """Tabulate the step times that a budget of time was planned with."""
    rows = []
    for name, time in comparison.step_times().items():
        text = f"{1000 * time.seconds:.1f}" if time.seconds is not None else time.reason
        rows.append([name, text, str(time.steps_per_epoch or "-")])
    return Table(["optimizer", "ms per step (measured before)", "steps per epoch"], rows)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
