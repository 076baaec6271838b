"""Image corpora from the Hugging Face Hub, from local files, or from scikit-learn.

A corpus has three splits and one list of class names. Labels are read at once, images on demand, so that the workers
of a DataLoader decode them.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hf_adafisher.data.images.files import ArraySource, ImageSource, broken_images
from hf_adafisher.data.images.hub import HUB_IMAGES, HubImages
from hf_adafisher.data.images.sampling import held_out_positions, stratified_positions
from hf_adafisher.data.images.tables import LabelledImages, read_folder, read_hub

if TYPE_CHECKING:
    from PIL.Image import Image

logger = logging.getLogger(__name__)

DEFAULT_IMAGES = "digits"
HELD_OUT_FRACTION = 0.1
"""Share of each class's training images that is held out in the absence of a validation split."""
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class ImageSplit:
    """Undecoded images of one split, and their classes.

    Attributes:
        source: Source of the images.
        indices: Indices of the split's images in the source, int64, shape (number,).
        labels: Class numbers, int64, shape (number,).
    """

    source: ImageSource
    indices: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        """Number of images."""
        return len(self.indices)

    def name(self, position: int) -> str:
        """Name of an image for error messages."""
        return self.source.name(int(self.indices[position]))

    def image(self, position: int) -> Image:
        """Decode an image to RGB.

        Raises:
            BrokenImageError: The image cannot be opened or decoded.
        """
        return self.source.read(int(self.indices[position]))

    def select(self, positions: np.ndarray) -> ImageSplit:
        """Subset of the split at the given positions, in their order."""
        return ImageSplit(self.source, self.indices[positions], self.labels[positions])

    def sample(self, count: int, seed: int = 0) -> ImageSplit:
        """Stratified sample of at most ``count`` images, deterministic for a seed."""
        return self if count >= len(self) else self.select(stratified_positions(self.labels, count, seed))


@dataclass(frozen=True)
class ImageCorpus:
    """Three splits of labelled images.

    Attributes:
        name: Corpus name, or "local files".
        train: Training images, at least one.
        validation: Validation images, at least one; held out from ``train`` if the data has none.
        test: Test images; empty if the corpus has no labelled test split.
        class_names: Names by class number.
        source: Provenance of the images, for the records.
        skipped: Reasons by the names of broken images that were left out.
    """

    name: str
    train: ImageSplit
    validation: ImageSplit
    test: ImageSplit
    class_names: tuple[str, ...]
    source: str
    skipped: dict[str, str] = field(default_factory=dict)


def available_images() -> list[str]:
    """List the names that ``load_images`` accepts, the embedded default first."""
    return [DEFAULT_IMAGES, *HUB_IMAGES]


def load_images(
    name: str | None = None,
    *,
    data_dir: str | PathLike[str] | None = None,
    config: str | None = None,
    token: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    validation_fraction: float = HELD_OUT_FRACTION,
    skip_broken: bool = False,
    seed: int = 0,
) -> ImageCorpus:
    """Load labelled images by name or from local files.

    Args:
        name: One of ``available_images()``, the id ("owner/name") of another data set on the Hub, or a local folder as
            ``data_dir``. Default without ``data_dir``: "digits", which needs no network.
        data_dir: Folder of class folders, or of train, validation and test folders with class folders; folder of
            parquet files, or one such file; or folder written by ``save_to_disk`` of ``datasets``.
        config: Configuration of a data set on the Hub.
        token: Of the Hub, for private data sets. Default: that of ``hf auth login``.
        image_column: Column of the images. Default: the only one of that type.
        label_column: Column of the class numbers. Default: "label", or the only column with class names.
        validation_fraction: Share of each class's training images, in (0, 1), that is held out for validation if the
            data has no validation split. Default 0.1.
        skip_broken: Leave out images that cannot be decoded. All images are decoded once for this. With False, the
            default, local files are checked quickly (see ``find_damage``), and a broken one is an error.
        seed: Seed of the choice of held-out images. Default 0.

    Returns:
        The corpus.

    Raises:
        ValueError: The name is unknown, name and folder are both given, there are no images, images are broken, the
            label column is missing or holds no class numbers, there is only one class, or validation or test has a
            class without a training image.
        FileNotFoundError: ``data_dir`` does not exist.
        ConnectionError: A data set of the Hub is neither cached nor reachable.
        ImportError: scikit-learn (for "digits") or pillow is not installed.
    """
    if not 0.0 < validation_fraction < 1.0:
        raise ValueError(f"validation_fraction is {validation_fraction}; it must be more than 0 and less than 1")
    if data_dir is not None and name is not None:
        raise ValueError(f"give either a data set's name (got {name!r}) or data_dir, not both")
    if data_dir is None and name is not None and name not in available_images() and Path(name).exists():
        data_dir = name
    on_hub = data_dir is None and name not in (None, DEFAULT_IMAGES)
    if config is not None and not on_hub:
        raise ValueError(f"a configuration ({config!r}) is one of a data set on the Hub: leave out dataset_config_name")
    if data_dir is not None:
        images = read_folder(Path(data_dir), image_column, label_column)
        title, check = "local files", True
    else:
        title = DEFAULT_IMAGES if name is None else name
        images, check = _by_name(title, image_column, label_column, config, token), False
    splits = {key: ImageSplit(src, np.arange(len(labels)), labels) for key, (src, labels) in images.splits.items()}
    skipped: dict[str, str] = {}
    if check or skip_broken:
        splits, skipped = _without_broken(splits, skip_broken)
    check_classes(splits, images.class_names)
    source = images.source
    if "validation" not in splits:
        train = splits["train"]
        held_out = held_out_positions(train.labels, validation_fraction, seed)
        kept = np.setdiff1d(np.arange(len(train)), held_out)
        splits["train"], splits["validation"] = train.select(kept), train.select(held_out)
        source += f"; validation: {len(held_out)} of {len(train)} training images, stratified, seed {seed}"
        logger.warning("no validation split: %d of %d training images are held out", len(held_out), len(train))
    if "test" not in splits:
        logger.warning("no labelled test split: results will have none")
        splits["test"] = splits["train"].select(np.arange(0))
    train, validation, test = (splits[key] for key in SPLITS)
    return ImageCorpus(title, train, validation, test, images.class_names, source, skipped)


