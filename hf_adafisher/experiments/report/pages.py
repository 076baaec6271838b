"""Tables in pages of documentation: made from archives, or held against the files that they name.

<!-- results: NAME VIEW -->      the table between these two lines is made from docs/results/NAME;
<!-- end of NAME VIEW -->        VIEW is one of ``VIEWS``, ``claims`` if it is left out
<!-- source: FILE ... -->        the numbers of the next table stand in these files (see ``unknown_numbers``)
<!-- no measurement -->          those of the next table were not measured: settings, versions
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hf_adafisher.experiments.comparison.protocol import Comparison
from hf_adafisher.experiments.comparison.published import read_published_results
from hf_adafisher.experiments.outputs import write_text
from hf_adafisher.experiments.report.archive import ARCHIVE_FILE, ArchivedReport, read_archive
from hf_adafisher.experiments.report.paired import OURS, paired_table, summary_table
from hf_adafisher.experiments.report.results import CellResult
from hf_adafisher.experiments.report.sources import is_measured, unknown_numbers
from hf_adafisher.experiments.report.tables import Table, best_table, cell_table
from hf_adafisher.experiments.report.tuning import tuning_table
from hf_adafisher.experiments.report.write_report import settings_and_claims

_MARKER = re.compile(r"<!-- (results:|source:|end of|no measurement)(?: (.+?))? -->\s*")


def _tuning(comparison: Comparison, results: Sequence[CellResult]) -> Table:
    if not comparison.tuning_seeds:
        raise ValueError("its configuration has no tuning seeds, so there is no table of trials")
    return tuning_table(settings_and_claims(comparison, results)[0], comparison.tuning_seeds)


VIEWS: Mapping[str, Callable[[Comparison, Sequence[CellResult]], Table]] = {
    "claims": lambda comparison, results: best_table(
        settings_and_claims(comparison, results)[1], read_published_results(comparison.config)
    ),
    "summary": lambda comparison, results: summary_table(settings_and_claims(comparison, results)[1]),
    "paired": lambda comparison, results: paired_table(settings_and_claims(comparison, results)[1], OURS),
    "tuning": _tuning,
    "runs": lambda comparison, results: cell_table(results, settings_and_claims(comparison, results)[1]),
}
"""Tables of an archive by name; ``summary`` has differences from AdamW, ``paired`` from ``OURS`` or the best one."""


@dataclass
class Archives:
    """The archives of a folder, each read once.

    Attributes:
        folder: That of the results, such as ``docs/results``.
        programs: Folder of the programs that run cells.
    """

    folder: Path
    programs: Path
    _read: dict[str, ArchivedReport] = field(default_factory=dict)

    def read(self, name: str) -> ArchivedReport:
        """Read an archive.

        Raises:
            ValueError: There is none, or it is damaged.
        """
        if name not in self._read:
            if not (self.folder / name / ARCHIVE_FILE).is_file():
                raise ValueError(f"there is no archive {self.folder / name / ARCHIVE_FILE}")
            self._read[name] = read_archive(self.folder / name, self.programs)
        return self._read[name]

    def table(self, words: str) -> str:
        """Render the table that a marker names, ``NAME`` or ``NAME VIEW``.

        Raises:
            ValueError: There is no such archive or view, or the view has no rows.
        """
        name, _, view = words.partition(" ")
        archive, view = self.read(name), view or "claims"
        if view not in VIEWS:
            raise ValueError(f"{view!r} is no table of an archive; there are {', '.join(VIEWS)}")
        table = VIEWS[view](archive.comparison, archive.results)
        if not table.rows:
            raise ValueError(f"its table {view!r} has no rows")
        return table.markdown().rstrip()

    def problems(self) -> Iterator[str]:
        """Yield what is wrong with the reports beside the runs."""
        for folder in sorted(path for path in self.folder.iterdir() if path.is_dir()):
            if (folder / ARCHIVE_FILE).is_file():
                try:
                    stale = self.read(folder.name).stale
                except ValueError as error:
                    yield str(error)
                    continue
                yield from (
                    f"{folder / name} is not what its runs give: hf-adafisher report {folder}" for name in stale
                )
            elif (folder / "report.md").is_file():
                yield f"{folder} has a report and no {ARCHIVE_FILE} that it could be made from"


def find_pages(paths: Sequence[Path]) -> tuple[list[Path], Path]:
    """Return the pages of files and folders (of these, not of folders below), and the folder of the results.

    Raises:
        ValueError: A path does not exist, or none of the folders has ``results`` in it.
    """
    for path in paths:
        if not path.exists():
            raise ValueError(f"{path} does not exist")
    pages = [page for path in paths for page in (sorted(path.glob("*.md")) if path.is_dir() else [path])]
    folders = [path / "results" for path in paths if (path / "results").is_dir()]
    if len(folders) != 1:
        raise ValueError(f"give one folder of pages with its results, such as docs, got {' '.join(map(str, paths))}")
    return pages, folders[0]


def check_pages(paths: Sequence[Path], programs: Path) -> list[str]:
    """Hold the tables of pages against the archives and files that they come from; see the top of this module.

    Args:
        paths: Pages, and a folder of pages with its ``results``. Paths in markers begin at the parent of that folder.
        programs: Folder of the programs that run cells.

    Returns:
        What is wrong, a line each, with page and line; also of the archives' own reports.

    Raises:
        ValueError: See ``find_pages``.
    """
    pages, results = find_pages(paths)
    archives = Archives(results, programs)
    found = [f"{page}:{line}: {text}" for page in pages for line, text in _check_page(page, archives)]
    return [*found, *archives.problems()]


def renew_pages(paths: Sequence[Path], programs: Path) -> list[Path]:
    """Write the tables between the markers of ``results`` again; return the pages that changed.

    Raises:
        ValueError: See ``find_pages``; or a table cannot be made, the message says where.
    """
    pages, results = find_pages(paths)
    archives = Archives(results, programs)
    renewed = []
    for page in pages:
        before = page.read_text(encoding="utf-8")
        lines = before.splitlines()
        for start, end, words in reversed(list(_blocks(lines))):
            try:
                if end is None:
                    raise ValueError(f"needs a line <!-- end of {words} --> below it")
                lines[start + 1 : end] = archives.table(words).splitlines()
            except ValueError as error:
                raise ValueError(f"{page}:{start + 1}: {words}: {error}") from None
        after = "\n".join(lines) + "\n"
        if after != before:
            write_text(page, after)
            renewed.append(page)
    return renewed


def _check_page(page: Path, archives: Archives) -> Iterator[tuple[int, str]]:
    """Yield line numbers and what is wrong there."""
    lines = page.read_text(encoding="utf-8").splitlines()
    made: set[int] = set()
    for start, end, words in _blocks(lines):
        if end is None:
            yield start + 1, f"{words}: needs a line <!-- end of {words} --> below it"
            continue
        made |= set(range(start, end + 1))
        try:
            if lines[start + 1 : end] != archives.table(words).splitlines():
                yield start + 1, f"{words}: the table is not what the archive gives: hf-adafisher report --write"
        except ValueError as error:
            yield start + 1, f"{words}: {error}"
    for start, end in _tables(lines):
        rows = lines[start:end]
        above = next((line for line in reversed(lines[:start]) if line.strip()), "")
        kind, words = (found[1], found[2]) if (found := _MARKER.fullmatch(above)) else ("", "")
        if start in made or kind == "no measurement":
            continue
        if kind == "source:":
            try:
                if unknown := unknown_numbers(rows, words or "", archives.folder.parents[1]):
                    yield start + 1, f"{words}: it has no {', '.join(unknown)}"
            except ValueError as error:
                yield start + 1, f"{words}: {error}"
        elif is_measured(rows):
            yield start + 1, "the table has numbers and no marker that names their file (results:, source:)"


def _blocks(lines: Sequence[str]) -> Iterator[tuple[int, int | None, str]]:
    """Yield the blocks of generated tables: indices of the two markers, and the words of the first."""
    for start, line in enumerate(lines):
        found = _MARKER.fullmatch(line)
        if found and found[1] == "results:":
            words = found[2] or ""
            below = (i for i in range(start + 1, len(lines)) if _MARKER.fullmatch(lines[i]))
            end = next(below, None)
            yield start, end if end is not None and lines[end].strip() == f"<!-- end of {words} -->" else None, words


def _tables(lines: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Yield first and last index (exclusive) of each table, outside of code blocks."""
    start, fenced = None, False
    for index, line in enumerate([*lines, ""]):
        fenced ^= line.lstrip().startswith("```")
        inside = line.startswith("|") and not fenced
        if inside and start is None:
            start = index
        elif not inside and start is not None:
            yield start, index
            start = None
