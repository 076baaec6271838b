"""Cutout, Mixup and CutMix of image batches.

They are implemented here, since the libraries differ from the papers and from each other. Kornia's erasing stays inside
the image and its Mixup has no alpha; torchvision mixes each image with its neighbour.
"""

from __future__ import annotations

import torch
from torch import Tensor


def cutout(pixels: Tensor, side: int) -> Tensor:
    """Cutout: set one random square of each image to 0 (DeVries and Taylor 2017, arXiv 1708.04552).

    After normalisation, 0 is the mean colour. The centre is uniform over the image, so part of the square may lie
    outside.

    Args:
        pixels: Images, shape (batch, channels, height, width).
        side: Side of the square, in pixels.

    Returns:
        New images of the same shape.
    """
    batch, _, height, width = pixels.shape
    top, left = (torch.randint(length, (batch, 1)) - side // 2 for length in (height, width))
    rows, columns = torch.arange(height), torch.arange(width)
    inside_rows, inside_columns = (rows >= top) & (rows < top + side), (columns >= left) & (columns < left + side)
    hole = inside_rows[:, None, :, None] & inside_columns[:, None, None, :]
    return pixels.masked_fill(hole, 0.0)


def mixup(pixels: Tensor, probabilities: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """Mixup: mix images and labels with those of a random permutation (Zhang et al. 2018, arXiv 1710.09412).

    Args:
        pixels: Images, shape (batch, channels, height, width).
        probabilities: Class probabilities, shape (batch, classes).
        alpha: The weight of the first image is drawn once per batch from Beta(alpha, alpha).

    Returns:
        Mixed images and class probabilities.
    """
    weight = _beta(alpha)
    other = torch.randperm(len(pixels))
    mixed = weight * pixels + (1 - weight) * pixels[other]
    return mixed, weight * probabilities + (1 - weight) * probabilities[other]


def cutmix(pixels: Tensor, probabilities: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """CutMix: paste a rectangle of another image, labels by area (Yun et al. 2019, arXiv 1905.04899).

    The rectangle has the image's aspect ratio and the share ``1 - weight`` of its area. Its centre is uniform over the
    image, and it is clipped at the borders; labels are mixed by the clipped area.

    Args:
        pixels: Images, shape (batch, channels, height, width).
        probabilities: Class probabilities, shape (batch, classes).
        alpha: ``weight`` is drawn once per batch from Beta(alpha, alpha).

    Returns:
        Mixed images and class probabilities.
    """
    height, width = pixels.shape[-2:]
    scale = (1 - _beta(alpha)) ** 0.5
    other = torch.randperm(len(pixels))
    (top, bottom), (left, right) = (_interval(length, round(length * scale)) for length in (height, width))
    mixed = pixels.clone()
    mixed[..., top:bottom, left:right] = pixels[other][..., top:bottom, left:right]
    weight = 1 - (bottom - top) * (right - left) / (height * width)
    return mixed, weight * probabilities + (1 - weight) * probabilities[other]


def _interval(length: int, side: int) -> tuple[int, int]:
    start = int(torch.randint(length, ())) - side // 2
    return max(start, 0), min(start + side, length)


def _beta(alpha: float) -> float:
    return float(torch.distributions.Beta(alpha, alpha).sample())
