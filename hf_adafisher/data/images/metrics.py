"""Accuracy, top-k accuracy and confusion matrix of image classifiers."""

from __future__ import annotations

from typing import Any

import numpy as np

TOP_K = 5


def top_k_accuracy(scores: Any, labels: Any, k: int = 1) -> float:
    """Return the share of examples whose class is among the ``k`` with the highest scores.

    Of equal scores the lower class number counts as higher, as in ``argmax``; an example with nan is wrong. The scores
    of a diverging model are not finite, which scikit-learn's ``top_k_accuracy_score`` refuses.

    Args:
        scores: Shape (examples, classes).
        labels: Class numbers, shape (examples,).
        k: At least 1.

    Raises:
        ValueError: Shapes that do not fit, no example, a class number without a score, or ``k`` below 1.
    """
    scores, labels = _checked(scores, labels)
    if k < 1:
        raise ValueError(f"k is {k}; it must be at least 1")
    highest = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    correct = (highest == labels[:, None]).any(axis=1) & ~np.isnan(scores).any(axis=1)
    return float(correct.mean())


def confusion_matrix(scores: Any, labels: Any) -> np.ndarray:
    """Count examples by true class (row) and predicted class (column).

    Args:
        scores: Shape (examples, classes).
        labels: Class numbers, shape (examples,).

    Returns:
        int64, shape (classes, classes).

    Raises:
        ImportError: scikit-learn is not installed; see ``require_scikit_learn``.
        ValueError: Shapes that do not fit, no example, or a class number without a score.
    """
    require_scikit_learn()
    from sklearn import metrics

    scores, labels = _checked(scores, labels)
    return metrics.confusion_matrix(labels, scores.argmax(axis=1), labels=np.arange(scores.shape[1]))


def require_scikit_learn() -> None:
    """Check for scikit-learn, before the training whose result it evaluates.

    Raises:
        ImportError: It is not installed; the message says how to install it.
    """
    try:
        import sklearn  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "image classifiers are evaluated by scikit-learn: pip install 'hf_adafisher[vision]'"
        ) from error


def accuracies(scores: Any, labels: Any) -> dict[str, float]:
    """Return the accuracy, and with more than 5 classes the top-5 accuracy; see ``top_k_accuracy``."""
    result = {"accuracy": top_k_accuracy(scores, labels)}
    if np.shape(scores)[1] > TOP_K:
        result[f"top{TOP_K}_accuracy"] = top_k_accuracy(scores, labels, TOP_K)
    return result


def logits_and_labels(prediction: Any) -> tuple[np.ndarray, np.ndarray]:
    """Unpack transformers' EvalPrediction or PredictionOutput; of several outputs the logits are the first."""
    logits = prediction.predictions
    return np.asarray(logits[0] if isinstance(logits, tuple) else logits), np.asarray(prediction.label_ids)


def image_metrics(prediction: Any) -> dict[str, float]:
    """Return the ``accuracies`` of transformers' EvalPrediction: a ``compute_metrics`` of Trainer."""
    return accuracies(*logits_and_labels(prediction))


def _checked(scores: Any, labels: Any) -> tuple[np.ndarray, np.ndarray]:
    scores, labels = np.asarray(scores), np.asarray(labels)
    if labels.ndim != 1 or scores.ndim != 2 or len(scores) != len(labels) or not len(labels):
        raise ValueError(
            f"scores of shape {scores.shape} and labels of shape {labels.shape} do not fit: "
            "(examples, classes) and (examples,), at least one example"
        )
    labels = labels.astype(np.int64)
    if labels.min() < 0 or labels.max() >= scores.shape[1]:
        raise ValueError(
            f"labels reach from {labels.min()} to {labels.max()}; there are scores for {scores.shape[1]} classes"
        )
    return scores, labels
