"""Hessian diagonals in two processes: those of the global batch, in a plain loop and under the Trainer."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from tests.distributed import hessian_worker
from tests.distributed.conftest import Results, torchrun


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What each of the two processes found."""
    folder = tmp_path_factory.mktemp("hessian")
    torchrun(2, str(folder), worker="tests.distributed.hessian_worker")
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("name", ["adahessian", "sophia"])
def test_a_plain_loop_equals_one_process_on_the_global_batch(name: str, parts: int, both: Results) -> None:
    alone = hessian_worker.plain_loop(name, parts)
    assert any(h.abs().max() > 1e-3 for h in alone["hessians"][0].values())
    for result in both:
        assert_close(result[f"plain {name} {parts}"]["hessians"], alone["hessians"])
        assert_close(result[f"plain {name} {parts}"]["weights"], alone["weights"])


def test_a_layer_that_one_process_uses_moves_in_both(both: Results) -> None:
    first, second = (result["unused"] for result in both)
    assert_close(first, second, rtol=0, atol=0)
    before = hessian_worker.four_layers().state_dict()
    same = {key for key, weight in first["weights"].items() if torch.equal(weight, before[key])}
    assert same == {"3.weight", "3.bias"}  # no process uses the last layer
    assert first["untouched"] and second["untouched"]


def test_buffers_are_those_of_the_first_process(both: Results) -> None:
    """DistributedDataParallel shares them only where it averages gradients, and not at all if so told."""
    for rank, result in enumerate(both):
        assert result["buffers"] == {True: 1.0, False: 1.0 + rank}


@pytest.mark.parametrize("name", ["adahessian", "sophia"])
def test_the_trainer_keeps_the_processes_together(name: str, both: Results) -> None:
    first, second = (result[f"trainer {name}"] for result in both)
    assert_close(first["weights"], second["weights"], rtol=0, atol=0)
    assert first["losses"][-1] < 0.97 * first["losses"][0]
