"""Figures of reports and of the package's pictures are made in one place."""

from __future__ import annotations

import itertools
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hf_adafisher.experiments import drawing
from hf_adafisher.optimizers.factory.catalog import available_optimizers

# Machado et al. 2009: how people without one kind of cones see linear RGB.
VISIONS = {
    "all cones": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
SHOWN_MOST = ["spectral-adafisher", "adafisherw", "adafisher", "adamw", "muon", "sgd", "lamb", "soap"]
TO_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])


def linear(colour: str) -> np.ndarray:
    values = np.array([int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)])
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def lightness_and_hue(rgb: np.ndarray) -> np.ndarray:
    """CIELAB."""
    t = TO_XYZ @ np.clip(rgb, 0, 1) / TO_XYZ.sum(1)
    f = np.where(t > 0.008856, np.cbrt(t), 7.787 * t + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def contrast(colour: str, ground: str) -> float:
    """Of WCAG."""
    dim, bright = sorted(float(TO_XYZ[1] @ linear(one)) for one in (colour, ground))
    return (bright + 0.05) / (dim + 0.05)


def test_every_optimizer_has_its_own_colour() -> None:
    assert set(drawing.OPTIMIZER_COLOURS) == set(available_optimizers())
    for page in (0, 1):
        assert len({pair[page] for pair in drawing.OPTIMIZER_COLOURS.values()}) == len(drawing.OPTIMIZER_COLOURS)


@pytest.mark.parametrize(("page", "ground"), [(0, "#ffffff"), (1, "#161b22")])
def test_colours_can_be_seen_and_told_apart(page: int, ground: str) -> None:
    """Contrast of lines at least 3 (WCAG 1.4.11); distances in CIELAB, of which 2.3 is just noticeable."""
    for name, pair in drawing.OPTIMIZER_COLOURS.items():
        assert contrast(pair[page], ground) >= 3, name
    for vision, matrix in VISIONS.items():
        seen = {
            name: lightness_and_hue(np.array(matrix) @ linear(drawing.OPTIMIZER_COLOURS[name][page]))
            for name in SHOWN_MOST
        }
        for (a, first), (b, second) in itertools.combinations(seen.items(), 2):
            assert np.linalg.norm(first - second) > 12, (vision, a, b)


def test_a_name_has_one_colour_in_every_picture_and_its_forms_other_dashes() -> None:
    one = drawing.optimizer_styles(["adafisherw (paper)", "sgd", "adafisherw"])
    two = drawing.optimizer_styles(["lion", "adafisherw:lr=1", "mine", "sgd", "yours"])
    assert one["sgd"] == two["sgd"] and one["adafisherw"] == two["adafisherw:lr=1"]
    assert one["adafisherw (paper)"] == {**one["adafisherw"], "linestyle": "--"}
    assert two["mine"]["color"] != two["yours"]["color"]


def test_six_lines_have_a_colour_ours_and_adamw_always() -> None:
    ranked = ["muon", "soap", "lamb", "lion", "sgd", "adafisherw", "adamw", "spectral-adafisher", "kfac", "adafisher"]
    expected = ["muon", "soap", "adafisherw", "adamw", "spectral-adafisher", "adafisher"]
    assert drawing.coloured_lines(ranked) == expected
    assert drawing.coloured_lines(["sgd", "lion"]) == ["sgd", "lion"]


def test_labels_keep_apart_and_their_order() -> None:
    assert drawing.spread_out([0.5, 0.5, 0.9, 0.0], 0.1) == pytest.approx([0.45, 0.55, 0.9, 0.0])
    wanted = np.random.default_rng(0).random(20).tolist()
    found = drawing.spread_out(wanted, 0.06)
    assert np.argsort(found).tolist() == np.argsort(wanted).tolist()
    assert np.diff(sorted(found)).min() == pytest.approx(0.06)
    assert drawing.spread_out(found, 0.05) == pytest.approx(found)  # nothing moves that need not


def picture(path: Path) -> str:
    figure, (axes,) = drawing.new_figure(1, 1, (4.0, 3.0))
    styles = drawing.optimizer_styles(["adamw", "muon"])
    for height, (name, style) in enumerate(styles.items()):
        axes.plot([0, 1], [height, 0.5 + height / 1000], **style)
        drawing.label_line_ends(axes, [(1, 0.5 + height / 1000, name, style["color"])])
    axes.set(xlabel="steps", ylabel="0.123456")
    assert drawing.save_figure(figure, path, {"a": 1}) == [path, path.with_suffix(".json")]
    return path.read_text()


def test_an_svg_has_text_a_dark_twin_of_every_colour_and_the_same_bytes(tmp_path: Path) -> None:
    text = picture(tmp_path / "a.svg")
    assert text == picture(tmp_path / "b.svg") and "Matplotlib" not in text and len(text) < 20_000
    for words in ("steps", "adamw", "0.123456"):
        assert f">{words}</text>" in text
    dark = re.search(r"@media \(prefers-color-scheme: dark\)\{(.*)\}</style>", text)
    assert dark is not None
    body = text.replace(dark[0], "")
    for part, colour in set(re.findall(r"(fill|stroke): (#\w{6})", body)):
        assert f'[style*="{part}: {colour}"]' in dark[1]
    assert f"fill:{drawing.OPTIMIZER_COLOURS['muon'][1]}!important" in dark[1]
    assert not re.search(r' d="[^"]*\.\d{3}', body)


def test_a_picture_s_ending_says_its_format(tmp_path: Path) -> None:
    figure, _ = drawing.new_figure(1, 1, (2.0, 2.0))
    drawing.write_picture(figure, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match=r"written as \.svg or \.png, not as .*a\.pdf"):
        drawing.write_picture(figure, tmp_path / "a.pdf")


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
