"""The report of a comparison: its tables, its pictures, its files, and what a browser makes of it."""

from __future__ import annotations

import base64
import csv
import html
import json
import math
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hf_adafisher.experiments.comparison.protocol import Comparison
from hf_adafisher.experiments.drawing import OPTIMIZER_COLOURS
from hf_adafisher.experiments.report import pictures
from hf_adafisher.experiments.report.pictures import draw_pictures
from hf_adafisher.experiments.report.results import CellResult, best_settings, group_by_setting, read_results
from hf_adafisher.experiments.report.tables import best_table
from hf_adafisher.experiments.report.write_report import write_report
from tests.scripts import folder_of

Compare = Callable[..., Comparison]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
ENTRIES = [
    {"optim": "adamw", "learning_rate": [0.05, 0.1, 2.0]},
    {"optim": "adafisherw", "learning_rate": [0.05, 0.1, 0.3, -1.0], "damping": [0.001, 0.003]},
    {"optim": "sgd", "learning_rate": 2.0},
]


@pytest.fixture
def finished(compare: Compare) -> Comparison:
    comparison = compare(ENTRIES, seeds=[0, 1, 2], budget="seconds=30", jobs=2, config={"description": "A & B <test>."})
    comparison.run()
    return comparison


def row(optim: str, loss: float | None, seed: int = 0, **settings: Any) -> CellResult:
    values = {"validation loss": loss, "test loss": loss}
    return CellResult(
        f"{optim}{settings}{seed}", {"optim": optim, **settings, "seed": seed}, "completed", "", values, []
    )


def test_the_mean_decides_not_the_luckiest_seed() -> None:
    rows = [row("a", loss, seed, lr=1) for seed, loss in enumerate((1.0, 5.0, 5.0))]
    rows += [row("a", loss, seed, lr=2) for seed, loss in enumerate((3.0, 3.1, 3.2))]
    rows += [row("a", loss, seed, lr=3) for seed, loss in enumerate((2.0, 2.0, None))]  # one seed diverged
    rows += [row("a", 0.5, 0, lr=4)]  # one seed only: luck
    rows += [row("b", 2.0, seed) for seed in range(3)] + [row("c", None)]
    best = best_settings(group_by_setting(rows))
    assert [(setting.optim, setting.others) for setting in best] == [("b", {}), ("a", {"lr": 2})]
    assert best[1].mean("test loss") == pytest.approx(3.1)
    assert best[1].spread("test loss") == pytest.approx(math.sqrt((0.1**2 + 0.1**2) / 2))
    assert group_by_setting(rows)[2].cost == math.inf and group_by_setting(rows)[2].mean("test loss") is None


@pytest.mark.subprocess
def test_the_tables_hold_what_the_cells_came_to(finished: Comparison) -> None:
    """The fake losses: 4 + (lr - 0.1)^2 + 1 for adamw + seed / 8."""
    text = write_report(finished)
    best = best_settings(group_by_setting(read_results(finished.plan(), finished.output_dir)))
    table = best_table(best)
    first = dict(zip(table.columns, table.rows[0], strict=True))
    spread = statistics.stdev([0, 1 / 8, 2 / 8])
    assert first == {
        "optimizer": "adafisherw",
        "setting": "learning_rate=0.1, damping=0.001",
        "seeds": "3",
        "validation loss": f"4.1250 ± {spread:.4f}",
        "test loss": f"4.1250 ± {spread:.4f}",
        "test token perplexity": "4.1 ± 0.1",
        "test word perplexity": "4.1 ± 0.1",
        "steps": "100",
        "planned s": "30.0",
        "used s": "30.0",
        "ms per step": "12",
        "optimizer bytes": "1,048,576",
    }
    assert [line[0] for line in table.rows] == ["adafisherw", "adamw"]
    assert len(re.findall(r"^\| \*\*", text, re.M)) == 6 and text.count("(diverged)") == 6
    assert text.count("(failed)") == 6 and "12 of 36 runs diverged or failed" in text


