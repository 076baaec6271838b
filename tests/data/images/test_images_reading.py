"""Decoding images of every mode, finding damaged files, and the data set that feeds a DataLoader."""

from __future__ import annotations

import io
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader

from hf_adafisher.data.images.corpora import ImageSplit, load_images
from hf_adafisher.data.images.dataset import ImageDataset, ImageItem, batch_seed, fit_square
from hf_adafisher.data.images.files import ArraySource, BrokenImageError, FileSource, decode, find_damage
from tests.data.images.image_samples import class_folders, encoded, picture


def decoded(image: Image.Image, kind: str = "PNG") -> np.ndarray:
    """What becomes of an image that is written to a file and decoded."""
    result = decode(io.BytesIO(encoded(image, kind)))
    assert result.mode == "RGB"
    return np.asarray(result).astype(int)


def test_rgb_and_grey() -> None:
    image = picture()
    np.testing.assert_array_equal(decoded(image), np.asarray(image))
    grey = image.convert("L")
    np.testing.assert_array_equal(decoded(grey), np.repeat(np.asarray(grey)[..., None], 3, axis=2))
    np.testing.assert_array_equal(decoded(image.convert("1")), np.asarray(image.convert("1").convert("RGB")))


def test_transparency_becomes_white() -> None:
    """By the definition of compositing; what the invisible pixels hold does not matter."""
    colours = np.asarray(picture()).astype(int)
    alpha = np.random.default_rng(1).integers(0, 256, colours.shape[:2])
    alpha[:2], alpha[2:4] = 0, 255
    rgba = Image.fromarray(np.dstack([colours, alpha]).astype(np.uint8), "RGBA")
    share = alpha[..., None] / 255
    expected = share * colours + (1 - share) * 255
    assert np.abs(decoded(rgba) - expected).max() <= 1
    assert (decoded(rgba)[:2] == 255).all()
    grey = rgba.convert("LA")
    assert (decoded(grey)[:2] == 255).all()


def test_palettes_with_and_without_transparency() -> None:
    palette = picture().quantize(16)
    np.testing.assert_array_equal(decoded(palette), np.asarray(palette.convert("RGB")))
    file = io.BytesIO()
    index = int(np.asarray(palette)[0, 0])
    palette.save(file, "PNG", transparency=index)
    result = np.asarray(decode(io.BytesIO(file.getvalue())))
    see_through = np.asarray(palette) == index
    assert see_through.any() and not see_through.all()
    assert (result[see_through] == 255).all()
    np.testing.assert_array_equal(result[~see_through], np.asarray(palette.convert("RGB"))[~see_through])


def test_cmyk() -> None:
    """Of a lossless file: each channel is (1 - ink) (1 - black), up to rounding."""
    cmyk = np.random.default_rng(0).integers(0, 256, (6, 5, 4))
    expected = (255 - cmyk[..., :3]) * (255 - cmyk[..., 3:]) / 255
    result = decoded(Image.fromarray(cmyk.astype(np.uint8), "CMYK"), "TIFF")
    assert np.abs(result - expected).max() <= 1
    photo = picture(size=(32, 32)).convert("CMYK")
    assert np.abs(decoded(photo, "JPEG") - np.asarray(photo.convert("RGB")).astype(int)).mean() < 12


