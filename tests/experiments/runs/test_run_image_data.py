"""Image classification runs: the images that they take, and what is drawn in their pictures."""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from hf_adafisher.experiments.runs.pictures import write_confusion_matrix, write_learning_curves
from tests.data.images.image_samples import picture
from tests.experiments.runs.image_runs import TINY, prepared, run
from tests.scripts import read_results

AUGMENTED = ["--cutout", "2", "--mixup", "0.4", "--cutmix", "1"]
FEW = ["--max_train_samples", "64", "--max_eval_samples", "50"]


def test_the_curve_takes_500_validation_images_at_most(tmp_path: Path) -> None:
    flags = ["--data_dir", many(tmp_path, 1100), "--validation_fraction", "0.5", "--output_dir", tmp_path]
    large = prepared(*TINY, *flags)
    trainer = large.new_trainer([])
    assert len(large.datasets["validation"]) == 550 and len(trainer.eval_dataset) == 500
    assert np.bincount(trainer.eval_dataset.split.labels).tolist() == [250, 250]
    again = prepared(*TINY, *flags, "--seed", 7)
    assert np.array_equal(again.corpus.validation.indices, large.corpus.validation.indices)


def many(folder: Path, count: int) -> Path:
    """A table of tiny images of two classes."""
    from datasets import Dataset, Features, Image, Value

    images = [picture(size=(8, 8), seed=number) for number in range(20)]
    rows = {"image": [images[row % 20] for row in range(count)], "label": [row % 2 for row in range(count)]}
    Dataset.from_dict(rows, Features({"image": Image(), "label": Value("int64")})).save_to_disk(folder / "table")
    return folder / "table"


def test_mixed_labels_train_and_whole_labels_evaluate(tmp_path: Path) -> None:
    """Training batches hold class shares; what is evaluated is neither mixed nor cut out nor smoothed."""
    made = prepared(*TINY, *AUGMENTED, *FEW, "--output_dir", tmp_path)
    trainer = made.new_trainer([])
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["labels"].shape == (16, 10) and torch.allclose(batch["labels"].sum(dim=1), torch.ones(16))
    assert (batch["labels"].max(dim=1).values < 0.999).any()
    plain = prepared(*TINY, *FEW, "--output_dir", tmp_path).new_trainer([])
    for first, second in (
        (trainer.get_eval_dataloader(), plain.get_eval_dataloader()),
        (trainer.get_test_dataloader(made.datasets["test"]), plain.get_test_dataloader(made.datasets["test"])),
    ):
        ours, theirs = next(iter(first)), next(iter(second))
        assert ours["labels"].dtype == torch.int64 and torch.equal(ours["pixel_values"], theirs["pixel_values"])
    again = next(iter(trainer.get_train_dataloader()))
    assert again["labels"].shape == (16, 10)


def test_weights_and_images_depend_on_what_they_should(tmp_path: Path) -> None:
    """Weights on the seed, not on the optimizer; the images not even on the seed."""

    def made(*flags: str) -> tuple[torch.Tensor, list[int]]:
        one = prepared(*TINY, *FEW, "--output_dir", tmp_path, *flags)
        weights = torch.cat([parameter.flatten() for parameter in one.model.parameters()])
        return weights, one.corpus.train.indices.tolist()

    first, images = made("--optim", "adafisherw")
    assert torch.equal(first, made("--optim", "sgd")[0])
    other, same = made("--seed", "43")
    assert not torch.equal(first, other) and same == images and len(images) == 64


@pytest.mark.parametrize(
    ("size", "flags", "expected"),
    [
        ((20, 20), [], 20),  # square and all alike
        ((12, 8), [], 224),
        ((300, 300), [], 224),
        ((12, 8), ["--image_size", "16"], 16),
    ],
)
def test_the_size_follows_from_the_images(
    tmp_path: Path, size: tuple[int, int], flags: list[str], expected: int
) -> None:
    for name in ("a", "b"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for number in range(2):
            picture(size=size, seed=number).save(tmp_path / "data" / name / f"{number}.png")
    made = prepared("--data_dir", tmp_path / "data", "--model", "cct-2-3x2", *flags, "--output_dir", tmp_path)
    assert made.image_size == expected == made.datasets["train"][0].image.shape[-1] == made.model.config.image_size


def test_digits_and_large_images_have_networks_of_their_own(tmp_path: Path) -> None:
    digits = prepared("--output_dir", tmp_path, *FEW)
    assert (digits.network, digits.image_size) == ("cct-2-3x2", 16)
    large = prepared("--output_dir", tmp_path, *FEW, "--image_size", "96")
    assert large.network == "resnet18" and large.model.config.model_type == "resnet"


def test_crops_are_random_for_training_only(tmp_path: Path) -> None:
    made = prepared(*TINY, *FEW, "--crop_ratio", "0.5", "--random_resized_crop", "true", "--output_dir", tmp_path)
    assert made.datasets["train"].random_resized_crop and not made.datasets["test"].random_resized_crop
    curve = made.new_trainer([]).eval_dataset
    assert made.datasets["test"].crop_ratio == curve.crop_ratio == 0.5 and not curve.random_resized_crop
    whole = made.datasets["test"].split.image(0)
    expected = np.asarray(whole.resize((8, 8), 2, box=(2, 2, 6, 6)))
    assert np.array_equal(made.datasets["test"][0].image.permute(1, 2, 0).numpy(), expected)


def test_augmentation_follows_the_seed(tmp_path: Path) -> None:
    """The same items become other pictures with another seed, crops included."""

    def batch(seed: int) -> torch.Tensor:
        flags = [*AUGMENTED, "--random_resized_crop", "true", "--seed", seed, "--output_dir", tmp_path]
        made = prepared(*TINY, *FEW, *flags)
        items = made.datasets["train"].__getitems__(range(8))
        assert all(item.image.shape == (3, 8, 8) for item in items)
        plain = [item._replace(image=torch.full_like(item.image, 100)) for item in items]
        return torch.cat([made.eval_collator(items)["pixel_values"], made.train_collator(plain)["pixel_values"]])

    first, again, other = batch(1), batch(1), batch(2)
    assert torch.equal(first, again)
    assert not torch.equal(first[:8], other[:8]) and not torch.equal(first[8:], other[8:])


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
