"""Budgets of cells: steps, seconds, or the seconds that a reference optimizer needs for some epochs."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hf_adafisher.experiments.comparison.cells import Cell
from hf_adafisher.optimizers.adafisher import STEP_SIZE_DEFAULTS

WARMUP_STEPS = 10
"""Steps of a measurement that are left out: allocation, caches, the first factorisation of a method."""
MEASURED_WINDOWS = 3
_DEFAULT_PERIOD = 10

# These change the training, not the cost of a step. A measurement leaves them at their defaults, so that another sweep
# does not need another measurement.
_FREE_OF_COST = {
    "learning_rate", "damping", "relative_damping", "weight_decay", "ema_decay", "beta", "max_grad_norm", "seed",
    "adam_beta1", "adam_beta2", "adam_epsilon",
}  # fmt: skip
# These determine the steps of an epoch.
_EPOCH_LENGTH = ("per_device_train_batch_size", "gradient_accumulation_steps")
_SCHEDULE = {"max_steps", "num_train_epochs", "eval_strategy", "eval_steps", "save_strategy", "save_steps"}


@dataclass(frozen=True)
class Budget:
    """Training budget of every cell.

    Attributes:
        kind: ``steps``, ``seconds`` or ``like``.
        amount: That many steps, seconds, or epochs.
        optim: The reference optimizer, for ``like``.
    """

    kind: str
    amount: float
    optim: str | None = None

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Parse ``steps=800``, ``seconds=600`` or ``like=adafisherw:epochs=5``.

        Raises:
            ValueError: Anything else, or an amount that is not positive.
        """
        kind, _, rest = text.partition("=")
        optim = None
        if kind == "like":
            optim, _, rest = rest.partition(":epochs=")
        try:
            amount = float(rest)
        except ValueError:
            amount = -1.0
        whole = kind != "steps" or amount.is_integer()
        if kind not in ("steps", "seconds", "like") or not 0 < amount < float("inf") or not whole or optim == "":
            raise ValueError(f"a budget is steps=800, seconds=600 or like=adafisherw:epochs=5, got {text!r}")
        return cls(kind, amount, optim)

    @property
    def needs_times(self) -> bool:
        """True for a budget of time: it takes measured step times to turn it into steps."""
        return self.kind != "steps"


@dataclass(frozen=True)
class StepTime:
    """Seconds per optimizer step, and optimizer steps per epoch; or the reason of a failed measurement."""

    seconds: float | None
    steps_per_epoch: int | None = None
    reason: str = ""


def work_period(cell: Cell) -> int:
    """Return the period, in steps, of a method's periodic work (its refresh of the curvature), if it has any."""
    settings = cell.all_settings
    papers = settings.get("step_size") == "paper" and cell.optim in ("adafisher", "adafisherw")
    default = STEP_SIZE_DEFAULTS["paper"]["update_interval"] if papers else _DEFAULT_PERIOD
    return max(int(settings.get("update_interval", default)), 1)


def timing_cell(cell: Cell) -> Cell:
    """Return the short run that measures the step time of a cell, and of all others with the same cost."""
    settings = {key: value for key, value in cell.settings.items() if key not in _FREE_OF_COST}
    common = {key: value for key, value in cell.common.items() if key not in _FREE_OF_COST | _SCHEDULE}
    steps = WARMUP_STEPS + MEASURED_WINDOWS * work_period(cell)
    timing = {**common, "max_steps": steps, "timing_only": True, "disable_tqdm": True}
    return replace(cell, settings=settings, common=timing)


def reference_cell(cells: Sequence[Cell]) -> Cell:
    """Select the cell whose epochs are the budget: the first of the reference optimizer.

    Args:
        cells: Of that optimizer, at least one.

    Raises:
        ValueError: Their epochs have different numbers of steps, so that "its epochs" is no amount of time.
    """
    for key in _EPOCH_LENGTH:
        values = dict.fromkeys(cell.settings.get(key, "the shared one") for cell in cells)
        if len(values) > 1:
            raise ValueError(
                f"a budget of the epochs of {cells[0].optim} needs one {key}, and its cells have "
                f"{', '.join(map(str, values))}: give a budget of seconds=N or steps=N, or num_train_epochs in "
                '"common" and no budget'
            )
    return cells[0]


def typical_step_seconds(seconds: Sequence[float], interval: int) -> float:
    """Return the median, over windows of ``interval`` steps after the warm-up, of the window's mean.

    The median of single steps would leave out the periodic work at every ``interval``-th step, the mean would count
    every interruption by another program.

    Raises:
        ValueError: Too few steps for one window.
    """
    kept = seconds[WARMUP_STEPS:]
    windows = [statistics.fmean(kept[i : i + interval]) for i in range(0, len(kept) - interval + 1, interval)]
    if not windows:
        raise ValueError(f"{len(seconds)} steps are too few to time windows of {interval} after {WARMUP_STEPS}")
    return statistics.median(windows)


def read_step_time(results: Sequence[Mapping[str, Any]], interval: int) -> StepTime:
    """Average the results of a measurement, which has several where several cells run side by side."""
    for result in results:
        if result["status"] == "failed":
            return StepTime(None, reason=result.get("reason") or "it failed")
    try:
        seconds = statistics.fmean(typical_step_seconds(result.get("step_seconds", []), interval) for result in results)
    except ValueError as error:
        return StepTime(None, reason=f"{results[0]['status']}: {error}")
    length = results[0].get("steps_per_epoch")
    return StepTime(seconds, None if length is None else int(length))


def plan_cell(cell: Cell, budget: Budget, time: StepTime | None, reference: StepTime | None) -> Cell:
    """Set ``max_steps``, which the schedule follows, and the planned seconds of a cell.

    Args:
        cell: With or without ``max_steps`` of its own, which is replaced.
        budget: Of all cells.
        time: Step time of this cell; needed for budgets of time.
        reference: Step time of the reference optimizer; needed for ``like``.
    """
    planned: float | None = None
    if budget.kind == "steps":
        steps = int(budget.amount)
    else:
        assert time is not None and time.seconds is not None
        planned = budget.amount if budget.kind == "seconds" else seconds_of_epochs(budget, reference)
        assert planned is not None
        steps = max(round(planned / time.seconds), 1)
    common = {key: value for key, value in cell.common.items() if key != "num_train_epochs"}
    return replace(cell, common={**common, "max_steps": steps}, planned_seconds=planned)


def seconds_of_epochs(budget: Budget, reference: StepTime | None) -> float | None:
    """Training time of a ``like`` budget, in seconds; None if it is not known."""
    if reference is None or reference.seconds is None or reference.steps_per_epoch is None:
        return None
    return budget.amount * reference.steps_per_epoch * reference.seconds
