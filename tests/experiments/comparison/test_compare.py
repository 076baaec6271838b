"""Comparisons: cells, what is run and what is not run again, and the script from its command line to its files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hf_adafisher.experiments.comparison.budget import timing_cell, work_period
from hf_adafisher.experiments.comparison.cell_process import available_cores
from hf_adafisher.experiments.comparison.cells import Cell, expand_cells, local_files, select_optimizers, set_arguments
from hf_adafisher.experiments.comparison.configuration import PRESETS as PRESET_FOLDER
from hf_adafisher.experiments.comparison.execution import run_cells
from hf_adafisher.experiments.comparison.forecast import forecast
from hf_adafisher.experiments.comparison.protocol import Comparison, create_comparison
from hf_adafisher.experiments.comparison.published import read_published_results
from hf_adafisher.experiments.comparison.stored import load_result
from hf_adafisher.experiments.figures.training_run import parse_optimizer
from hf_adafisher.optimizers.factory.create import available_optimizers
from tests.scripts import folder_of, load_command

CONFIGS = PRESET_FOLDER
PRESETS = sorted(CONFIGS.rglob("*.json"))
TINY = {
    "n_layer": 1,
    "n_embd": 16,
    "n_head": 2,
    "vocab_size": 300,
    "block_size": 16,
    "use_cpu": True,
    "eval_strategy": "no",
    "save_strategy": "no",
    "disable_tqdm": True,
}

Compare = Callable[..., Comparison]
Started = Callable[..., list[str]]


def script() -> Any:
    return load_command("compare")


def test_lists_of_an_entry_are_combined() -> None:
    config = {"common": {"max_steps": 3}, "cells": [{"optim": "a", "x": [1, 2], "y": [3, 4]}, {"optim": "b"}]}
    cells = expand_cells(config)
    assert [cell.name for cell in cells] == ["a,x=1,y=3", "a,x=1,y=4", "a,x=2,y=3", "a,x=2,y=4", "b"]
    arguments = Cell({"optim": "a"}, {"flag": True, "files": ["p", "q"]}).arguments()
    assert arguments == ["--flag", "true", "--files", "p", "q", "--optim", "a"]


def test_an_option_is_the_same_by_either_of_its_names() -> None:
    """So are its cell, its folder and its cost, whatever the argument's name on a command line."""
    short = {"common": {"step_size": "paper"}, "cells": [{"optim": "adafisherw", "damping": [0.1, 0.3]}]}
    cells = [{"optim": "adafisherw", "adafisher_damping": [0.1, 0.3]}]
    full = {"common": {"adafisher_step_size": "paper"}, "cells": cells}
    assert expand_cells(short) == expand_cells(full)
    assert expand_cells(full)[0].all_settings == {"step_size": "paper", "optim": "adafisherw", "damping": 0.1}
    assert work_period(expand_cells(full)[0]) == 100
    for key in ("step_size", "adafisher_step_size"):
        assert set_arguments(full, [f"{key}=root"])["common"] == {"step_size": "root"}
        with pytest.raises(ValueError, match="--set damping: cells of the configuration have a damping of their own"):
            set_arguments(full, ["adafisher_damping=0.2"])
    twice = {"cells": [{"optim": "adafisherw", "damping": 0.1, "adafisher_damping": 0.3}]}
    with pytest.raises(ValueError, match="damping and adafisher_damping are one argument"):
        expand_cells(twice)


def test_seeds_are_combined_with_every_entry() -> None:
    cells = expand_cells({"cells": [{"optim": "a", "x": [1, 2]}, {"optim": "b"}], "seeds": [0, 5]})
    assert [cell.name for cell in cells] == [
        *("a,x=1,seed=0", "a,x=1,seed=5", "a,x=2,seed=0", "a,x=2,seed=5", "b,seed=0", "b,seed=5"),
    ]
    assert cells[1].arguments()[-2:] == ["--seed", "5"]


