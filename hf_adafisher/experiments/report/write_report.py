"""The report of a comparison: every table and picture, in files and, in short, as text to print."""

from __future__ import annotations

import math
from pathlib import Path

from hf_adafisher.experiments.comparison.cells import Cell
from hf_adafisher.experiments.comparison.protocol import Comparison
from hf_adafisher.experiments.report.html import Section, as_html, as_markdown
from hf_adafisher.experiments.report.pictures import draw_pictures, optimizer_styles
from hf_adafisher.experiments.report.provenance import settings_table, software_table, step_time_table, unfinished
from hf_adafisher.experiments.report.published import read_paper
from hf_adafisher.experiments.report.results import Row, Setting, best_settings, group_settings, read_rows, write_csv
from hf_adafisher.experiments.report.stability import read_stability
from hf_adafisher.experiments.report.stability_picture import draw_stability
from hf_adafisher.experiments.report.tables import best_table, cell_table, failure_table

TITLE = "Comparison of optimizers"
_HOW = (
    "Each optimizer at the setting with the {rule}, chosen among its settings with the most seeds; one with a diverged "
    "or failed seed is none of them. Means over the seeds, ± the standard deviation (divisor n - 1). {extent}; "
    "seconds are those of optimizer steps alone, evaluation and start excluded."
)


def summarize(comparison: Comparison, command: str = "") -> str:
    """Write ``report.html``, ``report.md``, ``cells.csv`` and the pictures into the comparison's folder.

    Args:
        comparison: Some of its cells have results.
        command: What was typed, for the report.

    Returns:
        The tables in short and the paths, as text to print.

    Raises:
        ValueError: No cell has a result yet.
    """
    folder = comparison.output_dir
    rows = read_rows([*comparison.plan(), *_left_out(comparison)], folder, comparison.task)
    if not rows:
        raise ValueError(f"no run in {folder} has a result yet: run the comparison first")
    order = {cell.name: index for index, cell in enumerate(comparison.cells)}
    rows.sort(key=lambda row: order[row.cell])
    settings = group_settings(rows)
    best = best_settings(settings)
    pictures = draw_pictures(folder, settings, best)
    sections = _sections(comparison, rows, best, pictures, command)
    swept = _stability(folder, settings)
    sections[3:3] = swept
    paths = [*pictures, *(path for section in swept for path in section.pictures)]
    (folder / "report.html").write_text(as_html(TITLE, sections), encoding="utf-8")
    (folder / "report.md").write_text(as_markdown(TITLE, sections), encoding="utf-8")
    write_csv(folder / "cells.csv", rows)
    return _printed(comparison, rows, best, list(map(str, paths)))


def describe_step_times(comparison: Comparison) -> str:
    """The measured step times, to print."""
    return step_time_table(comparison).markdown()


def _left_out(comparison: Comparison) -> list[Cell]:
    names = comparison.unplanned()
    return [cell for cell in comparison.cells if cell.name in names]


def _sections(
    comparison: Comparison,
    rows: list[Row],
    best: list[Setting],
    pictures: dict[Path, str],
    command: str,
) -> list[Section]:
    lead = str(comparison.config.get("description", ""))
    failures, times = failure_table(rows), step_time_table(comparison)
    sections = [
        Section("", " ".join(part for part in (lead, _missing(comparison)) if part)),
        _best(comparison, best) if best else Section("", "No run ended well."),
        Section("Curves and learning rates", "" if pictures else "There are no pictures.", pictures=pictures),
        Section("Every run", "Those of the best settings stand out.", cell_table(rows, best)),
    ]
    if failures.rows:
        sections.append(Section("Runs that did not end well", table=failures, facts=True))
    if times.rows:
        text = "Measured before the runs: median over windows of steps, the first steps left out."
        sections.append(Section("Step times for the budget", text, times))
    sections.append(Section("Settings", "What all runs share.", settings_table(comparison), facts=True))
    sections.append(Section("Software and hardware", table=software_table(comparison, rows), facts=True))
    if command:
        sections.append(Section("Command", command=command))
    return sections


def _best(comparison: Comparison, best: list[Setting]) -> Section:
    task, paper = comparison.task, read_paper(comparison.config)
    extent = task.describe({**cell.common, **cell.settings} for cell in comparison.cells)
    how = _HOW.format(rule=task.rule, extent=extent)
    return Section("Best of each optimizer", how, best_table(best, paper), note=paper.note if paper else "")


def _stability(folder: Path, settings: list[Setting]) -> list[Section]:
    """What there is to say of a sweep over batch sizes; nothing of any other comparison."""
    stability = read_stability(settings)
    if stability is None:
        return []
    text = (
        f"Each optimizer at its best settings of batch size {stability.batch_size} (of those run at the most batch "
        "sizes), then with other batch sizes, and with the learning rate tuned again at each."
    )
    pictures = draw_stability(folder, stability, optimizer_styles(settings))
    return [Section("Batch size", text, stability.table(), pictures=pictures)]


def _missing(comparison: Comparison) -> str:
    missing = unfinished(comparison)
    return f"{missing} of {len(comparison.cells)} runs have no result yet." if missing else ""


def _printed(comparison: Comparison, rows: list[Row], best: list[Setting], pictures: list[str]) -> str:
    parts = [cell_table(rows, best).markdown()]
    paper = read_paper(comparison.config)
    if best and (len(rows) > len(best) or paper is not None):
        parts.append(best_table(best, paper).markdown())
        parts += [paper.note + "\n"] if paper is not None else []
    missing = _missing(comparison)
    parts += [missing + "\n"] if missing else []
    lost = sum(not math.isfinite(row.cost) for row in rows)
    parts += [f"{lost} of {len(rows)} runs diverged or failed; the report says why.\n"] if lost else []
    parts += [f"picture: {path}" for path in pictures]
    parts += [f"report: {comparison.output_dir / name}" for name in ("report.html", "report.md", "cells.csv")]
    return "\n".join(parts)
