"""Small image files for the tests: folders of classes, damaged files, every mode of pixels."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = {"blue": (0, 0, 255), "green": (0, 255, 0), "red": (255, 0, 0)}


def picture(colour: tuple[int, int, int] = (0, 0, 255), size: tuple[int, int] = (12, 8), seed: int = 0) -> Image.Image:
    """A picture of one colour with some noise, so that no two are alike."""
    noise = np.random.default_rng(seed).integers(0, 40, (size[1], size[0], 3))
    return Image.fromarray(np.clip(np.asarray(colour) - 20 + noise, 0, 255).astype(np.uint8))


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    """The image as a file's bytes."""
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def class_folders(root: Path, counts: dict[str, int], suffix: str = ".png") -> Path:
    """A folder ``root`` with one folder per class and so many pictures in each."""
    for number, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True)
        for index in range(count):
            image = picture(COLOURS.get(name, (90, 90, 90)), seed=1000 * number + index)
            image.save(root / name / f"{index:03d}{suffix}")
    return root
