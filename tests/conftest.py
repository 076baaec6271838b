"""Settings of the whole test session."""

from __future__ import annotations

import gc


def pytest_collection_finish() -> None:
    """Leave imported modules out of garbage collections, of which accelerate makes one in each training run."""
    gc.collect()
    gc.freeze()
