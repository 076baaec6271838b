"""Stored results of cells: one that is damaged, or not this cell's, never passes for a result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hf_adafisher.experiments.comparison.cells import Cell
from hf_adafisher.experiments.comparison.identity import COMMAND_FILE, difference, read_record
from hf_adafisher.experiments.comparison.schema import (
    anything,
    listing,
    mapping,
    number,
    one_of,
    optional,
    refuse,
    text,
)
from hf_adafisher.experiments.runs.run import RESULTS_FILE, SPLITS
from hf_adafisher.experiments.settings_files import read_json

_NUMBER, _OBJECT = optional(number()), optional(mapping(others=anything))


def _metrics(value: Any, place: str) -> None:
    """Accept the metrics of a split, and entries of the log: numbers, or null where they were not finite."""
    mapping(others=anything)(value, place)
    for key, item in value.items():
        if key in _MEASURED or key.startswith("eval_"):
            _NUMBER(item, f"{place}, {key!r}")


def _log_entry(value: Any, place: str) -> None:
    _metrics(value, place)
    number(0)(value.get("step"), f"{place}, 'step'")


_MEASURED = {
    "loss", "accuracy", "top5_accuracy", "token_perplexity", "word_perplexity", "train_seconds", "train_loss", "step",
}  # fmt: skip
_RESULT = mapping(
    {
        "status": one_of(("completed", "diverged", "failed")),
        "reason": optional(text),
        **dict.fromkeys(("steps", "steps_per_epoch", "train_seconds", "optimizer_state_bytes", "seconds"), _NUMBER),
        "step_seconds": listing(number()),
        "step_time": optional(mapping({"mean_ms": _NUMBER}, others=anything)),
        **dict.fromkeys(SPLITS, optional(_metrics)),
        "log_history": optional(listing(_log_entry)),
        "hardware": mapping({"torch_threads": number(1, whole=True)}, others=anything),
        **dict.fromkeys(("versions", "model", "corpus"), mapping(others=anything)),
    },
    others=anything,
    required=("status",),
)
"""What comparisons and reports read of a result."""


def load_result(folder: Path) -> dict[str, Any] | None:
    """Load the result of a cell, or None if it has none; a damaged file is a failure, with the damage as its reason."""
    path = folder / RESULTS_FILE
    if not path.exists():
        return None
    try:
        result = read_json(path)
        _RESULT(result, str(path))
        if result["status"] == "completed" and "step_seconds" not in result and not result.get("validation"):
            refuse(f"{path}, 'validation'", result.get("validation"), "there in a completed run")
    except (ValueError, OSError) as error:
        return _failure(f"damaged result: {error}")
    return dict(result)


def stored_result(cell: Cell, folder: Path, *, planned: bool = True, archive: bool = False) -> dict[str, Any] | None:
    """Load the result of this cell, or None if it has none.

    A result whose ``command.json`` is missing or damaged is a failure: nothing says what it belongs to.

    Args:
        cell: As it would run now.
        folder: Of this cell.
        planned: The steps of the cell are known.
        archive: Accept results without ``command.json`` in folders with the settings in their names, as committed
            results of earlier versions are.

    Raises:
        ValueError: The result was made with other arguments or data.
    """
    result = load_result(folder)
    if result is None:
        return None
    try:
        record = read_record(folder)
    except (ValueError, OSError) as error:
        return _failure(f"its record is damaged: {error}")
    if record is None:
        if archive and folder.name != cell.folder_name:
            return result
        return _failure(f"{folder / COMMAND_FILE} is missing: nothing says which arguments and data the result is of")
    other = difference(cell, record, planned)
    if other:
        raise ValueError(
            f"{folder} holds a result of {cell.name} made with {other}, see {COMMAND_FILE} there: use another output "
            "directory, or delete the folder to run it again"
        )
    return result


def is_done(cell: Cell, folder: Path, retry_failed: bool = False) -> bool:
    """Check that a cell has a result, made with the same arguments and data.

    Args:
        cell: As it would run now.
        folder: Of this cell.
        retry_failed: A failure is no result.

    Raises:
        ValueError: The result was made with other arguments or data.
    """
    failed = (load_result(folder) or {}).get("status") == "failed"
    if failed and retry_failed:
        return False
    result = stored_result(cell, folder)
    return result is not None and not (retry_failed and result["status"] == "failed")


def _failure(reason: str) -> dict[str, Any]:
    return {"status": "failed", "reason": reason}
