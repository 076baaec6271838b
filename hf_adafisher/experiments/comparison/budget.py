"""How long every cell may train: steps, seconds, or the seconds that one optimizer needs for some epochs."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hf_adafisher.experiments.comparison.cells import Cell

WARMUP_STEPS = 10
"""First steps of a measurement that do not count: allocation, caches, the first factorisation of a method."""
MEASURED_WINDOWS = 3
_DEFAULT_WINDOW = 10

# They change what is learned, not what a step costs. A measurement leaves them at their defaults, so that another sweep
# does not need another measurement.
_FREE = {
    "learning_rate", "damping", "relative_damping", "weight_decay", "ema_decay", "beta", "max_grad_norm", "seed",
    "adam_beta1", "adam_beta2", "adam_epsilon",
}  # fmt: skip
# They decide how many steps an epoch has.
_EPOCH = ("per_device_train_batch_size", "gradient_accumulation_steps")
_SCHEDULE = {"max_steps", "num_train_epochs", "eval_strategy", "eval_steps", "save_strategy", "save_steps"}


@dataclass(frozen=True)
class Budget:
    """What every cell gets.

    Attributes:
        kind: ``steps``, ``seconds`` or ``like``.
        amount: That many steps, seconds, or epochs.
        optim: The optimizer whose epochs count, for ``like``.
    """

    kind: str
    amount: float
    optim: str | None = None

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Reads ``steps=800``, ``seconds=600`` or ``like=adafisherw:epochs=5``.

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
        """Whether it takes measured step times to turn it into steps."""
        return self.kind != "steps"


@dataclass(frozen=True)
class StepTime:
    """Seconds per optimizer step, and optimizer steps per epoch; or why they could not be measured."""

    seconds: float | None
    steps_per_epoch: int | None = None
    reason: str = ""


def window(cell: Cell) -> int:
    """Steps after which a method's periodic work (its refresh of the curvature) comes round again."""
    return max(int({**cell.common, **cell.settings}.get("update_interval", _DEFAULT_WINDOW)), 1)


def timing_cell(cell: Cell) -> Cell:
    """The short run that measures the step time of a cell and of all that differ from it in what costs no time."""
    settings = {key: value for key, value in cell.settings.items() if key not in _FREE}
    common = {key: value for key, value in cell.common.items() if key not in _FREE | _SCHEDULE}
    steps = WARMUP_STEPS + MEASURED_WINDOWS * window(cell)
    return Cell(settings, {**common, "max_steps": steps, "timing_only": True, "disable_tqdm": True})


def like_cell(cells: Sequence[Cell]) -> Cell:
    """The cell whose epochs a budget like another optimizer's means: the first.

    Args:
        cells: Of the optimizer that the budget names, at least one.

    Raises:
        ValueError: Their epochs have different numbers of steps, so that "its epochs" is no amount of time.
    """
    for key in _EPOCH:
        values = dict.fromkeys(cell.settings.get(key, "the shared one") for cell in cells)
        if len(values) > 1:
            raise ValueError(
                f"a budget of the epochs of {cells[0].optim} needs one {key}, and its cells have "
                f"{', '.join(map(str, values))}: give a budget of seconds=N or steps=N, or num_train_epochs in "
                '"common" and no budget'
            )
    return cells[0]


def typical_step_seconds(seconds: Sequence[float], interval: int) -> float:
    """Median, over windows of ``interval`` steps after the warm-up, of the window's mean.

    The median of single steps would leave out what a method does at every ``interval``-th step, the mean would count
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
    """What a measurement (several results, where several ran side by side) says: the mean of its runs."""
    for result in results:
        if result["status"] == "failed":
            return StepTime(None, reason=result["reason"])
    try:
        seconds = statistics.fmean(typical_step_seconds(result["step_seconds"], interval) for result in results)
    except ValueError as error:
        return StepTime(None, reason=f"{results[0]['status']}: {error}")
    return StepTime(seconds, int(results[0]["steps_per_epoch"]))


def plan_cell(cell: Cell, budget: Budget, time: StepTime | None, like: StepTime | None) -> Cell:
    """The cell with ``max_steps`` and planned seconds as the budget wants them; the schedule follows ``max_steps``.

    Args:
        cell: With or without ``max_steps`` of its own, which is replaced.
        budget: Of all cells.
        time: Step time of this cell; needed for budgets of time.
        like: Step time of the optimizer that the budget names; needed for ``like``.
    """
    planned: float | None = None
    if budget.kind == "steps":
        steps = int(budget.amount)
    else:
        assert time is not None and time.seconds is not None
        planned = budget.amount if budget.kind == "seconds" else seconds_of_epochs(budget, like)
        assert planned is not None
        steps = max(round(planned / time.seconds), 1)
    common = {key: value for key, value in cell.common.items() if key != "num_train_epochs"}
    return replace(cell, common={**common, "max_steps": steps}, planned_seconds=planned)


def seconds_of_epochs(budget: Budget, like: StepTime | None) -> float | None:
    """Training time of a ``like`` budget, in seconds; None where it is not known."""
    if like is None or like.seconds is None or like.steps_per_epoch is None:
        return None
    return budget.amount * like.steps_per_epoch * like.seconds