@pytest.mark.subprocess
def test_every_file_of_a_report(finished: Comparison) -> None:
    printed = write_report(finished, "hf-adafisher compare 'a b.json'")
    for name in ("report.html", "report.md", "cells.csv", "differences.svg", "curves.svg", "learning_rates.svg"):
        assert str(finished.output_dir / name) in printed and (finished.output_dir / name).is_file()
    with (finished.output_dir / "cells.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 36 and {line["status"] for line in lines} == {"completed", "diverged", "failed"}
    for line in lines:
        result = json.loads((finished.output_dir / line["folder"] / "results.json").read_text())
        loss = (result.get("validation") or {}).get("loss")
        assert line["validation loss"] == ("" if loss is None else repr(loss))
        assert line["steps"] == str(result.get("steps", ""))  # whole, though failed runs have none
        assert line["cell"].endswith(f"seed={line['seed']}") and line["optim"] == line["cell"].split(",")[0]
    text = (finished.output_dir / "report.md").read_text()
    for words in ("ValueError: lr is negative", "the loss was not finite at step 3", "| torch | 9.9 |", "(curves.svg)",
                  "compare 'a b.json'", "| budget | seconds=30 |", "| adafisherw | 300.0 | 25 |"):  # fmt: skip
        assert words in text


@pytest.mark.subprocess
def test_the_page_shows_text_as_it_is(finished: Comparison) -> None:
    """Nothing that configurations or failures say is markup."""
    write_report(finished, "x --set a='<b>' c=\"d\"")
    page = html.unescape((finished.output_dir / "report.html").read_text())
    raw = (finished.output_dir / "report.html").read_text()
    for words in ("<p>A & B <test>.</p>", "<pre>x --set a='<b>' c=\"d\"</pre>", "<td>failed</td>"):
        assert words in page
    assert "<b>" not in raw and "<test>" not in raw
    assert (
        raw.count('<tr class="best">') == 7 and raw.count('<td class="words">') == 2
    )  # a setting of two arguments, the seeds


@pytest.mark.subprocess
def test_an_unfinished_comparison_says_so(finished: Comparison) -> None:
    shutil.rmtree(folder_of(finished.output_dir, "adamw,learning_rate=0.05,seed=0"))
    assert "1 of 36 runs have no result yet" in write_report(finished)
    assert "1 of 36 runs have no result yet" in (finished.output_dir / "report.html").read_text()


def test_no_result_at_all(compare: Compare) -> None:
    with pytest.raises(ValueError, match="no run in"):
        write_report(compare(ENTRIES))


@pytest.mark.subprocess
def test_nothing_ended_well(compare: Compare) -> None:
    comparison = compare(ENTRIES[2:])
    comparison.run()
    assert "1 of 1 runs diverged or failed" in write_report(comparison)
    assert "No run ended well." in (comparison.output_dir / "report.md").read_text()


@pytest.mark.subprocess
def test_without_matplotlib_there_are_tables(
    finished: Comparison, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    write_report(finished)
    page = (finished.output_dir / "report.html").read_text()
    assert "pip install matplotlib" in caplog.text and "<img" not in page and page.count("<tr") > 36


@pytest.mark.subprocess
def test_pictures_have_something_in_them(finished: Comparison) -> None:
    settings = group_by_setting(read_results(finished.plan(), finished.output_dir))
    found = draw_pictures(finished.output_dir, settings, best_settings(settings))
    assert len(found) == 4
    for path, texts in found.items():
        picture = path.read_text()
        names = ["adafisherw"] if path.name == "differences.svg" else ["adafisherw", "adamw"]
        for name in names:  # its line, and its name as text
            assert OPTIMIZER_COLOURS[name][0] in picture and re.search(f"<text[^>]*>{name}</text>", picture)
        assert "adafisherw" in texts.alt and texts.alt != texts.caption


@pytest.mark.subprocess
def test_alternative_texts_have_the_winner_in_numbers(finished: Comparison) -> None:
    """Of seeds 0 to 2: 5 + seed / 8 with adamw and 4 + seed / 8 with adafisherw, at the best rate of both."""
    settings = group_by_setting(read_results(finished.plan(), finished.output_dir))
    pictures = {path.name: texts for path, texts in draw_pictures(
        finished.output_dir, settings, best_settings(settings)).items()}  # fmt: skip
    assert "better: adafisherw -1 (-1 to -1)" in pictures["differences.svg"].alt
    sweep = pictures["learning_rates.svg"].alt
    assert "Lowest of each: adafisherw 4.125 at 0.1 (highest " in sweep and "adamw 5.125 at 0.1" in sweep
    ends = pictures["curves.svg"].alt.split("lowest first: ")[1]
    assert ends.startswith("adafisherw 4.125 (from ") and ", adamw 5.125 (from " in ends
    numbers = json.loads((finished.output_dir / "differences.json").read_text())
    assert [(bar["name"], bar["mean"], bar["seeds"]) for bar in numbers["bars"]] == [("adafisherw", -1.0, 3)]


@pytest.mark.subprocess
def test_the_curve_against_seconds_uses_the_seconds_of_each_evaluation(finished: Comparison) -> None:
    settings = group_by_setting(read_results(finished.plan(), finished.output_dir))
    draw_pictures(finished.output_dir, settings, [s for s in settings if s.name.endswith("0.05")])
    panels = json.loads((finished.output_dir / "curves_by_seconds.json").read_text())["panels"]
    curve = panels["validation loss (nats per token)"]["adamw"]
    assert (curve["steps"], curve["seconds"], curve["seeds"]) == ([1, 150], [0.25, 37.5], 3)


def test_curves_are_means_over_the_seeds_at_the_steps_that_all_have(tmp_path: Path) -> None:
    """Training loss and validation loss, each with the seconds of its own entries; the last entry of a step counts."""
    first = [
        {"step": 10, "loss": 5.0, "train_seconds": 1.0}, {"step": 10, "eval_loss": 6.0, "train_seconds": 1.5},
        {"step": 20, "loss": 9.0, "train_seconds": 2.0}, {"step": 30, "loss": 4.0, "train_seconds": 3.0},
        {"step": 30, "eval_loss": 7.0, "train_seconds": 3.0}, {"step": 30, "eval_loss": 3.0, "train_seconds": 3.0},
        {"step": 30, "train_loss": 4.5, "train_seconds": 3.0},
    ]  # fmt: skip
    second = [
        {"step": 10, "loss": 4.0, "train_seconds": 2.0}, {"step": 10, "eval_loss": 5.0, "train_seconds": 2.0},
        {"step": 30, "loss": 1.0, "train_seconds": 5.0}, {"step": 30, "eval_loss": 2.5, "train_seconds": 5.5},
        {"step": 40, "loss": 0.5, "train_seconds": 8.0}, {"step": 35, "loss": None, "train_seconds": 6.0},
    ]  # fmt: skip
    rows = [replace(row("a", 2.0, seed), history=history) for seed, history in enumerate((first, second))]
    settings = group_by_setting(rows)
    found = draw_pictures(tmp_path, settings, best_settings(settings))
    assert [path.name for path in found] == ["curves.svg", "curves_by_seconds.svg"]
    expected = {
        "training loss (nats)": {"steps": [10, 30], "seconds": [1.5, 4.0], "mean": [4.5, 2.5], "low": [4.0, 1.0],
                                 "high": [5.0, 4.0]},
        "validation loss (nats per token)": {"steps": [10, 30], "seconds": [1.75, 4.25], "mean": [5.5, 2.75],
                                             "low": [5.0, 2.5], "high": [6.0, 3.0]},
    }  # fmt: skip
    for path in found:
        panels = json.loads(path.with_suffix(".json").read_text())["panels"]
        assert panels == {title: {"a": {"setting": "defaults", "seeds": 2, **line}} for title, line in expected.items()}


@pytest.mark.subprocess
def test_the_curves_drawn_are_their_numbers(finished: Comparison, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = []
    create = pictures.new_figure
    monkeypatch.setattr(pictures, "new_figure", lambda *a, **k: figures.append(create(*a, **k)) or figures[-1])
    settings = group_by_setting(read_results(finished.plan(), finished.output_dir))
    paths = list(draw_pictures(finished.output_dir, settings, best_settings(settings)))
    for path, x, (_, all_axes) in zip(paths[1:3], ("steps", "seconds"), figures[:2], strict=True):
        panels = json.loads(path.with_suffix(".json").read_text())["panels"]
        for axes, (title, curves) in zip(all_axes, panels.items(), strict=True):
            assert axes.get_ylabel() == title
            lines = {line.get_label(): line for line in axes.get_lines()}
            assert set(lines) == set(curves) == {"adamw", "adafisherw"}
            for optim, line in lines.items():
                assert list(line.get_xdata()) == curves[optim][x]
                assert list(line.get_ydata()) == curves[optim]["mean"]
            assert {text.get_text() for text in axes.texts} == {"adamw", "adafisherw"}  # beside the lines' ends
        steps = {optim: curve["steps"] for optim, curve in panels["training loss (nats)"].items()}
        assert steps == {"adamw": [1, 150], "adafisherw": [1, 100]}  # 30 s at 0.2 s and 0.3 s a step


@pytest.mark.subprocess
def test_learning_rates_in_numbers(finished: Comparison) -> None:
    """4 + (lr - 0.1)^2 + 1 + seed / 8, as the fake runs have it; at 2.0 all diverge."""
    settings = group_by_setting(read_results(finished.plan(), finished.output_dir))
    draw_pictures(finished.output_dir, settings, best_settings(settings))
    found = json.loads((finished.output_dir / "learning_rates.json").read_text())["optimizers"]
    assert set(found) == {"adamw", "adafisherw", "sgd"} and set(found["adafisherw"]) == {
        "damping=0.001",
        "damping=0.003",
    }
    valley = found["adamw"]["all"]
    assert valley["learning rate"] == [0.05, 0.1, 2.0] and valley["mean"][2] is None
    assert valley["mean"][:2] == pytest.approx([5.0025 + 1 / 8, 5 + 1 / 8])
    assert valley["low"][:2] == pytest.approx([5.0025, 5]) and valley["high"][:2] == pytest.approx([5.2525, 5.25])


SORTING = """
const table = [...document.querySelectorAll("table")].find(t => t.tBodies[0].rows.length > 30);
const head = [...table.tHead.rows[0].cells].find(c => c.textContent === "validation loss"), column = head.cellIndex;
const values = () => [...table.tBodies[0].rows].map(row => row.cells[column].textContent);
head.querySelector("button").focus();
document.activeElement.click();
const up = values(), way = head.getAttribute("aria-sort");
document.activeElement.click();
const sorted = [way, up, head.getAttribute("aria-sort"), values()];
"""


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium on the PATH")
def test_a_browser_shows_the_report(finished: Comparison, tmp_path: Path) -> None:
    """Headless Chromium, without network, as wide as a phone: rows, pictures, no overflow, and columns that sort."""
    write_report(finished)
    page = (finished.output_dir / "report.html").read_text()
    assert not re.search(r"(src|href)=\"(?!data:)|@import|url\(|<script ", page)  # nothing from elsewhere
    images = [base64.b64decode(data) for data in re.findall(r'src="data:image/svg\+xml;base64,([^"]+)"', page)]
    names = ("differences.svg", "curves.svg", "curves_by_seconds.svg", "learning_rates.svg")
    assert images == [(finished.output_dir / name).read_bytes() for name in names]
    probe = (
        SORTING
        + """
    const rows = [...document.querySelectorAll("tbody tr")].filter(row => row.offsetHeight > 5).length;
    const root = document.documentElement, wide = [...document.images].map(image => image.naturalWidth > 100);
    document.title = JSON.stringify({sorted, rows, wide, width: innerWidth, over: root.scrollWidth - root.clientWidth,
        tables: [...document.querySelectorAll(".table")].some(box => box.scrollWidth > box.clientWidth),
        dark: getComputedStyle(document.body).backgroundColor});"""
    )
    (tmp_path / "probe.html").write_text(
        page.replace("</body>", f"<script>onload = () => {{ {probe} }}</script></body>")
    )
    # Windows of Chromium are at least 500 pixels wide, a frame is not.
    frame = (
        "<iframe src='probe.html' style='width: 390px; height: 2000px' onload='setTimeout(() => document.title = this."
    )
    frame += "contentDocument.title, 500)'></iframe>"
    (tmp_path / "frame.html").write_text(f"<!DOCTYPE html><title></title>{frame}")
    found = {}
    for scheme in ("1", "0"):
        shown = run_chromium(
            tmp_path, f"--blink-settings=preferredColorScheme={scheme}", "--allow-file-access-from-files",
            "--virtual-time-budget=5000", "--dump-dom", (tmp_path / "frame.html").as_uri(),
        )  # fmt: skip
        title = re.search(r"<title>(.*?)</title>", shown)
        assert title is not None
        found[scheme] = json.loads(html.unescape(title[1]))
    bright, dark = found["1"], found["0"]
    assert bright["rows"] == page.count("<tr") - page.count("<thead>") > 36 + 2 and all(bright["wide"])
    assert (bright["width"], bright["over"]) == (390, 0) and bright["tables"]  # tables scroll in their own box
    assert (bright["dark"], dark["dark"]) == ("rgb(255, 255, 255)", "rgb(22, 27, 34)")
    ascending, up, descending, down = bright["sorted"]
    numbers = [float(text) for text in up if text != "-"]
    assert (ascending, descending) == ("ascending", "descending")
    assert numbers == sorted(numbers) and len(numbers) > 20 and up[len(numbers) :] == ["-"] * (36 - len(numbers))
    assert [float(text) for text in down if text != "-"] == numbers[::-1] and down[-1] == "-"


def run_chromium(tmp_path: Path, *arguments: str) -> str:
    assert CHROMIUM is not None
    flags = "--headless --no-sandbox --disable-gpu --disable-background-networking --disable-component-update"
    quiet = "--disable-sync --no-first-run --disable-dev-shm-usage --window-size=1200,3000"
    command = [CHROMIUM, *flags.split(), *quiet.split(), f"--user-data-dir={tmp_path / 'profile'}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
