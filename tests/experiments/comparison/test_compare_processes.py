"""Runs of a comparison as processes: stopped, killed, run twice at the same time, handed to Ray."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hf_adafisher.experiments.comparison.cell_process import available_cores
from hf_adafisher.experiments.comparison.protocol import Comparison, create_comparison
from hf_adafisher.experiments.comparison.stored import load_result
from tests.scripts import folder_of, load_command

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
    return [pid for pid in map(int, found.split()) if "clm.py" in command_line(pid)]  # not ps itself


def waits(pid: int) -> bool:
    """True if the process holds the lock file of a cell open, which another one has locked."""
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):  # closed meanwhile
            if str(descriptor.readlink()).endswith(".lock"):
                return True
    return False


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


@pytest.mark.subprocess
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


@pytest.mark.subprocess
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


@pytest.mark.subprocess
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


@pytest.mark.subprocess
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


@pytest.mark.subprocess
def test_the_command_of_a_run_stands_beside_it(compare: Compare, tmp_path: Path) -> None:
    compare([{**ENTRY, "learning_rate": 0.1}], budget="steps=4").run()
    command = json.loads((folder_of(tmp_path / "out", "adamw,learning_rate=0.1") / "command.json").read_text())
    assert command["arguments"] == {"max_steps": 4, "optim": "adamw", "learning_rate": 0.1}


# A run and a child of it, which SIGTERM does not stop.
STUBBORN_RUN = """
import os, pathlib, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
out = pathlib.Path(sys.argv[sys.argv.index("--output_dir") + 1])
os.fork()
with open(out.parent / "pids.txt", "a") as file:
    file.write(f"{os.getpid()}\\n")
time.sleep(60)
"""


def pids(out: Path) -> list[int]:
    path = out / "pids.txt"
    return [int(line) for line in path.read_text().splitlines()] if path.is_file() else []


@pytest.mark.subprocess
def test_ctrl_c_twice_ends_everything_at_once(program: Path, tmp_path: Path) -> None:
    """E7: runs and children that ignore SIGTERM too, without waiting for the time of grace (a minute here) to pass."""
    out = tmp_path / "out"
    out.mkdir()
    program.write_text(STUBBORN_RUN)
    patient = "from hf_adafisher.experiments.comparison import cell_process\ncell_process._GRACE_SECONDS = 60.0\n"
    process = subprocess.Popen([sys.executable, "-c", patient + DRIVER, str(program.parent), str(out)])
    try:
        wait_until(lambda: len(pids(out)) == 4)  # two runs, each with a child
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)
        assert process.poll() is None
        begin = time.monotonic()
        process.send_signal(signal.SIGINT)
        assert process.wait(30) != 0
        assert time.monotonic() - begin < 25
        wait_until(lambda: not any(map(alive, pids(out))), seconds=5)
    finally:
        process.kill()
        for pid in filter(alive, pids(out)):
            os.kill(pid, signal.SIGKILL)


@pytest.mark.subprocess
def test_ctrl_c_ends_a_comparison_that_waits_for_another_ones_run(program: Path, tmp_path: Path) -> None:
    """E7: for the lock of a cell, which the other process holds."""
    import fcntl

    out = tmp_path / "out"
    out.mkdir()
    script = DRIVER.replace("jobs=2).run()", "jobs=1).run()").replace("[0.1, 0.2, 0.3]", "[0.1]")
    config = {"cells": [{"optim": "adamw", "learning_rate": [0.1]}]}
    (cell,) = create_comparison(config, program.parent, out).cells
    (out / cell.folder_name).mkdir()
    with (out / cell.folder_name / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        process = subprocess.Popen([sys.executable, "-c", script, str(program.parent), str(out)])
        try:
            wait_until(lambda: waits(process.pid))
            time.sleep(0.5)
            assert process.poll() is None
            process.send_signal(signal.SIGINT)
            assert process.wait(30) != 0
        finally:
            process.kill()


@pytest.mark.subprocess
def test_a_run_beyond_its_time_limit_has_failed(program: Path, tmp_path: Path, compare: Compare) -> None:
    """E7: it and its children are stopped, and the other cells run."""
    program.write_text(STUBBORN_RUN.replace("os.fork()", "os.fork() if '0.2' in sys.argv else sys.exit('no')"))
    comparison = compare([ENTRY])
    limited = replace(comparison, cells=[replace(cell, time_limit=2.0) for cell in comparison.cells])
    failures = limited.run()
    assert len(failures) == 3
    cell = next(cell for cell in comparison.cells if cell.settings["learning_rate"] == 0.2)
    result = load_result(tmp_path / "out" / cell.folder_name)
    assert result is not None and result["status"] == "failed"
    assert result["reason"] == "stopped after 2 s (--cell_timeout)"
    assert len(pids(tmp_path / "out")) == 2 and not any(map(alive, pids(tmp_path / "out")))


def test_the_time_limit_of_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """E7: every cell gets it, and a limit that is none is refused."""
    module = load_command("compare")
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"cells": [{"optim": "adamw"}]}))
    arguments = module._parser().parse_args(["--config", str(config), "--cell_timeout", "90"])
    assert [cell.time_limit for cell in module._comparison(arguments).cells] == [90.0]
    assert module.main(["--config", str(config), "--cell_timeout", "0", "--dry_run"]) == 2
    assert "--cell_timeout is 0.0; it must be a positive number" in capsys.readouterr().err
