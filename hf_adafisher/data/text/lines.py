"""Lines of text from the columns of tables and from files, read at once or as they are needed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

TABLE_FORMATS = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
"""Endings of files whose text is in a column; every other file is text itself."""
_TEXT_TYPES = ("string", "large_string")


class LineStream:
    """Lines that are read anew in every pass, so that a text need not fit into memory.

    Args:
        read: Returns the lines, without their newlines.
        start: Number of first lines to leave out.
        stop: Number of the line before which to stop. Default: none.
    """

    def __init__(self, read: Callable[[], Iterable[str]], start: int = 0, stop: int | None = None) -> None:
        self.read, self.start, self.stop = read, start, stop

    def __iter__(self) -> Iterator[str]:
        """Read the lines."""
        return islice(self.read(), self.start, self.stop)


Lines = list[str] | LineStream


def first_lines(lines: Lines, count: int | None) -> Lines:
    """Keep so many first lines; None keeps all."""
    if count is None or isinstance(lines, list):
        return lines[:count] if isinstance(lines, list) else lines
    return LineStream(lambda: islice(iter(lines), count))


def column_lines(table: Any, column: str | None, location: str) -> Callable[[], Iterator[str]]:
    """Return a reader of a column's lines: a text of several lines is several, and a last newline ends its line.

    Args:
        table: ``Dataset`` or ``IterableDataset`` of datasets.
        column: Name of the column. Default: ``text``, or the only one that holds text.
        location: Place in messages.

    Raises:
        ValueError: There is no such column, or it holds no text. The reader raises it for a row without text.
    """
    features = table.features if table.features is not None else table._resolve_features().features
    name = _text_column(features, column, location)
    rows = table.select_columns([name])

    def read() -> Iterator[str]:
        for number, row in enumerate(rows):
            text = row[name]
            if not isinstance(text, str):
                raise ValueError(f"{location}: row {number} of column {name!r} holds {text!r}; every row must be text")
            yield from text.removesuffix("\n").split("\n")

    return read


def file_lines(path: Path, column: str | None, streaming: bool) -> Callable[[], Iterable[str]]:
    """Return a reader of a file's lines.

    Args:
        path: A CSV, JSON or parquet file by its ending, else UTF-8 text.
        column: Column of the text in a table; see ``column_lines``.
        streaming: Read rows of a table as they are needed.

    Raises:
        FileNotFoundError: It does not exist.
        ValueError: It is a table without such a column, or cannot be read. The reader raises it for a file that is
            empty or not UTF-8.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"text file {str(path)!r} does not exist (or is not a file); give the path of a text file"
        )
    form = TABLE_FORMATS.get(path.suffix.lower())
    if form is None:
        if column is not None:
            raise ValueError(
                f"--text_column_name is {column!r}, but {str(path)!r} is a text file without columns; tables end in "
                f"{', '.join(TABLE_FORMATS)}"
            )
        return lambda: _text_lines(path)
    from datasets import load_dataset

    options = {"keep_default_na": False} if form == "csv" else {}  # an empty cell, or the word null, is text
    try:
        table = load_dataset(form, data_files={"train": [str(path)]}, split="train", streaming=streaming, **options)
    except Exception as error:  # of datasets, of pandas or of Arrow
        raise ValueError(f"{str(path)!r} cannot be read as a {form} table: {error.__cause__ or error}") from error
    return column_lines(table, column, str(path))


def _text_column(features: Any, wanted: str | None, location: str) -> str:
    texts = [name for name, kind in features.items() if getattr(kind, "dtype", None) in _TEXT_TYPES]
    name = wanted or ("text" if "text" in texts else texts[0] if len(texts) == 1 else None)
    columns = ", ".join(features)
    if name is None:
        raise ValueError(f"{location}: which column has the text? Give --text_column_name; columns: {columns}")
    if name not in features:
        raise ValueError(f"{location} has no column {name!r}; give another --text_column_name; columns: {columns}")
    if name not in texts:
        raise ValueError(f"{location}: column {name!r} has the type {features[name]}, which is no text; give another")
    return name


def _text_lines(path: Path) -> Iterator[str]:
    blank = True
    try:
        # -sig: a byte order mark is not part of the text. Iteration ends lines at line ends alone, where splitlines()
        # also cuts at form feeds and Unicode separators.
        with path.open(encoding="utf-8-sig") as file:
            for line in file:
                blank = blank and not line.strip()
                yield line.removesuffix("\n")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"text file {str(path)!r} is not UTF-8 ({error}); convert it, for example with iconv"
        ) from error
    if blank:
        raise ValueError(f"text file {str(path)!r} is empty or holds only blank lines; give a file with text")