def test_16_bit_grey_is_scaled_not_clipped() -> None:
    values = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    np.testing.assert_array_equal(decoded(Image.fromarray(values))[..., 1], values // 256)


def test_orientation_is_applied() -> None:
    image = picture(size=(6, 4))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    file = io.BytesIO()
    image.save(file, "PNG", exif=exif)
    np.testing.assert_array_equal(np.asarray(decode(io.BytesIO(file.getvalue()))), np.rot90(np.asarray(image), -1))


@pytest.mark.filterwarnings("ignore:Truncated File Read", "ignore:Corrupt EXIF data")
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF"])
@settings(derandomize=True, deadline=None, max_examples=25)
@given(share=st.floats(0.0, 0.98), padding=st.integers(0, 5))
def test_the_quick_look_agrees_with_decoding(kind: str, share: float, padding: int) -> None:
    """Whole files pass, padded ones too; a truncated file is found exactly when it does not decode."""
    whole = encoded(picture(size=(40, 30)), kind)
    assert find_damage(io.BytesIO(whole + bytes(padding))) is None
    cut = whole[: int(len(whole) * share)]
    try:
        decode(io.BytesIO(cut))
    except BrokenImageError:
        assert find_damage(io.BytesIO(cut)) is not None
    else:  # some formats can do without their last bytes
        assert find_damage(io.BytesIO(cut)) is None


@pytest.mark.parametrize("content", [b"", b"text", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xd9"])
def test_files_that_are_no_images(content: bytes, tmp_path: Path) -> None:
    assert find_damage(io.BytesIO(content)) is not None
    (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(BrokenImageError, match=r"x\.png' cannot be read"):
        FileSource([tmp_path / "x.png"]).read(0)


def test_a_file_that_went_away_is_named(tmp_path: Path) -> None:
    with pytest.raises(BrokenImageError, match=r"gone\.png' cannot be opened"):
        FileSource([tmp_path / "gone.png"]).read(0)


def a_split(count: int = 24, side: int = 8) -> ImageSplit:
    """Noise, with classes in turn."""
    images = np.random.default_rng(0).integers(0, 256, (count, side, side, 3)).astype(np.uint8)
    return ImageSplit(ArraySource(images, "noise"), np.arange(count), np.arange(count) % 3)


def test_items_are_the_images_themselves_at_their_own_size() -> None:
    split = a_split()
    dataset = ImageDataset(split, 8)
    for k in (0, 5, 23):
        item = dataset[k]
        assert item.image.dtype == torch.uint8 and item.label == k % 3 and item.position == k
        np.testing.assert_array_equal(item.image.permute(1, 2, 0).numpy(), np.asarray(split.image(k)))


@pytest.mark.parametrize("crop_ratio", [1.0, 0.5])
def test_other_shapes_are_cut_to_the_centre_square(crop_ratio: float) -> None:
    """Without scaling the cut is exact."""
    image = picture(size=(30, 16))
    side = int(16 * crop_ratio)
    left, top = (30 - side) // 2, (16 - side) // 2
    expected = np.asarray(image)[top : top + side, left : left + side]
    np.testing.assert_array_equal(np.asarray(fit_square(image, side, crop_ratio)), expected)


def test_upscaling_keeps_a_plain_image_plain() -> None:
    plain = Image.new("RGB", (5, 9), (10, 200, 30))
    result = np.asarray(fit_square(plain, 32))
    assert result.shape == (32, 32, 3) and (result == (10, 200, 30)).all()


def decode_counting(folder: Path) -> ImageSplit:
    """A split of image files that are written only after the corpus was loaded."""
    return load_images(data_dir=class_folders(folder, {"red": 4, "blue": 4}), validation_fraction=0.2).train


def test_images_are_decoded_when_they_are_asked_for(tmp_path: Path) -> None:
    split = decode_counting(tmp_path / "images")
    position = 2
    Image.new("RGB", (8, 8), (1, 2, 3)).save(split.name(position))  # after loading: must be what is returned
    assert ImageDataset(split, 8)[position].image[:, 0, 0].tolist() == [1, 2, 3]


def collate(items: list[ImageItem]) -> list[ImageItem]:
    """Leaves the items of a batch as they are."""
    return items


@pytest.mark.subprocess
def test_workers_return_the_same_items_as_the_main_process() -> None:
    """With the random parts too, in two epochs; and the epochs differ."""
    split = a_split(side=20)
    seen = []
    for workers in (0, 2):
        dataset = ImageDataset(split, 8, random_resized_crop=True, seed=5)
        loader = DataLoader(dataset, 6, collate_fn=collate, num_workers=workers, persistent_workers=workers > 0)
        for epoch in (0, 1):
            dataset.set_epoch(epoch)
            items = [item for batch in loader for item in batch]
            assert [item.epoch for item in items] == [epoch] * 24
            seen.append(torch.stack([item.image for item in items]))
    torch.testing.assert_close(seen[0], seen[2], rtol=0, atol=0)
    torch.testing.assert_close(seen[1], seen[3], rtol=0, atol=0)
    assert not torch.equal(seen[0], seen[1])


def test_random_parts_lie_in_the_image_and_differ() -> None:
    """On a horizontal ramp without noise: values stay in the ramp, and rise from left to right."""
    ramp = np.broadcast_to(np.linspace(0, 255, 64).astype(np.uint8)[None, :, None], (48, 64, 3))
    split = ImageSplit(ArraySource(np.stack([ramp] * 32), "ramp"), np.arange(32), np.zeros(32, dtype=np.int64))
    dataset = ImageDataset(split, 16, random_resized_crop=True)
    images = torch.stack([item.image for item in dataset.__getitems__(range(32))]).int()
    assert (images.diff(dim=3) >= 0).all()
    widths = (images[:, 0, 0, -1] - images[:, 0, 0, 0]).float()
    assert len(images[:, 0, 0, 0].unique()) > 10 and widths.min() < 120 and widths.max() > 150


def test_batch_seeds_depend_on_everything_that_they_should() -> None:
    seeds = [batch_seed(*a) for a in [(0, 0, [1, 2]), (1, 0, [1, 2]), (0, 1, [1, 2]), (0, 0, [2, 1]), (0, 0, [1])]]
    assert len(set(seeds)) == 5 and batch_seed(0, 0, np.asarray([1, 2])) == seeds[0]
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_a_data_set_can_be_sent_to_a_worker_that_is_started_anew() -> None:
    dataset = ImageDataset(load_images().validation, 16)
    copied = pickle.loads(pickle.dumps(dataset))
    assert torch.equal(copied[3].image, dataset[3].image)


@pytest.mark.parametrize(("name", "value"), [("image_size", 0), ("crop_ratio", 0.0), ("crop_ratio", 1.5)])
def test_bad_sizes(name: str, value: float) -> None:
    options: dict = {"image_size": 8, name: value}
    with pytest.raises(ValueError, match=f"{name} is {value}"):
        ImageDataset(a_split(), **options)
