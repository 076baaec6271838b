"""Bad input and damaged files of every kind: each ends in one sentence that names it, and no earlier file is touched.

    pytest -m slow -s tests/experiments/test_attack.py

prints how many were tried and survived properly in each group, and where the same stands as JSON. The cases are those
of the other tests together with products of names and values, against a folder that holds a finished run or comparison.
"""

from __future__ import annotations

import itertools
import json
import shutil
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_adafisher.experiments.comparison.protocol import Comparison
from hf_adafisher.experiments.report.write_report import read_comparison
from hf_adafisher.optimizers.base.options import Count
from hf_adafisher.optimizers.factory.catalog import optimizer_record
from hf_adafisher.training.checkpoints import last_complete_checkpoint
from tests.cases import mlp
from tests.data.images.image_samples import class_folders
from tests.experiments.comparison import test_configuration as configurations
from tests.experiments.comparison.test_compare import script
from tests.experiments.report.test_damaged_results import BAD_RECORDS, BAD_RESULTS, ENTRY, damage
from tests.experiments.runs import test_clm_input as clm_input
from tests.experiments.runs import test_run_image_input as image_input
from tests.experiments.runs.image_runs import TINY as TINY_IMAGES
from tests.experiments.runs.image_runs import run as run_images
from tests.experiments.runs.test_run_faults import contents
from tests.experiments.runs.test_run_faults import earlier as earlier
from tests.optimizers.test_options import OWN, WRONG, options_of
from tests.training.test_checkpoints import NEEDED

pytestmark = [pytest.mark.slow, pytest.mark.subprocess]
Outcome = tuple[int, str]
"""Exit status, and the error message."""
NO_NUMBERS = ("abc", "nan", "", "1e999", "--")
NUMBERS = (
    "n_layer", "n_embd", "n_head", "vocab_size", "block_size", "dropout", "max_eval_lines", "learning_rate", "damping",
    "update_interval", "weight_decay", "max_steps", "num_train_epochs", "per_device_train_batch_size",
    "gradient_accumulation_steps", "warmup_steps", "save_steps", "eval_steps", "logging_steps", "seed",
    "max_grad_norm", "adam_beta1", "adam_epsilon",
)  # fmt: skip
NEGATIVE = (
    "n_layer", "n_embd", "n_head", "vocab_size", "block_size", "dropout", "max_eval_lines", "learning_rate", "damping",
    "update_interval", "weight_decay", "per_device_train_batch_size", "per_device_eval_batch_size",
    "gradient_accumulation_steps", "warmup_steps",
)  # fmt: skip
MISSPELT = ("dampin", "learning_rat", "optims", "outputdir", "n_layers", "max_step", "resume", "trainfile")
CHOICES = ("optim", "dataset", "lr_scheduler_type", "eval_strategy", "save_strategy", "use_cpu", "optim_args")


def cases_of(test: Any) -> list[tuple[Any, str]]:
    """The table of a parametrized test."""
    return next(mark.args[1] for mark in test.pytestmark if mark.name == "parametrize")


class Table:
    """What was tried in each group, and what was not survived properly."""

    def __init__(self) -> None:
        self.tried: dict[str, int] = {}
        self.failed: dict[str, list[str]] = {}

    def attack(
        self, group: str, cases: Iterable[tuple[str, Callable[[], Outcome], str]], untouched: Callable[[], Any]
    ) -> None:
        """Try every case: its name, a call, and a word that the error must hold."""
        before = untouched()
        for name, call, word in cases:
            self.tried[group] = self.tried.get(group, 0) + 1
            try:
                status, message = call()
                problem = "" if status == 2 and word in message else f"status {status}: {message[-300:]!r}"
            except BaseException as error:
                problem = "".join(traceback.format_exception_only(error)).strip()[-300:]
            if (after := untouched()) != before:
                problem, before = f"{problem} files of the earlier run have changed", after
            if problem:
                self.failed.setdefault(group, []).append(f"{name}: {problem}")
        assert not self.failed.get(group), "\n" + "\n".join(self.failed[group])


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Table]:
    table = Table()
    yield table
    rows = {group: {"tried": n, "survived": n - len(table.failed.get(group, []))} for group, n in table.tried.items()}
    path = tmp_path_factory.getbasetemp() / "attack.json"
    path.write_text(json.dumps({**rows, "failed": table.failed}, indent=2))
    print(f"\n{'group':<16}{'tried':>8}{'survived':>10}    ({path})")
    for group, row in rows.items():
        print(f"{group:<16}{row['tried']:>8}{row['survived']:>10}")


