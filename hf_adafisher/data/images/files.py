"""Where images come from, one at a time and undecoded: folders, tables of the datasets library, arrays."""

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
    """An image that cannot be decoded; the message names it."""


class ImageSource(Protocol):
    """Images that are read when they are needed; small enough to be sent to every worker."""

    def __len__(self) -> int:
        """Number of images."""

    def name(self, index: int) -> str:
        """What to call an image in an error: its path, or the table and row."""

    def open(self, index: int) -> BinaryIO:
        """The encoded file. Raises OSError if it cannot be read."""

    def read(self, index: int) -> Image:
        """The image as RGB. Raises BrokenImageError."""


class EncodedSource:
    """What all sources of encoded files share: decoding."""

    def read(self, index: int) -> Image:
        """The image as RGB. Raises BrokenImageError."""
        try:
            with self.open(index) as file:
                return decode(file)
        except BrokenImageError as error:
            raise BrokenImageError(f"image {self.name(index)!r} cannot be read: {error}") from error
        except OSError as error:
            raise BrokenImageError(f"image {self.name(index)!r} cannot be opened: {error}") from error

    def name(self, index: int) -> str:
        """What to call an image in an error."""
        raise NotImplementedError

    def open(self, index: int) -> BinaryIO:
        """The encoded file."""
        raise NotImplementedError


class FileSource(EncodedSource):
    """Image files on disk."""

    def __init__(self, paths: list[Path]) -> None:
        self.paths = [str(path) for path in paths]

    def __len__(self) -> int:
        """Number of images."""
        return len(self.paths)

    def name(self, index: int) -> str:
        """The file's path."""
        return self.paths[index]

    def open(self, index: int) -> BinaryIO:
        """The file."""
        return open(self.paths[index], "rb")


class TableSource(EncodedSource):
    """A column of images of a `datasets.Dataset`."""

    def __init__(self, table: Any, column: str, title: str) -> None:
        from datasets import Image as ImageFeature

        self.table = table.select_columns([column]).cast_column(column, ImageFeature(decode=False))
        self.column = column
        self.title = title

    def __len__(self) -> int:
        """Number of images."""
        return len(self.table)

    def name(self, index: int) -> str:
        """The table, the row, and the file's name where the table has one."""
        path = (self.table[int(index)][self.column] or {}).get("path")
        return f"{self.title}, row {index}" + (f" ({path})" if path else "")

    def open(self, index: int) -> BinaryIO:
        """The encoded image: its bytes, or the file that the row names."""
        cell = self.table[int(index)][self.column]
        if cell is None or (cell["bytes"] is None and not cell["path"]):
            raise OSError("the cell is empty")
        return io.BytesIO(cell["bytes"]) if cell["bytes"] is not None else open(cell["path"], "rb")


class ArraySource:
    """Images in memory, uint8: (number, height, width) for grey ones, or (number, height, width, 3)."""

    def __init__(self, images: np.ndarray, title: str) -> None:
        self.images = images
        self.title = title

    def __len__(self) -> int:
        """Number of images."""
        return len(self.images)

    def name(self, index: int) -> str:
        """The array's title and the image's number."""
        return f"{self.title}, number {index}"

    def open(self, index: int) -> BinaryIO:
        """The image as a PNG file."""
        file = io.BytesIO()
        self.read(index).save(file, "PNG")
        file.seek(0)
        return file

    def read(self, index: int) -> Image:
        """The image as RGB."""
        from PIL import Image

        return Image.fromarray(self.images[index]).convert("RGB")


def decode(file: BinaryIO) -> Image:
    """Decodes an image file of any mode to RGB, upright.

    What is transparent becomes white: the colours below an alpha of 0 are arbitrary. 16-bit grey is scaled to 8 bits;
    of an animation, the first frame is taken.

    Raises:
        BrokenImageError: a file of zero bytes, no image, or damaged.
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
    """Converts an image of any mode to RGB, on white where it is transparent."""
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
    """Says what is wrong with an image file from its first and last bytes, or None; fast enough for a whole data set.

    Finds files of zero bytes, files that are no images, and truncated ones. Damage in the middle of a file is found
    only by `decode`.
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
    """Returns the images that cannot be read, by index, with the reason.

    Args:
        source: the images.
        indices: which of them to look at.
        decode_all: decode every image, which finds all damage, instead of looking at both ends of the file.
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
        found = pool.map(damage, indices)
        return {index: reason for index, reason in zip(indices, found, strict=True) if reason is not None}
