"""The tables of the README and of docs are those of the committed files, and so are some sentences."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from hf_adafisher.cli.compare import PROGRAMS
from hf_adafisher.experiments.report.pages import check_pages

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results"
PAGE = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")


def test_every_number_has_its_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """``hf-adafisher report --check docs README.md``; --write renews the tables that archives give."""
    monkeypatch.chdir(ROOT)
    assert check_pages([Path("docs"), Path("README.md")], PROGRAMS) == []


def cells(name: str) -> pd.DataFrame:
    return pd.read_csv(RESULTS / name / "cells.csv", dtype={"optim_args": str})


def test_rates_at_the_ends_of_the_grids() -> None:
    """Of the digits; the page says in words how many, and which not."""
    words = {"10": "Ten", "11": "Eleven", "12": "Twelve"}
    found = cells("digits-small")
    inside = set()
    for optim, runs in found.groupby("optim"):
        best = runs.groupby("learning_rate").size().idxmax()
        if best not in (runs["learning_rate"].min(), runs["learning_rate"].max()):
            inside.add(optim)
    assert f"{words[str(17 - len(inside))]} of the seventeen rates shown lie at an end" in " ".join(PAGE.split())
    assert inside == {"adam", "kfac", "lamb", "lion", "soap", "spectral-adafisher"}
    assert "all but those of Adam, K-FAC, LAMB, Lion, SOAP and the spectral AdaFisher" in " ".join(PAGE.split())
