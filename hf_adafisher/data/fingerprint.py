"""Fingerprints of data files."""

from __future__ import annotations

import hashlib
from os import PathLike
from pathlib import Path


def file_sha256(path: str | PathLike[str]) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal digits."""
    with Path(path).open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
