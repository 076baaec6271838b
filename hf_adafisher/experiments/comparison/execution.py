"""Where cells run: as processes side by side on this machine, or as tasks of a Ray cluster."""

from __future__ import annotations

import contextlib
import os
import subprocess
import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from hf_adafisher.experiments.comparison.cell_process import is_done, load_result, run_cell, stop
from hf_adafisher.experiments.comparison.cells import Cell
from hf_adafisher.experiments.comparison.tasks import TASKS

BACKENDS = ("local", "ray")
Task = tuple[Cell, Path]
"""A cell and its folder."""
Headline = Callable[[dict[str, Any]], str | None]


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads_for(jobs: int) -> int:
    """Threads of each of ``jobs`` runs side by side. Raises ValueError for ``jobs`` below 1."""
    if jobs < 1:
        raise ValueError(f"jobs must be at least 1, got {jobs}")
    return max(available_cores() // jobs, 1)


def run_cells(
    cells: Sequence[Cell],
    program: Path,
    output_dir: Path,
    jobs: int = 1,
    verbose: bool = False,
    *,
    backend: str = "local",
    retry_failed: bool = False,
    unit: str = "run",
    headline: Headline = TASKS["clm"].headline,
) -> list[str]:
    """Run every cell that has no result yet, ``jobs`` at a time with the cores divided among them.

    Killed at any time, the same call goes on where it was; Ctrl-C stops the runs too.

    Args:
        cells: What to run, in this order.
        program: The script that runs one cell.
        output_dir: Folder of the comparison; each cell has its folder below it.
        jobs: Cells at a time, >= 1.
        verbose: Show the runs' own output (only with one local job) instead of keeping it in ``log.txt``.
        backend: ``local``, or ``ray``: each cell is a task that asks for as many CPUs as it has threads.
        retry_failed: Run cells again whose result is a failure.
        unit: What to call a cell in the progress bar.
        headline: From a result to its measure in words, for the line on a finished cell.

    Returns:
        One message for each cell that failed, or was killed and has no result.

    Raises:
        ValueError: ``jobs`` below 1, or a folder whose result was made with other arguments.
        ImportError: ``ray`` is not installed.
    """
    threads = threads_for(jobs)
    tasks = [
        (cell, output_dir / cell.name) for cell in cells if not is_done(cell, output_dir / cell.name, retry_failed)
    ]
    if backend == "ray":
        outcomes = _run_on_ray(tasks, program, threads)
    else:
        outcomes = _run_here(tasks, program, threads, jobs, verbose and jobs == 1)
    failures = []
    with (
        contextlib.closing(outcomes),  # so that it stops its runs as soon as anything goes wrong here
        tqdm(total=len(cells), initial=len(cells) - len(tasks), unit=unit) as bar,
    ):
        for (cell, folder), failure in outcomes:
            if failure is not None:
                failures.append(failure)
            bar.update()
            bar.write(failure or describe_result(cell, load_result(folder), headline))
    return failures


def describe_result(cell: Cell, result: dict[str, Any], headline: Headline) -> str:
    """One line on a finished cell."""
    if result["status"] == "failed":
        return f"{cell.name}: failed: {result['reason']}"
    if "step_seconds" in result:
        return f"{cell.name}: {result['steps']} steps, {result['train_seconds']:.1f} s"
    shown = (headline(result) if result["status"] == "completed" else None) or result["status"]
    return f"{cell.name}: {shown}, {result['steps']} steps, {result['train_seconds']:.0f} s"


def _run_here(
    tasks: Sequence[Task], program: Path, threads: int, jobs: int, verbose: bool
) -> Generator[tuple[Task, str | None], None, None]:
    processes: list[subprocess.Popen[bytes]] = []
    stopping = threading.Event()

    def run(task: Task) -> str | None:
        return None if stopping.is_set() else run_cell(*task_arguments(task), started=started)

    def started(process: subprocess.Popen[bytes]) -> None:
        processes.append(process)
        if stopping.is_set():
            stop(process)

    def task_arguments(task: Task) -> tuple[Cell, Path, Path, int, bool]:
        return task[0], program, task[1], threads, verbose

    with ThreadPoolExecutor(jobs) as pool:
        futures = {pool.submit(run, task): task for task in tasks}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BaseException:  # Ctrl-C above all: what waits must not start, what runs must not stay behind
            stopping.set()
            pool.shutdown(wait=False, cancel_futures=True)
            for process in processes:
                if process.poll() is None:
                    stop(process)
            raise


def _run_on_ray(tasks: Sequence[Task], program: Path, threads: int) -> Generator[tuple[Task, str | None], None, None]:
    """Needs a file system that all machines share, as the results are files."""
    try:
        import ray
    except ImportError as error:
        raise ImportError('--backend ray needs ray: pip install "hf_adafisher[ray]"') from error
    return _ray_outcomes(ray, tasks, program.resolve(), threads)


def _ray_outcomes(
    ray: Any, tasks: Sequence[Task], program: Path, threads: int
) -> Generator[tuple[Task, str | None], None, None]:
    if not tasks:
        return
    owned = not ray.is_initialized()
    if owned:
        cluster = os.environ.get("RAY_ADDRESS")
        size = {} if cluster else {"num_cpus": available_cores(), "include_dashboard": False}
        ray.init(address=cluster, log_to_driver=False, **size)
    # A run that was killed with its worker is not tried again behind the user's back: the same call does that.
    remote: Callable[..., Any] = ray.remote(num_cpus=threads, max_retries=0)(run_cell).remote
    running = {remote(cell, program, folder.resolve(), threads): (cell, folder) for cell, folder in tasks}
    try:
        while running:
            (reference,), _ = ray.wait(list(running))
            task = running.pop(reference)
            try:
                outcome = ray.get(reference)
            except ray.exceptions.RayError as error:  # a machine or a worker died
                outcome = f"{task[0].name}: no result: {type(error).__name__}"
            yield task, outcome
    finally:
        for reference in running:
            ray.cancel(reference)
        if owned:
            ray.shutdown()
