"""Readers of labelled images: Hub data sets, parquet files, ``save_to_disk`` folders, and image folders."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hf_adafisher.data.images.files import IMAGE_SUFFIXES, FileSource, ImageSource, TableSource
from hf_adafisher.data.images.hub import HubImages
from hf_adafisher.data.tables import SPLIT_WORDS, by_split, is_saved, load_saved, load_tables, split_of

logger = logging.getLogger(__name__)

_ENCODED = ("binary", "large_binary", "string")  # bytes of files, or their paths
_FEW_CLASSES, _GAPS = 1000, 10
"""Class numbers without names may have gaps up to here, or up to so many times their count."""


@dataclass(frozen=True)
class LabelledImages:
    """Images and labels as a reader returns them, before missing splits are made.

    Attributes:
        splits: Images and class numbers (int64) by split; "train" is always there.
        class_names: Names by class number.
        source: Provenance of the images, for the records.
    """

    splits: Mapping[str, tuple[ImageSource, np.ndarray]]
    class_names: tuple[str, ...]
    source: str


def read_hub(
    name: str,
    record: HubImages,
    image_column: str | None,
    label_column: str | None,
    *,
    config: str | None = None,
    token: str | None = None,
) -> LabelledImages:
    """Read a data set from the Hub or its local cache.

    Args:
        name: Name in error messages.
        record: The data set.
        image_column: Column of the images, instead of the record's.
        label_column: Column of the class numbers, instead of the record's.
        config: Configuration of the data set.
        token: Of the Hub. Default: that of ``hf auth login``.

    Returns:
        The images of the splits with labels.

    Raises:
        ConnectionError: The data set is neither cached nor reachable.
        ValueError: A column is missing or has the wrong type, a label is out of range, or there is no training split.
    """
    tables = load_tables(
        record.path,
        config=config,
        token=token,
        title=f"the data set {name!r}, which is {record.describe()}",
        advice="Without a network, give local files with --data_dir, or use --dataset digits. For a data set with "
        "terms, accept them on its page and log in with `hf auth login`",
    )
    if record.splits is not None:
        tables = {ours: tables[theirs] for ours, theirs in record.splits}
    columns = (image_column or record.image_column, label_column or record.label_column)
    return _from_tables(by_split(tables), *columns, record.describe())


def read_folder(path: Path, image_column: str | None, label_column: str | None) -> LabelledImages:
    """Read local images in any layout that ``load_images`` accepts as ``data_dir``.

    Raises:
        FileNotFoundError: ``path`` does not exist.
        ValueError: The layout is unknown, a file cannot be read, or there are no images.
    """
    if not path.exists():
        raise FileNotFoundError(f"{str(path)!r} does not exist; give a folder of images or of parquet files")
    if is_saved(path):
        return _from_tables(load_saved(path), image_column, label_column, f"{path} (save_to_disk)")
    files = [path] if path.is_file() else sorted([*path.glob("*.parquet"), *path.glob("data/*.parquet")])
    if path.is_file() and path.suffix != ".parquet":
        raise ValueError(f"{str(path)!r} is neither a folder nor a parquet file")
    if files:
        return _from_tables(_parquet(files), image_column, label_column, f"{path} (parquet)")
    return _image_folder(path)


def _parquet(files: list[Path]) -> dict[str, Any]:
    from datasets import Dataset

    named: dict[str, list[str]] = {}
    for file in files:
        if not file.stat().st_size:
            raise ValueError(f"parquet file {str(file)!r} has zero bytes")
        named.setdefault(split_of(file.stem) or "train", []).append(str(file))
    tables = {}
    for split, paths in named.items():
        try:
            tables[split] = Dataset.from_parquet(paths)
        except Exception as error:  # of datasets, of Arrow, or of the file system
            cause = error.__cause__ or error
            raise ValueError(f"parquet files {', '.join(paths)} cannot be read: {cause}") from error
    return tables


def _from_tables(
    tables: dict[str, Any], image_column: str | None, label_column: str | None, source: str
) -> LabelledImages:
    if "train" not in tables:
        raise ValueError(f"{source} has no training split (found: {', '.join(tables) or 'none'})")
    names: list[str] | None = None
    splits: dict[str, tuple[ImageSource, np.ndarray]] = {}
    for split, table in tables.items():
        location = f"{source}, {split}"
        image = _image_column(table.features, image_column, location)
        label = _label_column(table.features, label_column, location)
        split_names = getattr(table.features[label], "names", None)
        if names is not None and split_names is not None and list(split_names) != names:
            raise ValueError(
                f"{location}: its class names {split_names[:5]} are not those of the training split, {names[:5]}"
            )
        names = list(split_names) if split_names is not None else names
        labels = np.asarray([-1 if value is None else value for value in table.with_format(None)[label][:]], np.int64)
        if split != "train" and len(labels) and (labels == -1).all():
            logger.warning("%s has no labels (all are missing or -1) and is not used", location)
            continue
        _check_labels(labels, location, names)
        splits[split] = (TableSource(table, image, location), labels)
    highest = max((int(labels.max()) for _, labels in splits.values() if len(labels)), default=-1)
    if not names:
        _check_gaps({split: labels for split, (_, labels) in splits.items()}, source, highest)
    return LabelledImages(splits, tuple(names or map(str, range(highest + 1))), source)


def _image_column(features: Mapping[str, Any], requested: str | None, location: str) -> str:
    from datasets import Image, Value

    if requested is not None and requested not in features:
        raise ValueError(f"{location} has no column {requested!r}; its columns: {', '.join(features)}")
    typed = [key for key, kind in features.items() if isinstance(kind, Image)]
    named = [key for key in ("image", "img", "pixel_values") if key in features]
    column = requested or (typed[0] if len(typed) == 1 else named[0] if named else None)
    if column is None:
        raise ValueError(
            f"{location}: which column has the images? Give --image_column; columns: {', '.join(features)}"
        )
    kind = features[column]
    encoded = isinstance(kind, Image) or (isinstance(kind, Value) and kind.dtype in _ENCODED)
    if not encoded and not (isinstance(kind, dict) and set(kind) == {"bytes", "path"}):
        raise ValueError(f"{location}: column {column!r} has the type {kind}, which is no image; give --image_column")
    return column


def _label_column(features: Mapping[str, Any], requested: str | None, location: str) -> str:
    from datasets import ClassLabel, Value

    if requested is not None and requested not in features:
        raise ValueError(f"{location} has no label column {requested!r}; its columns: {', '.join(features)}")
    classes = [key for key, kind in features.items() if isinstance(kind, ClassLabel)]
    named = [key for key in ("label", "labels") if key in features]
    column = requested or (named[0] if named else classes[0] if len(classes) == 1 else None)
    if column is None:
        raise ValueError(
            f"{location} has no column 'label'; give the label column with --label_column: {', '.join(features)}"
        )
    kind = features[column]
    integer = isinstance(kind, Value) and kind.dtype.lstrip("u").startswith("int")
    if not integer and not isinstance(kind, ClassLabel):
        raise ValueError(
            f"{location}: label column {column!r} has the type {getattr(kind, 'dtype', kind)}; it must hold "
            "class numbers (integers or ClassLabel). Text becomes so with datasets' class_encode_column"
        )
    return column


def _check_labels(labels: np.ndarray, location: str, names: list[str] | None) -> None:
    bad = np.flatnonzero((labels < 0) | (labels >= (len(names) if names else np.inf)))
    if len(bad):
        label = "no label" if labels[bad[0]] == -1 else f"the label {labels[bad[0]]}"
        allowed = f"0 to {len(names) - 1}" if names else "0 or more"
        raise ValueError(
            f"{location}: row {bad[0]} has {label} ({len(bad)} such rows); class numbers must be {allowed}"
        )


def _check_gaps(labels: Mapping[str, np.ndarray], source: str, highest: int) -> None:
    """Refuse class numbers far beyond their count: one wrong label would make the head and its tables enormous."""
    distinct = len(np.unique(np.concatenate([*labels.values()]))) if labels else 0
    if highest >= max(_FEW_CLASSES, _GAPS * distinct):
        split = next(split for split, values in labels.items() if len(values) and values.max() == highest)
        raise ValueError(
            f"{source}, {split}: row {int(np.argmax(labels[split]))} has the label {highest}, far out of the range of "
            f"the {distinct} different labels; class numbers must be 0 to {distinct - 1}, or the column a ClassLabel, "
            "with the names of the classes"
        )


def _image_folder(path: Path) -> LabelledImages:
    children = sorted(child for child in path.iterdir() if child.is_dir() and not child.name.startswith("."))
    roots = {split: child for child in children for split, words in SPLIT_WORDS.items() if child.name.lower() in words}
    if "train" not in roots:
        if roots and len(roots) == len(children):
            raise ValueError(f"{str(path)!r} has no train folder besides {', '.join(map(str, roots.values()))}")
        roots = {"train": path}
    files = {split: _class_files(root) for split, root in roots.items()}
    names = tuple(files["train"])
    splits: dict[str, tuple[ImageSource, np.ndarray]] = {}
    for split, by_class in files.items():
        foreign = [name for name in by_class if name not in names]
        if foreign:
            raise ValueError(
                f"{str(roots[split])!r} has classes without a folder in {str(roots['train'])!r}: "
                f"{', '.join(map(repr, foreign[:5]))}"
            )
        labels = [names.index(name) for name, paths in by_class.items() for _ in paths]
        files_of_split = [file for class_files in by_class.values() for file in class_files]
        splits[split] = (FileSource(files_of_split), np.asarray(labels, dtype=np.int64))
    return LabelledImages(splits, names, f"{path} (image folder)")


def _class_files(root: Path) -> dict[str, list[Path]]:
    folders = sorted(child for child in root.iterdir() if child.is_dir() and not child.name.startswith("."))
    by_class = {folder.name: sorted(file for file in folder.rglob("*") if _is_image(file)) for folder in folders}
    if not any(by_class.values()):
        loose = sum(map(_is_image, root.iterdir()))
        hint = f" (its {loose} images are in no class folder)" if loose else ""
        raise ValueError(
            f"{str(root)!r} holds no images in class folders{hint}; expected CLASS/IMAGE files with one of the endings "
            f"{', '.join(sorted(IMAGE_SUFFIXES))}, or parquet files"
        )
    empty = [folder for folder in folders if not by_class[folder.name]]
    if empty:
        raise ValueError(f"class folder {str(empty[0])!r} holds no images; fill it or delete it")
    return by_class


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".") and path.is_file()
