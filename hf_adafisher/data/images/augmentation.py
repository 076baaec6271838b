"""Augmentation of image batches in the workers of a DataLoader.

Crop, flip and RandAugment come from torchvision (``transforms.v2``) if it can be imported, else from kornia.
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
from hf_adafisher.data.images.mixing import cutmix, cutout, mixup
from hf_adafisher.data.images.normalization import Normalization

logger = logging.getLogger(__name__)

Library = Literal["auto", "kornia", "torchvision"]
LIBRARIES = ("auto", "kornia", "torchvision")


@dataclass(frozen=True)
class Augmentation:
    """Augmentation settings for training images; the defaults turn everything off.

    Attributes:
        crop_padding: Zero padding on each side before a random crop of the original size, in pixels; usually 4 for
            CIFAR.
        flip: Probability of a horizontal flip, in [0, 1].
        randaugment_ops: RandAugment operations per image; 0 turns it off.
        randaugment_magnitude: Strength of these operations, in 1..29. Default 9.
        cutout: Side of a square of the mean colour, in pixels; 0 turns it off.
        mixup: Alpha of Mixup's Beta distribution, >= 0; 0 turns it off.
        cutmix: Alpha of CutMix's Beta distribution, >= 0; 0 turns it off. With Mixup too, each batch uses one of them.
        library: Library for crop, flip and RandAugment: "torchvision", "kornia", or "auto" for torchvision if it can be
            imported, else kornia. Default "auto".

    Raises:
        ValueError: A value is outside its range.
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
        """True if crop, flip or RandAugment is on, which need torchvision or kornia."""
        return bool(self.crop_padding or self.flip or self.randaugment_ops)

    @property
    def uses_soft_labels(self) -> bool:
        """True if Mixup or CutMix is on, so that labels become class probabilities."""
        return bool(self.mixup or self.cutmix)


class Transforms(Protocol):
    """Crop, flip and RandAugment, drawn anew for each image from torch's global generator."""

    library: str

    def __call__(self, images: Tensor) -> Tensor:
        """Transform uint8 images of shape (batch, 3, side, side) to float32 in [0, 1] of that shape."""


class KorniaTransforms:
    """Random transforms of kornia.

    Raises:
        ImportError: Kornia is not installed.
    """

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
        self.transforms: list[Any] = []
        if settings.crop_padding:
            self.transforms.append(kornia.RandomCrop((image_size, image_size), padding=settings.crop_padding))
        if settings.flip:
            self.transforms.append(kornia.RandomHorizontalFlip(p=settings.flip))
        ops, magnitude = settings.randaugment_ops, settings.randaugment_magnitude
        self.randaugment = auto.RandAugment(n=ops, m=magnitude) if ops else None

    def __call__(self, images: Tensor) -> Tensor:
        """Apply the transforms; see ``Transforms``."""
        images = images.float() / 255
        for transform in self.transforms:
            images = transform(images)
        if self.randaugment is not None:  # it draws one set of operations per call
            images = torch.cat([self.randaugment(image[None]) for image in images]).clamp(0, 1)
        return images


class TorchvisionTransforms:
    """Random transforms of ``torchvision.transforms.v2``."""

    library = "torchvision"

    def __init__(self, settings: Augmentation, image_size: int) -> None:
        v2 = import_module("torchvision.transforms.v2")
        self.transforms: list[Any] = []
        if settings.crop_padding:
            self.transforms.append(v2.RandomCrop(image_size, padding=settings.crop_padding))
        if settings.flip:
            self.transforms.append(v2.RandomHorizontalFlip(p=settings.flip))
        if settings.randaugment_ops:
            self.transforms.append(v2.RandAugment(settings.randaugment_ops, settings.randaugment_magnitude))

    def __call__(self, images: Tensor) -> Tensor:
        """Apply the transforms; see ``Transforms``."""
        transformed = []
        for image in images:  # a transform draws once per call
            for transform in self.transforms:
                image = transform(image)
            transformed.append(image)
        return torch.stack(transformed).float() / 255


def torchvision_works() -> bool:
    """Check that torchvision's transforms can be imported."""
    try:  # a build for another version of torch raises RuntimeError
        import_module("torchvision.transforms.v2")
    except (ImportError, RuntimeError, AttributeError):
        return False
    return True


def make_transforms(settings: Augmentation, image_size: int) -> Transforms | None:
    """Create the transforms of a library: crop, flip and RandAugment.

    Args:
        settings: The augmentation.
        image_size: Side of the images, in pixels.

    Returns:
        The transforms, or None if the settings use none of them.

    Raises:
        ImportError: The requested library, or with "auto" both, cannot be imported.
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
    """Collate items of an ``ImageDataset`` into a batch of ``pixel_values`` and ``labels``, with augmentation.

    The random numbers of a batch depend on the seed, the epoch and the indices of its images only, so neither the
    number of workers nor a resume changes them. Torch's global generator is left unchanged.

    Args:
        normalization: Normalisation, applied after crop, flip and RandAugment.
        num_classes: Number of classes.
        image_size: Side of the images, in pixels.
        augmentation: Augmentation settings. Default: no augmentation, as for evaluation.
        seed: Seed of the random numbers. Default 0.

    Raises:
        ImportError: The augmentation needs a library that is not installed.
        ValueError: The Cutout square or the padding is larger than the image.
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
        """Collate one batch.

        Returns:
            ``pixel_values``, float32 of shape (batch, 3, side, side), and ``labels``: class numbers, int64 of shape
            (batch,), or with Mixup or CutMix class probabilities, float32 of shape (batch, classes).
        """
        images = torch.stack([item.image for item in items])
        labels = torch.tensor([item.label for item in items])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(batch_seed(self.seed, items[0].epoch, [item.position for item in items]))
            pixels = self.transforms(images) if self.transforms is not None else images.float() / 255
            pixels = self.normalization(pixels)
            if self.augmentation.cutout:
                pixels = cutout(pixels, self.augmentation.cutout)
            if self.augmentation.uses_soft_labels:
                pixels, labels = self._mix(pixels, torch.nn.functional.one_hot(labels, self.num_classes).float())
        return {"pixel_values": pixels, "labels": labels}

    def _mix(self, pixels: Tensor, probabilities: Tensor) -> tuple[Tensor, Tensor]:
        alphas = (self.augmentation.mixup, self.augmentation.cutmix)
        use_cutmix = not alphas[0] or (bool(alphas[1]) and bool(torch.rand(()) < 0.5))
        return (cutmix if use_cutmix else mixup)(pixels, probabilities, alphas[use_cutmix])
