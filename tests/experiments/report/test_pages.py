"""Tables in pages: made from an archive by hand-written runs, or held against the files that they name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from scipy import stats

from hf_adafisher.cli.compare import PROGRAMS
from hf_adafisher.experiments.comparison.identity import write_record
from hf_adafisher.experiments.comparison.protocol import create_comparison
from hf_adafisher.experiments.outputs import write_json
from hf_adafisher.experiments.report.archive import pack, report_archive
from hf_adafisher.experiments.report.pages import VIEWS, check_pages, renew_pages
from hf_adafisher.experiments.report.sources import unknown_numbers
from tests.scripts import load_command

CONFIG = {
    "cells": [
        {"optim": "adamw", "learning_rate": [0.001, 0.002]},
        {"optim": "lion", "learning_rate": [0.001, 0.002]},
        {"optim": "adamw", "learning_rate": 0.001, "seeds": [20, 21, 22]},
        {"optim": "lion", "learning_rate": 0.001, "seeds": [20, 21, 22]},
    ],
    "seeds": [0],
    "tuning_seeds": [0],
}
LOSSES = {"adamw": (5.1, 5.25, 5.3), "lion": (4.0, 4.25, 4.1)}
PAGE = """# A page

<!-- results: mine -->
<!-- end of mine -->

Text, `code`.

<!-- results: mine paired -->
| stale |
|---|
<!-- end of mine paired -->
"""
OTHER = """
| task | rate |
|---|---|
| a task with 15 | `0.004` |

```
| in | code |
|---|---|
| a | 1.25 |
```