def check_classes(splits: dict[str, ImageSplit], class_names: Sequence[str]) -> None:
    """Check that a classifier can be trained and tested on the labels of the splits.

    Raises:
        ValueError: Training has fewer than 2 classes, a split is empty, or validation or test has a class without a
            training image.
    """
    present = np.unique(splits["train"].labels)
    if len(present) < 2:
        only = f"only the class {class_names[present[0]]!r}" if len(present) else "no images"
        raise ValueError(f"the training split has {only}; a classifier needs images of at least 2 classes")
    for key, split in splits.items():
        if not len(split):
            raise ValueError(f"the {key} split has no images")
        foreign = np.setdiff1d(split.labels, present)
        if len(foreign):
            names = ", ".join(repr(class_names[label]) for label in foreign[:5])
            raise ValueError(
                f"the {key} split has {len(foreign)} classes without a training image: {names}; "
                "add training images of them, or leave them out of the split"
            )


def _without_broken(splits: dict[str, ImageSplit], skip: bool) -> tuple[dict[str, ImageSplit], dict[str, str]]:
    total = sum(map(len, splits.values()))
    if skip:
        logger.info("decoding all %d images once, to leave out the broken ones", total)
    kept, reasons = {}, {}
    for key, split in splits.items():
        broken = broken_images(split.source, split.indices, decode_all=skip)
        reasons.update({split.source.name(index): reason for index, reason in broken.items()})
        kept[key] = split.select(np.flatnonzero(~np.isin(split.indices, list(broken)))) if broken else split
    if not reasons:
        return splits, {}
    shown = "; ".join(f"{image} ({reason})" for image, reason in list(reasons.items())[:5])
    shown += "" if len(reasons) <= 5 else f"; and {len(reasons) - 5} more"
    if not skip:
        raise ValueError(
            f"{len(reasons)} of {total} images are broken: {shown}. Repair or delete them, or use --skip_broken"
        )
    logger.warning("%d of %d images are broken and left out: %s", len(reasons), total, shown)
    return kept, reasons


def _by_name(
    name: str, image_column: str | None, label_column: str | None, config: str | None, token: str | None
) -> LabelledImages:
    if name == DEFAULT_IMAGES:
        return _digits()
    if name in HUB_IMAGES or name.count("/") == 1:
        record = HUB_IMAGES.get(name, HubImages(name))
        return read_hub(name, record, image_column, label_column, config=config, token=token)
    near = difflib.get_close_matches(name.lower(), available_images(), n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    raise ValueError(
        f"unknown data set {name!r}{hint} Known: {', '.join(available_images())}, and OWNER/NAME for any other on the "
        "Hub. For your own images use --data_dir"
    )


def _digits() -> LabelledImages:
    try:
        from sklearn import __version__, datasets
    except ImportError as error:
        raise ImportError(
            "the data set 'digits' is scikit-learn's: pip install 'hf_adafisher[vision]', or use --data_dir"
        ) from error
    digits = datasets.load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    source, labels = ArraySource(images, DEFAULT_IMAGES), digits.target.astype(np.int64)
    held_out = stratified_positions(labels, round(0.2 * len(labels)), 0)
    test = held_out[stratified_positions(labels[held_out], len(held_out) // 2, 0)]
    positions = {
        "train": np.setdiff1d(np.arange(len(labels)), held_out),
        "validation": np.setdiff1d(held_out, test),
        "test": test,
    }
    splits = {
        key: (ArraySource(images[rows], f"{DEFAULT_IMAGES} {key}"), labels[rows]) for key, rows in positions.items()
    }
    return LabelledImages(
        splits,
        tuple(str(name) for name in digits.target_names),
        f"load_digits of scikit-learn {__version__}, {len(source)} images of 8x8, split 80 / 10 / 10, stratified",
    )
