"""Strict reading of JSON and YAML files, with errors that name the file."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml


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


SUFFIXES = (".json", ".yaml", ".yml")


def read_settings(path: Path) -> Any:
    """Read a file by its ending.

    Raises:
        FileNotFoundError: It does not exist.
        ValueError: It is no JSON or YAML, has the same key twice in one object, or an ending that is none of
            ``SUFFIXES``.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"{path} must end in one of {', '.join(SUFFIXES)}")
    if path.suffix.lower() == ".json":
        return read_json(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} {'is no file' if path.exists() else 'does not exist'}; give a YAML file")
    try:
        return yaml.load(path.read_bytes(), _StrictLoader)
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no valid YAML: {' '.join(str(error).split())}") from None


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses repeated keys, and takes true and false alone as booleans.

    By YAML 1.1 the ``no`` of ``eval_strategy: no`` would be false.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        found = super().construct_mapping(node, deep)
        if len(found) < len(node.value):
            keys = [key.value for key, _ in node.value]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise yaml.constructor.ConstructorError(None, None, f"the key {twice!r} stands there twice")
        return found


_BOOLEAN = "tag:yaml.org,2002:bool"
_StrictLoader.yaml_implicit_resolvers = {
    letter: [(tag, pattern) for tag, pattern in resolvers if tag != _BOOLEAN]
    for letter, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_StrictLoader.add_implicit_resolver(_BOOLEAN, re.compile("^(?:true|false)$", re.IGNORECASE), list("tTfF"))
