"""Tables of all optimizers and of the training modes that they refuse, for people and for programs."""

from __future__ import annotations

import json
from collections.abc import Sequence

from hf_adafisher.optimizers.factory.catalog import available_optimizers, optimizer_record
from hf_adafisher.optimizers.factory.records import OptimizerRecord
from hf_adafisher.optimizers.validation.training_modes import TRAINING_MODES, Needs

COLUMNS = (
    "optimizer",
    "implementation",
    "paper",
    "learning rate",
    "defaults set here",
    "state, bytes per parameter",
    "needs",
    "resumes exactly",
)
MODE_COLUMNS = ("mode", "refused by", "due steps run eagerly by", "since", "instead", "test")


def _row(record: OptimizerRecord) -> tuple[str, ...]:
    set_here = {name: default.value for name, default in record.defaults.items()}
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
    )


def rows() -> list[tuple[str, ...]]:
    """Return one row for each of ``available_optimizers()``, with the entries of ``COLUMNS``."""
    return [_row(optimizer_record(name)) for name in available_optimizers()]


def as_markdown() -> str:
    """Render the optimizers as a Markdown table."""
    return _markdown(COLUMNS, [(f"`{name}`", *others) for name, *others in rows()])


def modes_as_markdown() -> str:
    """Render the training modes that some optimizer refuses as a Markdown table."""
    return _markdown(MODE_COLUMNS, mode_rows())


def mode_rows() -> list[tuple[str, ...]]:
    """Return one row for each of ``TRAINING_MODES``, with the entries of ``MODE_COLUMNS``, for all forms."""
    records = [optimizer_record(name) for name in available_optimizers()]
    needs = {name: record.needs_with(form) for record in records for name, form in record.forms.items()}
    table: list[tuple[str, ...]] = []
    for mode in TRAINING_MODES:
        support = {name: mode.support(own) for name, own in needs.items()}
        refusing, eager = ([f"`{name}`" for name in support if support[name] == kind] for kind in ("refused", "eager"))
        tests = (path.split("::") for path in mode.tests)
        table.append(
            (
                mode.name,
                ", ".join(refusing),
                ", ".join(eager),
                mode.reason,
                mode.remedy(Needs.NOTHING),
                ", ".join(f"[`{name}`](../{path})" for path, name in tests),
            )
        )
    return table


def _markdown(columns: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in (columns, ("---",) * len(columns), *lines))


def as_text() -> str:
    """Render one paragraph for each optimizer, with the source of every default."""
    paragraphs = []
    for name in available_optimizers():
        record = optimizer_record(name)
        settings = {"learning rate": record.learning_rate, **record.defaults}
        about = [f"{record.paper}; {record.library}"]
        about += [f"{key} {setting.value} ({setting.source})" for key, setting in settings.items()]
        about += [f"state: {record.memory} bytes per parameter"]
        about += [f"{column}: {entry}" for column, entry in zip(COLUMNS[6:], _row(record)[6:], strict=True) if entry]
        for form, chosen in record.forms.items():
            refused = [mode.name for mode in TRAINING_MODES if mode.refused_by(record.needs_with(chosen))]
            own = f"{form.removeprefix(f'{name}, ')}: " if chosen else ""
            about += [f"{own}not with: {'; '.join(sorted(refused))}"] if refused else []
        options = record.options_class.specifications() if record.options_class else {}
        about += [f"option {option}: {specification}" for option, specification in options.items()]
        paragraphs.append("\n  ".join([name, *about]))
    return "\n".join(paragraphs)


def as_json() -> str:
    """Render a list of objects, one for each optimizer, with everything that its record holds."""
    return json.dumps([optimizer_record(name).as_dict() for name in available_optimizers()], indent=2)
