"""Identity of a cell: its folder, and the record of its arguments, data and source code beside the result."""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Collection, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from hf_adafisher.data.fingerprint import file_sha256
from hf_adafisher.experiments.comparison.cells import Cell, canonical
from hf_adafisher.experiments.comparison.schema import anything, listing, mapping, optional, scalar, text
from hf_adafisher.experiments.outputs import source_state, write_json
from hf_adafisher.experiments.runs.run import RESULTS_FILE
from hf_adafisher.experiments.settings_files import read_json

COMMAND_FILE = "command.json"
_DATA = ("train_file", "validation_file", "test_file", "data_dir", "train_dir")
_DATA_SETS = ("dataset", "dataset_name")
_MODELS = ("model_name_or_path", "config_name", "tokenizer_name", "embeddings_from")
_INPUTS = (*_DATA, *_DATA_SETS, *_MODELS)
_SCHEDULE = ("max_steps", "num_train_epochs")
_HASHED_BYTES = 1 << 30
"""Size from which the files of a folder are told apart by name and size, not by content: ImageNet has 150 GB."""
_RECORD = mapping(
    {
        "name": text,
        "arguments": mapping(others=anything),
        "data": mapping(others=optional(text)),
        "software": mapping(others=text),
        "archived": anything,
    },
    required=("arguments", "data", "software"),
)
_COMMAND_LINE = listing(scalar)  # the record of earlier versions


def cell_folder(output_dir: Path, cell: Cell) -> Path:
    """Return the folder of a cell; one of an earlier version, which had the settings in its name, if there is one."""
    folder, old = output_dir / cell.folder_name, cell.name
    plain = Path(old).name == old and old not in (".", "..") and len(os.fsencode(old)) < 256
    return output_dir / old if plain and not folder.exists() and (output_dir / old / RESULTS_FILE).exists() else folder


def write_record(cell: Cell, folder: Path) -> None:
    """Write ``command.json``: what a result in this folder belongs to."""
    folder.mkdir(parents=True, exist_ok=True)
    record = {
        "name": cell.name,
        "arguments": cell.all_settings,
        "data": data_fingerprints(cell),
        "software": source_state(),
    }
    write_json(folder / COMMAND_FILE, record)


def read_record(folder: Path) -> dict[str, Any] | None:
    """Read ``command.json``, or None if there is none.

    Raises:
        ValueError: It is damaged.
    """
    path = folder / COMMAND_FILE
    if not path.exists():
        return None
    record = read_json(path)
    if isinstance(record, list):
        _COMMAND_LINE(record, str(path))
        return {"arguments": _parsed(record), "data": {}, "software": {}}
    _RECORD(record, str(path))
    return dict(record)


def difference(cell: Cell, record: Mapping[str, Any], planned: bool = True) -> str:
    """Describe what a recorded result has else than a cell: arguments or data; empty if nothing.

    Args:
        cell: As it would run now.
        record: Of the result.
        planned: The steps of the cell are known.
    """
    archived = record.get("archived", False)  # compared when it was archived: the data may be gone by now
    data, recorded = {} if archived else data_fingerprints(cell), record["data"]
    both = [name for name in data if data[name] is not None and recorded.get(name) is not None]
    changed = [name for name in both if data[name] != recorded[name]]
    if changed:
        return f"other data ({', '.join(changed)} changed)"
    left_out = {*both, *(() if planned else _SCHEDULE), *(_INPUTS if archived else ())}
    if "dataset" in both:  # that of none is the default's
        left_out |= set(_DATA_SETS)
    own, theirs = canonical(cell.all_settings), canonical(record["arguments"])
    keys = [key for key in {**own, **theirs} if key not in left_out and own.get(key) != theirs.get(key)]
    parts = [f"{key}: {_shown(theirs.get(key))} there, {_shown(own.get(key))} here" for key in keys]
    return f"other arguments ({'; '.join(parts)})" if parts else ""


def data_fingerprints(cell: Cell) -> dict[str, str | None]:
    """Return a fingerprint of each input of a run, by argument: data sets, files and folders.

    Local files and folders are hashed. A data set is known by name and version. None: a local file that is not there.
    """
    settings = cell.all_settings
    found: dict[str, str | None] = {}
    for name in _DATA:
        if settings.get(name) is not None:
            given = settings[name] if isinstance(settings[name], list) else [settings[name]]
            hashes = [_fingerprint(Path(str(path))) for path in given]
            found[name] = None if None in hashes else " ".join(map(str, hashes))
    for name in (*_MODELS, *_DATA_SETS):  # a name of the Hub is no file
        if settings.get(name) is not None and Path(str(settings[name])).exists():
            found[name] = _fingerprint(Path(str(settings[name])))
    if not any(name in settings for name in _DATA) and not any(name in found for name in _DATA_SETS):
        found["dataset"] = _named(cell.task, settings.get("dataset", settings.get("dataset_name")))
    return found


def _fingerprint(path: Path) -> str | None:
    if path.is_file():
        status = path.stat()
        return _file(str(path.resolve()), status.st_mtime_ns, status.st_size)
    if not path.is_dir():
        return None
    files = sorted(item for item in path.rglob("*") if item.is_file())
    listing_ = tuple(
        (item.relative_to(path).as_posix(), item.stat().st_mtime_ns, item.stat().st_size) for item in files
    )
    return _folder(str(path.resolve()), listing_)


# Asked again for every cell: a file is read again only if its time or size is another one.
@functools.cache
def _file(path: str, modified: int, size: int) -> str:
    return file_sha256(path)


@functools.lru_cache(maxsize=16)
def _folder(path: str, files: tuple[tuple[str, int, int], ...]) -> str:
    small = sum(size for _, _, size in files) <= _HASHED_BYTES
    digest = hashlib.sha256()
    for name, modified, size in files:
        content = _file(str(Path(path) / name), modified, size) if small else str(size)
        digest.update(f"{name}\0{content}\n".encode(errors="surrogateescape"))
    return digest.hexdigest() if small else f"{digest.hexdigest()} of names and sizes"


def _named(task: str, name: str | None) -> str:
    from hf_adafisher.data.images.corpora import DEFAULT_IMAGES
    from hf_adafisher.data.text.corpora import DEFAULT_CORPUS, HUB_CORPORA

    name = name or {"clm": DEFAULT_CORPUS, "image": DEFAULT_IMAGES}[task]
    if name == DEFAULT_CORPUS:
        import pydoc_data.topics

        return f"{name} {_fingerprint(Path(pydoc_data.topics.__file__))}"
    if name == DEFAULT_IMAGES:
        return f"{name} of scikit-learn {_version('scikit-learn')}"
    return f"{name} {HUB_CORPORA[name].revision}" if name in HUB_CORPORA else name


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _parsed(words: Sequence[Any]) -> dict[str, Any]:
    """Arguments of a command line, by name."""
    found: dict[str, list[str]] = {}
    name = ""
    for word in map(str, words):
        if word.startswith("--"):
            name = word[2:]
            found[name] = []
        elif name:
            found[name].append(word)
    return {name: values[0] if len(values) == 1 else values for name, values in found.items()}


def _shown(values: Collection[str] | None) -> str:
    return "none" if values is None else " ".join(values)
