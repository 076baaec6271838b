"""Results files: strict JSON, and the software, source code and hardware that a result depends on."""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from enum import Enum
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from hf_adafisher import __version__

_ROOT = Path(__file__).parents[2]
_CODE = ("hf_adafisher", "scripts")
NO_COMMIT = "unknown, since it is no git checkout"


def source_state(root: Path = _ROOT) -> dict[str, str]:
    """Return the version, the ``commit``, and of a git checkout the ``uncommitted_changes``.

    Args:
        root: Folder that holds the package.

    Returns:
        ``uncommitted_changes`` is ``none`` or a hash of the changes. Of an installed package ``commit`` is what pip
        wrote down, if it came from a git repository, else ``NO_COMMIT``.
    """
    state = {"hf_adafisher": __version__}
    # An installed package may lie inside the checkout of another project: only one that tracks it counts.
    tracked = _git(root, "ls-files", "--error-unmatch", f"{_CODE[0]}/__init__.py")
    commit = _git(root, "rev-parse", "HEAD")
    status = _git(root, "status", "--porcelain", "--", *_CODE)
    if not tracked or not commit or status is None:
        return {**state, "commit": _installed_commit(root) or NO_COMMIT}
    changes = status + (_git(root, "diff", "--binary", "HEAD", "--", *_CODE) or b"")
    dirty = hashlib.sha256(changes).hexdigest()[:12] if changes else "none"
    return {**state, "commit": commit.decode().strip(), "uncommitted_changes": dirty}


def describe_source(state: dict[str, str]) -> str:
    """Describe a state in a few words: ``0.1.0 at commit 1a2b3c4d5e6f with uncommitted changes 0a1b2c``."""
    text = state.get("hf_adafisher", "an unknown version")
    if state.get("commit") == NO_COMMIT:
        return f"{text}, commit {NO_COMMIT}"
    if "commit" in state:
        text += f" at commit {state['commit'][:12]}"
    changes = state.get("uncommitted_changes", "none")
    return text if changes == "none" else f"{text} with uncommitted changes {changes}"


def _installed_commit(root: Path) -> str | None:
    """Commit from which pip installed the package in ``root`` (PEP 610); None if it came from elsewhere."""
    try:
        installed = metadata.distribution("hf_adafisher")
        origin = json.loads(installed.read_text("direct_url.json") or "{}")
    except (metadata.PackageNotFoundError, ValueError):
        return None
    if Path(str(installed.locate_file(_CODE[0]))).resolve() != (root / _CODE[0]).resolve():  # of another copy
        return None
    commit = origin.get("vcs_info", {}).get("commit_id")
    return None if commit is None else str(commit)


def _git(root: Path, *arguments: str) -> bytes | None:
    """Output of a git command; None if it failed."""
    command = ["git", "-C", str(root), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


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
