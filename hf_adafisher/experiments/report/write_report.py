"""The report of a comparison: every table and picture, in files and, in short, as text to print."""

from __future__ import annotations

import math
from collections.abc import Container, Sequence
from pathlib import Path

from hf_adafisher.experiments.comparison.protocol import Comparison, failed_measurements
from hf_adafisher.experiments.comparison.published import read_published_results
from hf_adafisher.experiments.outputs import write_text
from hf_adafisher.experiments.report.paired import paired_table
from hf_adafisher.experiments.report.pictures import draw_pictures
from hf_adafisher.experiments.report.provenance import describe_mixture, settings_table, software_table, step_time_table
from hf_adafisher.experiments.report.results import (
    CellResult,
    SettingResults,
    failed_result,
    group_by_setting,
    read_results,
    write_csv,
)
from hf_adafisher.experiments.report.stability import STABILITY_PICTURE, draw_stability, read_stability
from hf_adafisher.experiments.report.tables import (
    Section,
    best_table,
    cell_table,
    escape_bars,
    failure_table,
    render_html,
    render_markdown,
)
from hf_adafisher.experiments.report.tuning import best_of_each, claimed_settings, tuning_table, tuning_trials

_PAIRED = (
    "First minus second, seed by seed: mean and interval (Student's t). The intervals of all pairs with one second "
    "hold together with 95 % (Bonferroni: each is one of 1 - 0.05 / k for its k rivals). Where that of the test metric "
    "leaves out 0, the row stands out."
)
_SAME_SEEDS = " Settings that were chosen by the same seeds flatter themselves."
NO_PICTURES = "hf-adafisher report ARCHIVE --output_dir FOLDER draws them from the runs."
TITLE = "Comparison of optimizers"
_METHOD = (
    "{choice} Means over the seeds, ± the standard deviation (divisor n - 1). {extent}; seconds are those of optimizer "
    "steps alone, evaluation and start excluded."
)
_BEST = (
    "Each optimizer at the setting with the {rule}, chosen among its settings with the most seeds; one with a diverged "
    "or failed seed is none of them."
)
_FROZEN = (
    "Each optimizer at its frozen settings, with seeds that chose nothing: runs with seed {seeds} only choose (see "
    "Tuning). One without other seeds is shown at its best trial, and the column of seeds says tuning."
)
_AS_GIVEN = "Every setting as it was given: no run here chose it."
_TUNING = (
    "Trials with seed {seeds}; the best has the {rule}. A rate at the edge of those tried says that a better one may "
    "lie beyond."
)


def write_report(
    comparison: Comparison,
    command: str = "",
    results: Sequence[CellResult] | None = None,
    pictures: Container[str] | None = None,
) -> str:
    """Write ``report.html``, ``report.md``, ``cells.csv`` and the pictures into the comparison's folder.

    Args:
        comparison: Some of its cells have results.
        command: The command line, for the report.
        results: Of ``read_comparison``, if they have been read.
        pictures: Names of the pictures to draw, such as ``curves.svg``; None: all.

    Returns:
        The tables in short and the paths, as text to print.

    Raises:
        ValueError: No cell has a result yet.
    """
    folder = comparison.output_dir
    results = read_comparison(comparison) if results is None else list(results)
    if not results:
        raise ValueError(f"no run in {folder} has a result yet: run the comparison first")
    settings, best = settings_and_claims(comparison, results)
    drawn = [_curves(folder, comparison, settings, best, pictures), *stability_sections(folder, settings, pictures)]
    sections = _sections(comparison, results, settings, best, drawn, command)
    write_text(folder / "report.html", render_html(TITLE, sections))
    write_text(folder / "report.md", render_markdown(TITLE, sections))
    write_csv(folder / "cells.csv", results)
    return _summary(comparison, results, best, [path for section in sections for path in section.pictures])


def read_comparison(comparison: Comparison) -> list[CellResult]:
    """Read all results of a comparison; cells that cannot be planned are failures."""
    cells, unplanned = comparison.plans()
    results = read_results(cells, comparison.output_dir, comparison.task, unplanned)
    found = {result.cell for result in results}
    failed = {name: reason for name, reason in failed_measurements(unplanned).items() if name not in found}
    return [
        *results,
        *(failed_result(cell, failed[cell.name], comparison.task) for cell in cells if cell.name in failed),
    ]


def settings_and_claims(
    comparison: Comparison, results: Sequence[CellResult]
) -> tuple[list[SettingResults], list[SettingResults]]:
    """Group results by setting, and select those that claims are made of, the best first."""
    settings = group_by_setting(results)
    return settings, claimed_settings(settings, comparison.tuning_seeds)


def describe_step_times(comparison: Comparison) -> str:
    """Format the measured step times."""
    return step_time_table(comparison).markdown(escape_bars)


