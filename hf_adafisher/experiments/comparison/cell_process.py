"""One cell as a process of its own, in a folder of its own, with its result in one JSON file."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from hf_adafisher.experiments.comparison.cells import Cell
from hf_adafisher.experiments.outputs import write_json
from hf_adafisher.experiments.runs.run import RESULTS_FILE

LOG_FILE = "log.txt"
COMMAND_FILE = "command.json"
_LOCK_FILE = ".lock"
_LOCK_SECONDS = 0.1
_GRACE_SECONDS = 5.0

Job = tuple[Cell, Path]
"""A cell and its folder."""
Started = Callable[["subprocess.Popen[bytes]"], None]


def available_cores() -> int:
    """Count the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads_for(jobs: int) -> int:
    """Return the threads of each of ``jobs`` runs side by side. Raise ValueError for ``jobs`` below 1."""
    if jobs < 1:
        raise ValueError(f"jobs must be at least 1, got {jobs}")
    return max(available_cores() // jobs, 1)


def load_result(folder: Path) -> dict[str, Any] | None:
    """Load the result of a cell, or None if it has none."""
    path = folder / RESULTS_FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def is_done(cell: Cell, folder: Path, retry_failed: bool = False) -> bool:
    """Check that a cell has a result, made with the same arguments.

    Raises:
        ValueError: The result was made with other arguments.
    """
    result = load_result(folder)
    if result is None:
        return False
    command = folder / COMMAND_FILE
    if command.is_file() and json.loads(command.read_text(encoding="utf-8")) != cell.arguments():
        raise ValueError(
            f"{folder} holds a result made with other arguments ({command} lists them): use another output "
            "directory, or delete the folder to run it again"
        )
    return not (retry_failed and result["status"] == "failed")


def run_cell(
    cell: Cell,
    program: Path,
    folder: Path,
    threads: int,
    verbose: bool = False,
    started: Started | None = None,
    stopping: threading.Event | None = None,
) -> str | None:
    """Run one cell to its end, successful or not.

    Its folder gets the run's files, its output (``log.txt``) and its command. A run that ends with an error has a
    result too: ``status`` is ``failed``, ``reason`` the last line of its output. One that a signal kills has none.
    If another process is running the same cell (a comparison that was killed leaves its runs behind, two may share a
    folder), it is waited for.

    Args:
        cell: Of a comparison.
        program: The script that runs it.
        folder: Of this cell.
        threads: Of torch.
        verbose: Show the run's own output instead of keeping it in ``log.txt``.
        started: Called with the process, which it may ``stop``.
        stopping: Set when a run that still waits for another process must not start any more.

    Returns:
        A message if it failed or was killed, else None.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder / _LOCK_FILE, stopping) as (lock, waited):
        if (stopping is not None and stopping.is_set()) or (waited and (folder / RESULTS_FILE).is_file()):
            return None
        (folder / RESULTS_FILE).unlink(missing_ok=True)  # of an attempt that failed
        (folder / COMMAND_FILE).write_text(json.dumps(cell.arguments(), indent=2), encoding="utf-8")
        begin = time.perf_counter()
        code = _execute(cell.command(program, folder), folder, threads, verbose, lock, started, cell.time_limit)
        seconds = time.perf_counter() - begin
    if (folder / RESULTS_FILE).is_file():
        return None
    if code is not None and code < 0:
        return f"{cell.name}: killed by {signal.Signals(-code).name} after {seconds:.0f} s, it has no result"
    hint = "" if verbose else f", see {folder / LOG_FILE}"
    if code is None:
        reason = f"stopped after {cell.time_limit:g} s (--cell_timeout)"
    else:
        reason = (None if verbose else _last_line(folder / LOG_FILE)) or f"exit status {code}"
    write_json(folder / RESULTS_FILE, {"status": "failed", "reason": reason, "exit_status": code, "seconds": seconds})
    return f"{cell.name}: failed with exit status {code} after {seconds:.0f} s: {reason}{hint}"


def stop(*processes: subprocess.Popen[bytes]) -> None:
    """Stop runs and their children: by SIGTERM, and after five seconds, or at a second Ctrl-C, by SIGKILL."""
    deadline = time.monotonic() + _GRACE_SECONDS
    try:
        _signal(processes, signal.SIGTERM)
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(deadline - time.monotonic(), 0))
    finally:
        _signal(processes, signal.SIGKILL)  # children that ignored the first signal, too, after their parent's end


def _signal(processes: Iterable[subprocess.Popen[bytes]], sign: signal.Signals) -> None:
    for process in processes:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, sign)


def _execute(
    command: list[str],
    folder: Path,
    threads: int,
    verbose: bool,
    lock: int,
    started: Started | None,
    limit: float | None,
) -> int | None:
    """Run a command; return its exit status, or None if it was stopped after ``limit`` seconds."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    # A session of its own: Ctrl-C goes to the comparison alone, which then stops its runs; a run that heard it too
    # would look like a failed one.
    with contextlib.ExitStack() as stack:
        log = None if verbose else stack.enter_context((folder / LOG_FILE).open("w", encoding="utf-8"))
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=None if verbose else subprocess.STDOUT,
            start_new_session=True,
            pass_fds=(lock,),
        )
        if started is not None:
            started(process)
        try:
            return process.wait(limit)
        except subprocess.TimeoutExpired:
            return None
        finally:
            stop(process)  # and what it left behind


@contextlib.contextmanager
def _locked(path: Path, stopping: threading.Event | None = None) -> Iterator[tuple[int, bool]]:
    """Hold a lock that the run inherits, so that it ends with the last of both; yield it, and True if it waited."""
    import fcntl

    with path.open("a") as file:
        waited = False
        while stopping is None or not stopping.is_set():
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                waited = True
                time.sleep(_LOCK_SECONDS)
        yield file.fileno(), waited


def _last_line(path: Path) -> str | None:
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n") if path.is_file() else []
    return next((line.strip() for line in reversed(lines) if line.strip()), None)
