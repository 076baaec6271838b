"""The tables of the README and of docs are those of the committed files."""

from __future__ import annotations

from pathlib import Path

import pytest

from hf_adafisher.cli.compare import PROGRAMS
from hf_adafisher.experiments.report.pages import check_pages

ROOT = Path(__file__).parents[1]


def test_every_number_has_its_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """``hf-adafisher report --check docs README.md``; --write renews the tables that archives give."""
    monkeypatch.chdir(ROOT)
    assert check_pages([Path("docs"), Path("README.md")], PROGRAMS) == []
