"""What stands beside the tables of a report: the comparison's settings, and the software and machines of its cells."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from hf_adafisher.experiments.comparison.cell_process import load_result
from hf_adafisher.experiments.comparison.protocol import Comparison
from hf_adafisher.experiments.report.results import Row
from hf_adafisher.experiments.report.tables import Table
from hf_adafisher.experiments.runs.run import RESULTS_FILE

_MACHINE = ("platform", "device", "cpu_count", "torch_threads")


def settings_table(comparison: Comparison) -> Table:
    """The arguments that all cells share, the seeds and the budget."""
    config = comparison.config
    found = dict.fromkeys(str(cell.settings["seed"]) for cell in comparison.cells if "seed" in cell.settings)
    seeds = ", ".join(found) or "as the cells say"
    facts = {"task": config.get("task", "clm"), "seeds": seeds, "budget": config.get("budget") or "as the cells say"}
    facts |= config.get("common", {})
    return Table(["setting", "value"], [[key, _text(value)] for key, value in facts.items()])


def software_table(comparison: Comparison, rows: Sequence[Row]) -> Table:
    """Versions, hardware and the model; several values where the cells differ."""
    found: dict[str, list[str]] = {}
    for row in rows:
        result = load_result(comparison.output_dir / row.cell)
        machine = {key: value for key, value in result.get("hardware", {}).items() if key in _MACHINE}
        corpus, model = result.get("corpus", {}), result.get("model", {})
        sizes = {f"model {key}": value for key, value in model.items()} | {"corpus": corpus.get("source")}
        for key, value in {**result.get("versions", {}), **machine, **sizes}.items():
            values = found.setdefault(key, [])
            if value is not None and _text(value) not in values:
                values.append(_text(value))
    return Table(["what", "value"], [[key, "; ".join(values)] for key, values in found.items() if values])


def step_time_table(comparison: Comparison) -> Table:
    """The step times that a budget of time was planned with."""
    rows = []
    for name, time in comparison.step_times().items():
        shown = f"{1000 * time.seconds:.1f}" if time.seconds is not None else time.reason
        rows.append([name, shown, str(time.steps_per_epoch or "-")])
    return Table(["optimizer", "ms per step (measured before)", "steps per epoch"], rows)


def unfinished(comparison: Comparison) -> int:
    """How many cells have no result."""
    return sum(not (comparison.output_dir / cell.name / RESULTS_FILE).is_file() for cell in comparison.cells)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
