"""E8: two comparisons in one folder."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hf_adafisher.experiments.comparison.cell_process import run_cell
from hf_adafisher.experiments.comparison.cells import Cell
from hf_adafisher.experiments.comparison.execution import run_cells
from hf_adafisher.experiments.comparison.protocol import Comparison
from hf_adafisher.experiments.comparison.stored import load_result
from tests.experiments.comparison.test_compare_processes import wait_until, waits

Compare = Callable[..., Comparison]
Started = Callable[..., list[str]]
OTHER = """
import pathlib, sys
from hf_adafisher.experiments.comparison.protocol import create_comparison
entry = {"optim": "adamw", "learning_rate": [0.1, 0.2, 0.3]}
assert create_comparison({"cells": [entry]}, pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])).run() == []
"""

pytestmark = pytest.mark.subprocess


def test_a_cell_that_ended_meanwhile_is_neither_deleted_nor_run_again(
    compare: Compare, program: Path, started: Started
) -> None:
    """E8: asked once at the start, "is it done" was stale when the cell's turn came."""
    comparison = compare([{"optim": "adamw"}])
    (cell,) = comparison.cells
    assert run_cell(cell, program, comparison.folder(cell), 1) is None
    result = comparison.folder(cell) / "results.json"
    before = result.stat()
    assert run_cell(cell, program, comparison.folder(cell), 1) is None  # its lock is free: nobody has to wait
    assert (result.stat().st_ino, result.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert len(started()) == 1


def test_two_processes_share_a_folder(compare: Compare, program: Path, started: Started, tmp_path: Path) -> None:
    """E8: B plans all three cells while A's first one runs; each runs once, and no result changes afterwards."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "hang").touch()
    comparison = compare([{"optim": "adamw", "learning_rate": [0.1, 0.2, 0.3]}], jobs=2)
    first = threading.Thread(target=comparison.run)
    first.start()
    wait_until(lambda: len(list(out.glob("*/command.json"))) == 2)
    second = subprocess.Popen([sys.executable, "-c", OTHER, str(program.parent), str(out)])
    wait_until(lambda: len(list(Path(f"/proc/{second.pid}/fd").glob("*"))) and waits(second.pid))
    (out / "hang").unlink()
    first.join(60)
    assert second.wait(60) == 0 and not first.is_alive()
    assert sorted(line.split()[0] for line in started()) == [f"adamw,learning_rate={rate}" for rate in (0.1, 0.2, 0.3)]


def test_a_failure_that_was_waited_for_is_not_tried_again(
    compare: Compare, program: Path, started: Started, tmp_path: Path
) -> None:
    """E8, with --retry_failed: the other comparison has just tried."""
    out = tmp_path / "out"
    comparison = compare([{"optim": "adamw", "learning_rate": -1.0}])
    comparison.run()
    (out / "hang").touch()
    both = [threading.Thread(target=comparison.run, kwargs={"retry_failed": True}) for _ in range(2)]
    for thread in both:
        thread.start()
    wait_until(lambda: len(started()) == 2)
    threading.Event().wait(0.3)  # the second one gets to the lock
    (out / "hang").unlink()
    for thread in both:
        thread.join(60)
    assert len(started()) == 2


def test_a_folder_that_got_another_cell_s_result_is_refused_under_the_lock(
    compare: Compare, program: Path, started: Started
) -> None:
    """E8: also what is found only then is never overwritten."""
    (cell,) = compare([{"optim": "adamw"}]).cells
    other = Cell(cell.settings, {"max_steps": 3})
    folder = compare([{"optim": "adamw"}]).folder(cell)
    run_cell(cell, program, folder, 1)
    kept = load_result(folder)
    for run in (lambda: run_cell(other, program, folder, 1), lambda: run_cells([other], program, folder.parent)):
        assert "other arguments (max_steps: none there, 3 here)" in refusal(run)
    assert load_result(folder) == kept and json.loads((folder / "command.json").read_text())["arguments"] == {
        "optim": "adamw"
    }


def refusal(call: Callable[[], Any]) -> str:
    try:
        call()
    except ValueError as error:
        return str(error)
    raise AssertionError("nothing was refused")
