"""Forecast of a comparison: its cells, and the time that is left."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping

from hf_adafisher.experiments.comparison.budget import StepTime, seconds_of_epochs, timing_cell
from hf_adafisher.experiments.comparison.cells import Cell
from hf_adafisher.experiments.comparison.identity import cell_folder
from hf_adafisher.experiments.comparison.protocol import Comparison, failed_measurements
from hf_adafisher.experiments.comparison.stored import load_result
from hf_adafisher.optimizers.factory.catalog import canonical_name


def forecast(comparison: Comparison) -> str:
    """Format the names of all cells, their number, the number of finished ones, and the time of the others."""
    cells, unplanned = comparison.plans()
    failed = failed_measurements(unplanned)
    open_cells = [cell for cell in cells if cell.name not in failed and not comparison.is_done(cell)]
    times, source = _times(comparison)
    lines = [*(cell.name for cell in cells), ""]
    count = f"{len(cells)} cells, {len(cells) - len(open_cells)} of them finished"
    if comparison.jobs > 1:
        count += f", {comparison.jobs} at a time"
    lines.append(count)
    seconds = [_training_seconds(comparison, cell, times) for cell in open_cells]
    known = [value for value in seconds if value is not None]
    if len(known) < len(seconds):
        lines.append("how long is unknown until step times are measured (--measure_only)")
        return "\n".join(lines)
    overhead = float(comparison.config.get("overhead_seconds", 0))
    total = (sum(known) + overhead * len(known)) / comparison.jobs
    text = f"about {format_duration(total)} for the {len(known)} cells left"
    if known:
        kinds = f"training by {source}" if source else "training as the budget says"
        extra = f"{overhead:.0f} s a cell for start and evaluation" if overhead else "start and evaluation come on top"
        text += f" ({kinds}; {extra})"
    lines.append(text)
    return "\n".join(lines)


def format_duration(seconds: float) -> str:
    """Format a duration: ``45 s``, ``12 min``, ``3.4 h``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _times(comparison: Comparison) -> tuple[dict[str, StepTime], str]:
    """Return step times from the best source there is, and that source in words."""
    times: dict[str, StepTime] = {}
    config = comparison.config
    given = {canonical_name(name): seconds for name, seconds in config.get("step_seconds", {}).items()}
    examples = config.get("train_examples")
    for cell in comparison.cells:
        name = timing_cell(cell).name
        seconds = given.get(name, given.get(cell.optim))
        if seconds is not None:
            times[name] = StepTime(float(seconds), _steps_per_epoch(cell, examples))
    sources = ["the configuration's step times, measured on the machine where it was made"] if times else []
    finished = _from_finished(comparison)
    measured = {name: time for name, time in comparison.step_times().items() if time.seconds is not None}
    for found, source in ((finished, "finished cells"), (measured, "measured step times")):
        if found:
            sources = [source] if set(found) >= set(times) else [source, *sources]
            times |= found
    return times, " and ".join(sources)


def _steps_per_epoch(cell: Cell, examples: int | None) -> int | None:
    """Steps of an epoch on one process; None if the configuration has no batch size or number of examples."""
    arguments = cell.all_settings
    batch = arguments.get("per_device_train_batch_size")
    if examples is None or batch is None:
        return None
    # A configuration may hold numbers as text, as a command line does.
    return math.ceil(math.ceil(examples / int(batch)) / int(arguments.get("gradient_accumulation_steps", 1)))


def _from_finished(comparison: Comparison) -> dict[str, StepTime]:
    seen: dict[str, list[tuple[float, int | None]]] = {}
    for cell in comparison.cells:
        result = load_result(cell_folder(comparison.output_dir, cell)) or {}
        mean = (result.get("step_time") or {}).get("mean_ms")
        if mean:
            seen.setdefault(timing_cell(cell).name, []).append((mean / 1000, result.get("steps_per_epoch")))
    return {
        name: StepTime(statistics.median(seconds for seconds, _ in found), found[0][1]) for name, found in seen.items()
    }


def _training_seconds(comparison: Comparison, cell: Cell, times: Mapping[str, StepTime]) -> float | None:
    if cell.planned_seconds is not None:
        return cell.planned_seconds
    budget, time = comparison.budget, times.get(timing_cell(cell).name)
    if budget is not None and budget.kind == "seconds":
        return budget.amount
    if budget is not None and budget.kind == "like":
        reference = comparison.reference
        return seconds_of_epochs(budget, None if reference is None else times.get(timing_cell(reference).name))
    steps = budget.amount if budget is not None else _own_steps(cell, time)
    return None if time is None or time.seconds is None or steps is None else steps * time.seconds


def _own_steps(cell: Cell, time: StepTime | None) -> float | None:
    """Steps of a cell without a budget: its ``max_steps``, or its epochs if their length is known."""
    arguments = cell.all_settings
    epochs, length = arguments.get("num_train_epochs"), None if time is None else time.steps_per_epoch
    steps = arguments.get("max_steps")
    if steps is not None or epochs is None or length is None:
        return None if steps is None else float(steps)
    return math.ceil(float(epochs) * length)
