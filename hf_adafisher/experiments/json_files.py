"""Strict reading of JSON files, with errors that name the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_json(path: Path) -> Any:
    """Read a JSON file in UTF-8, UTF-16 or UTF-32, with or without a byte order mark.

    Raises:
        FileNotFoundError: It does not exist.
        ValueError: It is no JSON, has NaN or Infinity, the same key twice in one object, or is nested too deeply.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} {'is no file' if path.exists() else 'does not exist'}; give a JSON file")
    return parse_json(path.read_bytes(), str(path))


def parse_json(content: bytes, place: str) -> Any:
    """Parse JSON as ``read_json`` does.

    Args:
        content: The text, encoded.
        place: Where it stands, for the error.

    Raises:
        ValueError: See ``read_json``.
    """
    try:
        return json.loads(content, parse_constant=_no_number, object_pairs_hook=_unique)
    except RecursionError:
        raise ValueError(f"{place} is nested too deeply") from None
    except ValueError as error:  # of the decoder, of the text encoding, or of the two functions below
        raise ValueError(f"{place} is no valid JSON: {error}") from None


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no number of JSON")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in found if keys.count(key) > 1)!r} stands there twice")
    return found
