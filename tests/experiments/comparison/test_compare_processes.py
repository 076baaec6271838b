"""Runs of a comparison as processes: stopped, killed, run twice at the same time, handed to Ray."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hf_adafisher.experiments.comparison.cell_process import available_cores
from hf_adafisher.experiments.comparison.protocol import Comparison
from hf_adafisher.experiments.comparison.stored import load_result
from tests.experiments.cell_folders import folder_of

Compare = Callable[..., Comparison]
Started = Callable[..., list[str]]
ENTRY = {"optim": "adamw", "learning_rate": [0.1, 0.2, 0.3]}
# The script with its programs elsewhere: what is tested is its way of being interrupted.
DRIVER = """
import signal, sys, pathlib
from hf_adafisher.experiments.comparison.protocol import create_comparison
signal.signal(signal.SIGINT, signal.default_int_handler)
entry = {"optim": "adamw", "learning_rate": [0.1, 0.2, 0.3]}
create_comparison({"cells": [entry]}, pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), jobs=2).run()
"""


def wait_until(condition: Callable[[], Any], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


def children(parent: int) -> list[int]:
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(parent)], capture_output=True, text=True).stdout
    return [pid for pid in map(int, found.split()) if "run_clm.py" in command_line(pid)]  # not ps itself


def command_line(pid: int) -> str:
    path = Path(f"/proc/{pid}/cmdline")
    return path.read_text() if path.is_file() else ""


def alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False


@pytest.fixture
def hanging(program: Path, tmp_path: Path, started: Started) -> Iterator[tuple[subprocess.Popen[bytes], list[int]]]:
    """A comparison in a process of its own whose first two runs do not end, and these runs."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "hang").touch()
    process = subprocess.Popen([sys.executable, "-c", DRIVER, str(program.parent), str(out)])
    wait_until(lambda: len(started()) == 2)
    runs = children(process.pid)
    assert len(runs) == 2
    yield process, runs
    (out / "hang").unlink(missing_ok=True)
    process.kill()
    process.wait()


def test_ctrl_c_stops_the_runs_and_the_same_call_goes_on(
    hanging: tuple[subprocess.Popen[bytes], list[int]], compare: Compare, started: Started, tmp_path: Path
) -> None:
    process, runs = hanging
    process.send_signal(signal.SIGINT)
    assert process.wait(30) != 0
    wait_until(lambda: not any(map(alive, runs)))
    assert not list((tmp_path / "out").glob("*/results.json")) and len(started()) == 2
    (tmp_path / "out" / "hang").unlink()
    assert compare([ENTRY]).run() == [] and len(started()) == 5


def test_runs_that_a_killed_comparison_left_behind_are_waited_for(
    hanging: tuple[subprocess.Popen[bytes], list[int]], compare: Compare, started: Started, tmp_path: Path
) -> None:
    process, runs = hanging
    process.kill()
    process.wait()
    assert all(map(alive, runs))
    again = threading.Thread(target=compare([ENTRY], jobs=2).run)
    again.start()
    time.sleep(0.5)
    assert again.is_alive() and len(started()) == 2  # nothing runs twice
    (tmp_path / "out" / "hang").unlink()
    again.join(60)
    assert not again.is_alive() and sorted(line.split()[0] for line in started()) == [
        f"adamw,learning_rate={rate}" for rate in (0.1, 0.2, 0.3)
    ]


def test_a_run_killed_by_a_signal_has_no_result_and_is_run_again(
    compare: Compare, started: Started, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "hang").touch()
    failures: list[str] = []
    thread = threading.Thread(target=lambda: failures.extend(compare([{**ENTRY, "learning_rate": 0.1}]).run()))
    thread.start()
    wait_until(started)
    (run,) = children(os.getpid())
    os.kill(run, signal.SIGKILL)
    thread.join(30)
    assert "adamw,learning_rate=0.1: killed by SIGKILL" in failures[0] and "no result" in failures[0]
    (tmp_path / "out" / "hang").unlink()
    assert compare([ENTRY]).run() == [] and len(started()) == 4


def test_ray_gives_the_same_results(compare: Compare, started: Started, tmp_path: Path, program: Path) -> None:
    """On a local cluster: the same files as local runs, the same failures, and nothing is run again."""
    entry = {"optim": "adamw", "learning_rate": [0.1, 0.2, -1.0, 2.0]}
    local = compare([entry])
    expected = local.run()
    results = {cell.name: load_result(local.folder(cell)) for cell in local.cells}
    (tmp_path / "out").rename(tmp_path / "local")
    cluster = compare([entry], backend="ray")
    failures = cluster.run()
    assert len(failures) == len(expected) == 1 and "failed with exit status 1" in failures[0]
    for cell in cluster.cells:
        found, wanted = load_result(cluster.folder(cell)), results[cell.name]
        assert {**found, "seconds": 0} == {**wanted, "seconds": 0}
    assert sorted(started()) == sorted(f"{cell.name} {available_cores()}" for cell in cluster.cells)
    assert cluster.run() == [] and len(started()) == 4


def test_without_ray(compare: Compare, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r'pip install "hf_adafisher\[ray\]"'):
        compare([ENTRY], backend="ray").run()


def test_the_command_of_a_run_stands_beside_it(compare: Compare, tmp_path: Path) -> None:
    compare([{**ENTRY, "learning_rate": 0.1}], budget="steps=4").run()
    command = json.loads((folder_of(tmp_path / "out", "adamw,learning_rate=0.1") / "command.json").read_text())
    assert command["arguments"] == {"max_steps": 4, "optim": "adamw", "learning_rate": 0.1}
