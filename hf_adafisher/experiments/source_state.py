"""State of the source code that made a result: version, commit and uncommitted changes."""

from __future__ import annotations

import hashlib
import json
import subprocess
from importlib import metadata
from pathlib import Path

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
