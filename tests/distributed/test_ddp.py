"""DistributedDataParallel over two gloo processes: one process on the same global batch, D27."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch.testing import assert_close

from tests.distributed import worker
from tests.distributed.conftest import Results
from tests.training_helper import optimizer_of

KINDS = pytest.mark.parametrize("kind", worker.KINDS)


@KINDS
def test_d27_ddp_factors_are_bit_identical_on_the_ranks_without_being_asked_for(two: Results, kind: str) -> None:
    first, second = (result[f"{kind}_data_parallel"] for result in two)
    assert_close(first["state"], second["state"], rtol=0, atol=0)
    assert_close(first["weights"], second["weights"], rtol=0, atol=0)


@KINDS
def test_ddp_training_equals_one_process_on_the_same_global_batch(two: Results, kind: str) -> None:
    alone, both = worker.data_parallel(kind=kind), two[0][f"{kind}_data_parallel"]
    assert_close(both["weights"], alone["weights"])
    assert_close(both["diagonals"], alone["diagonals"])
    assert_close(both["state"], alone["state"])


def test_d27_ddp_makes_one_all_reduce_per_refresh(two: Results) -> None:
    result = two[0]["paper_data_parallel"]
    assert result["refreshes"] == 3  # steps 0, 3 and 6 of 7
    assert result["reductions"] == 3


@pytest.mark.parametrize("kind", ["root", "spectral"])
def test_ddp_gradient_factors_need_no_all_reduce(two: Results, kind: str) -> None:
    """Gradients are those of the global batch already, at each of the seven steps."""
    result = two[0][f"{kind}_data_parallel"]
    assert (result["refreshes"], result["reductions"]) == (worker.STEPS, 0)


@KINDS
def test_ddp_a_module_unused_on_one_rank_neither_hangs_nor_parts_the_ranks(two: Results, kind: str) -> None:
    first, second = (result[f"{kind}_unused_on_one_rank"] for result in two)
    assert_close(first, second, rtol=0, atol=0)
    assert first["state"]["branch.bias"]["factor_weight"] > 0


def test_ddp_nan_on_one_rank_reaches_no_factor_and_no_weight(two: Results) -> None:
    for result in two:
        outcome = result["not_a_number_on_one_rank"]
        assert_close(outcome["broken"], outcome["healthy"], rtol=0, atol=0)
        assert outcome["dropped"] == 1 and outcome["finite"]


def test_processes_that_train_different_parameters_are_told_so(two: Results) -> None:
    for result in two:
        assert "all processes must train the same parameters" in result["different_models"]["error"]


@KINDS
def test_ddp_under_the_trainer_equals_one_process_factors_included(two: Results, tmp_path: Path, kind: str) -> None:
    """Raw factors too: the trainer takes the scale of the loss out of them."""
    run = worker.trainer(tmp_path, kind)
    run.train()
    both = two[0][f"{kind}_under_trainer"]["whole"]
    rounding = {"rtol": 1e-5, "atol": 1e-6} if kind == "paper" else {"rtol": 1e-3, "atol": 1e-4}  # of float32
    assert_close(both["weights"], worker.weights_of(run.model), **rounding)
    alone = worker.state_of(run.model, optimizer_of(run))
    for name, state in both["state"].items():
        for key, value in state.items():
            scale = max(float(alone[name][key].abs().max()), 1e-30)
            close = 1e-4 if kind == "paper" else 1e-2
            assert_close(value / scale, alone[name][key] / scale, rtol=close, atol=close)


@KINDS
@pytest.mark.parametrize("rank", [0, 1])
def test_ddp_resume_equals_the_uninterrupted_run_bitwise(two: Results, rank: int, kind: str) -> None:
    runs = two[rank][f"{kind}_under_trainer"]
    assert_close(runs["resumed"], runs["whole"], rtol=0, atol=0)
    assert_close(runs["whole"], two[0][f"{kind}_under_trainer"]["whole"], rtol=0, atol=0)
