"""Metrics of classifiers against scikit-learn and slow definitions."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sklearn_metrics

from hf_adafisher.data.images.metrics import confusion_matrix, image_metrics, top_k_accuracy


def random_scores(examples: int = 200, classes: int = 9, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Scores that are somewhat right, and the classes."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, classes, examples)
    return generator.normal(size=(examples, classes)) + 1.2 * np.eye(classes)[labels], labels


def slow_top_k(scores: np.ndarray, labels: np.ndarray, k: int) -> float:
    """By sorting every row, highest first, the lower number first among equals."""
    right = 0
    for row, label in zip(scores.tolist(), labels.tolist(), strict=True):
        right += label in sorted(range(len(row)), key=lambda c: (-row[c], c))[:k]
    return right / len(labels)


@pytest.mark.parametrize("k", [1, 3, 5, 9, 20])
@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor, lambda values: np.asarray(values).tolist()])
def test_top_k_agrees_with_sklearn_and_the_definition(k: int, kind: Any) -> None:
    scores, labels = random_scores()
    expected = sklearn_metrics.top_k_accuracy_score(labels, scores, k=k) if k < 9 else 1.0
    assert top_k_accuracy(kind(scores), kind(labels), k) == pytest.approx(expected)
    assert top_k_accuracy(kind(scores), kind(labels), k) == pytest.approx(slow_top_k(scores, labels, k))


@settings(derandomize=True, deadline=None, max_examples=80)
@given(
    st.lists(st.tuples(st.lists(st.integers(0, 2), min_size=4, max_size=4), st.integers(0, 3)), min_size=1), st.data()
)
def test_equal_scores_count_by_class_number(rows: list[tuple[list[int], int]], data: st.DataObject) -> None:
    """As argmax does: so that top-1 is the accuracy of the predicted classes."""
    scores, labels = np.asarray([row for row, _ in rows], float), np.asarray([label for _, label in rows])
    k = data.draw(st.integers(1, 4))
    assert top_k_accuracy(scores, labels, k) == pytest.approx(slow_top_k(scores, labels, k))
    assert top_k_accuracy(scores, labels) == pytest.approx((scores.argmax(axis=1) == labels).mean())


def test_a_row_with_nan_is_wrong() -> None:
    scores = np.asarray([[np.nan, 1.0], [0.0, np.nan], [0.0, 1.0], [np.nan, np.nan]])
    labels = np.asarray([1, 1, 1, 0])
    assert top_k_accuracy(scores, labels, 1) == top_k_accuracy(scores, labels, 2) == 0.25


def test_infinite_scores_are_the_highest_and_the_lowest() -> None:
    scores = np.asarray([[np.inf, 1.0, 2.0], [-np.inf, 1.0, 2.0]])
    assert [top_k_accuracy(scores, [0, 0], k) for k in (1, 2, 3)] == [0.5, 0.5, 1.0]


@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor, lambda values: np.asarray(values).tolist()])
def test_confusion_matrix_counts_true_classes_by_row(kind: Any) -> None:
    scores, labels = random_scores(classes=6)
    found = confusion_matrix(kind(scores), kind(labels))
    expected = np.zeros((6, 6), dtype=int)
    for row, label in zip(scores.tolist(), labels.tolist(), strict=True):
        expected[label, row.index(max(row))] += 1
    np.testing.assert_array_equal(found, expected)
    assert found.dtype == np.int64 and not np.array_equal(found, found.T)
    assert np.trace(found) / found.sum() == pytest.approx(top_k_accuracy(scores, labels))


def test_confusion_matrix_has_a_row_for_classes_that_do_not_occur() -> None:
    scores = np.eye(4)[[0, 2]]
    assert confusion_matrix(scores, [0, 0]).tolist() == [[1, 0, 1, 0], [0] * 4, [0] * 4, [0] * 4]


def test_confusion_matrix_without_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ImportError, match=r"pip install 'hf_adafisher\[vision\]'"):
        confusion_matrix([[0.1, 0.9]], [1])


def test_metrics_for_trainer() -> None:
    scores, labels = random_scores()
    found = image_metrics(SimpleNamespace(predictions=(scores, "hidden states"), label_ids=labels))
    assert found == {
        "accuracy": pytest.approx(slow_top_k(scores, labels, 1)),
        "top5_accuracy": pytest.approx(slow_top_k(scores, labels, 5)),
    }
    few = image_metrics(SimpleNamespace(predictions=scores[:, :5], label_ids=labels % 5))
    assert set(few) == {"accuracy"}  # five of five classes are always right


@pytest.mark.parametrize(
    ("scores", "labels", "message"),
    [
        ([[0.1, 0.9]], [0, 1], r"scores of shape \(1, 2\) and labels of shape \(2,\) do not fit"),
        ([0, 1], [0, 1], r"scores of shape \(2,\) and labels of shape \(2,\) do not fit"),
        ([], [], r"at least one example"),
        ([[0.1, 0.9]], [2], r"labels reach from 2 to 2; there are scores for 2 classes"),
        ([[0.1, 0.9]], [-1], r"labels reach from -1"),
    ],
)
def test_bad_input(scores: Any, labels: Any, message: str) -> None:
    for function in (top_k_accuracy, confusion_matrix):
        with pytest.raises(ValueError, match=message):
            function(scores, labels)


def test_bad_options() -> None:
    with pytest.raises(ValueError, match=r"k is 0"):
        top_k_accuracy([[0.1, 0.9]], [1], 0)
