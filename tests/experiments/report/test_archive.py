"""The archive of a comparison: what comes out is what went in, and the committed ones hold their reports."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hf_adafisher.cli.compare import PROGRAMS
from hf_adafisher.experiments.comparison.protocol import Comparison
from hf_adafisher.experiments.outputs import write_json
from hf_adafisher.experiments.report.archive import ARCHIVE_FILE, pack, report_archive, unpack
from hf_adafisher.experiments.report.write_report import write_report
from tests.scripts import folder_of, load_command

ROOT = Path(__file__).parents[3]
RESULTS = ROOT / "docs" / "results"
ARCHIVES = sorted(path.parent.name for path in RESULTS.glob(f"*/{ARCHIVE_FILE}"))
Compare = Callable[..., Comparison]
ENTRIES = [{"optim": "adamw", "learning_rate": [0.05, 0.1]}, {"optim": "sgd", "learning_rate": [0.1, 2.0]}]


@pytest.fixture
def finished(compare: Compare) -> Comparison:
    """Planned from step times of two copies each, of which one is slower, with a run that diverged."""
    comparison = compare(ENTRIES, seeds=[0, 1], budget="seconds=30", jobs=2)
    comparison.measure()
    slow = folder_of(comparison.times_folder, "adamw,copy=2") / "results.json"
    result = json.loads(slow.read_text())
    write_json(slow, {**result, "step_seconds": [3 * seconds for seconds in result["step_seconds"]]})
    comparison.run()
    write_json(comparison.output_dir / "configuration.json", comparison.config)
    return comparison


def json_files(folder: Path) -> dict[str, Any]:
    """Results and records below a folder, by path."""
    paths = (path for path in folder.rglob("*.json") if path.name in ("results.json", "command.json"))
    return {path.relative_to(folder).as_posix(): json.loads(path.read_text()) for path in paths}


def test_the_committed_results_stay_small_and_every_picture_is_shown() -> None:
    files = [path for path in RESULTS.rglob("*") if path.is_file()]
    assert len(ARCHIVES) >= 9 and len(files) <= 60
    assert sum(path.stat().st_size for path in files) <= 3e6
    shown = set()
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        links = re.findall(r"\]\((?!http)([^)\s]+\.(?:png|svg))\)", page.read_text(encoding="utf-8"))
        shown |= {(page.parent / link).resolve() for link in links}
    there = {path for path in (ROOT / "docs").rglob("*") if path.suffix in (".png", ".svg")}
    assert all(path.exists() for path in shown)
    assert there - shown == set()


@pytest.mark.subprocess
def test_what_comes_out_is_what_went_in(finished: Comparison, tmp_path: Path) -> None:
    pack(finished, "the command", tmp_path / "a")
    pack(finished, "the command", tmp_path / "b")
    content = (tmp_path / "a" / ARCHIVE_FILE).read_bytes()
    assert content == (tmp_path / "b" / ARCHIVE_FILE).read_bytes() and content[4:8] == bytes(4)  # no time in it
    config, command = unpack(tmp_path / "a" / ARCHIVE_FILE, tmp_path / "c")
    assert (config, command) == (finished.config, "the command")
    before, after = json_files(finished.output_dir), json_files(tmp_path / "c")
    records = [record for path, record in after.items() if path.endswith("command.json")]
    assert len(records) == 12 and all(record.pop("archived") for record in records)
    assert after == before


@pytest.mark.subprocess
def test_its_report_is_the_comparisons(finished: Comparison, program: Path, tmp_path: Path) -> None:
    """Also where the steps were planned from measurements of two jobs."""
    write_report(finished, "the command")
    pack(finished, "the command", tmp_path / "archive")
    report_archive(tmp_path / "archive", program.parent, tmp_path / "whole")
    live = {path.name for path in finished.output_dir.iterdir() if path.is_file()}
    assert {path.name for path in (tmp_path / "whole").iterdir()} == live - {"configuration.json", "started.txt"}
    for name in ("report.md", "cells.csv"):
        assert (tmp_path / "whole" / name).read_text() == (finished.output_dir / name).read_text()
    assert "diverged" in (tmp_path / "whole" / "cells.csv").read_text()


@pytest.mark.subprocess
def test_data_are_compared_when_it_is_written_and_not_when_it_is_read(
    compare: Compare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "train.txt").write_text("a text")
    entry = {"optim": "adamw"}
    comparison = compare([entry], config={"common": {"train_file": str(data / "train.txt")}})
    comparison.run()
    run = folder_of(comparison.output_dir, "adamw")
    result = json.loads((run / "results.json").read_text())
    write_json(run / "results.json", {**result, "settings": {"training": {"output_dir": str(run), "seed": 0}}})
    (tmp_path / "moved.txt").write_text("a text")  # the same data at another place
    pack(compare([entry], config={"common": {"train_file": str(tmp_path / "moved.txt")}}), "", tmp_path / "moved")
    report_archive(tmp_path / "moved", PROGRAMS)
    assert "did not end well" not in (tmp_path / "moved" / "report.md").read_text()
    monkeypatch.setenv("HF_ADAFISHER_DATA", str(data))
    pack(comparison, f"compare {data}/train.txt", tmp_path / "archive")
    content = gzip.decompress((tmp_path / "archive" / ARCHIVE_FILE).read_bytes()).decode()
    assert str(tmp_path) not in content
    assert json.loads(content.splitlines()[1])["result"]["settings"] == {
        "training": {"output_dir": run.name, "seed": 0}
    }
    (data / "train.txt").write_text("another text")
    with pytest.raises(ValueError, match=r"not archived: .*other data \(train_file changed\)"):
        pack(comparison, "", tmp_path / "again")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "$HF_ADAFISHER_DATA").symlink_to(data)  # even where the path leads somewhere
    report_archive(tmp_path / "archive", PROGRAMS)
    report = (tmp_path / "archive" / "report.md").read_text()
    assert "did not end well" not in report and "compare $HF_ADAFISHER_DATA/train.txt" in report


@pytest.mark.subprocess
def test_a_foreign_result_is_not_archived(finished: Comparison, tmp_path: Path) -> None:
    record = folder_of(finished.output_dir, "adamw,learning_rate=0.1,seed=0") / "command.json"
    content = json.loads(record.read_text())
    content["arguments"]["learning_rate"] = 0.3
    record.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"not archived: .*learning_rate: 0.3 there, 0.1 here"):
        pack(finished, "", tmp_path / "archive")
    assert not (tmp_path / "archive").exists()


def test_there_must_be_a_result(compare: Compare, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no run in .* has a result yet"):
        pack(compare(ENTRIES), "", tmp_path / "archive")


HEADER = {"configuration": {"cells": [{"optim": "adamw"}]}, "command": ""}
RUN = {"folder": "adamw", "record": None, "result": {"status": "completed"}}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "is empty"),
        ([RUN], r"line 1: unknown key"),
        ([HEADER, {**RUN, "folder": "../adamw"}], r"line 2, 'folder' must be a path below"),
        ([HEADER, {**RUN, "folder": "/adamw"}], r"line 2, 'folder' must be a path below"),
        ([HEADER, RUN, {"folder": "adamw", "result": {}}], r"line 3 needs 'record'"),
        ([HEADER, [1]], r"line 2 must be an object"),
    ],
)
def test_a_damaged_archive_is_named_with_the_line(lines: list[Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / ARCHIVE_FILE
    path.write_bytes(gzip.compress("".join(json.dumps(line) + "\n" for line in lines).encode()))
    with pytest.raises(ValueError, match=rf"{ARCHIVE_FILE}.*{message}"):
        unpack(path, tmp_path / "out")
    assert not (tmp_path / "adamw").exists()


@pytest.mark.parametrize(
    "content", [b"no gzip", gzip.compress(b'{"configuration": {}}' * 40)[:-20]], ids=["another", "cut off"]
)
def test_what_is_no_whole_gzip_file_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / ARCHIVE_FILE).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{ARCHIVE_FILE} is no archive of a comparison, or damaged"):
        unpack(tmp_path / ARCHIVE_FILE, tmp_path / "out")


@pytest.mark.subprocess
def test_the_command_archives_and_reports(
    finished: Comparison,
    program: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = load_command("report")
    monkeypatch.setattr(command, "PROGRAMS", program.parent)
    out, archive = str(finished.output_dir), tmp_path / "archive"
    assert command.main([out, "--output_dir", str(tmp_path / "x")]) == 2
    assert "--output_dir is for archives" in capsys.readouterr().err
    write_report(finished, "hf-adafisher compare `mine`")
    assert command.main([out, "--archive", str(archive)]) == 0
    assert {path.name for path in archive.iterdir()} == {ARCHIVE_FILE, "report.md", "cells.csv"}
    assert "hf-adafisher compare `mine`" in (archive / "report.md").read_text()
    assert "](curves.svg)" not in (archive / "report.md").read_text()
    (archive / "curves.svg").write_text("stale")
    (archive / "cells.csv").unlink()
    assert command.main([str(archive)]) == 0
    assert {path.name for path in archive.iterdir()} == {ARCHIVE_FILE, "report.md", "cells.csv", "curves.svg"}
    assert "](curves.svg)" in (archive / "report.md").read_text()
    assert (archive / "curves.svg").read_text().startswith("<?xml")
    assert command.main([str(archive), "--archive", str(tmp_path / "x")]) == 2
    assert "is an archive already" in capsys.readouterr().err
