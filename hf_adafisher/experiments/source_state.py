"""State of the source code that made a result: version, commit and uncommitted changes."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path

from hf_adafisher import __version__

_ROOT = Path(__file__).parents[2]
_CODE = ("hf_adafisher", "scripts")


def source_state(root: Path = _ROOT) -> dict[str, str]:
    """Return the version, and from a git checkout the ``commit`` and ``uncommitted_changes``.

    Args:
        root: Folder that holds the package.

    Returns:
        ``uncommitted_changes`` is ``none`` or a hash of the changes; both are absent where the package was installed
        from a wheel, or there is no git.
    """
    state = {"hf_adafisher": __version__}
    # An installed package may lie inside the checkout of another project: only one that tracks it counts.
    tracked = _git(root, "ls-files", "--error-unmatch", f"{_CODE[0]}/__init__.py")
    commit = _git(root, "rev-parse", "HEAD")
    status = _git(root, "status", "--porcelain", "--", *_CODE)
    if not tracked or not commit or status is None:
        return state
    changes = status + (_git(root, "diff", "--binary", "HEAD", "--", *_CODE) or b"")
    dirty = hashlib.sha256(changes).hexdigest()[:12] if changes else "none"
    return {**state, "commit": commit.decode().strip(), "uncommitted_changes": dirty}


def describe_source(state: dict[str, str]) -> str:
    """Describe a state in a few words: ``0.1.0 at commit 1a2b3c4d5e6f with uncommitted changes 0a1b2c``."""
    text = state.get("hf_adafisher", "an unknown version")
    if "commit" in state:
        text += f" at commit {state['commit'][:12]}"
    changes = state.get("uncommitted_changes", "none")
    return text if changes == "none" else f"{text} with uncommitted changes {changes}"


def _git(root: Path, *arguments: str) -> bytes | None:
    """Output of a git command; None if it failed."""
    command = ["git", "-C", str(root), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
