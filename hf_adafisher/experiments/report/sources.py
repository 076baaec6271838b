"""Numbers of a hand-made table, held against the files that it names."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from hf_adafisher.experiments.report.paired import LEAST_SEEDS, paired_interval
from hf_adafisher.experiments.settings_files import read_json

_NUMBER = re.compile(r"(?<![\w.,-])[+-]?\d+(?:,\d{3})*(?:\.\d+)?(?:e[+-]?\d+)?(?!\w)")
_MEASURED = re.compile(r"\d\.\d|±")
_UNITS = (2**20, 1e6)
"""MiB and MB, which bytes are shown in."""


def is_measured(rows: Sequence[str]) -> bool:
    """Check that a Markdown table has measurements: a decimal number, or a ``±``, outside of code and links.

    Args:
        rows: Its lines.
    """
    return any(_MEASURED.search(cell) for row in rows for cell in _cells(row))


def unknown_numbers(rows: Sequence[str], sources: str, root: Path) -> list[str]:
    """Return the numbers of a Markdown table that its files do not have, at the precision shown.

    All numbers of a row must be those of one record: of one setting of a ``cells.csv``, of one of the ``rows`` of a
    JSON file, or of any other JSON file as a whole. The heading and the first column are labels and are left out, and
    so are code and links.

    Args:
        rows: Lines of the table.
        sources: Paths of JSON files and of ``cells.csv``, with spaces between them. ``FILE.json#KEY`` takes the values
            of one key alone; ``seeds=20-24`` runs with these seeds alone. Of a setting count its cells and, over the
            seeds, their number, means and standard deviations, and differences from other settings, seed by seed,
            with 95 % intervals; bytes also as MiB and MB.
        root: Folder that the paths begin at.

    Returns:
        Of each row those that the record with most of its numbers does not have.

    Raises:
        ValueError: A file is missing or damaged, or is of another kind.
    """
    seeds: range | None = None
    paths = []
    for word in sources.split():
        if found := re.fullmatch(r"seeds=(\d+)-(\d+)", word):
            seeds = range(int(found[1]), int(found[2]) + 1)
        else:
            paths.append(word)
    records = [record for path in paths for record in _records(root, path, seeds)]
    if not records:
        raise ValueError("there is no row or run in it that numbers could be of")
    unknown = []
    for row in rows[2:]:
        tokens = _NUMBER.findall(" | ".join(_cells(row)[1:]))
        missing = [[token for token in tokens if not _has(record, token)] for record in records]
        fewest = min(missing, key=len)
        unknown += fewest
    return unknown


def _has(record: set[float], token: str) -> bool:
    if "e" in token:
        return float(token) in record
    shown, digits = _plain(token), len(token.partition(".")[2])
    return any(_plain(f"{number:.{digits}f}") == shown for number in record)


def _cells(row: str) -> list[str]:
    """Cells without code and links."""
    return re.sub(r"`[^`]*`|\]\([^)]*\)", "", row).strip().strip("|").split("|")


def _plain(number: str) -> str:
    """Without plus sign and separators; minus zero is zero."""
    text = number.replace(",", "").lstrip("+")
    return text.lstrip("-") if not text.strip("-0.") else text


def _records(root: Path, name: str, seeds: range | None) -> Iterator[set[float]]:
    """Yield the numbers that one row of a table may have."""
    path, _, key = name.partition("#")
    if not (root / path).is_file():
        raise ValueError(f"{path} does not exist")
    if path.endswith(".json"):
        content = read_json(root / path)
        if key and key not in content:
            raise ValueError(f"{path} has no {key!r}; it has {', '.join(content)}")
        content = content[key] if key else content
        listed = content["rows"] if isinstance(content, dict) and isinstance(content.get("rows"), list) else [content]
        yield from ({*_leaves(record)} for record in listed)
    elif path.endswith(".csv"):
        yield from _of_settings(pd.read_csv(root / path), path, seeds)
    else:
        raise ValueError(f"{path} must be a JSON file or a cells.csv")


def _leaves(value: Any, key: str = "") -> Iterator[float]:
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _leaves(item, name)
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(item, key)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield float(value)
        if key.endswith("bytes"):
            yield from (value / unit for unit in _UNITS)


def _of_settings(table: pd.DataFrame, path: str, seeds: range | None) -> Iterator[set[float]]:
    if not {"cell", "seed", "optimizer bytes"} <= set(table.columns):
        raise ValueError(f"{path} must have the columns cell, seed and optimizer bytes, as those of comparisons have")
    table = table if seeds is None else table[table["seed"].isin(seeds)]
    table = table.assign(**{f"in {unit}": table["optimizer bytes"] / unit for unit in _UNITS})
    settings = table["cell"].str.replace(r",seed=\d+", "", regex=True)
    runs = [group.set_index("seed").select_dtypes("number") for _, group in table.groupby(settings)]
    for group in runs:
        found: list[Any] = [group, [len(group)], group.mean(), group.std()]
        for other in runs:
            common = group.index.intersection(other.index)
            if other is not group and len(common) >= LEAST_SEEDS:
                found += [paired_interval(group.loc[common, name], other.loc[common, name]) for name in group]
        numbers = np.concatenate([np.ravel(np.asarray(values, dtype=float)) for values in found])
        yield {*numbers[np.isfinite(numbers)].tolist()}
