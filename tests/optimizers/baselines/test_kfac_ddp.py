"""K-FAC under DistributedDataParallel, over two gloo processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from tests.optimizers.baselines import kfac_worker

pytestmark = pytest.mark.subprocess
ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each process has in the end."""
    folder = tmp_path_factory.mktemp("kfac")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-m", "tests.optimizers.baselines.kfac_worker"]
    processes = [
        subprocess.Popen([*command, str(rank), str(folder)], cwd=ROOT, env=environment, stderr=subprocess.PIPE)
        for rank in range(2)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=200)
        assert process.returncode == 0, errors.decode()[-5000:]
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


def test_two_processes_are_one_with_the_same_global_batch(ranks: list[dict[str, Any]]) -> None:
    assert_close(ranks[0]["plain"], ranks[1]["plain"], rtol=0, atol=0)
    assert_close(ranks[0]["plain"], kfac_worker.trained())
    assert ranks[0]["plain"]["refreshes"] == 4


def test_infinities_on_one_process_are_dropped_on_both(ranks: list[dict[str, Any]]) -> None:
    first, second = (rank["broken"] for rank in ranks)
    assert_close(first, second, rtol=0, atol=0)
    assert first["dropped"] == 1 and first["refreshes"] == 4  # at steps 0, 3 (late), 4, 6
    assert all(value.isfinite().all() for state in first["state"].values() for value in state.values())