<!-- no measurement -->
| torch | 2.13.0 |
|---|---|
| rate | 0.1 |
"""


def loss(optim: str, learning_rate: float, seed: int) -> float:
    return LOSSES[optim][seed - 20] if seed else 4.0 + 100 * learning_rate


@pytest.fixture
def docs(tmp_path: Path) -> Path:
    """A folder of pages with one archive in its results."""
    comparison = create_comparison(CONFIG, PROGRAMS, tmp_path / "out")
    for cell in comparison.cells:
        found = {"loss": loss(**cell.settings)}
        result = {"status": "completed", "validation": found, "test": found, "optimizer_state_bytes": 3 * 2**19}
        comparison.folder(cell).mkdir(parents=True)
        write_record(cell, comparison.folder(cell))
        write_json(comparison.folder(cell) / "results.json", result)
    archive = tmp_path / "docs" / "results" / "mine"
    pack(comparison, "hf-adafisher compare mine", archive)
    report_archive(archive, PROGRAMS)
    (tmp_path / "docs" / "page.md").write_text(PAGE)
    (tmp_path / "README.md").write_text(OTHER)
    return tmp_path / "docs"


def pages(docs: Path) -> list[Path]:
    return [docs, docs.parent / "README.md"]


def problems(docs: Path) -> list[str]:
    return [problem.replace(f"{docs.parent}/", "") for problem in check_pages(pages(docs), PROGRAMS)]


def test_tables_are_renewed_from_the_archive_and_then_hold(docs: Path) -> None:
    assert [text.split(": ")[:2] for text in problems(docs)] == [
        ["docs/page.md:3", "mine"],
        ["docs/page.md:8", "mine paired"],
    ]
    assert renew_pages(pages(docs), PROGRAMS) == [docs / "page.md"]
    text = (docs / "page.md").read_text()
    assert "| lion | learning_rate=0.001 | 3 | 4.1167 ± 0.1258 | 4.1167 ± 0.1258 | 1,572,864 |\n" in text
    assert "stale" not in text and "<!-- end of mine paired -->\n" in text and "Text, `code`.\n" in text
    low, high = stats.ttest_rel(LOSSES["adamw"], LOSSES["lion"]).confidence_interval(0.95)
    assert f"| **adamw - lion** | 3 | +1.1000 ({low:+.4f} to {high:+.4f}) |" in text
    assert problems(docs) == [] and renew_pages(pages(docs), PROGRAMS) == []


def test_a_changed_digit_a_stale_report_and_a_missing_archive_are_found(docs: Path) -> None:
    renew_pages(pages(docs), PROGRAMS)
    page, archive = docs / "page.md", docs / "results" / "mine"
    text = page.read_text()
    page.write_text(text.replace("4.1167 ± 0.1258", "4.1157 ± 0.1258", 1))
    assert [text.split(" is not")[0] for text in problems(docs)] == ["docs/page.md:3: mine: the table"]
    page.write_text(text.replace("mine", "yours"))
    found = problems(docs)
    assert (
        len(found) == 2 and "there is no archive" in found[0] and found[1].startswith("docs/page.md:12: yours paired: ")
    )
    page.write_text(text)
    for name in ("report.md", "cells.csv"):
        before = (archive / name).read_text()
        (archive / name).write_text(before.replace("4.25", "4.26"))
        assert [one.partition(" is not")[0] for one in problems(docs)] == [f"docs/results/mine/{name}"]
        (archive / name).unlink()
        assert len(problems(docs)) == 1
        (archive / name).write_text(before)
    (archive / "runs.jsonl.gz").write_bytes(b"no archive")
    assert len(problems(docs)) == 3 and "damaged" in problems(docs)[-1]
    (archive / "runs.jsonl.gz").unlink()
    assert "has a report and no runs.jsonl.gz" in problems(docs)[-1]


@pytest.mark.parametrize(
    ("page", "message"),
    [
        ("<!-- results: mine tests -->\n<!-- end of mine tests -->", "1: mine tests: 'tests' is no table"),
        ("<!-- results: mine -->\n| a |", "1: mine: needs a line <!-- end of mine --> below it"),
        ("<!-- results: mine -->\n<!-- end of mine paired -->", "1: mine: needs a line"),
        ("| a | b |\n|---|---|\n| x | 5.1 |", "1: the table has numbers and no marker"),
        ("| a | b |\n|---|---|\n| x | 5 ± 1 |", "1: the table has numbers and no marker"),
        ("<!-- no measurement -->\nText.\n\n| a | b |\n|---|---|\n| x | 5.1 |", "4: the table has numbers"),
        (
            "<!-- source: docs/a.json -->\n| a | b |\n|---|---|\n| x | 5.1 |",
            "2: docs/a.json: docs/a.json does not exist",
        ),
    ],
)
def test_what_a_page_may_not_have(page: str, message: str, docs: Path) -> None:
    (docs / "page.md").write_text(page + "\n")
    (found,) = problems(docs)
    assert found.startswith(f"docs/page.md:{message}")


def test_every_view_has_a_table(docs: Path) -> None:
    blocks = [f"<!-- results: mine {view} -->\n<!-- end of mine {view} -->\n" for view in VIEWS]
    (docs / "page.md").write_text("\n".join(blocks))
    renew_pages(pages(docs), PROGRAMS)
    text = (docs / "page.md").read_text()
    assert text.count("\n|---") == len(VIEWS) and problems(docs) == []
    assert "| adamw | 2 | learning_rate=0.001 | 4.1000 | lowest of 2: edge | learning_rate=0.001 |" in text
    assert "| **lion** | learning_rate=0.001 | 3 | 4.1167 ± 0.1258 | -1.1000 (" in text


JSON = {"a": {"ratio": 1.2345, "bytes": 3145728, "list": [0.5, [7]]}, "b": {"ratio": -9.876, "name": "8.8"}}


@pytest.mark.parametrize(
    ("cell", "source", "unknown"),
    [
        ("1.23, 1.2345 and +1.2 or 1", "a.json", []),
        ("1.24", "a.json", ["1.24"]),
        ("3,145,728; 3.0 MiB, 3.15 MB; 0.50 ± 7", "a.json#a", []),
        ("-9.88 (9.88)", "a.json", ["9.88"]),
        ("-9.88", "a.json#a", ["-9.88"]),
        ("8.8", "a.json", ["8.8"]),  # a text
        ("`5.5`, [6.6](x7.7), GPT-2, 4x4, v3", "a.json", ["6.6"]),
        ("4.117 ± 0.126, -1.100 (-1.348 to -0.852)", "docs/results/mine/cells.csv seeds=20-22", []),
        ("3 seeds, 4.25, 1.5 MiB", "docs/results/mine/cells.csv seeds=20-22", []),
        ("4.088", "docs/results/mine/cells.csv seeds=20-22", ["4.088"]),
        ("4.1125", "docs/results/mine/cells.csv", []),  # with seed 0
        ("4.1125", "a.json docs/results/mine/cells.csv", []),
        ("4.117, -1.100 and 5.217", "docs/results/mine/cells.csv seeds=20-22", ["5.217"]),  # of another optimizer
        ("1.23 and 0.5", "rows.json", ["0.5"]),
        ("2.5 and 0.5", "rows.json", []),
    ],
)
def test_the_numbers_of_a_file(cell: str, source: str, unknown: list[str], docs: Path) -> None:
    """Labels in the first column and headings do not count. The interval is that of the test above."""
    (docs.parent / "a.json").write_text(json.dumps(JSON))
    (docs.parent / "rows.json").write_text(json.dumps({"rows": [{"mean": 1.2345}, {"mean": 2.5, "low": 0.5}]}))
    rows = ["| a | 99.9 |", "|---|---|", f"| 88.8 | {cell} |"]
    assert unknown_numbers(rows, source, docs.parent) == unknown


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("a.json#c", "no 'c'; it has a, b"),
        ("page.md", "must be a JSON file"),
        ("docs/results/mine/cells.csv seeds=7-8", "no row or run in it"),
    ],
)
def test_a_source_that_is_none(source: str, message: str, docs: Path) -> None:
    (docs.parent / "a.json").write_text(json.dumps(JSON))
    (docs.parent / "page.md").write_text("")
    with pytest.raises(ValueError, match=message):
        unknown_numbers(["| a |", "|---|", "| b |"], source, docs.parent)


def test_the_command_writes_checks_and_exits_by_what_it_finds(docs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main = load_command("report").main
    given = [str(path) for path in pages(docs)]
    assert main(["--check", *given]) == 1
    assert f"{docs / 'page.md'}:3: mine: the table is not what" in capsys.readouterr().out
    assert main(["--write", *given]) == 0 and f"written: {docs / 'page.md'}" in capsys.readouterr().out
    assert main(["--check", *given]) == 0 and "every table is that of its file" in capsys.readouterr().out
    assert main(["--check", given[1]]) == 2 and "give one folder of pages" in capsys.readouterr().err
    for wrong in ([], [str(docs), "--check", *given]):
        with pytest.raises(SystemExit) as error:
            main(wrong)
        assert error.value.code == 2 and "give the folder of a comparison" in capsys.readouterr().err
