"""From a split of images to the items of a DataLoader: decoded, cut to one size, in its workers."""

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
    """One image of a batch. Not a dict, so that Trainer leaves it alone (`remove_unused_columns`).

    Attributes:
        image: uint8, shape (3, size, size).
        label: class number.
        position: in the data set; with `epoch`, decides the random numbers of its batch.
        epoch: as `ImageDataset.set_epoch` was last told.
    """

    image: Tensor
    label: int
    position: int
    epoch: int


class ImageDataset(Dataset[ImageItem]):
    """Images of one size, decoded when they are asked for.

    Args:
        split: the images.
        image_size: side of the square images to return, in pixels. Images are scaled (bilinear, antialiased) until
            the shorter side has `image_size / crop_ratio` pixels, and the centre is cut out.
        crop_ratio: in (0, 1]. ImageNet's customary 224 of 256 pixels is 0.875; default 1.
        random_resized_crop: for training on ImageNet: a random part of 8 to 100 % of the area and 3:4 to 4:3 in shape
            is scaled to the size instead.
        seed: of the random parts. They depend on it, the epoch and the batch's own indices only.

    Raises:
        ValueError: an `image_size` or `crop_ratio` outside its range.
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
        """Makes the random numbers those of another epoch; under Trainer, the callback `DatasetEpochs` calls it."""
        self._epoch.fill_(epoch)

    def __getitem__(self, index: int) -> ImageItem:
        """Decodes one image. Raises BrokenImageError, which names it."""
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[ImageItem]:
        """Decodes the images of a batch."""
        epoch = int(self._epoch)
        generator = np.random.default_rng(batch_seed(self.seed, epoch, indices))
        items = []
        for index in indices:
            image = self.split.image(index)
            if self.random_resized_crop:
                image = _random_part(image, self.image_size, generator)
            else:
                image = fit_square(image, self.image_size, self.crop_ratio)
            pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
            items.append(ImageItem(pixels, int(self.split.labels[index]), int(index), epoch))
        return items


def batch_seed(seed: int, epoch: int, indices: Sequence[int]) -> int:
    """Returns the seed of a batch's random numbers: the same wherever, and in whichever worker, the batch is made.

    So the number of workers changes nothing, and a resumed run sees the images that the uninterrupted one sees.
    """
    words = np.random.SeedSequence([seed, epoch, *map(int, indices)]).generate_state(2)
    return int(words[0]) << 31 | int(words[1]) >> 1


def fit_square(image: Image, size: int, crop_ratio: float = 1.0) -> Image:
    """Scales the shorter side to `size / crop_ratio` pixels and cuts out the centre square of `size`."""
    from PIL.Image import Resampling

    width, height = image.size
    side = min(width, height) * crop_ratio
    left, top = (width - side) / 2, (height - side) / 2
    if (width, height) == (size, size) and crop_ratio == 1.0:
        return image
    return image.resize((size, size), Resampling.BILINEAR, box=(left, top, left + side, top + side))


def _random_part(image: Image, size: int, generator: np.random.Generator) -> Image:
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
