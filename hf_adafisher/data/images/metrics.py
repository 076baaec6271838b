"""Accuracy and confusion matrix of classifiers, with the interface of `evaluate`'s modules, offline.

`evaluate.load("accuracy")` fetches a script from the Hub; these are the same things as classes:

    >>> from hf_adafisher.data.images.metrics import Accuracy
    >>> Accuracy().compute(predictions=[0, 1, 1], references=[0, 1, 0])
    {'accuracy': 0.6666666666666666}
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
import numpy as np

TOP_K = 5

_CLASSES = datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")})
_SCORES = datasets.Features(
    {"predictions": datasets.Sequence(datasets.Value("float64")), "references": datasets.Value("int64")}
)


class _ImageMetric(evaluate.Metric):
    """Takes class numbers or scores. Examples are kept in memory, unless `cache_dir` or several processes say no."""

    accepts: tuple[datasets.Features, ...] = (_CLASSES, _SCORES)
    title = ""

    def __init__(self, **options: Any) -> None:
        # evaluate makes the folder even where everything stays in memory; a read-only home must not matter.
        options.setdefault("keep_in_memory", options.get("num_process", 1) == 1 and "cache_dir" not in options)
        if options["keep_in_memory"]:
            options.setdefault("cache_dir", tempfile.gettempdir())
        super().__init__(**options)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=self.title, citation="", inputs_description=self.title, features=list(self.accepts)
        )


class Accuracy(_ImageMetric):
    """Top-1 accuracy: predictions are class numbers, or one list of scores per example."""

    title = "Share of examples whose class is predicted."

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        return {"accuracy": top_k_accuracy(_as_scores_or_classes(predictions), references, 1)}


class TopKAccuracy(_ImageMetric):
    """Top-k accuracy, 5 by default: predictions are one list of scores per example."""

    accepts = (_SCORES,)
    title = "Share of examples whose class is among the k with the highest scores."

    def _compute(self, predictions: Any, references: Any, k: int = TOP_K) -> dict[str, float]:
        return {f"top{k}_accuracy": top_k_accuracy(_as_scores_or_classes(predictions), references, k)}


class ConfusionMatrix(_ImageMetric):
    """Confusion matrix: rows are true classes, columns predicted ones."""

    title = "How often each class (row) is taken for each class (column)."

    def _compute(self, predictions: Any, references: Any, num_classes: int | None = None) -> dict[str, np.ndarray]:
        return {"confusion_matrix": confusion_matrix(_as_scores_or_classes(predictions), references, num_classes)}


def top_k_accuracy(predictions: Any, references: Any, k: int = 1) -> float:
    """Returns the share of examples whose class is among the `k` with the highest scores.

    Args:
        predictions: scores, shape (examples, classes); or class numbers, shape (examples,), for k = 1. Of equal scores
            the lower class number counts as higher. A row with nan is wrong.
        references: class numbers, shape (examples,).
        k: at least 1.

    Raises:
        ValueError: shapes that do not fit, no example, or a class number that has no score.
    """
    values, labels = _checked(predictions, references)
    if k < 1 or (values.ndim == 1 and k != 1):
        raise ValueError(f"k is {k}; it must be at least 1, and 1 for predicted class numbers")
    if values.ndim == 1:
        return float(np.mean(values == labels))
    own = np.take_along_axis(values, labels[:, None], axis=1)
    earlier = np.arange(values.shape[1]) < labels[:, None]
    rank = ((values > own) | ((values == own) & earlier)).sum(axis=1)
    return float(np.mean((rank < k) & ~np.isnan(values).any(axis=1)))


def confusion_matrix(predictions: Any, references: Any, num_classes: int | None = None) -> np.ndarray:
    """Returns how often class i (row) was taken for class j (column), int64, shape (classes, classes).

    Args:
        predictions: scores, shape (examples, classes), or class numbers, shape (examples,).
        references: class numbers, shape (examples,).
        num_classes: default: as many as there are scores, or the highest class number plus 1.

    Raises:
        ValueError: shapes that do not fit, no example, or a class number outside 0..num_classes - 1.
    """
    values, labels = _checked(predictions, references)
    classes = values.argmax(axis=1) if values.ndim == 2 else values.astype(np.int64)
    if num_classes is None:
        num_classes = values.shape[1] if values.ndim == 2 else int(max(classes.max(), labels.max())) + 1
    for name, numbers in (("predictions", classes), ("references", labels)):
        if numbers.min() < 0 or numbers.max() >= num_classes:
            raise ValueError(f"{name} reach from {numbers.min()} to {numbers.max()}; classes are 0..{num_classes - 1}")
    counts = np.bincount(labels * num_classes + classes, minlength=num_classes**2)
    return counts.reshape(num_classes, num_classes)


def image_metrics(prediction: Any) -> dict[str, float]:
    """A `compute_metrics` for Trainer: accuracy, and top-5 accuracy where there are more than 5 classes.

    Args:
        prediction: transformers' EvalPrediction; predictions are logits, or a tuple that starts with them.
    """
    scores = prediction.predictions
    scores = scores[0] if isinstance(scores, tuple) else scores
    metrics = {"accuracy": top_k_accuracy(scores, prediction.label_ids, 1)}
    if np.shape(scores)[1] > TOP_K:
        metrics[f"top{TOP_K}_accuracy"] = top_k_accuracy(scores, prediction.label_ids, TOP_K)
    return metrics


def _checked(predictions: Any, references: Any) -> tuple[np.ndarray, np.ndarray]:
    values, labels = np.asarray(predictions), np.asarray(references)
    if labels.ndim != 1 or values.ndim not in (1, 2) or len(values) != len(labels) or not len(labels):
        raise ValueError(
            f"predictions of shape {values.shape} and references of shape {labels.shape} do not fit: "
            "(examples,) or (examples, classes), and (examples,), at least one example"
        )
    labels = labels.astype(np.int64)
    if values.ndim == 2 and (labels.min() < 0 or labels.max() >= values.shape[1]):
        raise ValueError(
            f"references reach from {labels.min()} to {labels.max()}; there are scores for {values.shape[1]} classes"
        )
    return values, labels


def _as_scores_or_classes(predictions: Sequence[Any]) -> np.ndarray:
    return np.asarray(predictions)