def stability_sections(
    folder: Path, settings: list[SettingResults], wanted: Container[str] | None = None
) -> list[Section]:
    """Draw and tabulate a sweep over batch sizes; of any other comparison there is no section."""
    stability = read_stability(settings)
    if stability is None:
        return []
    text = (
        f"Each optimizer at its best settings of batch size {stability.batch_size} (of those run at the most batch "
        "sizes), then with other batch sizes, and with the learning rate tuned again at each."
    )
    drawn = wanted is None or STABILITY_PICTURE in wanted
    pictures = draw_stability(folder, stability) if drawn else {}
    return [Section("Batch size", text, stability.table(), pictures=pictures)]


def _sections(
    comparison: Comparison,
    results: list[CellResult],
    settings: list[SettingResults],
    best: list[SettingResults],
    pictures: list[Section],
    command: str,
) -> list[Section]:
    description = str(comparison.config.get("description", ""))
    lead = (description, _unfinished(comparison, results), describe_mixture(results))
    failures, times = failure_table(results), step_time_table(comparison)
    sections = [
        Section("", " ".join(filter(None, lead))),
        _best(comparison, best) if best else Section("", "No run ended well."),
        *_paired(comparison, best),
        *_tuning(comparison, settings),
        *pictures,
        _every_run(comparison, results, best),
    ]
    if failures.rows:
        sections.append(Section("Runs that did not end well", table=failures, is_text=True))
    if times.rows:
        text = "Measured before the runs: median over windows of steps, the first steps left out."
        sections.append(Section("Step times for the budget", text, times))
    sections.append(Section("Settings", "What all runs share.", settings_table(comparison), is_text=True))
    sections.append(Section("Software and hardware", table=software_table(results), is_text=True))
    if command:
        sections.append(Section("Command", command=command))
    return sections


def _curves(
    folder: Path,
    comparison: Comparison,
    settings: list[SettingResults],
    best: list[SettingResults],
    wanted: Container[str] | None,
) -> Section:
    """Curves of one setting of each optimizer, and sweeps; of trials alone, where there are any."""
    if comparison.tuning_seeds:
        trials = tuning_trials(settings, comparison.tuning_seeds)
        tried = {setting.optim for setting in trials}
        settings = [*trials, *(setting for setting in best if setting.optim not in tried)]
    pictures = draw_pictures(folder, settings, best_of_each(best), wanted)
    text = "" if pictures else "There are no pictures." if wanted is None else NO_PICTURES
    return Section("Curves and learning rates", text, pictures=pictures)


def _best(comparison: Comparison, best: list[SettingResults]) -> Section:
    task, published = comparison.task, read_published_results(comparison.config)
    extent = task.describe_extent(cell.all_settings for cell in comparison.cells)
    title = "Best of each optimizer"
    if comparison.tuning_seeds is None:
        choice = _BEST.format(rule=task.selection_rule)
    elif comparison.tuning_seeds:
        choice = _FROZEN.format(seeds=_listed(comparison))
    else:
        title, choice = "Every setting", _AS_GIVEN
    method = _METHOD.format(choice=choice, extent=extent)
    return Section(title, method, best_table(best, published), published.note if published else "")


def _every_run(comparison: Comparison, results: list[CellResult], best: list[SettingResults]) -> Section:
    if comparison.tuning_seeds == ():
        return Section("Every run", "", cell_table(results, []))
    return Section("Every run", "Those of the best settings stand out.", cell_table(results, best))


def _paired(comparison: Comparison, best: list[SettingResults]) -> list[Section]:
    table = paired_table(best)
    text = _PAIRED + (_SAME_SEEDS if comparison.tuning_seeds is None else "")
    return [Section("Paired differences", text, table, mark="differs")] if table.rows else []


def _tuning(comparison: Comparison, settings: list[SettingResults]) -> list[Section]:
    if not comparison.tuning_seeds:
        return []
    text = _TUNING.format(seeds=_listed(comparison), rule=comparison.task.selection_rule)
    return [Section("Tuning", text, tuning_table(settings, comparison.tuning_seeds), is_text=True)]


def _listed(comparison: Comparison) -> str:
    return ", ".join(map(str, comparison.tuning_seeds or ()))


def _unfinished(comparison: Comparison, results: list[CellResult]) -> str:
    unfinished = len(comparison.cells) - len(results)
    return f"{unfinished} of {len(comparison.cells)} runs have no result yet." if unfinished else ""


def _summary(
    comparison: Comparison, results: list[CellResult], best: list[SettingResults], pictures: list[Path]
) -> str:
    parts = [cell_table(results, best).markdown(escape_bars)]
    published = read_published_results(comparison.config)
    if best and (len(results) > len(best) or published is not None):
        parts.append(best_table(best, published).markdown(escape_bars))
        parts += [published.note + "\n"] if published is not None else []
    unfinished = _unfinished(comparison, results)
    parts += [text + "\n" for text in (unfinished, describe_mixture(results)) if text]
    lost = sum(not math.isfinite(result.cost) for result in results)
    failed = any(result.status == "failed" for result in results)
    hint = " --retry_failed runs failed ones again." if failed else ""
    parts += [f"{lost} of {len(results)} runs diverged or failed; the report says why.{hint}\n"] if lost else []
    parts += [f"picture: {path}" for path in pictures]
    parts += [f"report: {comparison.output_dir / name}" for name in ("report.html", "report.md", "cells.csv")]
    return "\n".join(parts)