def test_an_entry_may_have_seeds_of_its_own(compare: Callable[..., Comparison]) -> None:
    """A sweep with one seed, and the best of it with more: one configuration."""
    entries = [{"optim": "a", "x": [1, 2]}, {"optim": "a", "x": 2, "seeds": [0, 3]}]
    names = [cell.name for cell in expand_cells({"cells": entries, "seeds": [0]})]
    assert names == ["a,x=1,seed=0", "a,x=2,seed=0", "a,x=2,seed=3"]
    overridden = compare(entries, seeds=[7, 8], config={"seeds": [0]})
    assert [cell.name for cell in overridden.cells] == [f"a,x={x},seed={seed}" for x in (1, 2) for seed in (7, 8)]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"cells": []}, "'cells' must be a list with something in it"),
        ({"cells": [{"optim": "a"}], "common_": {}}, "unknown key 'common_', did you mean 'common'"),
        ({"cells": [{"x": 1}]}, r"'cells'\[0\] needs 'optim'"),
        ({"cells": [{"optim": "a", "x": [1, 1]}]}, r"twice: \['a,x=1'\]"),
        ({"cells": [{"optim": "a"}], "task": "chess"}, "'task' must be one of clm, image, got 'chess'"),
        ({"cells": [{"optim": "a", "seed": 1}], "seeds": [0]}, "not in both"),
    ],
)
def test_bad_configurations(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        expand_cells(config)


def test_hyphens_and_underscores_in_names_are_the_same(tmp_path: Path) -> None:
    def comparison(name: str, only: str, budget: str) -> Comparison:
        config = {
            "cells": [{"optim": one, "learning_rate": 0.1} for one in (name, "adamw")],
            "paper": {"source": "s", "measure": "m", "values": {name: 3.0}},
            "step_seconds": {name: 2.0},
        }
        return create_comparison(config, CONFIGS, tmp_path, optimizers=[only], budget=budget)

    mixed = comparison("spectral_adafisher", "spectral-adafisher", "like=spectral_adafisher:epochs=1")
    assert [cell.name for cell in mixed.cells] == ["spectral-adafisher,learning_rate=0.1"]
    other = comparison("spectral_adafisher", "spectral_adafisher", "steps=9")
    assert other.cells == mixed.cells and "the configuration's step times" in forecast(other)
    assert mixed.reference is not None and mixed.reference.optim == "spectral-adafisher"
    published = read_published_results(mixed.config)
    assert published is not None and published.values == {"spectral-adafisher": 3.0}
    assert parse_optimizer("spectral_adafisher:beta=0.8")[0] == "spectral-adafisher"


def test_a_subset_of_the_optimizers() -> None:
    config = {"cells": [{"optim": "a", "x": 1}, {"optim": "b"}, {"optim": "a", "x": 2}], "seeds": [0]}
    assert [entry.get("x") for entry in select_optimizers(config, ["a"])["cells"]] == [1, 2]
    with pytest.raises(ValueError, match="no entry for c, d; it has: a, b"):
        select_optimizers(config, ["a", "c", "d"])


@pytest.mark.subprocess
def test_finished_cells_are_not_run_again(compare: Compare, started: Started, program: Path, tmp_path: Path) -> None:
    comparison = compare([{"optim": "adamw", "learning_rate": [0.1, 2.0]}], jobs=2)
    assert comparison.run() == [] and comparison.run() == []
    threads = max(available_cores() // 2, 1)
    assert sorted(started()) == [f"adamw,learning_rate={rate} {threads}" for rate in (0.1, 2.0)]
    with pytest.raises(ValueError, match="made with other arguments"):
        run_cells([Cell(comparison.cells[0].settings, {"max_steps": 9})], program, tmp_path / "out")
    with pytest.raises(ValueError, match="jobs must be at least 1, got 0"):
        compare([{"optim": "adamw"}], jobs=0)


@pytest.mark.subprocess
def test_a_failed_cell_is_a_result_with_its_reason(compare: Compare, started: Started, tmp_path: Path) -> None:
    comparison = compare([{"optim": "adamw", "learning_rate": [-1.0, 0.1]}])
    (failure,) = comparison.run()
    assert "learning_rate=-1.0: failed with exit status 1" in failure and "log.txt" in failure
    result = load_result(folder_of(tmp_path / "out", "adamw,learning_rate=-1.0"))
    assert (result["status"], result["reason"]) == ("failed", "ValueError: lr is negative")
    assert comparison.run() == [] and len(started()) == 2
    assert len(comparison.run(retry_failed=True)) == 1 and len(started()) == 3


@pytest.mark.subprocess
def test_commands_for_a_scheduler(compare: Compare, tmp_path: Path, started: Started) -> None:
    """Run by a shell, the lines leave what the comparison itself would have left; what is done is not listed."""
    import subprocess

    entries = [{"optim": "adamw", "learning_rate": [0.1, 0.2], "optim_args": "a=1, b=$HOME"}]
    comparison = compare(entries, budget="steps=20", seeds=[3])
    compare([{**entries[0], "learning_rate": 0.1}], budget="steps=20", seeds=[3]).run()
    (line,) = comparison.commands()
    name = "adamw,learning_rate=0.2,optim_args=a=1, b=$HOME,seed=3"
    folder = folder_of(tmp_path / "out", name)
    subprocess.run(line, shell=True, check=True)
    assert load_result(folder)["steps"] == 20 and started()[-1] == f"{name} {available_cores()}"
    assert comparison.commands() == [] and comparison.run() == [] and len(started()) == 2


def test_local_files_need_all_three(tmp_path: Path) -> None:
    for name in ("train", "valid"):
        (tmp_path / f"{name}.txt").write_text("a b\n")
    with pytest.raises(FileNotFoundError, match=r"test\.txt does not exist: a local corpus needs"):
        local_files(tmp_path)
    (tmp_path / "test.txt").write_text("a b\n")
    assert local_files(tmp_path)["validation_file"] == str(tmp_path / "valid.txt")


def test_local_files_of_ptb_keep_their_names(tmp_path: Path) -> None:
    for name in ("train", "valid", "test"):
        (tmp_path / f"ptb.{name}.txt").write_text("a b\n")
    assert local_files(tmp_path)["test_file"] == str(tmp_path / "ptb.test.txt")


@pytest.mark.slow
@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_every_configuration_is_one_that_its_script_accepts(path: Path, tmp_path: Path) -> None:
    from hf_adafisher.experiments.runs import clm_arguments, image_arguments

    config = json.loads(path.read_text())
    parse = {"clm": clm_arguments.parse_clm_arguments, "image": image_arguments.parse_image_arguments}[
        config.get("task", "clm")
    ]
    for cell in expand_cells(config):
        *_, training = parse([*cell.arguments(), "--output_dir", str(tmp_path)])
        assert training.optim == cell.settings["optim"]
    names = {name for cell in expand_cells(config) for name in (cell.optim, timing_cell(cell).name)}
    assert set(config.get("step_seconds", {})) <= names
    comparison = create_comparison(config, path.parent, tmp_path)  # which reads its budget and the published numbers
    assert comparison.budget is not None or {"max_steps", "num_train_epochs"} & set(config["common"])


@pytest.mark.parametrize("name", ["ptb-small", "python-docs-small"])
def test_the_small_presets_sweep_every_optimizer(name: str) -> None:
    cells = expand_cells(json.loads((CONFIGS / f"{name}.json").read_text()))
    rates: dict[tuple[str, Any], set[float]] = {}
    for cell in cells:
        rates.setdefault((cell.optim, cell.settings.get("damping")), set()).add(cell.settings["learning_rate"])
    assert (
        {optim for optim, _ in rates}
        == {*("adafisherw", "adafisher", "adamw", "sgd", "lamb", "adahessian", "shampoo", "kfac", "muon", "soap")}
        <= set(available_optimizers())
    )
    assert all(len(found) >= 4 for found in rates.values())
    assert {damping for optim, damping in rates if optim == "adafisherw"} == {0.001, 0.003}


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    """A tiny comparison of real runs."""
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for name in ("train", "valid", "test"):
        (corpus / f"{name}.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 40)
    config = {
        "common": {**TINY, "dataset": "wikitext-2"},
        "cells": [{"optim": "adafisherw"}, {"optim": "adamw", "learning_rate": 0.01}],
        "budget": "steps=3",
        "step_seconds": {"adafisherw": 60, "adamw": 120},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    return ["--config", str(tmp_path / "config.json"), "--local_data", str(corpus)]


@pytest.mark.subprocess
def test_the_script_end_to_end_on_a_tiny_model(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    compare, output = script(), ["--output_dir", str(tmp_path / "out")]
    assert compare.main([*arguments, "--dry_run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["adafisherw", "adamw,learning_rate=0.01"] and "2 cells, 0 of them finished" in lines
    assert lines[-1].startswith("about 9 min for the 2 cells left (training by the configuration's step times")
    assert compare.main([*arguments, *output, "--jobs", "2"]) == 0
    table = capsys.readouterr().out
    assert "**adafisherw**" in table and "**adamw, learning_rate=0.01**" in table and "report.html" in table
    results = load_result(folder_of(tmp_path / "out", "adafisherw"))
    windows = results["corpus"]["train"]["tokens"] // 15  # of 16 tokens, one of them shared with the next
    assert results["steps"] == 3 and results["steps_per_epoch"] == -(-windows // 16) > 1
    assert compare.main([*arguments, *output, "--report_only", "--optimizers", "adamw"]) == 0
    assert "adafisherw" not in capsys.readouterr().out


@pytest.mark.subprocess
def test_the_script_measures_and_plans(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [*arguments, "--output_dir", str(tmp_path / "out"), "--budget", "like=adafisherw:epochs=2"]
    only = [*command, "--optimizers", "adafisherw"]
    assert script().main([*only, "--list_commands"]) == 2
    assert "--measure_only first" in capsys.readouterr().err
    assert script().main([*only, "--measure_only"]) == 0
    assert "| adafisherw |" in capsys.readouterr().out
    measured = load_result(folder_of(tmp_path / "out" / "step_times", "adafisherw"))
    assert len(measured["step_seconds"]) == measured["steps"] == 40 and measured["validation"] is None
    assert not list(folder_of(tmp_path / "out" / "step_times", "adafisherw").glob("*.safetensors"))
    assert script().main([*only, "--list_commands"]) == 0
    assert f"--max_steps {2 * measured['steps_per_epoch']} " in capsys.readouterr().out


def test_the_script_and_bad_input(tmp_path: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    for extra, message in (
        (["--config", str(tmp_path / "missing.json")], "missing.json"),
        (["--optimizers", "adam"], "no entry for adam; it has: adafisherw, adamw"),
        (["--budget", "steps=1.5"], "a budget is steps=800"),
        (["--budget", "like=sgd:epochs=1"], "no entry for sgd"),
        (["--report_only"], "no run in"),
    ):
        assert script().main([*arguments, "--output_dir", str(tmp_path / "out"), *extra]) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        script().main(["--dry_run"])
    assert "one of the arguments preset --config is required" in capsys.readouterr().err
