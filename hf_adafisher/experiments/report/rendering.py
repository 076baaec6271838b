"""Rendering of a report: one HTML page that needs no other file, and Markdown."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from jinja2 import Environment, FileSystemLoader

from hf_adafisher.experiments.report.tables import Table, escape_markdown, escape_paragraph

_TEMPLATE = "report.html.jinja"


class Picture(NamedTuple):
    """What stands below a picture, and what stands in its place for those who do not see it: trend and winner."""

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
