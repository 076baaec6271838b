"""Files with the arguments of a run: JSON, or YAML read as strictly."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from hf_adafisher.experiments.json_files import read_json

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
