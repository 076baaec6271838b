"""E12 and E14: damaged files are named and counted, the exit status says so, and reports show text as text."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hf_adafisher.experiments.comparison.forecast import forecast
from hf_adafisher.experiments.comparison.protocol import Comparison
from hf_adafisher.experiments.report.tables import Picture, Section, Table, escape_paragraph, render_markdown
from hf_adafisher.experiments.report.write_report import read_comparison, write_report
from tests.experiments.comparison.test_compare import TINY, script

pytestmark = pytest.mark.subprocess

Compare = Callable[..., Comparison]
ENTRY = {"optim": "adamw", "learning_rate": [0.1, 0.2]}
GOOD: dict[str, Any] = {
    "status": "completed", "steps": 7, "train_seconds": 1.0, "validation": {"loss": 4.0}, "log_history": [],
}  # fmt: skip
BAD_RESULTS: dict[str, Any] = {
    "empty": b"",
    "cut off": b'{"status": "comple',
    "not text": b"\xff\xfe\x00\xd8",
    "nested": b"[" * 100_000,
    "a list": [],
    "an empty object": {},
    "null": None,
    "a text": "completed",
    "no status": {"steps": 3},
    "an unknown status": {**GOOD, "status": "done"},
    "a list as status": {**GOOD, "status": ["completed"]},
    "a text as loss": {**GOOD, "validation": {"loss": "4.1"}},
    "NaN": b'{"status": "completed", "validation": {"loss": NaN}}',
    "a list as validation": {**GOOD, "validation": [4.0]},
    "no validation": {**GOOD, "validation": None},
    "a log without steps": {**GOOD, "log_history": [{"loss": 3.0}]},
    "a text in the log": {**GOOD, "log_history": [{"step": 3, "eval_loss": "x"}]},
    "an object as log": {**GOOD, "log_history": {"step": 3}},
    "null as hardware": {**GOOD, "hardware": None},
    "a list as versions": {**GOOD, "versions": ["torch"]},
    "a text as model": {**GOOD, "model": "gpt2"},
    "null as corpus": {**GOOD, "corpus": None},
    "a text as steps": {**GOOD, "steps": "7"},
    "true as seconds": {**GOOD, "train_seconds": True},
    "a number as step time": {**GOOD, "step_time": 12.0},
    "a text as step time": {**GOOD, "step_time": {"mean_ms": "12"}},
    "a text as steps of an epoch": {**GOOD, "steps_per_epoch": "x"},
    "a number as reason": {"status": "failed", "reason": 3},
}
BAD_RECORDS: dict[str, Any] = {
    "empty": b"",
    "null": None,
    "an empty object": {},
    "a text": "--optim adamw",
    "a list of lists": [["--optim"]],
    "a list as arguments": {"arguments": [], "data": {}, "software": {}},
    "a number as data": {"arguments": {}, "data": {"train_file": 3}, "software": {}},
}


def damage(path: Path, content: Any) -> None:
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())


@pytest.fixture
def finished(compare: Compare) -> Comparison:
    comparison = compare([ENTRY])
    comparison.run()
    return comparison


@pytest.mark.parametrize("name", ["results.json", "command.json"])
def test_one_damaged_file_is_named_and_does_not_block_the_report(finished: Comparison, name: str) -> None:
    """E12: of 22 kinds of damage 11 were tracebacks, and an empty file was a nameless error without a report."""
    path = finished.folder(finished.cells[0]) / name
    whole = path.read_bytes()
    for kind, content in (BAD_RESULTS if name == "results.json" else BAD_RECORDS).items():
        path.write_bytes(whole)
        damage(path, content)
        first, second = read_comparison(finished)
        assert (first.status, second.status) == ("failed", "completed"), kind
        assert str(path) in first.reason, kind
        assert "1 of 2 runs diverged or failed" in write_report(finished), kind
        for report in ("report.md", "report.html"):
            assert name in (finished.output_dir / report).read_text(), kind
        assert "2 cells, 2 of them finished" in forecast(finished), kind


def test_a_folder_in_the_place_of_a_result(finished: Comparison) -> None:
    """E12: named too."""
    path = finished.folder(finished.cells[0]) / "results.json"
    path.unlink()
    path.mkdir()
    assert f"{path} is no file" in read_comparison(finished)[0].reason


def test_a_good_result_by_hand_is_one(finished: Comparison) -> None:
    """E12: what makes the others bad is the damage alone."""
    damage(finished.folder(finished.cells[0]) / "results.json", GOOD)
    assert [result.status for result in read_comparison(finished)] == ["completed", "completed"]


def test_damaged_cells_run_again_when_asked_to(finished: Comparison, compare: Compare) -> None:
    """E12: like every failure; without being asked to, nothing is deleted."""
    for cell, name in zip(finished.cells, ("results.json", "command.json"), strict=True):
        damage(finished.folder(cell) / name, b"")
    assert finished.run() == [] and {result.status for result in read_comparison(finished)} == {"failed"}
    assert finished.run(retry_failed=True) == []
    assert {result.status for result in read_comparison(finished)} == {"completed"}


def test_a_damaged_step_time_is_a_reason(compare: Compare) -> None:
    """E12: of a measurement as of a run."""
    comparison = compare([ENTRY], budget="seconds=6")
    comparison.measure()
    (path,) = (comparison.output_dir / "step_times").glob("*/results.json")
    damage(path, {"status": "completed", "step_seconds": ["x"]})
    (reason,) = set(comparison.unplanned().values())
    assert str(path) in reason and "'step_seconds'[0] must be a number, got 'x'" in reason
    assert comparison.run() == [] and {r.reason for r in read_comparison(comparison)} == {reason}


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    """A comparison of real runs, one of which fails in a second: its vocabulary is larger than the text gives."""
    (tmp_path / "text.txt").write_text("a b\n" * 50)
    common = {**TINY, "max_steps": 1, **dict.fromkeys(("train_file", "validation_file"), str(tmp_path / "text.txt"))}
    config = {"common": common, "cells": [{"optim": "adamw", "block_size": [16, 4096]}]}
    del common["block_size"]
    (tmp_path / "c.json").write_text(json.dumps(config))
    return ["--config", str(tmp_path / "c.json"), "--output_dir", str(tmp_path / "out")]


def test_the_exit_status_is_that_of_all_cells(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """E14: 1 while a cell has failed, on the second call and of the report alone too."""
    compare = script()
    assert compare.main(command) == 1
    assert compare.main(command) == 1
    assert "--retry_failed runs failed ones again" in capsys.readouterr().out
    assert compare.main([*command, "--report_only"]) == 1


def test_the_exit_status_of_damage_and_of_success(finished: Comparison, tmp_path: Path) -> None:
    """E14: a damaged result is a failure; without any, the status is 0."""
    (tmp_path / "c.json").write_text(json.dumps({"cells": [ENTRY]}))
    command = ["--config", str(tmp_path / "c.json"), "--output_dir", str(tmp_path / "out"), "--report_only"]
    assert script().main(command) == 0
    damage(finished.folder(finished.cells[0]) / "results.json", b"")
    assert script().main(command) == 1


def test_markdown_shows_text_as_it_is(compare: Compare) -> None:
    """E14: ``<script>`` stood raw in report.md."""
    name = "<script>alert(1)</script>"
    markup = f"{name} | ![x](y) `code` *bold* _it_ [l](m) ~~s~~ learning_rate"
    comparison = compare(
        [{"optim": "adamw", "x": name}], config={"description": f"# {markup}", "common": {"y": markup}}
    )
    comparison.run()
    write_report(comparison)
    text = (comparison.output_dir / "report.md").read_text()
    assert "<script>" not in text and "&lt;script&gt;" in text
    escaped = r"\| !\[x\](y) \`code\` \*bold\* \_it\_ \[l\](m) \~\~s\~\~ learning_rate"
    assert text.count(escaped) == 2 and r"\# &lt;script&gt;" in text


def test_every_part_of_a_page_is_escaped() -> None:
    """E14: titles, texts, tables, notes, captions; and a command cannot end its block."""
    table = Table(["<a>"], [["<b>\n<c>"]])
    section = Section("<d>", "<e>", table, "<f>", {Path("p.svg"): Picture("<g>", "<h>")}, "x ``` <y>\n```")
    text = render_markdown("t", [section])
    page, block = text.split("````bash\n")
    assert "<" not in page and block == "x ``` <y>\n```\n````\n"
    assert "| &lt;b&gt; &lt;c&gt; |" in page
    assert [escape_paragraph(text) for text in ("- a", "1. b", "---", "1.5", "-1e-3", "a-b")] == [
        r"\- a", r"1\. b", r"\---", "1.5", "-1e-3", "a-b",
    ]  # fmt: skip
