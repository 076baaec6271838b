"""Metrics of classifiers against scikit-learn and slow definitions, through the interface of `evaluate`."""

from __future__ import annotations

import socket
from types import SimpleNamespace
from typing import Any

import evaluate
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sklearn_metrics

from hf_adafisher.data.images.metrics import (
    Accuracy,
    ConfusionMatrix,
    TopKAccuracy,
    confusion_matrix,
    image_metrics,
    top_k_accuracy,
)

ROWS = st.lists(st.integers(0, 2), min_size=4, max_size=4)


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
def test_top_k_agrees_with_sklearn_and_the_definition(k: int) -> None:
    scores, labels = random_scores()
    expected = sklearn_metrics.top_k_accuracy_score(labels, scores, k=k) if k < 9 else 1.0
    assert top_k_accuracy(scores, labels, k) == pytest.approx(expected)
    assert top_k_accuracy(scores, labels, k) == pytest.approx(slow_top_k(scores, labels, k))


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


@pytest.mark.parametrize("as_scores", [True, False])
def test_confusion_matrix_agrees_with_sklearn(as_scores: bool) -> None:
    scores, labels = random_scores(classes=6)
    classes = scores.argmax(axis=1)
    found = confusion_matrix(scores if as_scores else classes, labels, 6)
    np.testing.assert_array_equal(found, sklearn_metrics.confusion_matrix(labels, classes, labels=range(6)))
    assert found.dtype == np.int64 and not np.array_equal(found, found.T)
    assert np.trace(found) / found.sum() == pytest.approx(top_k_accuracy(scores, labels))


def test_confusion_matrix_has_a_row_for_classes_that_do_not_occur() -> None:
    found = confusion_matrix([0, 2], [0, 0], 4)
    assert found.tolist() == [[1, 0, 1, 0], [0] * 4, [0] * 4, [0] * 4]
    assert confusion_matrix([0, 2], [0, 0]).shape == (3, 3)


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any connection fails the test."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor, lambda values: np.asarray(values).tolist()])
def test_the_interface_of_evaluate(kind: Any) -> None:
    scores, labels = random_scores()
    classes = scores.argmax(axis=1)
    accuracy = pytest.approx(sklearn_metrics.accuracy_score(labels, classes))
    assert Accuracy().compute(predictions=kind(classes), references=kind(labels)) == {"accuracy": accuracy}
    assert Accuracy().compute(predictions=kind(scores), references=kind(labels)) == {"accuracy": accuracy}
    top5 = TopKAccuracy().compute(predictions=kind(scores), references=kind(labels))
    assert top5 == {"top5_accuracy": pytest.approx(slow_top_k(scores, labels, 5))}
    top2 = TopKAccuracy().compute(predictions=kind(scores), references=kind(labels), k=2)
    assert top2 == {"top2_accuracy": pytest.approx(slow_top_k(scores, labels, 2))}
    matrix = ConfusionMatrix().compute(predictions=kind(classes), references=kind(labels), num_classes=12)
    assert matrix is not None
    expected = sklearn_metrics.confusion_matrix(labels, classes, labels=range(12))
    np.testing.assert_array_equal(matrix["confusion_matrix"], expected)


@pytest.mark.usefixtures("no_network")
def test_batches_add_up_and_modules_combine() -> None:
    scores, labels = random_scores()
    module = Accuracy()
    assert isinstance(module, evaluate.EvaluationModule)
    for start in range(0, len(labels), 64):
        module.add_batch(predictions=scores[start : start + 64], references=labels[start : start + 64])
    assert module.compute() == {"accuracy": pytest.approx(top_k_accuracy(scores, labels))}
    both = evaluate.combine([Accuracy(), TopKAccuracy()])
    assert set(both.compute(predictions=scores, references=labels)) == {"accuracy", "top5_accuracy"}


def test_metrics_for_trainer() -> None:
    scores, labels = random_scores()
    found = image_metrics(SimpleNamespace(predictions=(scores, "hidden states"), label_ids=labels))
    assert found == {
        "accuracy": pytest.approx(top_k_accuracy(scores, labels)),
        "top5_accuracy": pytest.approx(slow_top_k(scores, labels, 5)),
    }
    few = image_metrics(SimpleNamespace(predictions=scores[:, :5], label_ids=labels % 5))
    assert set(few) == {"accuracy"}  # five of five classes are always right


@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        ([0, 1], [0], r"do not fit"),
        ([], [], r"at least one example"),
        ([[0.1, 0.9]], [2], r"references reach from 2 to 2; there are scores for 2 classes"),
        ([[0.1, 0.9]], [-1], r"references reach from -1"),
    ],
)
def test_bad_input(predictions: Any, references: Any, message: str) -> None:
    for function in (top_k_accuracy, confusion_matrix):
        with pytest.raises(ValueError, match=message):
            function(predictions, references)


def test_bad_options() -> None:
    with pytest.raises(ValueError, match=r"k is 0"):
        top_k_accuracy([[0.1, 0.9]], [1], 0)
    with pytest.raises(ValueError, match=r"k is 5; .* 1 for predicted class numbers"):
        top_k_accuracy([1], [1], 5)
    with pytest.raises(ValueError, match=r"predictions reach from 0 to 5; classes are 0\.\.2"):
        confusion_matrix([0, 5], [0, 1], 3)
