"""Augmentation of batches of images, in the workers of a DataLoader.

Crop, flip and RandAugment are those of torchvision (`transforms.v2`) where it can be imported, else of kornia. Cutout,
Mixup and CutMix are written out here, because the libraries differ from the papers and from each other: kornia's
erasing stays inside the image and its Mixup knows no alpha; torchvision mixes each image with its neighbour.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from hf_adafisher.data.images.dataset import ImageItem, batch_seed
from hf_adafisher.data.images.normalization import Normalization

logger = logging.getLogger(__name__)

Library = Literal["auto", "kornia", "torchvision"]
LIBRARIES = ("auto", "kornia", "torchvision")


@dataclass(frozen=True)
class Augmentation:
    """What is done to training images; by default nothing.

    Attributes:
        crop_padding: zero pixels added on each side before a random part of the old size is cut out; CIFAR's is 4.
        flip: probability of mirroring left and right, in [0, 1].
        randaugment_ops: operations of RandAugment per image; 0 turns it off.
        randaugment_magnitude: strength of these operations, in 1..29.
        cutout: side of a square that is set to the mean colour, anywhere, cut at the borders; 0 turns it off.
        mixup: alpha of Mixup's Beta distribution, >= 0; 0 turns it off.
        cutmix: alpha of CutMix's Beta distribution, >= 0; 0 turns it off. With both, each batch takes one of them.
        library: which one crops, flips and runs RandAugment. Default "auto": torchvision if it works, else kornia.
    """

    crop_padding: int = 0
    flip: float = 0.0
    randaugment_ops: int = 0
    randaugment_magnitude: int = 9
    cutout: int = 0
    mixup: float = 0.0
    cutmix: float = 0.0
    library: Library = "auto"

    def __post_init__(self) -> None:
        """Raises ValueError for a value outside its range."""
        for name in ("crop_padding", "randaugment_ops", "cutout", "mixup", "cutmix"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 0 (off) or more")
        if not 0.0 <= self.flip <= 1.0:
            raise ValueError(f"flip is {self.flip}; a probability must be in [0, 1]")
        if not 1 <= self.randaugment_magnitude <= 29:
            raise ValueError(f"randaugment_magnitude is {self.randaugment_magnitude}; it must be in 1..29")
        if self.library not in LIBRARIES:
            raise ValueError(f"augmentation library is {self.library!r}; known: {', '.join(LIBRARIES)}")

    @property
    def needs_library(self) -> bool:
        """Whether anything is asked for that kornia or torchvision does."""
        return bool(self.crop_padding or self.flip or self.randaugment_ops)

    @property
    def mixes(self) -> bool:
        """Whether labels become class shares."""
        return bool(self.mixup or self.cutmix)


class Transforms(Protocol):
    """Crop, flip and RandAugment, different for each image; random numbers are torch's global ones."""

    library: str

    def __call__(self, images: Tensor) -> Tensor:
        """From uint8 (batch, 3, side, side) to float32 in [0, 1] of the same shape."""


class KorniaTransforms:
    """Kornia's random transforms."""

    library = "kornia"

    def __init__(self, settings: Augmentation, image_size: int) -> None:
        try:
            kornia = import_module("kornia.augmentation")
            auto = import_module("kornia.augmentation.auto")
        except ImportError as error:
            raise ImportError(
                "augmentation needs kornia or a working torchvision: pip install 'hf_adafisher[vision]', "
                "or leave out crop, flip and RandAugment"
            ) from error
        self.batch: list[Any] = []
        if settings.crop_padding:
            self.batch.append(kornia.RandomCrop((image_size, image_size), padding=settings.crop_padding))
        if settings.flip:
            self.batch.append(kornia.RandomHorizontalFlip(p=settings.flip))
        ops, magnitude = settings.randaugment_ops, settings.randaugment_magnitude
        self.randaugment = auto.RandAugment(n=ops, m=magnitude) if ops else None

    def __call__(self, images: Tensor) -> Tensor:
        """See `Transforms`."""
        images = images.float() / 255
        for transform in self.batch:
            images = transform(images)
        if self.randaugment is not None:  # it draws one set of operations per call
            images = torch.cat([self.randaugment(image[None]) for image in images]).clamp(0, 1)
        return images


class TorchvisionTransforms:
    """The random transforms of torchvision.transforms.v2."""

    library = "torchvision"

    def __init__(self, settings: Augmentation, image_size: int) -> None:
        v2 = import_module("torchvision.transforms.v2")
        parts: list[Any] = []
        if settings.crop_padding:
            parts.append(v2.RandomCrop(image_size, padding=settings.crop_padding))
        if settings.flip:
            parts.append(v2.RandomHorizontalFlip(p=settings.flip))
        if settings.randaugment_ops:
            parts.append(v2.RandAugment(settings.randaugment_ops, settings.randaugment_magnitude))
        self.parts = parts

    def __call__(self, images: Tensor) -> Tensor:
        """See `Transforms`."""
        changed = []
        for image in images:  # a transform draws once per call
            for part in self.parts:
                image = part(image)
            changed.append(image)
        return torch.stack(changed).float() / 255


def torchvision_works() -> bool:
    """Whether torchvision's transforms can be imported: a build for another torch raises RuntimeError."""
    try:
        import_module("torchvision.transforms.v2")
    except (ImportError, RuntimeError, AttributeError):
        return False
    return True


