"""The numbers and the files that docs/architecture.md names."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def traced() -> dict[str, dict[str, int]]:
    command = [sys.executable, str(ROOT / "scripts" / "trace_step.py"), "--json"]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout)


@pytest.mark.subprocess
def test_the_page_quotes_what_the_trace_counts(traced: dict[str, dict[str, int]]) -> None:
    quoted = re.findall(r"<!--(idle|due|root) (files|functions)-->(\d+)", PAGE)
    assert len(quoted) == 6
    assert {(kind, what): int(number) for kind, what, number in quoted} == {
        (kind, what): traced[kind][what] for kind in ("idle", "due", "root") for what in ("files", "functions")
    }


@pytest.mark.subprocess
def test_a_step_stays_short(traced: dict[str, dict[str, int]]) -> None:
    assert traced["idle"]["files"] <= 7 and traced["idle"]["functions"] <= 20
    assert traced["due"]["files"] <= 12 and traced["due"]["functions"] <= 50
    assert traced["root"]["files"] <= 10 and traced["root"]["functions"] <= 35


def test_every_file_and_name_that_the_page_names_exists() -> None:
    names = re.findall(r"`([\w/.]+(?:\.py|/))`", PAGE)
    assert len(names) > 30
    roots = [ROOT, ROOT / "hf_adafisher", *(path for path in (ROOT / "hf_adafisher").rglob("*") if path.is_dir())]
    missing = [name for name in names if not any((root / name).exists() for root in roots)]
    assert not missing
    source = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "hf_adafisher").rglob("*.py"))
    defined = set(re.findall(r"^ *(?:def|class) (\w+)|^(\w+) = ", source, re.M))
    words = re.findall(r"`(?:\w+\.)?(_?[a-zA-Z]\w*)`", re.sub(r"`[\w/]+\.(?:py|json)`", "", PAGE))
    assert len(words) > 20
    assert {word for word in words if "_" in word or word[0].isupper()} <= {
        name for pair in defined for name in pair
    } | {"learning_rate"}
