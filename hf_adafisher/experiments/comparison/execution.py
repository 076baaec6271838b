"""Execution of cells: as processes side by side on this machine, or on a Ray cluster with a shared file system."""

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

from hf_adafisher.experiments.comparison.cell_process import Job, available_cores, run_cell, stop, threads_for
from hf_adafisher.experiments.comparison.cells import Cell
from hf_adafisher.experiments.comparison.identity import cell_folder
from hf_adafisher.experiments.comparison.stored import is_done, load_result
from hf_adafisher.experiments.comparison.tasks import TASKS, format_number


def run_on_ray(
    todo: Sequence[Job], program: Path, threads: int, retry_failed: bool = False
) -> Generator[tuple[Job, str | None], None, None]:
    """Run cells as Ray tasks, each with as many CPUs as it has threads.

    The cluster is the one that is connected, that of ``RAY_ADDRESS``, or a new one on this machine.

    Args:
        todo: Cells and their folders.
        program: Absolute path of the script that runs one cell.
        threads: Of each run.
        retry_failed: Run cells again whose result is a failure.

    Returns:
        Iterator over the cells as they end, each with a message if it failed.

    Raises:
        ImportError: ``ray`` is not installed.
    """
    try:
        import ray
    except ImportError as error:
        raise ImportError('--backend ray needs ray: pip install "hf_adafisher[ray]"') from error
    return _outcomes(ray, todo, program, threads, retry_failed)


def _outcomes(
    ray: Any, todo: Sequence[Job], program: Path, threads: int, retry_failed: bool
) -> Generator[tuple[Job, str | None], None, None]:
    if not todo:
        return
    owned = not ray.is_initialized()
    if owned:
        cluster = os.environ.get("RAY_ADDRESS")
        size = {} if cluster else {"num_cpus": available_cores(), "include_dashboard": False}
        ray.init(address=cluster, log_to_driver=False, **size)
    # A run that was killed with its worker is not tried again behind the user's back: the same call does that.
    remote: Callable[..., Any] = ray.remote(num_cpus=threads, max_retries=0)(run_cell).remote
    running = {
        remote(cell, program, folder.resolve(), threads, retry_failed=retry_failed): (cell, folder)
        for cell, folder in todo
    }
    try:
        while running:
            (reference,), _ = ray.wait(list(running))
            job = running.pop(reference)
            try:
                outcome = ray.get(reference)
            except ray.exceptions.RayError as error:  # a machine or a worker died
                outcome = f"{job[0].name}: no result: {type(error).__name__}"
            yield job, outcome
    finally:
        for reference in running:
            ray.cancel(reference)
        if owned:
            ray.shutdown()


BACKENDS = ("local", "ray")
Headline = Callable[[dict[str, Any]], str | None]


def run_cells(
    cells: Sequence[Cell],
    program: Path,
    output_dir: Path,
    jobs: int = 1,
    verbose: bool = False,
    *,
    backend: str = "local",
    retry_failed: bool = False,
    headline: Headline = TASKS["clm"].headline,
) -> list[str]:
    """Run every cell that has no result yet, ``jobs`` at a time with the cores divided among them.

    Killed at any time, the same call goes on where it was; Ctrl-C stops the runs too.

    Args:
        cells: In the order of execution.
        program: The script that runs one cell.
        output_dir: Folder of the comparison; each cell has its folder below it.
        jobs: Cells at a time, >= 1.
        verbose: Show the runs' own output (only with one local job) instead of keeping it in ``log.txt``.
        backend: ``local``, or ``ray``: each cell is a task that asks for as many CPUs as it has threads.
        retry_failed: Run cells again whose result is a failure.
        headline: Formats the metric of a result, for the line on a finished cell.

    Returns:
        One message for each cell that failed, or was killed and has no result.

    Raises:
        ValueError: ``jobs`` out of range, or a folder whose result was made with other arguments or data.
        ImportError: ``ray`` is not installed.
    """
    threads = threads_for(jobs)
    folders = [(cell, cell_folder(output_dir, cell)) for cell in cells]
    todo = [(cell, folder) for cell, folder in folders if not is_done(cell, folder, retry_failed)]
    if backend == "ray":
        outcomes = run_on_ray(todo, program.resolve(), threads, retry_failed)
    else:
        outcomes = _run_locally(todo, program, threads, jobs, verbose and jobs == 1, retry_failed)
    failures = []
    with (
        contextlib.closing(outcomes),  # so that it stops its runs as soon as anything goes wrong here
        tqdm(total=len(cells), initial=len(cells) - len(todo), unit="run") as bar,
    ):
        for (cell, folder), failure in outcomes:
            if failure is not None:
                failures.append(failure)
            bar.update()
            bar.write(failure or describe_result(cell, load_result(folder), headline))
    return failures


def describe_result(cell: Cell, result: dict[str, Any] | None, headline: Headline) -> str:
    """Describe a cell that was run in one line."""
    if result is None:
        return f"{cell.name}: no result"
    if result["status"] == "failed":
        return f"{cell.name}: failed: {result.get('reason') or 'no reason given'}"
    steps = f"{format_number(result.get('steps'), 0)} steps"
    if "step_seconds" in result:
        return f"{cell.name}: {steps}, {format_number(result.get('train_seconds'), 1)} s"
    metric = (headline(result) if result["status"] == "completed" else None) or result["status"]
    return f"{cell.name}: {metric}, {steps}, {format_number(result.get('train_seconds'), 0)} s"


def _run_locally(
    todo: Sequence[Job], program: Path, threads: int, jobs: int, verbose: bool, retry_failed: bool
) -> Generator[tuple[Job, str | None], None, None]:
    processes: list[subprocess.Popen[bytes]] = []
    stopping = threading.Event()

    def run(job: Job) -> str | None:
        cell, folder = job
        if stopping.is_set():
            return None
        return run_cell(cell, program, folder, threads, verbose, started, retry_failed, stopping)

    def started(process: subprocess.Popen[bytes]) -> None:
        processes.append(process)
        if stopping.is_set():
            stop(process)

    with ThreadPoolExecutor(jobs) as pool:
        futures = {pool.submit(run, job): job for job in todo}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BaseException:  # Ctrl-C above all: what waits must not start, what runs must not stay behind
            stopping.set()
            pool.shutdown(wait=False, cancel_futures=True)
            stop(*(process for process in processes if process.poll() is None))
            raise
