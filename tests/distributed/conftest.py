"""Runs the scenarios of `worker.py` once, in two processes, for all tests of this folder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
TIME_LIMIT = 400
Results = list[dict[str, Any]]


def torchrun(processes: int, *arguments: str, worker: str = "tests.distributed.worker") -> None:
    """Run a worker under torchrun on this machine; its output is the failure's message."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}"]
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1"]
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "CUDA_VISIBLE_DEVICES": "",
        "TOKENIZERS_PARALLELISM": "false",
    }
    done = subprocess.run(
        [*command, "-m", worker, *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIME_LIMIT,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-9000:]


def load(folder: Path, processes: int) -> Results:
    """What each process wrote."""
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(processes)]


@pytest.fixture(scope="session")
def two(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Results of both processes, by scenario."""
    folder = tmp_path_factory.mktemp("two")
    torchrun(2, "all", str(folder))
    return [{**result, "folder": str(folder)} for result in load(folder, 2)]


@pytest.fixture(scope="session")
def three(two: Results, tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Results of three processes that continue from the two processes' distributed checkpoint."""
    folder = tmp_path_factory.mktemp("three")
    torchrun(3, "reload", str(folder), str(Path(two[0]["folder"]) / "paper"))
    return load(folder, 3)


@pytest.fixture(scope="session")
def four(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Results of four processes: two replicas of two shards."""
    folder = tmp_path_factory.mktemp("four")
    torchrun(4, "hybrid", str(folder))
    return load(folder, 4)
