"""Augmentation against its definitions, written out slowly; the same images wherever a batch is made."""

from __future__ import annotations

import pickle
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from hf_adafisher.data.images.augmentation import (
    Augmentation,
    ImageCollator,
    KorniaTransforms,
    TorchvisionTransforms,
    make_transforms,
    torchvision_works,
)
from hf_adafisher.data.images.corpora import ImageSplit, load_images
from hf_adafisher.data.images.dataset import ImageDataset, ImageItem
from hf_adafisher.data.images.files import ArraySource
from hf_adafisher.data.images.mixing import cutmix, cutout, mixup
from hf_adafisher.data.images.normalization import (
    IMAGENET,
    Normalization,
    channel_statistics,
    corpus_normalization,
    image_processor,
    pretrained_normalization,
)

PLAIN = Normalization((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
SIDE, CLASSES = 12, 4


def noise_items(count: int, side: int = SIDE, seed: int = 0) -> list[ImageItem]:
    """Images of noise without a zero; classes in turn."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(1, 256, (count, 3, side, side), generator=generator, dtype=torch.uint8)
    return [ImageItem(image, k % CLASSES, k, 0) for k, image in enumerate(images)]


def stacked(items: list[ImageItem]) -> Tensor:
    """The images as they are, in [0, 1]."""
    return torch.stack([item.image for item in items]).float() / 255


def augmented(items: list[ImageItem], seed: int = 0, **settings: Any) -> dict[str, Tensor]:
    """The batch of a collator without normalisation."""
    side = items[0].image.shape[-1]
    return ImageCollator(PLAIN, CLASSES, side, Augmentation(**settings), seed=seed)(items)


def places(image: Tensor, padding: int, result: Tensor) -> list[tuple[int, int]]:
    """Where, in the image padded with zeros, the result is found; by trying every place."""
    channels, side, _ = image.shape
    padded = torch.zeros(channels, side + 2 * padding, side + 2 * padding)
    padded[:, padding : padding + side, padding : padding + side] = image
    tries = range(2 * padding + 1)
    found = [(i, j) for i in tries for j in tries if torch.equal(padded[:, i : i + side, j : j + side], result)]
    return found


def test_nothing_is_the_default() -> None:
    items = noise_items(5)
    batch = ImageCollator(PLAIN, CLASSES, SIDE)(items)
    assert torch.equal(batch["pixel_values"], stacked(items))
    assert batch["labels"].tolist() == [0, 1, 2, 3, 0] and batch["labels"].dtype == torch.int64


def test_crops_are_cut_from_the_padded_image_at_every_place() -> None:
    items, padding = noise_items(300), 2
    results = augmented(items, crop_padding=padding)["pixel_values"]
    found = [places(image, padding, result) for image, result in zip(stacked(items), results, strict=True)]
    assert all(len(places_of_one) == 1 for places_of_one in found)
    counts = np.zeros((5, 5))
    for ((i, j),) in found:
        counts[i, j] += 1
    assert (counts > 0).all() and counts.max() < 30  # 12 expected at each of 25 places


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_flips_mirror_their_share_of_the_images(share: float) -> None:
    items = noise_items(400)
    results, images = augmented(items, flip=share)["pixel_values"], stacked(items)
    backwards = list(range(SIDE - 1, -1, -1))
    mirrored = [torch.equal(result, image[:, :, backwards]) for result, image in zip(results, images, strict=True)]
    same = [torch.equal(result, image) for result, image in zip(results, images, strict=True)]
    assert all(a != b for a, b in zip(mirrored, same, strict=True))
    assert abs(np.mean(mirrored) - share) < 0.08


def square(row: int, column: int, side: int) -> np.ndarray:
    """The pixels of a square around a centre that lie in the image, one by one."""
    hole = np.zeros((SIDE, SIDE), dtype=bool)
    for i in range(row - side // 2, row - side // 2 + side):
        for j in range(column - side // 2, column - side // 2 + side):
            if 0 <= i < SIDE and 0 <= j < SIDE:
                hole[i, j] = True
    return hole


@pytest.mark.parametrize("side", [1, 3, 4, 12])
def test_cutout_removes_one_square_with_its_centre_anywhere(side: int) -> None:
    pixels = torch.rand(400, 3, SIDE, SIDE) + 1
    torch.manual_seed(0)
    results = cutout(pixels, side)
    squares = {(row, column): square(row, column, side) for row in range(SIDE) for column in range(SIDE)}
    centres: set[tuple[int, int]] = set()
    for image, result in zip(pixels.numpy(), results.numpy(), strict=True):
        holes = result == 0
        assert (holes == holes[:1]).all() and (result[~holes] == image[~holes]).all()
        matching = {centre for centre, hole in squares.items() if np.array_equal(hole, holes[0])}
        assert matching
        centres |= matching
    rows, columns = zip(*centres, strict=True)
    assert set(rows) == set(columns) == set(range(SIDE))


def test_cutout_sets_the_mean_colour() -> None:
    """It comes after the normalisation."""
    items = noise_items(8)
    batch = ImageCollator(IMAGENET, CLASSES, SIDE, Augmentation(cutout=4))(items)["pixel_values"]
    untouched = IMAGENET(stacked(items))
    changed = (batch != untouched).all(dim=1)
    assert changed.flatten(1).sum(dim=1).min() >= 4 and (batch[changed[:, None].expand_as(batch)] == 0).all()


def coded_batch(count: int = 8) -> tuple[Tensor, Tensor]:
    """Images whose every pixel is the one-hot code of their class, and the codes: one class each."""
    shares = torch.eye(count)
    return shares[:, :, None, None].expand(count, count, 6, 10).clone(), shares


@pytest.mark.parametrize("mix", [mixup, cutmix])
@pytest.mark.parametrize("alpha", [0.2, 1.0, 5.0])
def test_labels_are_mixed_exactly_as_the_pixels_are(mix: Callable[..., tuple[Tensor, Tensor]], alpha: float) -> None:
    """With pixels that are the code of their class, the mean pixel is the class shares."""
    for seed in range(40):
        torch.manual_seed(seed)
        pixels, shares = coded_batch()
        mixed, labels = mix(pixels, shares, alpha)
        torch.testing.assert_close(mixed.mean(dim=(2, 3)), labels)
        torch.testing.assert_close(labels.sum(dim=1), torch.ones(8))
        assert torch.equal(pixels, coded_batch()[0])  # the batch itself is left alone
        if mix is mixup:
            assert torch.equal(mixed, mixed[:, :, :1, :1].expand_as(mixed))
        else:
            assert set(mixed.unique().tolist()) <= {0.0, 1.0}


def test_cutmix_replaces_a_rectangle() -> None:
    sizes = []
    for seed in range(60):
        torch.manual_seed(seed)
        pixels, shares = coded_batch()
        mixed, _ = cutmix(pixels, shares, 1.0)
        moved = (mixed != pixels).any(dim=1)
        where = moved.any(dim=0)
        rows, columns = where.any(dim=1), where.any(dim=0)
        assert torch.equal(where, rows[:, None] & columns[None, :])
        for flags in (rows, columns):
            assert (flags.int().diff() > 0).sum() <= 1
        sizes.append(int(where.sum()))
    assert max(sizes) > 40 and min(sizes) < 10


def test_mixup_weights_follow_their_beta_distribution() -> None:
    weights = []
    for seed in range(600):
        torch.manual_seed(seed)
        _, labels = mixup(*coded_batch(2), 0.5)
        if labels[0, 1] > 0:  # not paired with itself
            weights.append(float(labels[0, 0]))
    assert len(weights) > 200
    assert abs(np.mean(weights) - 0.5) < 0.06 and abs(np.var(weights) - 1 / 8) < 0.02  # Beta(a, a): 1 / (4 (2a + 1))


def test_both_mixes_take_turns() -> None:
    items = noise_items(6)
    kinds = set()
    for seed in range(30):
        batch = augmented(items, seed=seed, mixup=1.0, cutmix=1.0)
        assert batch["labels"].shape == (6, CLASSES) and batch["labels"].dtype == torch.float32
        pixels = set(stacked(items).flatten().tolist())
        kinds.add("cutmix" if set(batch["pixel_values"].flatten().tolist()) <= pixels else "mixup")
    assert kinds == {"mixup", "cutmix"}
    only = augmented(items, mixup=1.0, seed=1)["labels"]
    assert ((only > 0).sum(dim=1) <= 2).all()


@pytest.mark.parametrize(("method", "copies_pixels"), [("mixup", False), ("cutmix", True)])
def test_either_method_alone_is_the_one_that_was_set(method: str, copies_pixels: bool) -> None:
    """Each pixel of a CutMix image is one of the originals'; those of a Mixup image are averages."""
    items = noise_items(16)
    pixels = augmented(items, **{method: 1.0})["pixel_values"]
    originals = stacked(items)
    copied = (pixels.unsqueeze(1) == originals.unsqueeze(0)).all(dim=2).any(dim=1)
    assert bool(copied.all()) == copies_pixels


def test_randaugment_changes_each_image_in_its_own_way() -> None:
    one = noise_items(1, side=16)[0].image
    items = [ImageItem(one, 0, k, 0) for k in range(24)]
    results = augmented(items, randaugment_ops=2, library="kornia")["pixel_values"]
    assert results.shape == (24, 3, 16, 16) and results.min() >= 0 and results.max() <= 1 and results.isfinite().all()
    assert len({result.numpy().tobytes() for result in results}) > 12


def test_randaugment_is_stronger_with_a_larger_magnitude_and_more_operations() -> None:
    items = noise_items(60, side=16)

    def change(**settings: Any) -> float:
        results = augmented(items, library="kornia", **settings)["pixel_values"]
        return float((results - stacked(items)).abs().mean())

    assert change(randaugment_ops=1, randaugment_magnitude=2) < change(randaugment_ops=1, randaugment_magnitude=28)
    assert change(randaugment_ops=1) < change(randaugment_ops=4)


ALL = {"crop_padding": 2, "flip": 0.5, "randaugment_ops": 1, "cutout": 4, "mixup": 0.4, "cutmix": 1.0}


def test_a_batch_depends_on_seed_epoch_and_images_alone() -> None:
    items = noise_items(6)
    torch.manual_seed(1)
    first = augmented(items, **ALL)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    again = augmented(items, **ALL)
    assert torch.equal(torch.get_rng_state(), state)  # dropout's random numbers are not touched
    assert all(torch.equal(first[key], again[key]) for key in first)
    later = [item._replace(epoch=1) for item in items]
    for other in (augmented(items, seed=1, **ALL), augmented(later, **ALL), augmented(items[::-1], **ALL)):
        assert not torch.equal(first["pixel_values"], other["pixel_values"])


def test_workers_change_nothing_and_do_not_repeat_each_other() -> None:
    image = np.random.default_rng(0).integers(0, 256, (1, SIDE, SIDE, 3)).astype(np.uint8)
    split = ImageSplit(ArraySource(np.repeat(image, 24, axis=0), "same"), np.arange(24), np.arange(24) % CLASSES)
    collator = ImageCollator(PLAIN, CLASSES, SIDE, Augmentation(**ALL, library="kornia"), seed=3)
    batches = []
    for workers in (0, 2):
        loader = DataLoader(ImageDataset(split, SIDE), 4, collate_fn=collator, num_workers=workers)
        batches.append([batch["pixel_values"] for batch in loader])
    assert len(batches[0]) == 6 and all(torch.equal(a, b) for a, b in zip(*batches, strict=True))
    assert len({batch.numpy().tobytes() for batch in batches[0]}) == 6


def test_a_collator_can_be_sent_to_a_worker_that_is_started_anew() -> None:
    collator = ImageCollator(IMAGENET, CLASSES, SIDE, Augmentation(**ALL, library="kornia"))
    items = noise_items(5)
    copied = pickle.loads(pickle.dumps(collator))
    assert torch.equal(copied(items)["pixel_values"], collator(items)["pixel_values"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"crop_padding": -1}, "crop_padding is -1"),
        ({"mixup": -0.1}, "mixup is -0.1"),
        ({"cutmix": float("nan")}, "cutmix is nan"),
        ({"flip": 1.5}, "flip is 1.5"),
        ({"randaugment_magnitude": 30}, "randaugment_magnitude is 30"),
        ({"library": "albumentations"}, "'albumentations'; known: auto, kornia, torchvision"),
        ({"cutout": SIDE + 1}, f"cutout is {SIDE + 1}, more than the image's {SIDE} pixels"),
        ({"crop_padding": SIDE + 1}, f"crop_padding is {SIDE + 1}, more than"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImageCollator(PLAIN, CLASSES, SIDE, Augmentation(**settings))


class FakeTransform:
    """Stands for one of torchvision's: adds 1 to a uint8 image and remembers what it was made with and called on."""

    made: list[tuple[str, tuple, dict]]
    shapes: list[tuple[int, ...]]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        FakeTransform.made.append((type(self).__name__, args, kwargs))

    def __call__(self, image: Tensor) -> Tensor:
        """One image, uint8."""
        assert image.dtype == torch.uint8
        FakeTransform.shapes.append(tuple(image.shape))
        return image + 1


@pytest.fixture
def fake_torchvision(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A stand-in for ``torchvision.transforms.v2``, which cannot be installed beside a CPU build of torch."""
    FakeTransform.made, FakeTransform.shapes = [], []
    v2 = types.ModuleType("torchvision.transforms.v2")
    for name in ("RandomCrop", "RandomHorizontalFlip", "RandAugment"):
        setattr(v2, name, type(name, (FakeTransform,), {}))
    for name, module in (
        ("torchvision", types.ModuleType("torchvision")),
        ("torchvision.transforms", types.ModuleType("torchvision.transforms")),
        ("torchvision.transforms.v2", v2),
    ):
        monkeypatch.setitem(sys.modules, name, module)
    yield


@pytest.mark.usefixtures("fake_torchvision")
def test_torchvision_is_used_where_it_works() -> None:
    assert torchvision_works()
    items = noise_items(3)
    collator = ImageCollator(PLAIN, CLASSES, SIDE, Augmentation(crop_padding=4, flip=0.25, randaugment_ops=2))
    assert isinstance(collator.transforms, TorchvisionTransforms)
    assert FakeTransform.made == [
        ("RandomCrop", (SIDE,), {"padding": 4}),
        ("RandomHorizontalFlip", (), {"p": 0.25}),
        ("RandAugment", (2, 9), {}),
    ]
    expected = torch.stack([item.image + 3 for item in items]).float() / 255
    assert torch.equal(collator(items)["pixel_values"], expected)
    assert FakeTransform.shapes == [(3, SIDE, SIDE)] * 9  # image by image: each has its own random numbers
    assert isinstance(make_transforms(Augmentation(flip=0.5, library="kornia"), SIDE), KorniaTransforms)


def broken_import(*names: str) -> Callable[[str], Any]:
    """An ``import_module`` that fails for these packages, as a torchvision of another build does."""
    from importlib import import_module

    def load(name: str) -> Any:
        if name.split(".")[0] in names:
            raise (
                RuntimeError("operator torchvision::nms does not exist") if name.startswith("t") else ImportError(name)
            )
        return import_module(name)

    return load


def test_without_a_working_torchvision_kornia_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_adafisher.data.images.augmentation.import_module", broken_import("torchvision"))
    assert not torchvision_works()
    assert isinstance(make_transforms(Augmentation(flip=0.5), SIDE), KorniaTransforms)
    with pytest.raises(ImportError, match=r"torchvision cannot be imported"):
        make_transforms(Augmentation(flip=0.5, library="torchvision"), SIDE)


def test_without_any_library_the_advice_is_given_and_the_rest_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_adafisher.data.images.augmentation.import_module", broken_import("torchvision", "kornia"))
    with pytest.raises(ImportError, match=r"hf_adafisher\[vision\]"):
        ImageCollator(PLAIN, CLASSES, SIDE, Augmentation(flip=0.5))
    assert augmented(noise_items(4), cutout=4, mixup=1.0)["labels"].shape == (4, CLASSES)


def test_statistics_are_those_of_all_pixels() -> None:
    images = np.random.default_rng(0).integers(0, 256, (7, 5, 6, 3)).astype(np.uint8)
    images[..., 2] = 51
    split = ImageSplit(ArraySource(images, "noise"), np.arange(7), np.zeros(7, dtype=np.int64))
    found = channel_statistics(split)
    pixels = images.reshape(-1, 3) / 255
    np.testing.assert_allclose(found.mean, pixels.mean(axis=0))
    np.testing.assert_allclose(found.std, [*pixels.std(axis=0)[:2], 1.0])


def test_normalised_digits_have_mean_0_and_standard_deviation_1() -> None:
    corpus = load_images()
    dataset = ImageDataset(corpus.train, 8)
    collator = ImageCollator(corpus_normalization(corpus), 10, 8)
    pixels = collator(dataset.__getitems__(range(len(dataset))))["pixel_values"]
    assert abs(float(pixels.mean())) < 1e-4 and abs(float(pixels.std()) - 1) < 1e-4


def test_the_image_processor_does_what_training_does(tmp_path: Any) -> None:
    """A saved model is used through it; and its file gives the normalisation back."""
    corpus = load_images()
    normalization = corpus_normalization(corpus)
    processor = image_processor(normalization, 32)
    batch = ImageCollator(normalization, 10, 32)(ImageDataset(corpus.test, 32).__getitems__([0, 7]))
    images = [corpus.test.image(k) for k in (0, 7)]
    torch.testing.assert_close(processor(images, return_tensors="pt")["pixel_values"], batch["pixel_values"])
    processor.save_pretrained(tmp_path)
    assert pretrained_normalization(str(tmp_path)) == normalization


def test_the_normalisation_of_pretrained_models(tmp_path: Any, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    assert pretrained_normalization(str(tmp_path)) == IMAGENET
    assert "ImageNet's are used" in caplog.text
    (tmp_path / "config.json").write_text('{"pretrained_cfg": {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.1, 0.3]}}')
    assert pretrained_normalization(str(tmp_path)) == Normalization((0.5, 0.4, 0.3), (0.2, 0.1, 0.3))
    (tmp_path / "preprocessor_config.json").write_text('{"do_normalize": false, "image_mean": [0.5], "image_std": [1]}')
    assert pretrained_normalization(str(tmp_path)) == PLAIN


def test_a_standard_deviation_of_zero_is_refused() -> None:
    with pytest.raises(ValueError, match=r"one positive std"):
        Normalization((0.5, 0.5, 0.5), (0.1, 0.0, 0.1))
