"""Hashes of a split's content and of files, by which data that changed under the same name is told."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hf_adafisher.data.images.corpora import ImageSplit


def file_sha256(path: str | PathLike[str]) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal digits."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def text_sha256(lines: Sequence[str]) -> str:
    """SHA-256 of the lines of a split, each with its newline."""
    digest = hashlib.sha256()
    for line in lines:
        digest.update(line.encode("utf-8", "surrogatepass"))
        digest.update(b"\n")
    return digest.hexdigest()


def images_sha256(split: ImageSplit) -> str:
    """SHA-256 of the labels and images of a split, in order; of a large file, its size and both ends are taken."""
    digest = hashlib.sha256(split.labels.astype("<i8").tobytes())
    for index in split.indices:
        sample = split.source.sample_bytes(int(index))
        digest.update(len(sample).to_bytes(8, "little"))
        digest.update(sample)
    return digest.hexdigest()
