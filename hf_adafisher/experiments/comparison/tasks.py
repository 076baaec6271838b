"""Tasks of comparisons: the script of a cell, the metrics of its results, and the one that selects settings."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any


def _identity(value: float) -> float:
    return value


def _percent(share: float) -> float:
    return 100 * share


def _error(accuracy: float) -> float:
    return 100 - accuracy


@dataclass(frozen=True)
class Metric:
    """A number of a run.

    Attributes:
        name: Title of its column.
        split: Entry of ``results.json`` that holds it: ``validation`` or ``test``.
        key: Its name there.
        digits: Decimals shown.
        convert: Maps the number there to the one shown.
    """

    name: str
    split: str
    key: str
    digits: int
    convert: Callable[[float], float] = _identity

    def read(self, result: Mapping[str, Any]) -> float | None:
        """Return the number of a run, or None if it has none."""
        value = (result.get(self.split) or {}).get(self.key)
        return None if value is None else self.convert(value)

    def format(self, value: float | None) -> str:
        """Format the number with its digits; ``-`` for None."""
        return format_number(value, self.digits)


def format_number(value: float | None, digits: int, group: str = "") -> str:
    """Format a number with so many decimals, thousands separated by ``group``; ``-`` for None and nan."""
    return "-" if value is None or math.isnan(value) else f"{value:{group}.{digits}f}"


@dataclass(frozen=True)
class Task:
    """The task-specific part of a comparison.

    Attributes:
        script: File name of the program in ``hf_adafisher/cli`` that runs one cell.
        metrics: Metrics of a run beside steps, seconds and bytes, which every task has.
        setting_columns: Names of those in the table of the best settings.
        cell_columns: Names of those in the table of all runs.
        selection_metric: Name of the one that selects each optimizer's setting, by its mean over the seeds.
        to_cost: Maps it to a cost (lower is better), which curves and learning rate sweeps show.
        tie_breaker: Name of the metric, lower is better, that decides between equals.
        selection_rule: The selection in words.
        cost_label: Axis label of the cost, with its unit.
        eval_limit: Name of the argument that limits the evaluation at the end, besides ``max_eval_samples``.
        eval_extent: Sentence on the data evaluated; with the limit, and without it.
    """

    script: str
    metrics: tuple[Metric, ...]
    setting_columns: tuple[str, ...]
    cell_columns: tuple[str, ...]
    selection_metric: str
    to_cost: Callable[[float], float]
    tie_breaker: str
    selection_rule: str
    cost_label: str
    eval_limit: str
    eval_extent: tuple[str, str]

    @property
    def more_is_better(self) -> bool:
        """True for a selection metric like accuracy, False for one like loss."""
        return self.to_cost(1.0) < self.to_cost(0.0)

    def metric(self, name: str) -> Metric:
        """Return the metric of this name."""
        return next(metric for metric in self.metrics if metric.name == name)

    @property
    def selection(self) -> Metric:
        """The metric that selects settings."""
        return self.metric(self.selection_metric)

    @property
    def compared_metrics(self) -> list[Metric]:
        """The metric that selects settings, and the same of the test data."""
        return [self.selection, *(m for m in self.metrics if m.split == "test" and m.key == self.selection.key)]

    def cost(self, values: Mapping[str, float | None]) -> float:
        """Selection metric as a cost, lower is better; infinite without a value."""
        value = values[self.selection_metric]
        return math.inf if value is None else self.to_cost(value)

    def logged_cost(self, entry: Mapping[str, Any]) -> float | None:
        """Return the cost in an entry of Trainer's log, or None if it is no evaluation."""
        metric = self.selection
        value = entry.get(f"eval_{metric.key}")
        return None if value is None else self.to_cost(metric.convert(value))

    def headline(self, result: Mapping[str, Any]) -> str | None:
        """Format the selection metric, ``validation loss 4.1250``; None if a run has none."""
        metric = self.selection
        value = metric.read(result)
        if value is None:
            return None
        name = metric.name.removesuffix(" %")
        return f"{name} {metric.format(value)}{metric.name.removeprefix(name)}"

    def describe_extent(self, arguments: Iterable[Mapping[str, Any]]) -> str:
        """Describe the data evaluated.

        Args:
            arguments: Of every run.
        """
        limits = {given.get(self.eval_limit, given.get("max_eval_samples")) for given in arguments} or {None}
        limited, unlimited = self.eval_extent
        if limits == {None}:
            return unlimited
        return limited.format(limits.pop() if len(limits) == 1 else f"{self.eval_limit} (see each run)")


TASKS = {
    "clm": Task(
        script="clm.py",
        metrics=(
            Metric("validation loss", "validation", "loss", 4),
            Metric("token perplexity", "validation", "token_perplexity", 1),
            Metric("word perplexity", "validation", "word_perplexity", 1),
            Metric("test loss", "test", "loss", 4),
            Metric("test token perplexity", "test", "token_perplexity", 1),
            Metric("test word perplexity", "test", "word_perplexity", 1),
        ),
        setting_columns=("validation loss", "test loss", "test token perplexity", "test word perplexity"),
        cell_columns=("validation loss", "token perplexity", "word perplexity", "test loss"),
        selection_metric="validation loss",
        to_cost=_identity,
        tie_breaker="validation loss",
        selection_rule="lowest mean validation loss over the seeds",
        cost_label="validation loss (nats per token)",
        eval_limit="max_eval_lines",
        eval_extent=(
            "Losses are in nats per token over the first {} lines of the text",
            "Losses are in nats per token over the whole text",
        ),
    ),
    "image": Task(
        script="image.py",
        metrics=(
            Metric("validation accuracy %", "validation", "accuracy", 2, _percent),
            Metric("validation top-5 %", "validation", "top5_accuracy", 2, _percent),
            Metric("validation loss", "validation", "loss", 4),
            Metric("test accuracy %", "test", "accuracy", 2, _percent),
            Metric("test top-5 %", "test", "top5_accuracy", 2, _percent),
            Metric("test loss", "test", "loss", 4),
        ),
        setting_columns=("validation accuracy %", "validation loss", "test accuracy %", "test top-5 %", "test loss"),
        cell_columns=("validation accuracy %", "validation top-5 %", "validation loss", "test accuracy %", "test loss"),
        selection_metric="validation accuracy %",
        to_cost=_error,
        tie_breaker="validation loss",
        selection_rule=(
            "highest mean validation accuracy over the seeds (of equal ones, that with the lower validation loss)"
        ),
        cost_label="validation error (% of the images)",
        eval_limit="max_eval_samples",
        eval_extent=(
            "Accuracies are in per cent, losses in nats per image, over at most {} images of each split, every class "
            "in proportion",
            "Accuracies are in per cent, losses in nats per image, over all images of each split",
        ),
    ),
}
"""Every task by its name in a configuration."""
