"""The archive of a comparison: every run as a line of one compressed file, from which the report is written again."""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from hf_adafisher.experiments.comparison.identity import COMMAND_FILE, read_record
from hf_adafisher.experiments.comparison.protocol import Comparison, create_comparison, with_measured_jobs
from hf_adafisher.experiments.comparison.schema import anything, mapping, optional, refuse, text
from hf_adafisher.experiments.outputs import json_ready, replacing, write_json
from hf_adafisher.experiments.report.results import CellResult
from hf_adafisher.experiments.report.tables import escape_paragraph
from hf_adafisher.experiments.report.write_report import NO_PICTURES, read_comparison, write_report
from hf_adafisher.experiments.runs.run import RESULTS_FILE
from hf_adafisher.experiments.settings_files import parse_json, read_json

ARCHIVE_FILE = "runs.jsonl.gz"
DATA_VARIABLE = "HF_ADAFISHER_DATA"
_KEPT = ("report.md", "cells.csv")
_HEADER = mapping({"configuration": mapping(others=anything), "command": text}, required=("configuration", "command"))
_RUN = mapping(
    {"folder": text, "record": optional(mapping(others=anything)), "result": mapping(others=anything)},
    required=("folder", "record", "result"),
)


def pack(comparison: Comparison, command: str, target: Path) -> None:
    """Write the archive of a comparison: its configuration and command, then a line for each run and measurement.

    A line holds the ``results.json`` and the ``command.json`` of a run. Where the environment variable
    ``HF_ADAFISHER_DATA`` names a folder, paths below it are written with the variable's name instead; of the folders
    of the runs the last name is kept.

    Args:
        comparison: With results.
        command: The command line that made it, for the report.
        target: Folder of the archive; it is made.

    Raises:
        ValueError: There is no result, or one is damaged, or made with other arguments or data.
    """
    folder = comparison.output_dir
    for result in read_comparison(comparison):
        path = folder / result.folder / RESULTS_FILE
        if result.status == "failed" and path.exists() and read_json(path).get("status") != "failed":
            raise ValueError(f"not archived: {result.reason}")
    lines = [_line({"configuration": comparison.config, "command": command})]
    for path in sorted(folder.rglob(RESULTS_FILE)):
        place = path.parent.relative_to(folder).as_posix()
        line = _line({"folder": place, "record": read_record(path.parent), "result": read_json(path)})
        lines.append(_without_parent(line, path.parent.name))
    if len(lines) == 1:
        raise ValueError(f"no run in {folder} has a result yet: run the comparison first")
    content = "".join(lines)
    if root := os.environ.get(DATA_VARIABLE):
        content = content.replace(json.dumps(str(Path(root)))[1:-1], f"${DATA_VARIABLE}")
    target.mkdir(parents=True, exist_ok=True)
    with replacing(target / ARCHIVE_FILE) as partial:  # no time in it: the same runs are the same bytes
        partial.write_bytes(gzip.compress(content.encode(), mtime=0))


def unpack(archive: Path, folder: Path) -> tuple[dict[str, Any], str]:
    """Write the runs of an archive into a folder, as the comparison had left them there.

    Returns:
        The configuration and the command of the comparison.

    Raises:
        ValueError: The archive is damaged.
    """
    lines = _lines(archive)
    place, header = next(lines)
    _HEADER(header, place)
    for place, run in lines:
        _RUN(run, place)
        name = PurePosixPath(run["folder"])
        if name.is_absolute() or ".." in name.parts:
            refuse(f"{place}, 'folder'", run["folder"], "a path below the comparison's folder")
        (folder / name).mkdir(parents=True, exist_ok=True)
        write_json(folder / name / RESULTS_FILE, run["result"])
        if run["record"] is not None:
            write_json(folder / name / COMMAND_FILE, {**run["record"], "archived": True})
    return dict(header["configuration"]), str(header["command"])


def report_archive(folder: Path, programs: Path, output_dir: Path | None = None) -> list[Path]:
    """Write the report of an archive again.

    Args:
        folder: Of the archive.
        programs: Folder of the programs that run cells.
        output_dir: The whole report goes there. None: ``report.md``, ``cells.csv`` and those pictures that stand
            beside the archive are renewed there, and no others are drawn.

    Returns:
        The files written.

    Raises:
        ValueError: The archive is damaged, or its configuration is not valid.
    """
    with _unpacked(folder, programs) as (comparison, command):
        pictures = None if output_dir is not None else {path.name for path in folder.glob("*.svg")}
        write_report(comparison, command, pictures=pictures)
        written = sorted(path for path in comparison.output_dir.iterdir() if path.is_file())  # runs are folders
        if pictures is not None:
            written = [path for path in written if path.name in {*_KEPT, *pictures}]
        target = output_dir or folder
        target.mkdir(parents=True, exist_ok=True)
        return [Path(shutil.copyfile(path, target / path.name)) for path in written]


@dataclass(frozen=True)
class ArchivedReport:
    """Results of an archive, and whether the tables beside it are theirs.

    Attributes:
        comparison: Its folder is gone.
        results: One for each run.
        stale: Those of ``report.md`` and ``cells.csv`` beside the archive that the runs do not give, or that are
            missing. Pictures and their captions are not looked at, since it takes seconds to draw them.
    """

    comparison: Comparison
    results: list[CellResult]
    stale: list[str]


def read_archive(folder: Path, programs: Path) -> ArchivedReport:
    """Read an archive, and compare the tables beside it with its runs.

    Args:
        folder: Of the archive.
        programs: Folder of the programs that run cells.

    Raises:
        ValueError: The archive is damaged, or its configuration is not valid.
    """
    with _unpacked(folder, programs) as (comparison, command):
        results = read_comparison(comparison)
        write_report(comparison, command, results, pictures=())
        stale = [name for name in _KEPT if _tables_of(folder / name) != _tables_of(comparison.output_dir / name)]
        return ArchivedReport(comparison, results, stale)


@contextmanager
def _unpacked(folder: Path, programs: Path) -> Iterator[tuple[Comparison, str]]:
    """Unpack an archive for a while; its comparison and command."""
    with tempfile.TemporaryDirectory() as name:
        config, command = unpack(folder / ARCHIVE_FILE, Path(name))
        yield with_measured_jobs(create_comparison(config, programs, Path(name))), command


def _tables_of(path: Path) -> bytes | None:
    """A report without its pictures and their captions; None where there is none."""
    if not path.is_file():
        return None
    if path.suffix != ".md":
        return path.read_bytes()
    shown = re.sub(r"!\[.*\]\(\S+\)\n\n.*\n\n", "", path.read_text("utf-8"))
    return shown.replace(f"{escape_paragraph(NO_PICTURES)}\n\n", "").encode()


def _line(value: Any) -> str:
    return json.dumps(json_ready(value), allow_nan=False, separators=(",", ":")) + "\n"


def _without_parent(line: str, name: str) -> str:
    """Leave out where on its machine a run's folder was: its arguments have the whole path as ``output_dir``."""
    found = re.search(rf'"output_dir":("[^"]*/){re.escape(name)}"', line)
    return line.replace(found[1], '"') if found else line


def _lines(archive: Path) -> Iterator[tuple[str, Any]]:
    """Yield each line's place and content; there is one at least."""
    try:
        lines = gzip.decompress(archive.read_bytes()).splitlines()
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{archive} is no archive of a comparison, or damaged: {error}") from None
    if not lines:
        raise ValueError(f"{archive} is empty")
    for number, line in enumerate(lines, 1):
        place = f"{archive}, line {number}"
        yield place, parse_json(line, place)
