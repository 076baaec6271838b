"""Figures of reports and of the package's pictures are made in one place."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from hf_adafisher.experiments import drawing


def test_every_new_figure_is_made_in_one_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sizes: list[tuple[float, float]] = []

    def empty_figure(size: tuple[float, float]) -> Any:
        sizes.append(size)
        return original(size)

    original = drawing.empty_figure
    monkeypatch.setattr(drawing, "empty_figure", empty_figure)
    panels = drawing.new_panels(tmp_path / "a.png", 2)
    assert panels is not None and len(panels) == 2 and sizes == [(7, 7.5)]
    figure, axes = drawing.new_figure(1, 3, (4.0, 2.0))
    assert len(axes) == 3 and sizes[1:] == [(4.0, 2.0)]
    for made, size in ((panels[0].figure, (7, 7.5)), (figure, (4, 2))):
        assert tuple(made.get_size_inches()) == size and made.get_layout_engine() is not None


def test_without_matplotlib_panels_warn_and_figures_raise(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert drawing.new_panels(tmp_path / "a.png") is None and "pip install matplotlib" in caplog.text
    with pytest.raises(ImportError, match=r'pip install "hf_adafisher\[plots\]"'):
        drawing.new_figure(1, 1, (4.0, 2.0))
