"""Tables and sections of a report, rendered as Markdown or as one HTML page that needs no other file."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader

from hf_adafisher.experiments.comparison.published import PublishedResults
from hf_adafisher.experiments.comparison.tasks import Metric, format_number
from hf_adafisher.experiments.report.results import CPU_TIME, CellResult, SettingResults


def escape_markdown(text: str) -> str:
    """Escape text for Markdown: it shows as it is, and is neither markup nor HTML; line breaks become spaces."""
    plain = html.escape(" ".join(text.split()), quote=False)
    # An underscore within a word is none of Markdown's; escaped there, names would be hard to read.
    return re.sub(r"[\\`*\[\]|~]|(?<!\w)_|_(?!\w)", r"\\\g<0>", plain)


def escape_paragraph(text: str) -> str:
    """Escape a paragraph for Markdown, also what would begin a heading, a list or a line there."""
    return re.sub(r"^(\d*)([#=]|[+-](?=[\s-]|$)|(?<=\d)[.)](?=\s|$))", r"\1\\\2", escape_markdown(text))


def escape_bars(text: str) -> str:
    """Escape what would end a cell of a table: bars, and line breaks become spaces."""
    return " ".join(text.split()).replace("|", "\\|")


@dataclass(frozen=True)
class Table:
    """Text by column and row.

    Attributes:
        columns: Titles.
        rows: As many texts each as there are columns.
        bold: Indices of the rows that are highlighted.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    bold: frozenset[int] = frozenset()

    def markdown(self, escape: Callable[[str], str] = escape_markdown) -> str:
        """Render Markdown; the first text of a highlighted row is bold.

        Args:
            escape: Applied to every text; ``escape_bars`` is for screens, which show Markdown as it is.
        """
        columns = [escape(column) for column in self.columns]
        lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
        for index, row in enumerate(self.rows):
            texts = [escape(text) for text in row]
            if index in self.bold:
                texts[0] = f"**{texts[0]}**"
            lines.append("| " + " | ".join(texts) + " |")
        return "\n".join(lines) + "\n"


def best_table(best: Sequence[SettingResults], published: PublishedResults | None = None) -> Table:
    """Tabulate each optimizer at its best or its frozen settings: mean and standard deviation over the seeds.

    Args:
        best: At least one, see ``hf_adafisher.experiments.report.tuning.claimed_settings``.
        published: Numbers of a paper for these optimizers.
    """
    task = best[0].task
    columns: dict[str, Callable[[SettingResults], str]] = {
        "optimizer": lambda setting: setting.optim,
        "setting": lambda setting: setting.name,
        "seeds": describe_seeds,
        **{name: with_spread(task.metric(name)) for name in task.setting_columns},
        **({} if published is None else {published.title: lambda s: format_number(published.values.get(s.base), 2)}),
        "steps": _mean("steps", 0),
        "planned s": _mean("planned seconds", 1),
        "used s": _mean("seconds", 1),
        "ms per step": _mean("ms per step", 0),
        CPU_TIME: _mean(CPU_TIME, 0),
        "optimizer bytes": _mean("optimizer bytes", 0, ","),
    }
    return Table(*_filled(columns, best))


def describe_seeds(setting: SettingResults) -> str:
    """Return the number of seeds, and say so if they chose the setting: ``1 (tuning)``."""
    return f"{len(setting.cells)} (tuning)" if setting.tuning else str(len(setting.cells))


def cell_table(results: Sequence[CellResult], best: Sequence[SettingResults]) -> Table:
    """Tabulate every cell (at least one); those of the best settings are highlighted."""
    task = results[0].task
    highlighted = {result.cell for setting in best for result in setting.cells}
    columns: dict[str, Callable[[CellResult], str]] = {
        "run": lambda result: (
            result.cell.replace(",", ", ") + ("" if result.status == "completed" else f" ({result.status})")
        ),
        "steps": _value("steps", 0),
        **{name: _value(name, task.metric(name).digits) for name in task.cell_columns},
        "ms per step": _value("ms per step", 0),
        "optimizer MiB": lambda result: format_number((result.values["optimizer bytes"] or 0) / 2**20 or None, 1),
        "planned s": _value("planned seconds", 1),
        "used s": _value("seconds", 1),
    }
    bold = frozenset(index for index, result in enumerate(results) if result.cell in highlighted)
    return Table(*_filled(columns, results), bold)


