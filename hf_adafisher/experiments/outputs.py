"""Results files: strict JSON, and the software and hardware that a result depends on."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from enum import Enum
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from hf_adafisher.experiments.source_state import source_state


def software_versions(optional: Sequence[str] = ()) -> dict[str, str]:
    """Return the versions of Python, of this package (with its commit) and of the libraries that a result depends on.

    Args:
        optional: Further libraries; those not installed are left out.
    """
    versions = {"python": platform.python_version(), **source_state()}
    for name in ("torch", "transformers", "accelerate", "datasets", "tokenizers"):
        versions[name] = metadata.version(name)
    for name in optional:
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def hardware() -> dict[str, Any]:
    """Return the platform, the device, the number of CPUs and threads, and the load average of the last minute."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    device = str(accelerator or "cpu")
    if device.startswith("cuda"):
        device = torch.cuda.get_device_name()
    return {
        "platform": platform.platform(),
        "device": device,
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,  # Windows has none
    }


def json_ready(value: Any) -> Any:
    """Convert ``value`` to types of strict JSON: non-finite numbers become None, unknown objects text."""
    if isinstance(value, Enum):
        return json_ready(value.value)
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): json_ready(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [json_ready(item) for item in value]
    return str(value)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``, which takes its place once everything is written.

    A killed process or a full disk leaves the earlier file as it was.

    Raises:
        OSError: It cannot be written; unlike Python's own, the message always names ``path``.
    """
    partial = path.with_name(f".partial-{path.name}")
    try:
        yield partial
        os.replace(partial, path)
    except OSError as error:
        raise OSError(error.errno, f"cannot be written: {error.strerror or error}", str(path)) from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file in one piece; see ``replacing``."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write strict JSON in one piece: NaN and Infinity, which JSON does not have, become null."""
    write_text(path, json.dumps(json_ready(value), indent=2, allow_nan=False) + "\n")
