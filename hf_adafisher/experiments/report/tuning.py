"""Trials that choose each optimizer's setting, and the settings that claims are made of: those run with fresh seeds."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from hf_adafisher.experiments.comparison.cells import canonical
from hf_adafisher.experiments.report.results import SettingResults, best_settings
from hf_adafisher.experiments.report.tables import Table
from hf_adafisher.optimizers.factory.catalog import RECORDS, canonical_name

RATE = "learning_rate"
_NO_OPTIONS = (RATE, "lr_scheduler_type", "warmup_steps")
"""Arguments that a setting may have beside options of the optimizer."""


def tuning_trials(settings: Sequence[SettingResults], tuning_seeds: Collection[int]) -> list[SettingResults]:
    """Return the settings with their runs of the tuning seeds alone."""
    return _restricted(settings, lambda seed: seed in tuning_seeds, tuning=True)


def claimed_settings(
    settings: Sequence[SettingResults], tuning_seeds: Collection[int] | None = None
) -> list[SettingResults]:
    """Return the settings that stand in tables of claims, the best first.

    Args:
        settings: With all of their runs.
        tuning_seeds: Runs with these only choose. An optimizer with runs of other seeds is there with these alone, at
            every setting that has some; one without them at its best trial. Empty: every setting as it is. None:
            ``best_settings``.
    """
    if tuning_seeds is None:
        return best_settings(settings)
    fresh = _restricted(settings, lambda seed: seed not in tuning_seeds, tuning=False)
    confirmed = {setting.optim for setting in fresh}
    trials = best_settings(tuning_trials(settings, tuning_seeds))
    return sorted([*fresh, *(trial for trial in trials if trial.optim not in confirmed)], key=lambda one: one.rank)


def best_of_each(claims: Sequence[SettingResults]) -> list[SettingResults]:
    """Return the first setting of every optimizer, for pictures, which show one."""
    first: dict[str, SettingResults] = {}
    for setting in claims:
        first.setdefault(setting.optim, setting)
    return list(first.values())


def distinct_names(settings: Sequence[SettingResults]) -> list[str]:
    """Name each setting by its optimizer; several of one also by the arguments in which these differ."""
    names = []
    for setting in settings:
        same = [other.others for other in settings if other.optim == setting.optim]
        keys = dict.fromkeys(key for others in same for key in others)
        differ = [key for key in keys if any(others.get(key) != setting.others.get(key) for others in same)]
        names.append(", ".join([setting.optim, *(f"{key}={setting.others.get(key, '-')}" for key in differ)]))
    return names


def tuning_table(settings: Sequence[SettingResults], tuning_seeds: Collection[int]) -> Table:
    """Tabulate each optimizer's trials: how many, the best one, where its rate lies, and what was frozen.

    A rate at the end of those tried with the same other arguments is an ``edge``: a better one may lie beyond. A frozen
    setting that is not the best trial is named as such, or as the optimizer's default.

    Args:
        settings: With all of their runs.
        tuning_seeds: Seeds of the trials.
    """
    trials = tuning_trials(settings, tuning_seeds)
    best = {setting.optim: setting for setting in best_settings(trials)}
    claims = [setting for setting in claimed_settings(settings, tuning_seeds) if not setting.tuning]
    rows = []
    for optim in dict.fromkeys(setting.optim for setting in trials):
        tried = [setting for setting in trials if setting.optim == optim]
        lost = sum(not math.isfinite(setting.cost) for setting in tried)
        count = f"{len(tried)} ({lost} diverged or failed)" if lost else str(len(tried))
        frozen = [setting for setting in claims if setting.optim == optim]
        chosen = best.get(optim)
        marks = "; ".join(f"{one.name}{_mark(one, chosen)}" for one in frozen) or "none yet"
        if chosen is None:
            rows.append([optim, count, "-", "-", "-", marks])
        else:
            selection = chosen.task.selection
            value = selection.format(chosen.mean(selection.name))
            rows.append([optim, count, chosen.name, value, _place_of_rate(chosen, tried), marks])
    metric = trials[0].task.selection_metric if trials else "result"
    return Table(["optimizer", "trials", "best trial", metric, "its learning rate", "frozen"], rows)


def is_default(setting: SettingResults) -> bool:
    """Check that a setting is what its optimizer does by itself: its rate, or that for fine-tuning, and its options."""
    record = RECORDS.get(canonical_name(setting.base))
    if record is None:  # Trainer's own
        return False
    options = {key: value for key, value in setting.others.items() if key not in _NO_OPTIONS}
    rates = (record.learning_rate.value, record.fine_tuning_rate)
    if RATE in setting.others and float(setting.others[RATE]) not in rates:
        return False
    defaults = record.option_defaults()
    return canonical(options) == canonical({key: defaults.get(key) for key in options})


def _mark(frozen: SettingResults, best: SettingResults | None) -> str:
    if best is not None and canonical(frozen.others) == canonical(best.others):
        return ""
    if best is not None and _other_arguments(frozen, "max_steps") == _other_arguments(best, "max_steps"):
        return " (the best trial at another number of steps)"
    return " (default)" if is_default(frozen) else " (not the best trial)"


def _place_of_rate(best: SettingResults, tried: Sequence[SettingResults]) -> str:
    """Where the best rate lies among those that were tried with the same other arguments."""
    if RATE not in best.others:
        return "its default"
    alike = [one for one in tried if _other_arguments(one, RATE) == _other_arguments(best, RATE)]
    rates = sorted({float(setting.others[RATE]) for setting in alike if RATE in setting.others})
    if len(rates) == 1:
        return "the only one"
    rate = float(best.others[RATE])
    ends = {rates[0]: "lowest", rates[-1]: "highest"}
    return f"{ends[rate]} of {len(rates)}: edge" if rate in ends else f"inside of {len(rates)}"


def _other_arguments(setting: SettingResults, left_out: str) -> Mapping[str, Any]:
    return canonical({key: value for key, value in setting.others.items() if key != left_out})


def _restricted(
    settings: Sequence[SettingResults], wanted: Callable[[int | None], bool], tuning: bool
) -> list[SettingResults]:
    """Settings with those of their runs whose seed is wanted; without the others."""
    kept = [[cell for cell in setting.cells if wanted(cell.settings.get("seed"))] for setting in settings]
    return [SettingResults(cells, tuning) for cells in kept if cells]