def failure_table(results: Sequence[CellResult]) -> Table:
    """Tabulate the cells that diverged or failed, with the reason."""
    failures = [result for result in results if result.status != "completed"]
    return Table(["run", "what", "why"], [[result.cell, result.status, result.reason] for result in failures])


def _filled(columns: Mapping[str, Callable[[Any], str]], items: Sequence[Any]) -> tuple[list[str], list[list[str]]]:
    """Titles and rows without the columns that are empty for all items."""
    texts = {title: [text(item) for item in items] for title, text in columns.items()}
    kept = [title for title in texts if any(text != "-" for text in texts[title])]
    return kept, [list(row) for row in zip(*(texts[title] for title in kept), strict=True)]


def _value(metric: str, digits: int) -> Callable[[CellResult], str]:
    return lambda result: format_number(result.values[metric], digits)


def _mean(metric: str, digits: int, group: str = "") -> Callable[[SettingResults], str]:
    return lambda setting: format_number(setting.mean(metric), digits, group)


def with_spread(metric: Metric) -> Callable[[SettingResults], str]:
    """Return what formats a metric's mean and standard deviation over the seeds: ``5.056 ± 0.021``."""

    def text(setting: SettingResults) -> str:
        mean, spread = setting.mean(metric.name), setting.spread(metric.name)
        return metric.format(mean) + ("" if mean is None or spread is None else f" ± {metric.format(spread)}")

    return text


_TEMPLATE = "report.html.jinja"


class Picture(NamedTuple):
    """Text below a picture, and text in its place for those who do not see it: trend and winner."""

    caption: str
    alt: str


@dataclass(frozen=True)
class Section:
    """A part of a report: text, a table with a note below it, SVG pictures with their texts, a command.

    Attributes:
        is_text: The table holds text, which is aligned left and broken into lines, not numbers.
        mark: What the highlighted rows of the table are, in a word, for those who do not see the highlight.
    """

    title: str
    text: str = ""
    table: Table | None = None
    note: str = ""
    pictures: Mapping[Path, Picture] = field(default_factory=dict)
    command: str = ""
    is_text: bool = False
    mark: str = "best"


def render_html(title: str, sections: Sequence[Section]) -> str:
    """Render the page, with pictures, style and the script that sorts its tables inside it."""
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=loader, autoescape=True, trim_blocks=True, keep_trailing_newline=True)
    environment.filters["base64"] = lambda path: base64.b64encode(path.read_bytes()).decode("ascii")
    return environment.get_template(_TEMPLATE).render(title=title, sections=sections)


def render_markdown(title: str, sections: Sequence[Section]) -> str:
    """Render Markdown, with pictures as links to files beside it."""
    parts = [f"# {title}"]
    for section in sections:
        parts += [f"## {escape_markdown(section.title)}"] if section.title else []
        parts += [escape_paragraph(section.text)] if section.text else []
        parts += [section.table.markdown().rstrip()] if section.table is not None else []
        parts += [escape_paragraph(section.note)] if section.note else []
        pictures = [(path.name, *map(escape_markdown, picture)) for path, picture in section.pictures.items()]
        parts += [f"![{alt}]({name})\n\n{caption}" for name, caption, alt in pictures]
        parts += [_code_block(section.command)] if section.command else []
    return "\n\n".join(parts) + "\n"


def _code_block(command: str) -> str:
    """Fence a command by more backticks than it has in a row."""
    longest = max(map(len, re.findall("`+", command)), default=0)
    fence = "`" * max(longest + 1, 3)
    return f"{fence}bash\n{command}\n{fence}"
