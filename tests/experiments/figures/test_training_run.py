"""The run behind a figure: what its user may say, its start and learning rates, its batches, and what stays behind."""

from __future__ import annotations

import csv
import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import TrainingArguments

from hf_adafisher.experiments.comparison.tasks import TASKS
from hf_adafisher.experiments.figures.command_line import given_arguments
from hf_adafisher.experiments.figures.training_run import (
    DIGITS_LEARNING_RATES,
    check_same_start,
    fixed_batches,
    gives,
    prepare_run,
)
from hf_adafisher.experiments.report.results import CellResult, SettingResults, best_settings, group_by_setting
from hf_adafisher.experiments.runs import clm_setup, image_setup
from tests.experiments.runs.image_runs import QUICK, TINY, TINY_RESNET


@pytest.fixture
def parsed_only(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Nothing is loaded: what prepare_run returns is the training arguments, with the others in the list."""
    seen: list[Any] = []

    def prepare(model_args: Any, data_args: Any, training_args: Any) -> Any:
        seen[:] = [model_args, data_args]
        return training_args

    monkeypatch.setattr(image_setup, "prepare_image_run", prepare)
    monkeypatch.setattr(clm_setup, "prepare_clm_run", prepare)
    return seen


def test_given_arguments_are_those_of_every_spelling() -> None:
    words = ["--eval-strategy", "no", "--learning-rate=3", "--report_t", "x", "--unknown", "3", "--use_cpu"]
    assert given_arguments("digits", [*words, "--report-to=y"]) == {
        "eval_strategy": "no",
        "learning_rate": 3.0,
        "report_to": "y",
        "use_cpu": True,
    }
    assert given_arguments("clm", ["--block-size=8"]) == {"block_size": 8}


def test_an_option_is_given_by_either_of_its_names() -> None:
    for word in ("--step_size=paper", "--step-size", "--adafisher_step_size", "--adafisher-step-size=root"):
        assert gives(["--seed=1", word, "root"], "step_size")
    assert not gives(["--seed=1", "--step", "step_size", "--adafisher_beta=0.1"], "step_size")


NOT_FREE = [
    ("max_steps", "9"),
    ("num_train_epochs", "2"),
    ("output_dir", "x"),
    ("optim", "sgd"),
    ("resume_from_checkpoint", "last"),
    ("eval_strategy", "steps"),
    ("save_strategy", "epoch"),
    ("load_best_model_at_end", "true"),
    ("push_to_hub", "true"),
    ("do_eval", "true"),
    ("curvature_log", "true"),
    ("dataset", "cifar10"),
    ("data_dir", "x"),
    ("dataset_name", "x"),
    ("train_dir", "x"),
]
ALIASES = {"dataset_name": "dataset", "train_dir": "data_dir"}


@pytest.mark.parametrize(("name", "value"), NOT_FREE)
def test_what_the_figure_decides_is_refused_in_every_spelling(
    parsed_only: list[Any], tmp_path: Path, name: str, value: str
) -> None:
    for option in {name, name.replace("_", "-")} - {"dataset-name", "train-dir"}:
        for words in ([f"--{option}", value], [f"--{option}={value}"]):
            with pytest.raises(ValueError, match=f"^--{ALIASES.get(name, name)} is not free here: "):
                prepare_run("digits", 3, tmp_path / "a.png", None, words)
        choice = f"adam:{option}={value}"
        with pytest.raises(
            ValueError, match=f"^--{ALIASES.get(name, name)} is not free here in 'adam:{option}={value}': "
        ):
            prepare_run("digits", 3, tmp_path / "a.png", choice)
    assert not parsed_only


@pytest.mark.parametrize(
    ("words", "name"),
    [(["--eval_strategy", "no"], "eval_strategy"), (["--save-strategy=no"], "save_strategy"),
     (["--dataset=digits"], "dataset"), (["--curvature_log", "false"], "curvature_log")],
)  # fmt: skip
def test_what_the_figure_does_anyway_may_be_said(
    parsed_only: list[Any], tmp_path: Path, words: list[str], name: str
) -> None:
    run: Any = prepare_run("digits", 3, tmp_path / "a.png", None, words)
    assert (run.max_steps, run.eval_strategy, run.save_strategy) == (3, "no", "no")
    assert parsed_only[1].dataset == "digits"


def test_other_tasks_have_their_own_data(parsed_only: list[Any], tmp_path: Path) -> None:
    prepare_run("image", 3, tmp_path / "a.png", None, ["--dataset", "cifar10"])
    assert parsed_only[1].dataset == "cifar10"
    prepare_run("clm", 3, tmp_path / "a.png", None, ["--dataset=wikitext2"])
    assert parsed_only[1].dataset == "wikitext2"
    for words, name in ((["--max-steps=9"], "max_steps"), (["--streaming"], "streaming")):
        with pytest.raises(ValueError, match=f"--{name} is not free here"):
            prepare_run("clm", 3, tmp_path / "a.png", None, words)


@pytest.mark.parametrize("words", [["--report_to", "wandb"], ["--report_to=wandb"], ["--report-to=wandb"]])
def test_report_to_is_the_users(parsed_only: list[Any], tmp_path: Path, words: list[str]) -> None:
    run: Any = prepare_run("digits", 3, tmp_path / "a.png", None, words)
    assert run.report_to == ["wandb"]
    silent: Any = prepare_run("digits", 3, tmp_path / "a.png", None)
    assert silent.report_to == []


def test_learning_rates_of_the_optimizer_of_the_command_line_and_of_the_digits(
    parsed_only: list[Any], tmp_path: Path
) -> None:
    def rate(optimizer: str, *words: str) -> float:
        run: Any = prepare_run("digits", 3, tmp_path / "a.png", optimizer, words)
        return run.learning_rate

    assert rate("adam") == DIGITS_LEARNING_RATES["adam"]
    for option in ("learning_rate", "learning-rate"):
        assert rate("adam", f"--{option}", "0.5") == rate("adam", f"--{option}=0.5") == 0.5
        assert rate(f"adam:{option}=0.25", "--learning_rate", "0.5") == rate(f"adam:{option}=0.25") == 0.25


@pytest.mark.parametrize("text", ["", ":learning_rate=1", "adam:learning_rate", "adam:=1", "adam:learning_rate="])
def test_malformed_optimizers_are_refused(parsed_only: list[Any], tmp_path: Path, text: str) -> None:
    with pytest.raises(ValueError, match=f"'{text}' is no optimizer: write its name, or name:argument=value"):
        prepare_run("digits", 3, tmp_path / "a.png", text)
    assert not parsed_only


@pytest.mark.parametrize("task", ["digits", "image", "clm"])
def test_several_processes_are_refused(
    parsed_only: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: str
) -> None:
    monkeypatch.setattr(TrainingArguments, "world_size", 2)
    with pytest.raises(ValueError, match="one process: start this without torchrun"):
        prepare_run(task, 3, tmp_path / "a.png", None)
    assert not parsed_only


def prepared(folder: Path, *words: str, optimizer: str = "adam") -> Any:
    return prepare_run("digits", 2, folder / "a.v2.png", optimizer, [*QUICK, *words])


def test_an_empty_folder_does_not_stay_behind(tmp_path: Path) -> None:
    for left in ([], ["log"]):
        run = prepared(tmp_path, *TINY)
        folder = Path(run.training_args.output_dir)
        run.new_trainer([])
        assert folder == tmp_path / "a.v2_run" and folder.is_dir()
        for name in left:
            (folder / name).touch()
        del run
        gc.collect()
        assert [path.name for path in tmp_path.rglob("*")] == ([folder.name, *left] if left else [])


def test_batches_of_a_figure_are_not_augmented(tmp_path: Path) -> None:
    """Every option of the augmentation; the images are those of a run without."""
    plain = prepared(tmp_path, *TINY, "--crop_ratio", "0.75")
    expected = images(plain, 40)
    assert len(expected) == 40 and not torch.equal(expected, images(prepared(tmp_path, *TINY), 40))
    options = {
        "random_resized_crop": "true",
        "crop_padding": "2",
        "flip": "1",
        "randaugment_ops": "2",
        "cutout": "4",
        "mixup": "1",
        "cutmix": "1",
    }
    names = plain.data_args.augmentation().__dict__.keys() - {"library", "randaugment_magnitude"}
    assert names | {"random_resized_crop"} == options.keys()
    words = [f"--{name}={value}" for name, value in options.items()]
    assert torch.equal(images(prepared(tmp_path, *TINY, "--crop_ratio", "0.75", *words), 40), expected)


def images(run: Any, examples: int) -> Tensor:
    trainer = run.new_trainer([])
    batches = fixed_batches(trainer, trainer.train_dataset, examples)
    assert not any(batch["labels"].is_floating_point() for batch in batches)  # soft labels are of mixed images
    return torch.cat([batch["pixel_values"] for batch in batches])


def test_a_last_batch_that_is_not_full_counts(tmp_path: Path) -> None:
    run = prepared(tmp_path, *TINY, "--dataloader_drop_last", "true", "--per_device_eval_batch_size", "16")
    assert len(images(run, 40)) == 40
    assert run.training_args.dataloader_drop_last


def test_runs_that_start_alike(tmp_path: Path) -> None:
    first = prepared(tmp_path, *TINY)
    check_same_start({"adam": first, "sgd": prepared(tmp_path, *TINY, "--learning_rate", "3", optimizer="sgd")})
    for words, name, others, firsts in (
        (["--seed", "7"], "seed", 7, 42),
        (["--per_device_train_batch_size", "8"], "per_device_train_batch_size", 8, 16),
        (["--gradient_accumulation_steps", "2"], "gradient_accumulation_steps", 2, 1),
        (["--flip", "0.5"], "flip", 0.5, 0.0),
        (["--max_train_samples", "50"], "max_train_samples", 50, None),
    ):
        message = f"^b has {name}={others}, where adam has {firsts}: .*; give --{name} once, for all of them$"
        with pytest.raises(ValueError, match=message):
            check_same_start({"adam": first, "b": prepared(tmp_path, *TINY, *words)})


@pytest.mark.parametrize("what", ["buffers", "parameters"])
def test_other_weights_or_statistics_are_another_start(tmp_path: Path, what: str) -> None:
    first, second = (prepared(tmp_path, *TINY_RESNET) for _ in range(2))
    check_same_start({"adam": first, "b": second})
    with torch.no_grad():
        next(tensor for tensor in getattr(second.model, what)() if tensor.is_floating_point()).add_(1)
    with pytest.raises(ValueError, match="b starts from other weights than adam"):
        check_same_start({"adam": first, "b": second})


CELLS = Path(__file__).parents[3] / "docs" / "results" / "digits-small" / "cells.csv"
TASK = TASKS["image"]
SETTINGS = ("optim", "damping", "learning_rate", "lr_scheduler_type", "seed")


def best() -> dict[str, SettingResults]:
    """The report's choice of each optimizer, from its table of all cells."""
    rows = []
    with CELLS.open(newline="", encoding="utf-8") as file:
        for line in csv.DictReader(file):
            settings = {key: line[key] for key in SETTINGS if line[key]}
            values = {m.name: float(line[m.name]) if line[m.name] else None for m in TASK.metrics}
            rows.append(CellResult(line["cell"], settings, line["status"], line["reason"], values, [], TASK))
    return {setting.optim: setting for setting in best_settings(group_by_setting(rows))}


def test_the_rates_of_the_digits_are_the_best_of_the_committed_comparison() -> None:
    chosen = {name: float(setting.others["learning_rate"]) for name, setting in best().items()}
    assert chosen == DIGITS_LEARNING_RATES


@pytest.mark.parametrize("name", ["adafisher", "adafisherw", "schedule_free_adamw"])
def test_a_figures_run_has_what_else_that_comparison_set(name: str, tmp_path: Path) -> None:
    """Damping and learning rate belong together, and so do the rate and its schedule."""
    args: Any = prepare_run("digits", 1, tmp_path / "a.png", name, ["--use_cpu"]).training_args
    others = {"lr_scheduler_type": "cosine", **best()[name].others}
    assert args.lr_scheduler_type == others["lr_scheduler_type"]
    for key in others.keys() - {"lr_scheduler_type"}:
        assert getattr(args, key) == float(others[key]), key
