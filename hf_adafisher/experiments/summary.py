"""The table and the pictures of a comparison."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_adafisher.experiments.clm_setup import RESULTS_FILE
from hf_adafisher.experiments.compare import Cell, load_result
from hf_adafisher.experiments.report import write_json, write_learning_curves, write_lines

_COLUMNS = (
    "run",
    "steps",
    "validation loss",
    "token perplexity",
    "word perplexity",
    "test loss",
    "ms per step",
    "optimizer MiB",
)


def summarize(cells: Sequence[Cell], output_dir: Path) -> str:
    """Write ``comparison.json``, ``comparison.md``, ``curves.png`` and, for a sweep, ``learning_rates.png``.

    Of each optimizer the run with the lowest validation loss is marked and drawn; perplexities are those of the
    validation split.

    Returns:
        The table (Markdown) and the paths of the pictures, as text to print.

    Raises:
        ValueError: No cell has a result yet.
    """
    rows = [_row(cell, output_dir) for cell in cells if (output_dir / cell.name / RESULTS_FILE).is_file()]
    if not rows:
        raise ValueError(f"no run in {output_dir} has a result yet: run the comparison first")
    best = _best(rows)
    table = _markdown(rows, {row["run"] for row in best})
    missing = len(cells) - len(rows)
    if missing:
        table += f"\n{missing} of {len(cells)} runs have no result yet.\n"
    write_json(output_dir / "comparison.json", rows)
    (output_dir / "comparison.md").write_text(table, encoding="utf-8")
    histories = {row["run"]: load_result(output_dir / row["run"])["log_history"] for row in best}
    pictures = []
    if write_learning_curves(output_dir / "curves.png", histories, "best run of each optimizer"):
        pictures.append(output_dir / "curves.png")
    curves = _loss_by_learning_rate(rows)
    if any(len(points) > 1 for points in curves.values()) and write_lines(
        output_dir / "learning_rates.png", curves, "learning rate", "validation loss (nats per token)"
    ):
        pictures.append(output_dir / "learning_rates.png")
    return "\n".join([table, *(f"picture: {path}" for path in pictures)])


def _row(cell: Cell, output_dir: Path) -> dict[str, Any]:
    result = load_result(output_dir / cell.name)
    validation, test = result.get("validation") or {}, result.get("test") or {}
    return {
        "run": cell.name,
        **cell.settings,
        "status": result["status"],
        "seed": result["seed"],
        "steps": result["steps"],
        "validation loss": validation.get("loss"),
        "token perplexity": validation.get("token_perplexity"),
        "word perplexity": validation.get("word_perplexity"),
        "test loss": test.get("loss"),
        "test token perplexity": test.get("token_perplexity"),
        "test word perplexity": test.get("word_perplexity"),
        "ms per step": result["step_time"]["mean_ms"],
        "optimizer MiB": result["optimizer_state_bytes"] / 2**20,
        "seconds": result["train_seconds"],
    }


def _best(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The row of each optimizer with the lowest validation loss; optimizers that only diverged are left out."""
    best: dict[str, dict[str, Any]] = {}
    for row in rows:
        loss = row["validation loss"]
        if loss is not None and loss < best.get(row["optim"], {}).get("validation loss", math.inf):
            best[row["optim"]] = row
    return list(best.values())


def _markdown(rows: Sequence[dict[str, Any]], best: set[str]) -> str:
    lines = ["| " + " | ".join(_COLUMNS) + " |", "|" + "---|" * len(_COLUMNS)]
    for row in rows:
        cells = [_shown(row[column], column) for column in _COLUMNS]
        if row["run"] in best:
            cells[0] = f"**{cells[0]}**"
        if row["status"] != "completed":
            cells[0] += f" ({row['status']})"
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _shown(value: Any, column: str) -> str:
    if value is None:
        return "-"
    if isinstance(value, str):
        return value.replace(",", ", ")
    digits = {"steps": 0, "ms per step": 0, "validation loss": 4, "test loss": 4}.get(column, 1)
    return f"{value:.{digits}f}"


def _loss_by_learning_rate(rows: Sequence[dict[str, Any]]) -> dict[str, list[tuple[float, float]]]:
    """Points (learning rate, validation loss) of each optimizer and its other settings, sorted."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row["validation loss"] is not None and "learning_rate" in row:
            parts = [part for part in row["run"].split(",") if not part.startswith("learning_rate=")]
            curves.setdefault(", ".join(parts), []).append((float(row["learning_rate"]), row["validation loss"]))
    return {label: sorted(points) for label, points in curves.items()}
