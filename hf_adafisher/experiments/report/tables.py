"""The tables of a comparison as plain cells of text, for Markdown and for HTML alike."""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hf_adafisher.experiments.comparison.tasks import Measure
from hf_adafisher.experiments.report.published import Paper
from hf_adafisher.experiments.report.results import Row, Setting


@dataclass(frozen=True)
class Table:
    """Text by column and row.

    Attributes:
        columns: Titles.
        rows: As many texts each as there are columns.
        bold: Indices of the rows that stand out.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    bold: frozenset[int] = frozenset()

    def markdown(self) -> str:
        """As Markdown; the first text of a row that stands out is bold."""
        lines = ["| " + " | ".join(self.columns) + " |", "|" + "---|" * len(self.columns)]
        for index, row in enumerate(self.rows):
            texts = [text.replace("|", "\\|") for text in row]
            if index in self.bold:
                texts[0] = f"**{texts[0]}**"
            lines.append("| " + " | ".join(texts) + " |")
        return "\n".join(lines) + "\n"

    def html(self) -> str:
        """As an HTML table."""
        head = "".join(f'<th scope="col">{html.escape(title)}</th>' for title in self.columns)
        lines = []
        for index, row in enumerate(self.rows):
            mark = ' class="best"' if index in self.bold else ""
            lines.append(
                f'<tr{mark}><th scope="row">{html.escape(row[0])}</th>{"".join(map(_html_cell, row[1:]))}</tr>'
            )
        body = "\n".join(lines)
        return f'<div class="table"><table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table></div>'


def _html_cell(text: str) -> str:
    words = ' class="words"' if ", " in text else ""  # several words may break into lines, a number may not
    return f"<td{words}>{html.escape(text)}</td>"


def best_table(best: Sequence[Setting], paper: Paper | None = None) -> Table:
    """One row an optimizer, at its best setting: mean and standard deviation over the seeds, and the paper's number.

    Args:
        best: At least one.
        paper: What was published for these optimizers.
    """
    task = best[0].task
    columns = {
        "optimizer": lambda setting: setting.optim,
        "best setting": lambda setting: setting.name,
        "seeds": lambda setting: str(len(setting.rows)),
        **{name: _with_spread(task.measure(name)) for name in task.best},
        **({paper.title: lambda setting: _shown(paper.values.get(setting.optim), 2)} if paper is not None else {}),
        "steps": _mean("steps", 0),
        "planned s": _mean("planned seconds", 1),
        "used s": _mean("seconds", 1),
        "ms per step": _mean("ms per step", 0),
        "optimizer bytes": _mean("optimizer bytes", 0, ","),
    }
    return _filled(columns, best)


def cell_table(rows: Sequence[Row], best: Sequence[Setting]) -> Table:
    """Every cell (at least one); those of the best settings stand out."""
    task = rows[0].task
    marked = {row.cell for setting in best for row in setting.rows}
    columns: dict[str, Callable[[Row], str]] = {
        "run": lambda row: row.cell.replace(",", ", ") + ("" if row.status == "completed" else f" ({row.status})"),
        "steps": _value("steps", 0),
        **{name: _value(name, task.measure(name).digits) for name in task.cells},
        "ms per step": _value("ms per step", 0),
        "optimizer MiB": lambda row: _shown((row.values["optimizer bytes"] or 0) / 2**20 or None, 1),
        "planned s": _value("planned seconds", 1),
        "used s": _value("seconds", 1),
    }
    table = _filled(columns, rows)
    return Table(table.columns, table.rows, frozenset(i for i, row in enumerate(rows) if row.cell in marked))


def failure_table(rows: Sequence[Row]) -> Table:
    """The cells that did not end well, and why."""
    return Table(
        ["run", "what", "why"], [[row.cell, row.status, row.reason] for row in rows if row.status != "completed"]
    )


def _filled(columns: Mapping[str, Callable[[Any], str]], things: Sequence[Any]) -> Table:
    """The table without the columns in which nothing stands."""
    texts = {title: [show(thing) for thing in things] for title, show in columns.items()}
    kept = [title for title in texts if any(text != "-" for text in texts[title])]
    return Table(kept, list(zip(*(texts[title] for title in kept), strict=True)))


def _shown(value: float | None, digits: int, group: str = "") -> str:
    return "-" if value is None else f"{value:{group}.{digits}f}"


def _value(measure: str, digits: int) -> Callable[[Row], str]:
    return lambda row: _shown(row.values[measure], digits)


def _mean(measure: str, digits: int, group: str = "") -> Callable[[Setting], str]:
    return lambda setting: _shown(setting.mean(measure), digits, group)


def _with_spread(measure: Measure) -> Callable[[Setting], str]:
    def show(setting: Setting) -> str:
        spread = setting.spread(measure.name)
        return measure.shown(setting.mean(measure.name)) + ("" if spread is None else f" ± {measure.shown(spread)}")

    return show
