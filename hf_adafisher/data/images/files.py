"""Sources of undecoded images (files, tables, arrays), and their decoding."""

from __future__ import annotations

import io
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGE_SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".pbm"))

_ENDINGS = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}
_TAIL = 4096  # some writers pad their files with zeros


class BrokenImageError(ValueError):
    """Image that cannot be decoded; the message names it."""


class ImageSource(Protocol):
    """Images that are read on demand, in the workers of a DataLoader."""

    def __len__(self) -> int:
        """Number of images."""

    def name(self, index: int) -> str:
        """Name of an image for error messages: its path, or its table and row."""

    def open(self, index: int) -> BinaryIO:
        """Open the encoded image.

        Raises:
            OSError: The image cannot be opened.
        """

    def sample_bytes(self, index: int) -> bytes:
        """Read enough of an image to tell it from any other; empty if it cannot be opened."""

    def read(self, index: int) -> Image:
        """Decode an image to RGB.

        Raises:
            BrokenImageError: The image cannot be opened or decoded.
        """


class EncodedSource:
    """Base class of sources of encoded images."""

    def read(self, index: int) -> Image:
        """Decode an image to RGB.

        Raises:
            BrokenImageError: The image cannot be opened or decoded.
        """
        try:
            with self.open(index) as file:
                return decode(file)
        except BrokenImageError as error:
            raise BrokenImageError(f"image {self.name(index)!r} cannot be read: {error}") from error
        except OSError as error:
            raise BrokenImageError(f"image {self.name(index)!r} cannot be opened: {error}") from error

    def sample_bytes(self, index: int) -> bytes:
        """Read all of a small file; of a large one its size and both ends, where the compressed pixels are."""
        try:
            with self.open(index) as file:
                length = file.seek(0, io.SEEK_END)
                file.seek(0)
                if length <= 2 * _TAIL:
                    return file.read()
                return length.to_bytes(8, "little") + file.read(_TAIL) + _tail(file)
        except OSError:
            return b""

    def name(self, index: int) -> str:
        """Name of an image for error messages."""
        raise NotImplementedError

    def open(self, index: int) -> BinaryIO:
        """Open the encoded image."""
        raise NotImplementedError


class FileSource(EncodedSource):
    """Image files on disk.

    Args:
        paths: Paths of the files.
    """

    def __init__(self, paths: list[Path]) -> None:
        self.paths = [str(path) for path in paths]

    def __len__(self) -> int:
        """Number of images."""
        return len(self.paths)

    def name(self, index: int) -> str:
        """Path of the file."""
        return self.paths[index]

    def open(self, index: int) -> BinaryIO:
        """Open the file."""
        return open(self.paths[index], "rb")


class TableSource(EncodedSource):
    """Image column of a ``datasets.Dataset``.

    Args:
        table: The data set.
        column: Name of the column.
        title: Name of the table in error messages.
    """

    def __init__(self, table: Any, column: str, title: str) -> None:
        from datasets import Image as ImageFeature

        self.table = table.select_columns([column]).cast_column(column, ImageFeature(decode=False))
        self.column = column
        self.title = title

    def __len__(self) -> int:
        """Number of images."""
        return len(self.table)

    def name(self, index: int) -> str:
        """Title, row and, if the table has one, file name."""
        path = (self.table[int(index)][self.column] or {}).get("path")
        return f"{self.title}, row {index}" + (f" ({path})" if path else "")

    def open(self, index: int) -> BinaryIO:
        """Open the bytes in the cell, or the file that it names.

        Raises:
            OSError: The cell is empty, or the file cannot be opened.
        """
        cell = self.table[int(index)][self.column]
        if cell is None or (cell["bytes"] is None and not cell["path"]):
            raise OSError("the cell is empty")
        return io.BytesIO(cell["bytes"]) if cell["bytes"] is not None else open(cell["path"], "rb")


class ArraySource:
    """Images in memory.

    Args:
        images: uint8, shape (number, height, width) for grey images or (number, height, width, 3).
        title: Name of the array in error messages.
    """

    def __init__(self, images: np.ndarray, title: str) -> None:
        self.images = images
        self.title = title

    def __len__(self) -> int:
        """Number of images."""
        return len(self.images)

    def name(self, index: int) -> str:
        """Title and position of the image."""
        return f"{self.title}, number {index}"

    def sample_bytes(self, index: int) -> bytes:
        """Pixels of the image."""
        return self.images[index].tobytes()

    def open(self, index: int) -> BinaryIO:
        """Encode the image as a PNG file in memory."""
        file = io.BytesIO()
        self.read(index).save(file, "PNG")
        file.seek(0)
        return file

    def read(self, index: int) -> Image:
        """Convert the image to RGB."""
        from PIL import Image

        return Image.fromarray(self.images[index]).convert("RGB")


def decode(file: BinaryIO) -> Image:
    """Decode an image file of any mode to RGB, with the EXIF orientation applied.

    Transparent pixels become white, since colours under an alpha of 0 are arbitrary. 16-bit grey is scaled to 8 bits.
    An animation gives its first frame.

    Raises:
        BrokenImageError: The file is empty, no image, or damaged.
    """
    from PIL import Image, ImageOps

    if not file.read(1):
        raise BrokenImageError("the file has zero bytes")
    file.seek(0)
    try:
        with Image.open(file) as image:
            image.load()
            return to_rgb(ImageOps.exif_transpose(image))
    # Decoders raise a dozen unrelated types on damaged files (SyntaxError and struct.error among them).
    except Exception as error:
        raise BrokenImageError(f"{type(error).__name__}: {error}") from error


def to_rgb(image: Image) -> Image:
    """Convert an image of any mode to RGB, on a white background."""
    from PIL import Image

    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):  # convert() would clip 16-bit values at 255
        values = np.asarray(image).astype(np.int64)
        return Image.fromarray((values.clip(0, 65535) // 256).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def find_damage(file: BinaryIO) -> str | None:
    """Check an image file by its first and last bytes, fast enough for a complete data set.

    It finds empty files, files that are no images, and truncated ones. Damage in the middle is found by ``decode``
    only.

    Returns:
        The damage in words, or None.
    """
    from PIL import Image

    if not file.read(1):
        return "the file has zero bytes"
    file.seek(0)
    try:
        with Image.open(file) as image:
            ending = _ENDINGS.get(image.format or "")
            if ending is not None and _tail(file).rstrip(b"\0").endswith(ending):
                return None
            file.seek(0)
            decode(file)  # another format, or something follows the image: only decoding tells
    except BrokenImageError as error:
        return str(error)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def _tail(file: BinaryIO) -> bytes:
    length = file.seek(0, io.SEEK_END)
    file.seek(max(0, length - _TAIL))
    return file.read()


def broken_images(source: ImageSource, indices: Iterable[int], *, decode_all: bool) -> dict[int, str]:
    """Find images that cannot be read.

    Args:
        source: The images.
        indices: Indices of the images to check.
        decode_all: Decode every image, which finds all damage, instead of checking both ends of the file.

    Returns:
        Reasons by index.
    """

    def damage(index: int) -> str | None:
        try:
            with source.open(index) as file:
                if not decode_all:
                    return find_damage(file)
                decode(file)
        except (BrokenImageError, OSError) as error:
            return str(error)
        return None

    indices = [int(index) for index in indices]
    with ThreadPoolExecutor() as pool:  # reading and decoding leave Python's lock
        reasons = pool.map(damage, indices)
        return {index: reason for index, reason in zip(indices, reasons, strict=True) if reason is not None}