def make_transforms(settings: Augmentation, image_size: int) -> Transforms | None:
    """Returns the library's part of the augmentation, or None if nothing is asked of it.

    Raises:
        ImportError: the library asked for, or for "auto" both, cannot be imported.
    """
    if not settings.needs_library:
        return None
    if settings.library == "kornia":
        return KorniaTransforms(settings, image_size)
    if torchvision_works():
        return TorchvisionTransforms(settings, image_size)
    if settings.library == "torchvision":
        raise ImportError("torchvision cannot be imported, or belongs to another build of torch; use library kornia")
    return KorniaTransforms(settings, image_size)


class ImageCollator:
    """Makes a batch of `pixel_values` and `labels` from the items of an `ImageDataset`, augmented for training.

    The random numbers of a batch depend on the seed, the epoch and the indices of its images only: the number of
    workers changes nothing, nor does resuming a run. Torch's global generator is left as it was.

    Args:
        normalization: applied after crop, flip and RandAugment.
        num_classes: number of classes.
        image_size: side of the images.
        augmentation: what to do to the images. Default: nothing, as for evaluation.
        seed: of the random numbers.

    Raises:
        ImportError: the augmentation needs a library that is not installed.
        ValueError: a Cutout square or a padding that is larger than the image.
    """

    def __init__(
        self,
        normalization: Normalization,
        num_classes: int,
        image_size: int,
        augmentation: Augmentation | None = None,
        *,
        seed: int = 0,
    ) -> None:
        self.normalization = normalization
        self.num_classes = num_classes
        self.augmentation = augmentation or Augmentation()
        self.seed = seed
        for name in ("crop_padding", "cutout"):
            if getattr(self.augmentation, name) > image_size:
                raise ValueError(
                    f"{name} is {getattr(self.augmentation, name)}, more than the image's {image_size} pixels"
                )
        self.transforms = make_transforms(self.augmentation, image_size)

    def __call__(self, items: Sequence[ImageItem]) -> dict[str, Tensor]:
        """Returns pixel_values, float32 (batch, 3, side, side), and labels.

        Labels are class numbers, int64 (batch,), or with Mixup or CutMix class shares, float32 (batch, classes).
        """
        images = torch.stack([item.image for item in items])
        labels = torch.tensor([item.label for item in items])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(batch_seed(self.seed, items[0].epoch, [item.position for item in items]))
            pixels = self.transforms(images) if self.transforms is not None else images.float() / 255
            pixels = self.normalization(pixels)
            if self.augmentation.cutout:
                pixels = cutout(pixels, self.augmentation.cutout)
            if self.augmentation.mixes:
                pixels, labels = self._mix(pixels, torch.nn.functional.one_hot(labels, self.num_classes).float())
        return {"pixel_values": pixels, "labels": labels}

    def _mix(self, pixels: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
        alphas = (self.augmentation.mixup, self.augmentation.cutmix)
        second = not alphas[0] or (bool(alphas[1]) and bool(torch.rand(()) < 0.5))
        return (cutmix if second else mixup)(pixels, shares, alphas[second])


def cutout(pixels: Tensor, side: int) -> Tensor:
    """Sets one square of each image to 0, which after normalisation is the mean colour (DeVries and Taylor 2017).

    Its centre is anywhere in the image, so part of the square may lie outside.

    Args:
        pixels: shape (batch, channels, height, width).
        side: of the square, in pixels.
    """
    batch, _, height, width = pixels.shape
    top, left = (torch.randint(length, (batch, 1)) - side // 2 for length in (height, width))
    rows, columns = torch.arange(height), torch.arange(width)
    inside_rows, inside_columns = (rows >= top) & (rows < top + side), (columns >= left) & (columns < left + side)
    hole = inside_rows[:, None, :, None] & inside_columns[:, None, None, :]
    return pixels.masked_fill(hole, 0.0)


def mixup(pixels: Tensor, shares: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """Mixes each image, and its class shares alike, with another of the batch (Zhang et al. 2018, arXiv 1710.09412).

    Args:
        pixels: shape (batch, channels, height, width).
        shares: class shares, shape (batch, classes).
        alpha: the weight of the first image is drawn, once per batch, from Beta(alpha, alpha).
    """
    weight = _beta(alpha)
    other = torch.randperm(len(pixels))
    return weight * pixels + (1 - weight) * pixels[other], weight * shares + (1 - weight) * shares[other]


def cutmix(pixels: Tensor, shares: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """Replaces a rectangle of each image by that of another; shares go by area (Yun et al. 2019, arXiv 1905.04899).

    Args:
        pixels: shape (batch, channels, height, width).
        shares: class shares, shape (batch, classes).
        alpha: the rectangle's area is 1 - weight of the image, before it is cut at the borders, the weight drawn once
            per batch from Beta(alpha, alpha); it has the image's proportions and its centre is anywhere.
    """
    height, width = pixels.shape[-2:]
    scale = (1 - _beta(alpha)) ** 0.5
    other = torch.randperm(len(pixels))
    (top, bottom), (left, right) = (_interval(length, round(length * scale)) for length in (height, width))
    mixed = pixels.clone()
    mixed[..., top:bottom, left:right] = pixels[other][..., top:bottom, left:right]
    weight = 1 - (bottom - top) * (right - left) / (height * width)
    return mixed, weight * shares + (1 - weight) * shares[other]


def _interval(length: int, side: int) -> tuple[int, int]:
    start = int(torch.randint(length, ())) - side // 2
    return max(start, 0), min(start + side, length)


def _beta(alpha: float) -> float:
    return float(torch.distributions.Beta(alpha, alpha).sample())
