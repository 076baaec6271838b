"""One cell as a process of its own, in a folder of its own, with its result in one JSON file."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from hf_adafisher.experiments.comparison.cells import Cell
from hf_adafisher.experiments.comparison.identity import write_record
from hf_adafisher.experiments.comparison.stored import is_done
from hf_adafisher.experiments.outputs import write_json
from hf_adafisher.experiments.runs.run import RESULTS_FILE

LOG_FILE = "log.txt"
MAX_JOBS = 1024
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
    """Return the threads of each of ``jobs`` runs side by side. Raise ValueError for ``jobs`` outside 1..1024."""
    if jobs < 1:
        raise ValueError(f"jobs must be at least 1, got {jobs}")
    if jobs > MAX_JOBS:
        raise ValueError(f"jobs must be at most {MAX_JOBS}, got {jobs}: this machine has {available_cores()} cores")
    return max(available_cores() // jobs, 1)


def run_cell(
    cell: Cell,
    program: Path,
    folder: Path,
    threads: int,
    verbose: bool = False,
    started: Started | None = None,
    retry_failed: bool = False,
    stopping: threading.Event | None = None,
) -> str | None:
    """Run one cell to its end, successful or not.

    Its folder gets the run's files, its output (``log.txt``) and its command. A run that ends with an error has a
    result too: ``status`` is ``failed``, ``reason`` the last line of its output. One that a signal kills has none.
    If another process is running the same cell (a comparison that was killed leaves its runs behind, two may share a
    folder), it is waited for. A cell that has a result by then is not run, and its result stays.

    Args:
        cell: Of a comparison.
        program: The script that runs it.
        folder: Of this cell.
        threads: Of torch.
        verbose: Show the run's own output instead of keeping it in ``log.txt``.
        started: Called with the process, which it may ``stop``.
        retry_failed: Run it again if its result is a failure, but not one that was just waited for.
        stopping: Set when a run that still waits for another process must not start any more.

    Returns:
        A message if it failed or was killed, else None.

    Raises:
        ValueError: The folder has got a result made with other arguments or data.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder / _LOCK_FILE, stopping) as (lock, waited):
        if (stopping is not None and stopping.is_set()) or is_done(cell, folder, retry_failed and not waited):
            return None
        (folder / RESULTS_FILE).unlink(missing_ok=True)  # of an attempt that failed
        write_record(cell, folder)
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
        failure = {"status": "failed", "reason": reason, "exit_status": code, "seconds": seconds}
        write_json(folder / RESULTS_FILE, failure)
    return f"{cell.name}: failed with exit status {code} after {seconds:.0f} s: {reason}{hint}"


def prepare_cell(cell: Cell, folder: Path) -> None:
    """Write the record of a cell that a shell will run by itself, unless it is running."""
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(BlockingIOError), _locked(folder / _LOCK_FILE, wait=False):
        write_record(cell, folder)


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
def _locked(path: Path, stopping: threading.Event | None = None, wait: bool = True) -> Iterator[tuple[int, bool]]:
    """Hold a lock that the run inherits, so that it ends with the last of both; yield it, and True if it waited."""
    import fcntl

    with path.open("a") as file:
        waited = False
        while stopping is None or not stopping.is_set():
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not wait:
                    raise
                waited = True
                time.sleep(_LOCK_SECONDS)
        yield file.fileno(), waited


def _last_line(path: Path) -> str | None:
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n") if path.is_file() else []
    return next((line.strip() for line in reversed(lines) if line.strip()), None)