@pytest.fixture
def attempt(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Callable[..., Outcome]:
    """Runs a script in this process up to its training, and returns its status and its error, one line."""

    def train(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("training was started")

    monkeypatch.setattr("transformers.Trainer.train", train)

    def call(main: Callable[..., int], *arguments: Any) -> Outcome:
        caplog.clear()
        status = main(*arguments)
        message = caplog.records[-1].getMessage() if caplog.records else ""
        return (status, message) if "\n" not in message else (-1, message)

    return call


def test_arguments(table: Table, main: Any, attempt: Any, command: list[str], earlier: Path) -> None:
    flags: list[tuple[list[str], str]] = [
        (given, words)
        for given, words in cases_of(clm_input.test_bad_input_ends_in_one_line)
        # Here there are text files, a number of steps, and something to resume from.
        if given[0] not in ("nowhere.json", "--dataset", "--num_train_epochs") and "last" not in given
    ]
    flags += [([f"--{name}={value}"], name) for name in NUMBERS for value in NO_NUMBERS]
    flags += [([f"--{name}=-1"], name) for name in NEGATIVE]
    flags += [([f"--{name}", "1"], f"--{name}") for name in MISSPELT]
    flags += [([f"--{name}=nonsense"], "nonsense") for name in CHOICES]
    output = ["--output_dir", str(earlier)]
    cases = [
        (" ".join(given), lambda given=given: attempt(main, [*command, *given, *output]), word) for given, word in flags
    ]
    images = [case for case in cases_of(image_input.test_bad_options_end_in_one_line) if "last" not in case[0]]
    cases += [
        (" ".join(given), lambda given=given: attempt(run_images, *given, *output), word) for given, word in images
    ]
    table.attack("arguments", cases, lambda: contents(earlier))


def test_argument_files(
    table: Table, main: Any, attempt: Any, files: dict[str, str], earlier: Path, tmp_path: Path
) -> None:
    """A JSON file instead of a command line: values of other types, unknown names, no JSON."""
    path = tmp_path / "run.json"
    good = {**{f"{split}_file": file for split, file in files.items()}, "output_dir": str(earlier), "use_cpu": True}
    good |= {"n_layer": 1, "n_embd": 16, "n_head": 2, "vocab_size": 300, "block_size": 16, "max_steps": 4}

    def run(content: Any) -> Outcome:
        damage(path, content)
        return attempt(main, [str(path)])

    contents_of: list[tuple[Any, str]] = [
        ({**good, name: value}, name) for name in NUMBERS for value in ("abc", [], [1], {}, True)
    ]
    contents_of += [({**good, name: None}, name) for name in ("n_layer", "n_head", "block_size", "dropout", "seed")]
    contents_of += [({**good, name: 1}, name) for name in MISSPELT]
    contents_of += [({**good, name: 3}, "3") for name in CHOICES]
    contents_of += [(content, str(path)) for content, _ in cases_of(configurations.test_files_that_are_no_json)]
    contents_of += [(content, str(path)) for content in ([], None, "text", 3)]
    cases = [(str(content)[-60:], lambda content=content: run(content), word) for content, word in contents_of]
    table.attack("argument files", cases, lambda: contents(earlier))


class Trap:
    """A pickle that runs code when it is loaded."""

    def __reduce__(self) -> tuple[Any, ...]:
        return pytest.fail, ("code of a checkpoint was run",)


def hostile(path: Path) -> None:
    torch.save(Trap(), path)


def folder_instead(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGE: dict[str, Callable[[Path], Any]] = {
    **{f"cut to {n}": lambda path, n=n: path.write_bytes(path.read_bytes()[:n]) for n in (0, 1, 9, 100, -2)},
    "cut in half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "noise": lambda path: path.write_bytes(bytes((i * i * 7 + 13) % 251 for i in range(999))),
    "a text": lambda path: path.write_text("no checkpoint"),
    "a list": lambda path: path.write_text("[]" if path.suffix == ".json" else "[]x"),
    "hostile": hostile,
    "deleted": Path.unlink,
    "a folder": folder_instead,
}


@pytest.mark.parametrize("resume", ["by name", "last"])
def test_checkpoints(
    table: Table, main: Any, attempt: Any, command: list[str], earlier: Path, tmp_path: Path, resume: str
) -> None:
    """By its path the file is named; ``last`` takes the checkpoint before."""
    target = earlier / "checkpoint-4"
    whole = Path(shutil.copytree(target, tmp_path / "whole"))
    flags = [*command, "--max_steps", "6", "--output_dir", str(earlier), "--resume_from_checkpoint", str(target)]

    def damaged(name: str, break_it: Callable[[Path], Any]) -> Outcome:
        try:
            break_it(target / name)
            broken = contents(target)
            if resume == "last":
                return (
                    (2, f"{name} is skipped") if last_complete_checkpoint(earlier).name == "checkpoint-2" else (0, "")
                )
            outcome = attempt(main, flags)
            assert contents(target) == broken, "the checkpoint was changed"
            return outcome
        finally:
            shutil.rmtree(target)
            shutil.copytree(whole, target)

    cases = [
        (f"{name}, {kind}", lambda name=name, break_it=break_it: damaged(name, break_it), name)
        for name, (kind, break_it) in itertools.product(NEEDED, DAMAGE.items())
    ]
    table.attack(f"checkpoint {resume}", cases, lambda: contents(earlier))


def test_results(table: Table, compare: Callable[..., Comparison]) -> None:
    """A damaged result or record is a failed cell with a reason; the other cells stand."""
    comparison = compare([ENTRY])
    comparison.run()
    bad, good = map(comparison.folder, comparison.cells)

    def damaged(name: str, content: Any) -> Outcome:
        whole = (bad / name).read_bytes()
        try:
            damage(bad / name, content)
            first, second = read_comparison(comparison)
            return (2 if (first.status, second.status) == ("failed", "completed") else 0), first.reason
        finally:
            (bad / name).write_bytes(whole)

    kinds = [("results.json", BAD_RESULTS), ("command.json", BAD_RECORDS)]
    cases = [
        (f"{name}, {kind}", lambda name=name, content=content: damaged(name, content), str(bad / name))
        for name, kind_of in kinds
        for kind, content in {**kind_of, "garbage": bytes(range(256)), "cut": b'{"a": [1, '}.items()
    ]
    table.attack("results", cases, lambda: contents(good))


def test_configurations(
    table: Table, tmp_path: Path, compare: Callable[..., Comparison], capsys: pytest.CaptureFixture[str]
) -> None:
    comparison = compare([ENTRY])
    comparison.run()
    path = tmp_path / "c.json"

    def run(content: Any, way: str) -> Outcome:
        damage(path, content)
        capsys.readouterr()
        flags = ["--config", str(path), "--output_dir", str(comparison.output_dir), *([way] if way else [])]
        return script().main(flags), capsys.readouterr().err

    contents_of: list[tuple[Any, str]] = [*configurations.BAD, *cases_of(configurations.test_files_that_are_no_json)]
    contents_of += [({"cells": [{"optim": "adamw", **given}]}, words) for given, words in configurations.BAD_ARGUMENTS]
    contents_of += [({"common": {name: "abc"}, "cells": [{"optim": "adamw"}]}, name) for name in NUMBERS]
    contents_of += [({"common": {name: 1}, "cells": [{"optim": "adamw"}]}, name) for name in MISSPELT]
    cases = [
        (f"{str(content)[:80]} {way}", lambda content=content, way=way: run(content, way), words)
        for content, words in contents_of
        for way in ("", "--dry_run")
    ]
    table.attack("configurations", cases, lambda: contents(comparison.output_dir))


DATA: dict[str, bytes | None] = {
    "missing": None,
    "empty": b"",
    "blank": b"\n \n\n",
    "one word": b"word\n",
    "no text": bytes(range(128, 256)) * 40,
    "UTF-16": ("a few words\n" * 50).encode("utf-16"),
    "a PNG": b"\x89PNG\r\n\x1a\n" + bytes(999),
}


def test_data(table: Table, main: Any, attempt: Any, command: list[str], earlier: Path, tmp_path: Path) -> None:
    output = ["--output_dir", str(earlier)]

    def text(split: str, content: bytes | None) -> Outcome:
        path = tmp_path / f"bad-{split}.txt"
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_bytes(content)
        return attempt(main, [*command, f"--{split}_file", str(path), *output])

    def image(kind: str, break_it: Callable[[Path], Any]) -> Outcome:
        data = class_folders(tmp_path / f"images {kind}", {"blue": 4, "red": 4})
        break_it(data / "red" / "002.png")
        return attempt(run_images, *TINY_IMAGES, "--data_dir", data, *output)

    cases = [
        (f"{split}, {kind}", lambda split=split, content=content: text(split, content), split)
        for split, (kind, content) in itertools.product(("train", "validation", "test"), DATA.items())
        if (split, kind) != ("test", "one word")  # enough for a perplexity
    ]
    kinds = {kind: break_it for kind, break_it in DAMAGE.items() if kind not in ("deleted", "a folder", "cut to -2")}
    cases += [
        (f"image, {kind}", lambda kind=kind, break_it=break_it: image(kind, break_it), "002.png")
        for kind, break_it in kinds.items()
    ]
    table.attack("data", cases, lambda: contents(earlier))


def test_options(table: Table) -> None:
    """Wrong values of every option of every optimizer here."""
    model = mlp(3, 2)

    def build(name: str, option: str, value: Any) -> Outcome:
        try:
            optimizer_record(name).cls(model, **{option: value})  # type: ignore[call-arg]
        except ValueError as error:
            return 2, str(error)
        return 0, "accepted"

    def more(specification: Any) -> list[Any]:
        return [] if isinstance(specification.range, Count) else [10**400]  # a count may be as large as it likes

    cases = [
        (
            f"{name}, {option}={str(value)[:20]}",
            lambda name=name, option=option, value=value: build(name, option, value),
            option,
        )
        for name in OWN
        for option, specification in options_of(name).specifications().items()
        for value in [*WRONG[type(specification.range)], *more(specification), [], torch.ones(2)]
    ]
    table.attack("options", cases, lambda: len(model[0]._forward_hooks))
