"""Provenance of a report: the comparison's settings and step times, the software and machines of its cells."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from hf_adafisher.experiments.comparison.protocol import Comparison
from hf_adafisher.experiments.outputs import describe_source
from hf_adafisher.experiments.report.results import CellResult
from hf_adafisher.experiments.report.tables import Table

_SOURCE = ("hf_adafisher", "commit", "uncommitted_changes")
_MACHINE = ("platform", "device", "cpu_count", "torch_threads")


def settings_table(comparison: Comparison) -> Table:
    """Tabulate the arguments that all cells share, the seeds and the budget."""
    config = comparison.config
    seeds = dict.fromkeys(str(cell.settings["seed"]) for cell in comparison.cells if "seed" in cell.settings)
    settings = {
        "task": config.get("task", "clm"),
        "seeds": ", ".join(seeds) or "as the cells say",
        **({"tuning seeds": ", ".join(map(str, comparison.tuning_seeds))} if comparison.tuning_seeds else {}),
        "budget": config.get("budget") or "as the cells say",
        **config.get("common", {}),
    }
    return Table(["setting", "value"], [[key, _text(value)] for key, value in settings.items()])


def software_table(results: Sequence[CellResult]) -> Table:
    """Tabulate versions, hardware, the model and the data; several values where the cells differ."""
    found: dict[str, dict[str, None]] = {}
    for result in results:
        content = result.content
        machine = {key: value for key, value in content.get("hardware", {}).items() if key in _MACHINE}
        model = {f"model {key}": value for key, value in content.get("model", {}).items()}
        corpus = {"corpus": content.get("corpus", {}).get("source")}
        data = {f"data, {key}": value for key, value in (result.record or {}).get("data", {}).items()}
        versions = {**content.get("versions", {}), **_source(result)}
        for key, value in {**versions, **machine, **model, **corpus, **data}.items():
            if value is not None:
                found.setdefault(key, {})[_text(value)] = None
    loads = [load for result in results if (load := result.content.get("hardware", {}).get("load_average")) is not None]
    if loads:
        found["load average (range)"] = {f"{min(loads):.2f} to {max(loads):.2f}": None}
    return Table(["what", "value"], [[key, "; ".join(values)] for key, values in found.items()])


def describe_mixture(results: Sequence[CellResult]) -> str:
    """Describe what the cells of one table do not have in common: source code; or have no record of."""
    sources: dict[str, int] = {}
    for result in results:
        if source := _source(result):
            text = describe_source(source)
            sources[text] = sources.get(text, 0) + 1
    parts = []
    if len(sources) > 1:
        counts = "; ".join(f"{text} ({count} runs)" for text, count in sources.items())
        parts.append(f"These runs are not all of the same source code: {counts}.")
    unknown = sum(result.record is None and result.status != "failed" for result in results)
    if unknown:
        parts.append(
            f"{unknown} of {len(results)} runs have no record of their arguments and data (earlier versions wrote "
            "none) and are taken as they are."
        )
    return " ".join(parts)


def _source(result: CellResult) -> dict[str, str]:
    """State of the source code as the run itself says, else as the comparison wrote it down before the run."""
    said = {key: str(value) for key, value in result.content.get("versions", {}).items() if key in _SOURCE}
    return said or dict((result.record or {}).get("software", {}))


def step_time_table(comparison: Comparison) -> Table:
    """Tabulate the step times that a budget of time was planned with."""
    rows = []
    for name, time in comparison.step_times().items():
        text = f"{1000 * time.seconds:.1f}" if time.seconds is not None else time.reason
        rows.append([name, text, str(time.steps_per_epoch or "-")])
    return Table(["optimizer", "ms per step (measured before)", "steps per epoch"], rows)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
