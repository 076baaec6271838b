"""Tables of the datasets library, from the Hugging Face Hub or local, by split."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing"),
}


def is_saved(path: Path) -> bool:
    """Check for a folder that ``save_to_disk`` of datasets wrote."""
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


def load_saved(path: Path) -> dict[str, Any]:
    """Load a folder that ``save_to_disk`` wrote.

    Returns:
        Tables by split; see ``by_split``.

    Raises:
        ValueError: It cannot be read.
    """
    from datasets import load_from_disk

    try:
        return by_split(load_from_disk(str(path)))
    except (OSError, ValueError, KeyError, IndexError) as error:  # the last for a table without rows
        raise ValueError(f"{str(path)!r} cannot be read as a data set saved with save_to_disk: {error}") from error


def load_tables(
    name: str,
    *,
    config: str | None = None,
    token: str | None = None,
    streaming: bool = False,
    title: str = "",
    advice: str = "",
) -> Any:
    """Load a data set, all of its splits under their own names.

    Args:
        name: Id on the Hub, or a local folder or file that ``load_dataset`` can read.
        config: Configuration of the data set.
        token: Of the Hub, for private data sets. Default: that of ``hf auth login``.
        streaming: Read rows as they are needed.
        title: Description of the data set for messages. Default: its name.
        advice: Sentences for the message about a data set that cannot be had.

    Raises:
        ValueError: A local one cannot be read, or there is no such configuration.
        ConnectionError: A data set of the Hub is neither cached nor reachable.
    """
    from datasets import load_dataset

    try:
        return load_dataset(name, config, token=token, streaming=streaming)
    # datasets and its dependencies raise a dozen unrelated types here. The advice is the same for all of them.
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        if Path(name).exists():
            raise ValueError(f"the data set {name!r} cannot be read: {reason}") from error
        if isinstance(error, ValueError) and config is not None:
            raise ValueError(f"the data set {name!r} has no configuration {config!r}: {error}") from error
        raise ConnectionError(
            f"could not load {title or f'the data set {name!r}'} on the Hugging Face Hub: it is not in the local cache "
            f"and the Hub gave no answer ({reason}). {advice}"
        ) from error


def split_of(name: str) -> str | None:
    """Split by the first word of a name, such as train, train-00000-of-00001 or validation_2; None if unknown."""
    word = "".join(c if c.isalpha() else " " for c in name.lower()).split()[:1]
    return next((split for split, words in SPLIT_WORDS.items() if word and word[0] in words), None)


def by_split(tables: Any) -> dict[str, Any]:
    """Return tables under the names train, validation and test; a table without splits is ``train``."""
    if not isinstance(tables, Mapping):
        return {"train": tables}
    found: dict[str, Any] = {}
    for key, table in tables.items():
        split = split_of(str(key))
        if split is None:
            logger.warning("split %r is not used: it is none of train, validation and test", key)
        else:
            found.setdefault(split, table)
    return found
