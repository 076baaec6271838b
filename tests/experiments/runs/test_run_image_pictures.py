"""The pictures of an image classification run, by what is drawn in them."""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from hf_adafisher.experiments.runs.pictures import write_confusion_matrix, write_learning_curves
from tests.experiments.runs.image_runs import TINY, run
from tests.scripts import read_results


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> dict[str, Figure]:
    """The figures that were saved, by the name of their file."""
    figures: dict[str, Figure] = {}
    save = Figure.savefig

    def keep(self: Figure, path: Any, *args: Any, **kwargs: Any) -> None:
        figures[Path(path).name.removeprefix(".partial-")] = self
        save(self, path, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keep)
    return figures


def test_a_small_matrix_shows_its_numbers(tmp_path: Path, drawn: dict[str, Figure]) -> None:
    counts = np.array([[8, 2, 0], [0, 5, 0], [1, 0, 0]])
    assert write_confusion_matrix(tmp_path / "a.png", counts, ["cat", "dog", "a" * 40], "pets, test")
    axes = drawn["a.png"].axes[0]
    texts = {(round(t.get_position()[1]), round(t.get_position()[0])): int(t.get_text()) for t in axes.texts}
    assert texts == {(0, 0): 8, (0, 1): 2, (1, 1): 5, (2, 0): 1}  # row, column
    np.testing.assert_allclose(axes.images[0].get_array(), [[0.8, 0.2, 0], [0, 1, 0], [1, 0, 0]])
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == [label.get_text() for label in axes.get_xticklabels()]
    assert names[:2] == ["cat", "dog"] and len(names[2]) == 24 and names[2].endswith("…")
    assert axes.get_ylabel() == "true class" and axes.get_xlabel() == "predicted class"
    assert axes.get_title() == "pets, test: accuracy 81.25% of 16 images"


@pytest.mark.slow
@pytest.mark.parametrize("classes", [10, 100, 200])
def test_names_do_not_overlap(tmp_path: Path, drawn: dict[str, Figure], classes: int) -> None:
    counts = np.eye(classes, dtype=int) * 3
    write_confusion_matrix(tmp_path / "a.png", counts, [f"class {number}" for number in range(classes)])
    figure = drawn["a.png"]
    axes, renderer = figure.axes[0], figure.canvas.get_renderer()
    boxes = [label.get_window_extent(renderer) for label in axes.get_yticklabels()]
    assert len(boxes) == classes and len(axes.texts) == (classes if classes <= 20 else 0)
    tops = sorted((box.y0, box.y1) for box in boxes)
    assert all(upper[0] >= lower[1] - 1 for lower, upper in pairwise(tops))


@pytest.mark.slow
def test_a_class_without_images_and_a_thousand_classes_can_be_drawn(tmp_path: Path, drawn: dict[str, Figure]) -> None:
    counts = np.zeros((1000, 1000), dtype=int)
    counts[3, 4] = 1
    assert write_confusion_matrix(tmp_path / "a.png", counts, list(map(str, range(1000))))
    axes = drawn["a.png"].axes[0]
    assert axes.images[0].get_array()[3, 4] == 1 and axes.images[0].get_array().sum() == 1
    assert axes.get_title() == "accuracy 0.00% of 1 images"


def test_the_curve_has_a_panel_of_accuracies(tmp_path: Path, drawn: dict[str, Figure]) -> None:
    few = ["--max_train_samples", 64, "--max_eval_samples", 50]
    assert run(*TINY, *few, "--max_steps", 4, "--eval_steps", 2, "--output_dir", tmp_path) == 0
    log = read_results(tmp_path)["log_history"]
    losses, accuracies = drawn["learning_curve.png"].axes
    assert losses.get_ylabel() == "loss (nats per image)" and accuracies.get_ylabel() == "validation accuracy"
    lines = {line.get_label(): np.asarray(line.get_xydata()) for axes in (losses, accuracies) for line in axes.lines}
    keys = {"training": "loss", "validation": "eval_loss", "accuracy": "eval_accuracy"}
    keys["top-5 accuracy"] = "eval_top5_accuracy"
    for label, key in keys.items():
        points = [(entry["step"], entry[key]) for entry in log if key in entry]
        np.testing.assert_allclose(lines.pop(f"adafisherw, {label}"), points)
    assert not lines


def test_a_curve_without_accuracies_has_one_panel(tmp_path: Path, drawn: dict[str, Figure]) -> None:
    history = [{"step": 1, "loss": 2.0}, {"step": 1, "eval_loss": 3.0}]
    assert write_learning_curves(tmp_path / "a.png", {"sgd": history}, "text")
    (axes,) = drawn["a.png"].axes
    assert axes.get_ylabel() == "loss (nats per token)" and axes.get_xlabel() == "optimizer step"
    assert axes.get_title() == "text"


def test_a_run_goes_on_without_matplotlib(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("matplotlib", "matplotlib.figure", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, name, None)
    few = ["--max_train_samples", 32, "--max_eval_samples", 20]
    assert run(*TINY, *few, "--max_steps", 1, "--output_dir", tmp_path) == 0
    assert "pip install matplotlib" in caplog.text and not (tmp_path / "confusion_matrix.png").exists()
    assert "counts" in read_results(tmp_path)["confusion_matrix"]
