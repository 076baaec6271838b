"""FSDP2 over two gloo processes: updates on sharded parameters, distributed checkpoints."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from tests.distributed import worker
from tests.distributed.conftest import Results

KINDS = pytest.mark.parametrize("kind", worker.KINDS)
PARTS = ("weights", "diagonals", "state")


@pytest.mark.parametrize("name", ["gpt2", "vit"])
def test_fsdp_updates_of_sharded_parameters_equal_one_process(two: Results, name: str) -> None:
    """Tied head and Conv1D; convolution, class token and a head of three rows, which two processes share unevenly."""
    alone = worker.data_parallel(name)
    for result in two:
        both = result["paper_fully_sharded_gpt2" if name == "gpt2" else "fully_sharded_vit"]
        assert both["sharded"] and both["reductions"] == 3
        for part in PARTS:
            assert_close(both[part], alone[part])
    rules = both["rules"]
    assert set(rules.values()) == (
        {"Conv1D", "LayerNorm", "Embedding+Linear", "Embedding"}
        if name == "gpt2"
        else {"Conv", "Linear", "LayerNorm", "gradient factors"}
    )


@pytest.mark.parametrize("kind", ["root", "spectral"])
@pytest.mark.parametrize("name", ["gpt2", "convnext"])
def test_fsdp_updates_by_gradient_factors_equal_one_process(two: Results, name: str, kind: str) -> None:
    """Tied head and Conv1D; hidden convolutions, and depthwise ones, which are no matrices."""
    alone = worker.data_parallel(name, kind=kind)
    for result in two:
        both = result[f"{kind}_fully_sharded_{name}"]
        assert both["sharded"] and both["reductions"] == 0
        for part in PARTS:
            assert_close(both[part], alone[part])


@KINDS
def test_fsdp_steps_of_a_diagnosis_are_those_of_the_whole_parameters(two: Results, kind: str) -> None:
    alone = worker.data_parallel("gpt2", kind=kind)["steps"]
    for result in two:
        both = result[f"{kind}_fully_sharded_gpt2"]["steps"]
        for number in ("smallest", "median", "largest"):
            assert both[number] == pytest.approx(alone[number], rel=1e-6)


@KINDS
def test_fsdp_uneven_and_empty_shards_equal_one_process(two: Results, four: Results, kind: str) -> None:
    """In two processes, and in two replicas of two shards."""
    alone = worker.uneven(kind)
    for results in (two, four):
        for rank, result in enumerate(results):
            both = result[f"{kind}_uneven"]
            rows = both["rows"]
            assert [rows["head.weight"], rows["one.weight"]] == [[2, 1], [1, 0]][rank % 2]
            for part in PARTS:
                assert_close(both[part], alone[part])


def test_fsdp_gradient_factors_and_sums_of_uneven_and_empty_shards(two: Results) -> None:
    """Means over rows and columns of the whole, by both processes; a single process has the whole."""
    alone = worker.sums_over_shards()
    for result in two:
        assert_close(result["sums_over_shards"], alone)
    means = alone["(3, 12) along 0"]
    whole = torch.randn(3, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert_close(means["sums"], torch.stack([whole.sum(), whole.square().sum()]))
    assert_close(means["axis0_1_factor"], whole.square())


def test_fsdp_every_optimizer_that_is_said_to_work_equals_one_process(two: Results) -> None:
    alone = worker.others_sharded()
    assert {"adafisherw", "spectral-adafisher", "adamw", "muon", "sgd"} <= alone.keys()
    for result in two:
        for name, weights in alone.items():
            rounding = {"rtol": 1e-2, "atol": 1e-3} if name == "muon" else {}  # its iteration is in bfloat16
            assert_close(result["others_sharded"][name], weights, **rounding)


def test_fsdp_norms_that_are_units_of_their_own_equal_one_process(two: Results) -> None:
    """Their weight is sharded again when a hook that comes after FSDP2's looks at it."""
    alone = worker.data_parallel("llama")
    for result in two:
        both = result["fully_sharded_llama"]
        assert both["sharded"] and both["reductions"] == 3
        assert set(both["rules"].values()) == {"Embedding", "Linear", "RMSNorm"}
        for part in ("weights", "diagonals", "state"):  # the norms compute in float32 whatever they are given
            assert_close(both[part], alone[part], rtol=1e-5, atol=1e-6)


def test_fsdp_shards_of_a_grouped_convolution_may_end_inside_a_group(two: Results) -> None:
    alone = worker.grouped_convolution()
    for result in two:
        assert_close(result["grouped_convolution"], alone)


def test_fsdp_factors_go_to_the_device_of_the_shard(two: Results) -> None:
    for result in two:
        found = result["factor_of_an_offloaded_shard"]
        assert found == {"devices": ["meta", "meta"], "shapes": [(2, 1), (1, 3)]}


@KINDS
def test_hsdp_two_replicas_of_two_shards_equal_one_process(four: Results, kind: str) -> None:
    alone = worker.data_parallel("gpt2", kind=kind)
    for result in four:
        hybrid = result[f"{kind}_hybrid"]
        assert hybrid["sharded"]
        for part in PARTS:
            assert_close(hybrid[part], alone[part])


@KINDS
def test_fsdp_through_accelerate_which_replaces_the_parameters_of_a_built_optimizer(two: Results, kind: str) -> None:
    """It still knows its layers and its matrices.

    The gradient of an attention's key bias is zero but for rounding. Divided by its own root it moves, and no two
    orders of summation make the same of it.
    """
    alone = worker.data_parallel("vit", kind=kind)
    noise = [name for name in alone["weights"] if name.endswith("k_proj.bias") and kind != "paper"]
    for result in two:
        both = result[f"{kind}_through_accelerate"]
        for part in ("weights", "state"):
            found, expected = ({k: v for k, v in side[part].items() if k not in noise} for side in (both, alone))
            assert len(found) == len(both[part]) - len(noise) > 0
            assert_close(found, expected)


@KINDS
def test_fsdp_resume_from_a_distributed_checkpoint_is_bitwise(two: Results, kind: str) -> None:
    """In the middle of an interval, where there is one."""
    damping = "relative_damping" if kind == "spectral" else "damping"
    counts = {"next_refresh": 9, "refreshes": 3} if kind == "paper" else {"next_refresh": 7, "refreshes": 7}
    for result in two:
        runs = result[f"{kind}_distributed_checkpoint"]
        for part in ("weights", "state"):
            assert_close(runs["resumed"][part], runs["uninterrupted"][part], rtol=0, atol=0)
        assert runs["resumed"]["options"] == {damping: 0.1, "steps": 7, **counts}


def test_fsdp_resume_onto_another_number_of_processes(two: Results, three: Results) -> None:
    uninterrupted = two[0]["paper_distributed_checkpoint"]["uninterrupted"]
    for result in three:
        for part in ("weights", "state"):  # the loss is computed in float32, and a third is not a power of two
            assert_close(result["reloaded"][part], uninterrupted[part], rtol=1e-5, atol=1e-7)
        assert result["reloaded"]["options"]["steps"] == 7


def test_fsdp_a_checkpoint_before_the_first_step_leaves_the_refresh_due(two: Results) -> None:
    fresh = two[0]["paper_distributed_checkpoint"]["fresh"]
    assert fresh["due"] and "gradient factors" not in fresh["rules"]
