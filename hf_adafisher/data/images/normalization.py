"""The mean and standard deviation that images are normalised with."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_adafisher.data.images.corpora import ImageCorpus, ImageSplit

logger = logging.getLogger(__name__)

STATISTICS_SAMPLE = 2000
"""Images that the statistics of a data set are taken from, at most."""


@dataclass(frozen=True)
class Normalization:
    """Mean and standard deviation of each channel, for values in [0, 1]."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        """Raises ValueError for a standard deviation that is not positive."""
        if len(self.mean) != len(self.std) or not all(value > 0 for value in self.std):
            raise ValueError(f"mean is {self.mean} and std {self.std}: one positive std is needed for each mean")

    def __call__(self, images: Tensor) -> Tensor:
        """Normalises images of shape (..., channels, height, width)."""
        mean, std = (torch.tensor(values, dtype=images.dtype).view(-1, 1, 1) for values in (self.mean, self.std))
        return (images - mean) / std


IMAGENET = Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def pretrained_normalization(name_or_path: str) -> Normalization:
    """Returns the normalisation of a pretrained model, from its image processor's file; ImageNet's where it has none.

    Args:
        name_or_path: a model id of the Hub or a folder.
    """
    from transformers import PreTrainedConfig
    from transformers.image_processing_base import ImageProcessingMixin

    settings: dict[str, Any] = {}
    try:
        settings, _ = ImageProcessingMixin.get_image_processor_dict(name_or_path)
    except (OSError, ValueError):  # no such file; timm keeps the values in the model's configuration
        config, _ = PreTrainedConfig.get_config_dict(name_or_path)
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
    """Returns the mean and standard deviation of the training images, of at most 2,000 of them."""
    return channel_statistics(corpus.train.sample(STATISTICS_SAMPLE, seed))


def channel_statistics(split: ImageSplit) -> Normalization:
    """Returns mean and standard deviation over all pixels of all images, per channel, for values in [0, 1].

    A channel without any variation gets a standard deviation of 1.
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
    """Returns an image processor that prepares square images as training did, to be saved beside the model.

    Images of other shapes it squeezes to a square, where `ImageDataset` cuts out the centre.
    """
    from transformers import ViTImageProcessor

    size = {"height": image_size, "width": image_size}
    return ViTImageProcessor(size=size, image_mean=list(normalization.mean), image_std=list(normalization.std))
