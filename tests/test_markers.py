"""The guard of ``tests/conftest.py``: a test that starts processes says so with a marker."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest_plugins = "pytester"
MARKERS = ("slow", "distributed", "subprocess", "browser")
TESTS = """
import os, subprocess, sys
import pytest
import torch.distributed as dist

@pytest.fixture(scope="session")
def program():
    return subprocess.run([sys.executable, "-c", ""])

def test_program(): subprocess.run([sys.executable, "-c", ""])

def test_fixture(program): pass

def test_fork():
    child = os.fork()
    if not child:
        os._exit(0)
    os.waitpid(child, 0)

def test_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    dist.destroy_process_group()

@pytest.mark.subprocess
def test_marked(): subprocess.run([sys.executable, "-c", ""])

def test_group_of_the_fixture(process_group): pass

def test_nothing(): subprocess.list2cmdline(["uname"])
"""


@pytest.mark.subprocess
def test_processes_need_a_marker(pytester: pytest.Pytester) -> None:
    pytester.makeini(f"[pytest]\nmarkers = {', '.join(MARKERS)}".replace(", ", "\n    "))
    pytester.makeconftest(Path(__file__).with_name("conftest.py").read_text())
    pytester.makepyfile(TESTS)
    outcome = pytester.runpytest_inprocess("--strict-markers", "-p", "no:cacheprovider", "-p", "no:xdist")
    outcome.assert_outcomes(failed=4, passed=3)
    outcome.stdout.fnmatch_lines(["*mark this test as 'subprocess' or 'distributed': it started a process group"])
