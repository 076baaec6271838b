"""The learning rates that figures on the digits start from are those that the committed comparison found best."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest

from hf_adafisher.experiments.comparison.tasks import TASKS
from hf_adafisher.experiments.figures.training_run import DIGITS_LEARNING_RATES, prepare_run
from hf_adafisher.experiments.report.results import CellResult, SettingResults, best_settings, group_by_setting

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
