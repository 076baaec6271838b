"""What each task of a comparison measures: its script, the numbers of its results, and which of them decides."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any


def _as_it_is(value: float) -> float:
    return value


def _percent(share: float) -> float:
    return 100 * share


def _error(accuracy: float) -> float:
    return 100 - accuracy


@dataclass(frozen=True)
class Measure:
    """A number of a run.

    Attributes:
        name: Title of its column.
        split: Part of ``results.json`` that holds it: ``validation`` or ``test``.
        key: Its name there.
        digits: Shown after the point.
        convert: From the number there to the one shown.
    """

    name: str
    split: str
    key: str
    digits: int
    convert: Callable[[float], float] = _as_it_is

    def read(self, result: Mapping[str, Any]) -> float | None:
        """The number, or None where the run has none."""
        value = (result.get(self.split) or {}).get(self.key)
        return None if value is None else self.convert(value)

    def shown(self, value: float | None) -> str:
        """The number as text."""
        return "-" if value is None else f"{value:.{self.digits}f}"


@dataclass(frozen=True)
class Task:
    """What differs between the tasks of a comparison.

    Attributes:
        program: The script, beside ``compare_optimizers.py``, that runs one cell.
        measures: Numbers of a run beside steps, seconds and bytes, which every task has.
        best: Names of those in the table of the best settings.
        cells: Names of those in the table of all runs.
        decides: Name of the one that chooses each optimizer's setting, by its mean over the seeds.
        cost: From that number to one of which less is better: what curves and valleys show.
        tie: Name of the one that chooses between equals; less of it is better.
        rule: The choice in words.
        axis: The cost in words, with its unit.
        limit: Argument that bounds what is evaluated at the end.
        extent: In words, what the numbers are taken over; with the limit, and without it.
    """

    program: str
    measures: tuple[Measure, ...]
    best: tuple[str, ...]
    cells: tuple[str, ...]
    decides: str
    cost: Callable[[float], float]
    tie: str
    rule: str
    axis: str
    limit: str
    extent: tuple[str, str]

    def measure(self, name: str) -> Measure:
        """One of the measures."""
        return next(measure for measure in self.measures if measure.name == name)

    def cost_of(self, values: Mapping[str, float | None]) -> float:
        """What decides, less being better; infinite without a value."""
        value = values[self.decides]
        return math.inf if value is None else self.cost(value)

    def logged_cost(self, entry: Mapping[str, Any]) -> float | None:
        """The cost in an entry of Trainer's log, or None if it is no evaluation."""
        measure = self.measure(self.decides)
        value = entry.get(f"eval_{measure.key}")
        return None if value is None else self.cost(measure.convert(value))

    def headline(self, result: Mapping[str, Any]) -> str | None:
        """What decides, in words: ``validation loss 4.1250``; None if a run has no such number."""
        measure = self.measure(self.decides)
        value = measure.read(result)
        if value is None:
            return None
        name = measure.name.removesuffix(" %")
        return f"{name} {measure.shown(value)}{measure.name.removeprefix(name)}"

    def describe(self, arguments: Iterable[Mapping[str, Any]]) -> str:
        """What the numbers are taken over, in words.

        Args:
            arguments: Of every run.
        """
        limits = {given.get(self.limit) for given in arguments} or {None}
        limited, whole = self.extent
        if limits == {None}:
            return whole
        if len(limits) == 1:
            return limited.format(limits.pop())
        return limited.format(f"{self.limit} (see each run)")


TASKS = {
    "clm": Task(
        program="run_clm.py",
        measures=(
            Measure("validation loss", "validation", "loss", 4),
            Measure("token perplexity", "validation", "token_perplexity", 1),
            Measure("word perplexity", "validation", "word_perplexity", 1),
            Measure("test loss", "test", "loss", 4),
            Measure("test token perplexity", "test", "token_perplexity", 1),
            Measure("test word perplexity", "test", "word_perplexity", 1),
        ),
        best=("validation loss", "test loss", "test token perplexity", "test word perplexity"),
        cells=("validation loss", "token perplexity", "word perplexity", "test loss"),
        decides="validation loss",
        cost=_as_it_is,
        tie="validation loss",
        rule="lowest mean validation loss over the seeds",
        axis="validation loss (nats per token)",
        limit="max_eval_lines",
        extent=(
            "Losses are in nats per token over the first {} lines of the text",
            "Losses are in nats per token over the whole text",
        ),
    ),
    "image": Task(
        program="run_image_classification.py",
        measures=(
            Measure("validation accuracy %", "validation", "accuracy", 2, _percent),
            Measure("validation top-5 %", "validation", "top5_accuracy", 2, _percent),
            Measure("validation loss", "validation", "loss", 4),
            Measure("test accuracy %", "test", "accuracy", 2, _percent),
            Measure("test top-5 %", "test", "top5_accuracy", 2, _percent),
            Measure("test loss", "test", "loss", 4),
        ),
        best=("validation accuracy %", "validation loss", "test accuracy %", "test top-5 %", "test loss"),
        cells=("validation accuracy %", "validation top-5 %", "validation loss", "test accuracy %", "test loss"),
        decides="validation accuracy %",
        cost=_error,
        tie="validation loss",
        rule="highest mean validation accuracy over the seeds (of equal ones, that with the lower validation loss)",
        axis="validation error (% of the images)",
        limit="max_eval_samples",
        extent=(
            "Accuracies are in per cent, losses in nats per image, over at most {} images of each split, every class "
            "in proportion",
            "Accuracies are in per cent, losses in nats per image, over all images of each split",
        ),
    ),
}
"""Every task by its name in a configuration."""
