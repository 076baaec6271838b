"""Accuracy, top-k accuracy and confusion matrix of classifiers."""

from __future__ import annotations

from typing import Any

import numpy as np

TOP_K = 5


def top_k_accuracy(predictions: Any, references: Any, k: int = 1) -> float:
    """Share of examples whose class is among the ``k`` with the highest scores.

    Unlike scikit-learn's ``top_k_accuracy_score``, it accepts nan, as a diverged model gives, and resolves ties as
    ``argmax`` does, so that top-1 is the accuracy of the predicted classes.

    Args:
        predictions: Scores, shape (examples, classes), or class numbers, shape (examples,), for ``k = 1``. Of equal
            scores the lower class number counts as higher. A row with nan is wrong.
        references: Class numbers, shape (examples,).
        k: Number of classes that count as predicted, >= 1. Default 1.

    Returns:
        A value in [0, 1].

    Raises:
        ValueError: Shapes do not fit, there is no example, a class number has no score, or ``k`` is out of range.
    """
    values, labels = _checked(predictions, references)
    if k < 1 or (values.ndim == 1 and k != 1):
        raise ValueError(f"k is {k}; it must be at least 1, and 1 for predicted class numbers")
    if values.ndim == 1:
        return float(np.mean(values == labels))
    label_scores = np.take_along_axis(values, labels[:, None], axis=1)
    lower_class = np.arange(values.shape[1]) < labels[:, None]
    rank = ((values > label_scores) | ((values == label_scores) & lower_class)).sum(axis=1)
    return float(np.mean((rank < k) & ~np.isnan(values).any(axis=1)))


def confusion_matrix(predictions: Any, references: Any, num_classes: int | None = None) -> np.ndarray:
    """Number of examples of each class (row) that are predicted as each class (column).

    Args:
        predictions: Scores, shape (examples, classes), or class numbers, shape (examples,).
        references: Class numbers, shape (examples,).
        num_classes: Number of classes. Default: the number of scores, or the highest class number plus 1.

    Returns:
        Counts, int64, shape (num_classes, num_classes).

    Raises:
        ValueError: Shapes do not fit, there is no example, or a class number is outside ``0..num_classes - 1``.
    """
    values, labels = _checked(predictions, references)
    classes = values.argmax(axis=1) if values.ndim == 2 else values.astype(np.int64)
    if num_classes is None:
        num_classes = values.shape[1] if values.ndim == 2 else int(max(classes.max(), labels.max())) + 1
    for name, numbers in (("predictions", classes), ("references", labels)):
        if numbers.min() < 0 or numbers.max() >= num_classes:
            raise ValueError(f"{name} reach from {numbers.min()} to {numbers.max()}; classes are 0..{num_classes - 1}")
    # By numpy: scikit-learn is an extra that a run on local images does not need otherwise.
    counts = np.bincount(labels * num_classes + classes, minlength=num_classes**2)
    return counts.reshape(num_classes, num_classes)


def image_metrics(prediction: Any) -> dict[str, float]:
    """``compute_metrics`` function for Trainer: accuracy, and top-5 accuracy for more than 5 classes.

    Args:
        prediction: ``EvalPrediction`` of transformers. Its predictions are logits, shape (examples, classes), or a
            tuple that starts with them.

    Returns:
        ``accuracy`` and, for more than 5 classes, ``top5_accuracy``.
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
