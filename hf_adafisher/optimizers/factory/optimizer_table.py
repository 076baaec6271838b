"""The records of all optimizers as a table, for people and for programs."""

from __future__ import annotations

import json

from hf_adafisher.optimizers.factory.catalog import available_optimizers, optimizer_record
from hf_adafisher.optimizers.factory.records import OptimizerRecord

COLUMNS = (
    "optimizer",
    "implementation",
    "paper",
    "learning rate",
    "defaults set here",
    "state, bytes per parameter",
    "needs",
    "resumes exactly",
    "not with",
)


def _row(record: OptimizerRecord) -> tuple[str, ...]:
    set_here = {name: setting.value for name, setting in record.defaults.items() if name != "lr"}
    needs = {"the model": record.needs_model, "second derivatives": record.create_graph}
    return (
        record.name,
        record.library,
        record.paper,
        f"{record.learning_rate.value:g}",
        ", ".join(f"{name}={value}" for name, value in set_here.items()),
        record.memory,
        ", ".join(need for need, applies in needs.items() if applies),
        "yes" if record.resumable else "no",
        ", ".join(sorted(record.refuses)),
    )


def rows() -> list[tuple[str, ...]]:
    """One row for each optimizer, in the order of ``available_optimizers()``, with the entries of ``COLUMNS``."""
    return [_row(optimizer_record(name)) for name in available_optimizers()]


def as_markdown() -> str:
    """A Markdown table."""
    lines = [COLUMNS, ("---",) * len(COLUMNS), *((f"`{name}`", *others) for name, *others in rows())]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def as_text() -> str:
    """One paragraph for each optimizer, with the source of every default."""
    paragraphs = []
    for name in available_optimizers():
        record = optimizer_record(name)
        settings = {"learning rate": record.learning_rate, **{k: v for k, v in record.defaults.items() if k != "lr"}}
        about = [f"{record.paper}; {record.library}"]
        about += [f"{key} {setting.value} ({setting.source})" for key, setting in settings.items()]
        about += [f"state: {record.memory} bytes per parameter"]
        about += [f"{column}: {entry}" for column, entry in zip(COLUMNS[6:], _row(record)[6:], strict=True) if entry]
        paragraphs.append("\n  ".join([name, *about]))
    return "\n".join(paragraphs)


def as_json() -> str:
    """A list of objects, one for each optimizer, with everything that its record holds."""
    return json.dumps([optimizer_record(name).as_dict() for name in available_optimizers()], indent=2)
