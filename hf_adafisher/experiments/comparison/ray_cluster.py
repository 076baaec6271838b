"""Execution of cells on a Ray cluster, whose machines share a file system: results are files."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

from hf_adafisher.experiments.comparison.cell_process import Job, available_cores, run_cell


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
