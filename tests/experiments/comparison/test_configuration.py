"""E13: configurations are found, read and checked before anything runs."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from hf_adafisher.experiments.comparison.cell_arguments import check_cells
from hf_adafisher.experiments.comparison.cells import expand_cells
from hf_adafisher.experiments.comparison.configuration import (
    MEANINGS,
    check_configuration,
    configuration_schema,
    find_configuration,
)
from tests.experiments.comparison.test_compare import CONFIGS, PRESETS, script

GOOD: dict[str, Any] = {"common": {"max_steps": 3}, "cells": [{"optim": "adamw", "learning_rate": 0.1}]}
PAPER = {"source": "s", "measure": "m", "values": {"adamw": 1.0}}
# A configuration, and words of the message.
BAD: list[tuple[Any, str]] = [
    ([], "must be an object, got []"),
    (None, "must be an object, got None"),
    ("text", "must be an object"),
    ({}, "needs 'cells'"),
    ({**GOOD, "cells": None}, "'cells' must be a list"),
    ({**GOOD, "cells": {}}, "'cells' must be a list"),
    ({**GOOD, "cells": []}, "a list with something in it"),
    ({**GOOD, "cells": [None]}, "'cells'[0] must be an object, got None"),
    ({**GOOD, "cells": ["adamw"]}, "'cells'[0] must be an object"),
    ({**GOOD, "cells": [{"optim": None}]}, "'optim' must be a text"),
    ({**GOOD, "cells": [{"optim": 3}]}, "'optim' must be a text"),
    ({**GOOD, "cells": [{"optim": " "}]}, "must be the name of an optimizer"),
    ({**GOOD, "cells": [{"optim": "adamw", "learning_rate": None}]}, "'learning_rate' must be a text, a finite number"),
    ({**GOOD, "cells": [{"optim": "adamw", "learning_rate": {"a": 1}}]}, "'learning_rate' must be"),
    ({**GOOD, "cells": [{"optim": "adamw", "learning_rate": [0.1, None]}]}, "'learning_rate'[1] must be"),
    ({**GOOD, "cells": [{"optim": "adamw", "a\0": 1}]}, "no name of an argument"),
    ({**GOOD, "cells": [{"optim": "adamw", "--x": 1}]}, "no name of an argument"),
    ({**GOOD, "cells": [{"optim": "adamw", "optim_args": "\0"}]}, "without null characters"),
    ({**GOOD, "cells": [{"optim": "adamw", "optim_args": "\ud800"}]}, "lone surrogates"),
    ({**GOOD, "cells": [{"optim": "adamw", "output_dir": "x"}]}, "use --output_dir"),
    ({**GOOD, "cells": [{"optim": "adamw", "seeds": [0, 0]}]}, "without duplicates"),
    ({**GOOD, "cells": [{"optim": "adamw", "learning_rate": [1, 1.0]}]}, "twice"),
    ({**GOOD, "cells": GOOD["cells"] * 2}, "twice"),
    ({**GOOD, "common": None}, "'common' must be an object"),
    ({**GOOD, "common": []}, "'common' must be an object"),
    ({**GOOD, "common": {"max_steps": None}}, "'max_steps' must be a text"),
    ({**GOOD, "common": {"max_steps": [[3]]}}, "'max_steps'[0] must be"),
    ({**GOOD, "common": {"token": "hf_x"}}, "'token' would stand in every record: log in with `hf auth login`"),
    ({**GOOD, "commom": {}}, "unknown key 'commom', did you mean 'common'"),
    ({**GOOD, "seeds": 3}, "'seeds' must be a list"),
    ({**GOOD, "seeds": []}, "a list with something in it"),
    ({**GOOD, "seeds": [1.5]}, "'seeds'[0] must be an integer of at least 0, got 1.5"),
    ({**GOOD, "seeds": [-1]}, "of at least 0, got -1"),
    ({**GOOD, "seeds": [True]}, "got True"),
    ({**GOOD, "seeds": ["0"]}, "got '0'"),
    ({**GOOD, "budget": 5}, "'budget' must be a text"),
    ({**GOOD, "budget": "hours=1"}, "a budget is steps=800"),
    ({**GOOD, "budget": ""}, "a budget is steps=800"),
    ({**GOOD, "task": []}, "'task' must be one of clm, image, got []"),
    ({**GOOD, "task": "chess"}, "'task' must be one of clm, image, got 'chess'"),
    ({**GOOD, "step_seconds": []}, "'step_seconds' must be an object"),
    ({**GOOD, "step_seconds": {"adamw": "fast"}}, "'adamw' must be a number above 0"),
    ({**GOOD, "step_seconds": {"adamw": 0}}, "'adamw' must be a number above 0, got 0"),
    ({**GOOD, "step_seconds": {"adamw": -1}}, "above 0, got -1"),
    ({**GOOD, "train_examples": "many"}, "'train_examples' must be an integer of at least 1"),
    ({**GOOD, "train_examples": 0}, "of at least 1, got 0"),
    ({**GOOD, "overhead_seconds": "long"}, "'overhead_seconds' must be a number of at least 0"),
    ({**GOOD, "overhead_seconds": -1}, "of at least 0, got -1"),
    ({**GOOD, "description": 3}, "'description' must be a text"),
    ({**GOOD, "paper": []}, "'paper' must be an object"),
    ({**GOOD, "paper": {}}, "'paper' needs 'source', 'measure', 'values'"),
    ({**GOOD, "paper": {**PAPER, "values": [1]}}, "'values' must be an object"),
    ({**GOOD, "paper": {**PAPER, "values": {"adamw": "x"}}}, "must be a number"),
    ({**GOOD, "paper": {**PAPER, "page": 3}}, "unknown key 'page'"),
]  # fmt: skip
# Arguments of a cell, and words of the message: what the run itself would say.
BAD_ARGUMENTS: list[tuple[dict[str, Any], str]] = [
    ({"optim": "adamx"}, "unknown optim 'adamx', did you mean 'adam"),
    ({"optim": ".."}, "unknown optim '..'"),
    ({"max_stepz": 5}, "unknown argument --max_stepz, did you mean '--max_steps'"),
    ({"max_step": 5}, "unknown argument --max_step, did you mean '--max_steps'"),
    ({"learning_rate": "abc"}, "invalid float value: 'abc'"),
    ({"learning_rate": "nan"}, "learning_rate"),
    ({"learning_rate": -1}, "learning_rate"),
    ({"learning_rate": -1, "optim": "adamw_torch"}, "learning_rate is -1.0; it must be at least 0"),
    ({"learning_rate": "inf", "optim": "adamw_torch"}, "learning_rate is inf; it must be finite"),
    ({"update_interval": "x", "optim": "adafisherw"}, "invalid int value: 'x'"),
    ({"update_interval": 0, "optim": "adafisherw"}, "update_interval"),
    ({"damping": -1, "optim": "adafisherw"}, "damping"),
    ({"optim_args": "x=1"}, "adamw"),
    ({"optim_args": "x"}, "optim_args must look like"),
    ({"max_steps": 1.5}, "invalid int value: '1.5'"),
    ({"n_embd": 7}, "n_embd (7) must be a multiple of n_head"),
    ({"vocab_size": 3}, "vocab_size is 3"),
    ({"train_file": "nowhere.txt"}, "train_file does not exist: nowhere.txt"),
    ({"eval_strategy": "never"}, "never"),
    ({"per_device_train_batch_size": 0}, "per_device_train_batch_size is 0; it must be at least 1"),
    ({"gradient_accumulation_steps": -1}, "gradient_accumulation_steps is -1; it must be at least 1"),
]


def dry_run(content: Any, tmp_path: Path, *more: str) -> int:
    (tmp_path / "c.json").write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return script().main(["--config", str(tmp_path / "c.json"), "--dry_run", *more])


@pytest.mark.parametrize("config", [one for one, _ in BAD], ids=[f"{i}" for i in range(len(BAD))])
def test_what_is_no_configuration(config: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """E13: 15 of 95 tried gave tracebacks; each is a sentence that says where, and status 2."""
    assert dry_run(config, tmp_path) == 2
    error = capsys.readouterr().err
    assert next(words for one, words in BAD if one is config) in error and "Traceback" not in error


@pytest.mark.parametrize(("arguments", "words"), BAD_ARGUMENTS)
def test_arguments_that_a_run_would_refuse(
    arguments: dict[str, Any], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """E13: about thirty passed the dry run, and failed one by one, 25 s after their start."""
    config = {"cells": [{"optim": "adamw", "seed": 1}, {"optim": "adamw", **arguments}]}
    assert dry_run(config, tmp_path) == 2
    error = capsys.readouterr().err
    assert "1 of 2 cells cannot run" in error and words in error


def test_the_json_schema_refuses_what_the_checks_refuse() -> None:
    """Duplicates in a grid, the words of a budget and lone surrogates are beyond a schema."""
    jsonschema = pytest.importorskip("jsonschema")
    schema = configuration_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    assert list(MEANINGS) == list(schema["properties"])
    assert validator.is_valid(GOOD) and validator.is_valid({**GOOD, "paper": PAPER, "seeds": [0, 1]})
    beyond = ("twice", "a budget is", "lone surrogates")
    passed = [(config, words) for config, words in BAD if validator.is_valid(config)]
    assert [words for _, words in passed if not words.startswith(beyond)] == []
    for path in PRESETS:
        validator.validate(json.loads(path.read_text()))


def test_every_way_of_running_checks_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """E13: not the dry run alone; nothing is started or written."""
    (tmp_path / "c.json").write_text(json.dumps(GOOD))
    out = tmp_path / "out"
    for way in ([], ["--list_commands"], ["--measure_only"], ["--dry_run"]):
        arguments = ["--config", str(tmp_path / "c.json"), "--output_dir", str(out), "--set", "max_stepz=5", *way]
        assert script().main(arguments) == 2
        assert "--max_stepz, did you mean '--max_steps'" in capsys.readouterr().err and not out.exists()


def test_many_problems_are_few_lines() -> None:
    """E13: a sweep of 144 wrong cells is one sentence, eight kinds of error are five lines."""
    sweep = {"cells": [{"optim": "adamx", "learning_rate": [0.1, 0.2, 0.3]}]}
    with pytest.raises(ValueError, match="3 of 3 cells") as error:
        check_cells(expand_cells(sweep))
    assert "adamx,learning_rate=0.1 and 2 more: unknown optim" in str(error.value)
    many = {"cells": [{"optim": f"adamx{number}"} for number in range(8)]}
    with pytest.raises(ValueError, match="and 3 more") as error:
        check_cells(expand_cells(many))
    assert len(str(error.value).splitlines()) == 7


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_every_preset_passes(path: Path) -> None:
    """E13: a check must not refuse what runs."""
    config = json.loads(path.read_text())
    check_configuration(config)
    check_cells(expand_cells(config))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"cells": [', "is no valid JSON: Expecting value"),
        (b"", "is no valid JSON"),
        (b'{"cells": [{"optim": "adamw", "learning_rate": NaN}]}', "NaN is no number of JSON"),
        (b'{"cells": [{"optim": "adamw", "learning_rate": -Infinity}]}', "-Infinity is no number of JSON"),
        (b'{"cells": [{"optim": "adamw", "damping": 1, "damping": 2}]}', "the key 'damping' stands there twice"),
        (b'{"cells": [{"optim": "adamw", "learning_rate": 1e999}]}', "a finite number"),
        (b'{"cells": ' + b"[" * 100_000, "is nested too deeply"),
        (b'{"cells": "\xff"}', "is no valid JSON"),
    ],
)  # fmt: skip
def test_files_that_are_no_json(content: bytes, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """E13: the message names the file."""
    assert dry_run(content, tmp_path) == 2
    error = capsys.readouterr().err
    assert words in error and str(tmp_path / "c.json") in error


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_other_encodings_are_read(encoding: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """E13: as editors on other systems write them."""
    assert dry_run(json.dumps(GOOD).encode(encoding), tmp_path) == 0
    assert capsys.readouterr().out.startswith("adamw,learning_rate=0.1\n")


def test_a_preset_is_found_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """E13: from any folder, with and without .json; a file of that name comes first."""
    monkeypatch.chdir(tmp_path)
    for name in ("lm-scratch", "lm-scratch.json", "paper/cifar-cnn"):
        assert find_configuration(Path(name)).resolve().is_relative_to(CONFIGS.resolve())
    assert script().main(["lm-scratch", "--dry_run"]) == 0
    assert "cells, 0 of them finished" in capsys.readouterr().out
    assert script().main(["lm-scratc", "--dry_run"]) == 2
    assert "no configuration 'lm-scratc', did you mean 'lm-scratch'? Presets: cct" in capsys.readouterr().err
    (tmp_path / "lm-scratch").write_text(json.dumps(GOOD))
    assert find_configuration(Path("lm-scratch")) == Path("lm-scratch")


def test_numbers_may_be_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """E13: as on a command line; the forecast multiplies them all the same."""
    common = {"per_device_train_batch_size": "16", "num_train_epochs": "2", "gradient_accumulation_steps": "2"}
    config = {"common": common, "cells": [{"optim": "adamw"}], "train_examples": 640, "step_seconds": {"adamw": 0.5}}
    assert dry_run(config, tmp_path) == 0
    assert "about 20 s for the 1 cells left" in capsys.readouterr().out
    assert dry_run(config, tmp_path, "--set", "max_steps='3'", "max_steps=60") == 0
    assert "about 30 s" in capsys.readouterr().out
    assert dry_run(config, tmp_path, "--set", "y=" + "[" * 100_000) == 2


def test_a_million_jobs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """E13: the dry run looked for the step times of a million copies, for over a minute."""
    begin = time.monotonic()
    assert dry_run(GOOD, tmp_path, "--budget", "seconds=5", "--jobs", "1000000") == 2
    assert "jobs must be at most 1024, got 1000000" in capsys.readouterr().err
    assert dry_run(GOOD, tmp_path, "--budget", "seconds=5", "--jobs", "1024") == 0
    assert time.monotonic() - begin < 30
