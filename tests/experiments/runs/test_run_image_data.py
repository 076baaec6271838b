"""Which images an image classification run takes, in which size, and what becomes of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.data.images.image_samples import picture
from tests.experiments.runs.image_runs import TINY, prepared

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
