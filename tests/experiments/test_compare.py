"""Comparisons: cells, what is run and what is not run again, the table and the pictures."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from hf_adafisher.experiments.compare import Cell, expand_cells, local_files, run_cells
from hf_adafisher.experiments.summary import summarize

CONFIGS = Path(__file__).parents[2] / "scripts" / "configs"
SCRIPT = Path(__file__).parents[2] / "scripts" / "compare_optimizers.py"
RUN_CLM = SCRIPT.with_name("run_clm.py")

# Stands in for a training run: the loss is a function of the learning rate; a negative one fails, a large one diverges.
FAKE_RUN = """
import json, os, pathlib, sys
a = dict(zip(sys.argv[1::2], sys.argv[2::2]))
out, lr = pathlib.Path(a["--output_dir"]), float(a["--learning_rate"])
with open(out.parent / "started.txt", "a") as f:
    f.write(out.name + " " + os.environ["OMP_NUM_THREADS"] + "\\n")
if lr < 0:
    sys.exit(3)
loss = None if lr > 1 else 4 + (lr - 0.1) ** 2 + (a["--optim"] == "adamw")
split = {"loss": loss, "token_perplexity": loss, "word_perplexity": loss}
(out / "results.json").write_text(json.dumps({
    "status": "completed" if loss else "diverged", "seed": 0, "steps": 7, "validation": split, "test": split,
    "step_time": {"mean_ms": 12.0}, "optimizer_state_bytes": 2**20, "train_seconds": 1.0,
    "log_history": [{"step": 1, "loss": 5.0}, {"step": 7, "loss": 4.0}, {"step": 7, "eval_loss": 4.5}]}))
"""


@pytest.fixture
def program(tmp_path: Path) -> Path:
    path = tmp_path / "fake_run.py"
    path.write_text(FAKE_RUN)
    return path


def script() -> Any:
    spec = importlib.util.spec_from_file_location("compare_optimizers", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_lists_of_an_entry_are_combined() -> None:
    config = {"common": {"max_steps": 3}, "cells": [{"optim": "a", "x": [1, 2], "y": [3, 4]}, {"optim": "b"}]}
    cells = expand_cells(config)
    assert [cell.name for cell in cells] == ["a,x=1,y=3", "a,x=1,y=4", "a,x=2,y=3", "a,x=2,y=4", "b"]
    arguments = Cell({"optim": "a"}, {"flag": True, "files": ["p", "q"]}).arguments()
    assert arguments == ["--flag", "true", "--files", "p", "q", "--optim", "a"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"cells": []}, 'needs "cells"'),
        ({"cells": [{"optim": "a"}], "common_": {}}, "unknown: .'common_'"),
        ({"cells": [{"x": 1}]}, 'names an "optim"'),
        ({"cells": [{"optim": "a", "x": [1, 1]}]}, r"twice: \['a,x=1'\]"),
    ],
)
def test_bad_configurations(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        expand_cells(config)


def test_finished_cells_are_not_run_again_and_failed_ones_are(tmp_path: Path, program: Path) -> None:
    cells = expand_cells({"cells": [{"optim": "adamw", "learning_rate": [0.1, 2.0, -1.0]}]})
    for attempt in (1, 2):
        failures = run_cells(cells, program, tmp_path / "out", jobs=2)
        assert len(failures) == 1 and "learning_rate=-1.0: failed with exit status 3" in failures[0]
        started = (tmp_path / "out" / "started.txt").read_text().splitlines()
        assert len(started) == 2 + attempt
    with pytest.raises(ValueError, match="made with other arguments"):
        run_cells([Cell(cells[0].settings, {"max_steps": 9})], program, tmp_path / "out")
    with pytest.raises(ValueError, match="jobs must be at least 1, got 0"):
        run_cells(cells, program, tmp_path / "out", jobs=0)


def test_the_table_marks_the_best_run_of_each_optimizer(tmp_path: Path, program: Path) -> None:
    entries = [{"optim": name, "learning_rate": [0.05, 0.1, 2.0]} for name in ("adamw", "adafisherw")]
    cells = expand_cells({"cells": [*entries, {"optim": "sgd", "learning_rate": 0.1}]})
    run_cells(cells[:-1], program, tmp_path)
    text = summarize(cells, tmp_path)
    marked = [line for line in text.splitlines() if "**" in line]
    assert [line.split("|")[1].strip() for line in marked] == [
        "**adamw, learning_rate=0.1**",
        "**adafisherw, learning_rate=0.1**",
    ]
    assert marked[1].split("|")[2:-1] == [" 7 ", " 4.0000 ", " 4.0 ", " 4.0 ", " 4.0000 ", " 12 ", " 1.0 "]
    assert text.count("(diverged)") == 2 and "1 of 7 runs have no result yet" in text
    assert len(json.loads((tmp_path / "comparison.json").read_text())) == 6
    for picture in ("curves.png", "learning_rates.png"):
        assert str(tmp_path / picture) in text
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="no run in"):
        summarize(cells, tmp_path / "nothing")


def test_local_files_need_all_three(tmp_path: Path) -> None:
    for name in ("train", "valid"):
        (tmp_path / f"{name}.txt").write_text("a b\n")
    with pytest.raises(FileNotFoundError, match=r"test\.txt does not exist: a local corpus needs"):
        local_files(tmp_path)
    (tmp_path / "test.txt").write_text("a b\n")
    assert local_files(tmp_path)["validation_file"] == str(tmp_path / "valid.txt")


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.json")), ids=lambda path: path.stem)
def test_every_configuration_is_one_that_run_clm_accepts(path: Path, tmp_path: Path) -> None:
    from hf_adafisher.experiments.clm_arguments import parse_arguments

    for cell in expand_cells(json.loads(path.read_text())):
        _, _, training = parse_arguments([*cell.arguments(), "--output_dir", str(tmp_path)])
        assert training.optim == cell.settings["optim"]


def test_the_script_end_to_end_on_a_tiny_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny = {
        "n_layer": 1,
        "n_embd": 16,
        "n_head": 2,
        "vocab_size": 300,
        "block_size": 16,
        "max_steps": 3,
        "use_cpu": True,
    }
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for name in ("train", "valid", "test"):
        (corpus / f"{name}.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 40)
    config = {
        "common": {
            **tiny,
            "dataset": "wikitext-2",
            "eval_strategy": "no",
            "save_strategy": "no",
            "disable_tqdm": True,
        },
        "cells": [{"optim": "adafisherw"}, {"optim": "adamw", "learning_rate": 0.01}],
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    arguments = [
        "--config",
        str(tmp_path / "config.json"),
        "--output_dir",
        str(tmp_path / "out"),
        "--local_data",
        str(corpus),
    ]
    compare = script()
    assert compare.main([*arguments, "--dry_run"]) == 0
    assert capsys.readouterr().out.split() == ["adafisherw", "adamw,learning_rate=0.01"]
    assert compare.main([*arguments, "--jobs", "2"]) == 0
    table = capsys.readouterr().out
    assert "**adafisherw**" in table and "**adamw, learning_rate=0.01**" in table and "curves.png" in table
    assert compare.main(["--config", str(tmp_path / "missing.json"), "--output_dir", str(tmp_path)]) == 2
    assert "missing.json" in capsys.readouterr().err
