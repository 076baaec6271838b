"""The report as one HTML page that needs no other file, and as Markdown."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hf_adafisher.experiments.report.tables import Table

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 1250px; margin: 2em auto;
       padding: 0 1.5em; }
h1 { font-size: 1.6em; margin-bottom: .2em; } h2 { font-size: 1.2em; margin-top: 2em; }
.table { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { padding: .3em .55em; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap; }
th:first-child, .facts td, .facts th { text-align: left; }
th[scope=row] { font-weight: normal; }
thead th { border-bottom: 2px solid #888; white-space: normal; vertical-align: bottom; }
td.words { white-space: normal; }
.facts td { white-space: normal; overflow-wrap: anywhere; }
tbody tr:hover { background: #f4f6f8; } tr.best { background: #eaf3fb; } tr.best th { font-weight: 600; }
figure { margin: 1.5em 0; } figure img { max-width: 100%; height: auto; } figcaption { color: #555; font-size: 13px; }
pre { background: #f4f6f8; padding: .7em 1em; overflow-x: auto; white-space: pre-wrap; overflow-wrap: anywhere; }
"""


@dataclass(frozen=True)
class Section:
    """A part of a report: text, a table with a note below it, pictures with their captions, a command."""

    title: str
    text: str = ""
    table: Table | None = None
    note: str = ""
    pictures: Mapping[Path, str] = field(default_factory=dict)
    command: str = ""
    facts: bool = False


def as_html(title: str, sections: Sequence[Section]) -> str:
    """The page. Pictures are inside it, and there is no script."""
    body = "\n".join(_section(section) for section in sections)
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{_STYLE}</style>'
    body = f"<h1>{html.escape(title)}</h1>\n{body}"
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'


def as_markdown(title: str, sections: Sequence[Section]) -> str:
    """The same with pictures as links to files beside it."""
    parts = [f"# {title}"]
    for section in sections:
        parts += [f"## {section.title}"] if section.title else []
        parts += [section.text] if section.text else []
        parts += [section.table.markdown().rstrip()] if section.table is not None else []
        parts += [section.note] if section.note else []
        parts += [f"![{caption}]({path.name})\n\n{caption}" for path, caption in section.pictures.items()]
        parts += [f"```bash\n{section.command}\n```"] if section.command else []
    return "\n\n".join(parts) + "\n"


def _section(section: Section) -> str:
    parts = [f"<h2>{html.escape(section.title)}</h2>"] if section.title else []
    parts += [f"<p>{html.escape(section.text)}</p>"] if section.text else []
    if section.table is not None:
        table = section.table.html()
        parts.append(f'<div class="facts">{table}</div>' if section.facts else table)
    parts += [f"<p>{html.escape(section.note)}</p>"] if section.note else []
    for path, caption in section.pictures.items():
        data, text = base64.b64encode(path.read_bytes()).decode("ascii"), html.escape(caption)
        image = f'<img src="data:image/png;base64,{data}" alt="{text}">'
        parts.append(f"<figure>{image}<figcaption>{text}</figcaption></figure>")
    parts += [f"<pre>{html.escape(section.command)}</pre>"] if section.command else []
    return "\n".join(parts)
