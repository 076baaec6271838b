"""Data set of decoded square images for a DataLoader."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from hf_adafisher.data.images.corpora import ImageSplit

if TYPE_CHECKING:
    from PIL.Image import Image

_CROP_AREA = (0.08, 1.0)
_CROP_LOG_RATIO = (math.log(3 / 4), math.log(4 / 3))
_CROP_TRIES = 10


class ImageItem(NamedTuple):
    """One image of a batch; no dict, so that Trainer's ``remove_unused_columns`` leaves it alone.

    Attributes:
        image: Pixels, uint8, shape (3, size, size).
        label: Class number.
        position: Index in the data set; part of the seed of the batch.
        epoch: Epoch by ``ImageDataset.set_epoch``; part of the seed of the batch.
    """

    image: Tensor
    label: int
    position: int
    epoch: int


class ImageDataset(Dataset[ImageItem]):
    """Square images of one size, decoded on access.

    Args:
        split: The images.
        image_size: Side of the returned images, in pixels. Images are resized (bilinear, antialiased) so that the
            shorter side has ``image_size / crop_ratio`` pixels; then the centre is cropped.
        crop_ratio: Value in (0, 1]; 0.875 is 224 of 256 pixels, as usual for ImageNet. Default 1.
        random_resized_crop: Resize a random crop of 8 to 100 % of the area and an aspect ratio of 3:4 to 4:3 instead,
            as usual for training on ImageNet. Default False.
        seed: Seed of the random crops. They depend on it, on the epoch and on the indices of the batch only.

    Raises:
        ValueError: ``image_size`` or ``crop_ratio`` is outside its range.
    """

    def __init__(
        self,
        split: ImageSplit,
        image_size: int,
        *,
        crop_ratio: float = 1.0,
        random_resized_crop: bool = False,
        seed: int = 0,
    ) -> None:
        if image_size < 1:
            raise ValueError(f"image_size is {image_size}; it must be a positive number of pixels")
        if not 0.0 < crop_ratio <= 1.0:
            raise ValueError(f"crop_ratio is {crop_ratio}; it must be more than 0 and at most 1")
        self.split = split
        self.image_size = image_size
        self.crop_ratio = crop_ratio
        self.random_resized_crop = random_resized_crop
        self.seed = seed
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # persistent workers see it change

    def __len__(self) -> int:
        """Number of images."""
        return len(self.split)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch that the random crops depend on; under Trainer, the callback ``DatasetEpochs`` calls it."""
        self._epoch.fill_(epoch)

    def __getitem__(self, index: int) -> ImageItem:
        """Decode one image.

        Raises:
            BrokenImageError: The image cannot be read; the message names it.
        """
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[ImageItem]:
        """Decode the images of a batch.

        Raises:
            BrokenImageError: An image cannot be read; the message names it.
        """
        epoch = int(self._epoch)
        generator = np.random.default_rng(batch_seed(self.seed, epoch, indices))
        items = []
        for index in indices:
            image = self.split.image(index)
            if self.random_resized_crop:
                image = _random_resized_crop(image, self.image_size, generator)
            else:
                image = fit_square(image, self.image_size, self.crop_ratio)
            pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
            items.append(ImageItem(pixels, int(self.split.labels[index]), int(index), epoch))
        return items


def batch_seed(seed: int, epoch: int, indices: Sequence[int]) -> int:
    """Seed of the random numbers of a batch, independent of the worker that makes it.

    So the number of workers changes nothing, and a resumed run sees the images of the uninterrupted one.

    Args:
        seed: Seed of the run, >= 0.
        epoch: Number of the epoch, from 0.
        indices: Indices of the examples in the batch.

    Returns:
        A non-negative integer of 63 bits.
    """
    words = np.random.SeedSequence([seed, epoch, *map(int, indices)]).generate_state(2)
    return int(words[0]) << 31 | int(words[1]) >> 1


def fit_square(image: Image, size: int, crop_ratio: float = 1.0) -> Image:
    """Resize the shorter side to ``size / crop_ratio`` pixels and crop the centre square of side ``size``."""
    from PIL.Image import Resampling

    width, height = image.size
    side = min(width, height) * crop_ratio
    left, top = (width - side) / 2, (height - side) / 2
    if (width, height) == (size, size) and crop_ratio == 1.0:
        return image
    return image.resize((size, size), Resampling.BILINEAR, box=(left, top, left + side, top + side))


def _random_resized_crop(image: Image, size: int, generator: np.random.Generator) -> Image:
    from PIL.Image import Resampling

    width, height = image.size
    for _ in range(_CROP_TRIES):
        area = width * height * generator.uniform(*_CROP_AREA)
        ratio = math.exp(generator.uniform(*_CROP_LOG_RATIO))
        w, h = max(1, round(math.sqrt(area * ratio))), max(1, round(math.sqrt(area / ratio)))
        if w <= width and h <= height:
            left, top = (int(generator.integers(room, endpoint=True)) for room in (width - w, height - h))
            return image.resize((size, size), Resampling.BILINEAR, box=(left, top, left + w, top + h))
    return fit_square(image, size)
