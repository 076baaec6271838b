"""Markers of the test session, and a guard that keeps them true. See ``tests/README.md``."""

from __future__ import annotations

import gc
import sys
import traceback
from collections.abc import Generator, Iterator
from typing import Any

import pytest
import torch.distributed as dist

PROCESS_EVENTS = {"subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.system"}
BY_LIBRARIES = ("/platform.py", "/torch/_inductor/", "/experiments/outputs.py")
"""Code whose processes do not count: ``uname``, ``git``, and the compilers of torch, which a warm cache saves."""
started: list[str] = []
"""Processes and process groups that the running test has started, in its fixtures or in itself."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark all tests of ``tests/distributed``, and all that use a process group, as distributed."""
    for item in items:
        if item.nodeid.startswith("tests/distributed/") or "process_group" in getattr(item, "fixturenames", ()):
            item.add_marker("distributed")


def pytest_collection_finish() -> None:
    """Leave what is there out of garbage collections, of which accelerate makes one in each training run."""
    gc.collect()
    gc.freeze()


def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Leave out also what the tests of a file have imported."""
    if nextitem is not None and nextitem.path != item.path:
        pytest_collection_finish()


def pytest_configure(config: pytest.Config) -> None:
    """Watch what starts processes and process groups."""
    sys.addaudithook(note_process)
    patch = pytest.MonkeyPatch()
    config.add_cleanup(patch.undo)
    create_group = dist.init_process_group

    def noted(*args: Any, **kwargs: Any) -> None:
        started.append("a process group")
        create_group(*args, **kwargs)

    patch.setattr(dist, "init_process_group", noted)


def note_process(event: str, arguments: tuple[Any, ...]) -> None:
    """Note an audit event that starts a process."""
    if event in PROCESS_EVENTS:
        callers = [frame.f_code.co_filename for frame, _ in traceback.walk_stack(None)]
        if not any(part in caller for caller in callers for part in BY_LIBRARIES):
            started.append(f"{event} {arguments[:2]}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol() -> Generator[None, Any, Any]:
    """Begin to watch before the fixtures of a test are set up."""
    started.clear()
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    """Fail a test that has started a process without saying so."""
    result = yield
    if started and not any(item.get_closest_marker(name) for name in ("subprocess", "distributed", "browser")):
        pytest.fail(f"mark this test as 'subprocess' or 'distributed': it started {started[0]}", pytrace=False)
    return result


@pytest.fixture
def process_group(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A group of one process."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()
