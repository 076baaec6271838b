"""Normalisation of images: channel mean and standard deviation."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_adafisher.data.images.corpora import ImageCorpus, ImageSplit

logger = logging.getLogger(__name__)

STATISTICS_SAMPLE = 2000
"""Largest number of images from which statistics of a data set are computed."""


@dataclass(frozen=True)
class Normalization:
    """Mean and standard deviation of each channel, for values in [0, 1].

    Attributes:
        mean: One value per channel.
        std: One positive value per channel.

    Raises:
        ValueError: A standard deviation is not positive, or the lengths differ.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:

        if len(self.mean) != len(self.std) or not all(value > 0 for value in self.std):
            raise ValueError(f"mean is {self.mean} and std {self.std}: one positive std is needed for each mean")

    def __call__(self, images: Tensor) -> Tensor:
        """Normalise images of shape (..., channels, height, width)."""
        mean, std = (torch.tensor(values, dtype=images.dtype).view(-1, 1, 1) for values in (self.mean, self.std))
        return (images - mean) / std


IMAGENET = Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def pretrained_normalization(name_or_path: str, hub: Mapping[str, Any] | None = None) -> Normalization:
    """Normalisation of a pretrained model, from its image processor or timm configuration.

    Args:
        name_or_path: Model id on the Hub, or a folder.
        hub: Arguments for the Hub, such as ``revision`` and ``token``.

    Returns:
        The model's normalisation, or with a warning that of ImageNet if the model has none.
    """
    from transformers import PreTrainedConfig
    from transformers.image_processing_base import ImageProcessingMixin

    settings: dict[str, Any] = {}
    try:
        settings, _ = ImageProcessingMixin.get_image_processor_dict(name_or_path, **(hub or {}))
    except (OSError, ValueError):  # no such file; timm keeps the values in the model's configuration
        config, _ = PreTrainedConfig.get_config_dict(name_or_path, **(hub or {}))
        timm = config.get("pretrained_cfg") or {}
        settings = {"image_mean": timm.get("mean"), "image_std": timm.get("std")}
    if settings.get("do_normalize") is False:
        return Normalization((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    mean, std = settings.get("image_mean"), settings.get("image_std")
    if not mean or not std:
        logger.warning("%s says no mean and standard deviation of its images; ImageNet's are used", name_or_path)
        return IMAGENET
    return Normalization(tuple(mean), tuple(std))


def corpus_normalization(corpus: ImageCorpus, seed: int = 0) -> Normalization:
    """Normalisation by the statistics of a corpus, over a sample of at most 2,000 training images."""
    return channel_statistics(corpus.train.sample(STATISTICS_SAMPLE, seed))


def channel_statistics(split: ImageSplit) -> Normalization:
    """Mean and standard deviation of each channel over all pixels of a split, for values in [0, 1].

    A constant channel gets a standard deviation of 1.
    """
    count, total, squares = 0, np.zeros(3), np.zeros(3)
    for position in range(len(split)):
        pixels = np.asarray(split.image(position), dtype=np.float64).reshape(-1, 3) / 255
        count += len(pixels)
        total += pixels.sum(axis=0)
        squares += np.square(pixels).sum(axis=0)
    mean = total / count
    std = np.sqrt(np.maximum(squares / count - mean**2, 0.0))
    return Normalization(tuple(mean.tolist()), tuple(np.where(std > 1e-4, std, 1.0).tolist()))


def image_processor(normalization: Normalization, image_size: int) -> Any:
    """Image processor of transformers to save with a model, equal to the evaluation transform on square images.

    It squeezes other images to a square, whereas ``ImageDataset`` crops the centre.

    Args:
        normalization: Normalisation of the training images.
        image_size: Side of the images, in pixels.

    Returns:
        A ``ViTImageProcessor``.
    """
    from transformers import ViTImageProcessor

    size = {"height": image_size, "width": image_size}
    return ViTImageProcessor(size=size, image_mean=list(normalization.mean), image_std=list(normalization.std))
