"""E9, E10, E11: what a result belongs to, and the folder it lies in."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hf_adafisher import __version__
from hf_adafisher.data.fingerprint import file_sha256
from hf_adafisher.experiments.comparison import identity
from hf_adafisher.experiments.comparison.cells import Cell, expand_cells
from hf_adafisher.experiments.comparison.identity import data_fingerprints
from hf_adafisher.experiments.comparison.protocol import Comparison
from hf_adafisher.experiments.outputs import NO_COMMIT, describe_source, software_versions, source_state
from hf_adafisher.experiments.report.write_report import read_comparison, write_report

pytestmark = pytest.mark.subprocess

Compare = Callable[..., Comparison]
Started = Callable[..., list[str]]
ENTRY = {"optim": "adamw", "learning_rate": [0.1, 0.2]}


@pytest.fixture
def common(tmp_path: Path) -> dict[str, Any]:
    """Shared arguments with three local files."""
    for name in ("train", "valid", "test"):
        (tmp_path / f"{name}.txt").write_text(f"{name} text\n")
    return {
        f"{split}_file": str(tmp_path / f"{name}.txt")
        for split, name in (("train", "train"), ("validation", "valid"), ("test", "test"))
    }


def test_changed_data_are_refused(compare: Compare, common: dict[str, Any], tmp_path: Path, started: Started) -> None:
    """E9: one cell, then another text under the same name, then one more cell."""
    assert compare([{**ENTRY, "learning_rate": 0.1}], config={"common": common}).run() == []
    (tmp_path / "valid.txt").write_text("altered text\n")
    with pytest.raises(ValueError, match=r"made with other data \(validation_file changed\)") as error:
        compare([ENTRY], config={"common": common}).run()
    assert "adamw,learning_rate=0.1" in str(error.value) and len(started()) == 1
    (tmp_path / "valid.txt").write_text("valid text\n")
    assert compare([ENTRY], config={"common": common}).run() == [] and len(started()) == 2


def test_changed_data_are_told_apart_by_the_report(compare: Compare, common: dict[str, Any], tmp_path: Path) -> None:
    """E9: a table never mixes them, whether or not the files are still there."""
    compare([{**ENTRY, "learning_rate": 0.1}], config={"common": common}).run()
    (tmp_path / "train.txt").write_text("altered text\n")
    compare([{**ENTRY, "learning_rate": 0.2}], config={"common": common}).run()
    both = compare([ENTRY], config={"common": common})
    assert [(r.status, "other data (train_file changed)" in r.reason) for r in read_comparison(both)] == [
        ("failed", True), ("completed", False),
    ]  # fmt: skip
    for name in ("train", "valid", "test"):
        (tmp_path / f"{name}.txt").unlink()
    first, second = read_comparison(both)
    assert first.status == "completed" and second.status == "failed"
    assert "other data than adamw,learning_rate=0.1 (train_file changed)" in second.reason
    assert "| adamw | learning_rate=0.1 | 1 |" in write_report(both) + (both.output_dir / "report.md").read_text()


def test_the_same_data_elsewhere_are_the_same(compare: Compare, common: dict[str, Any], tmp_path: Path) -> None:
    """E9: the content counts, not the path."""
    compare([ENTRY], config={"common": common}).run()
    (tmp_path / "moved").mkdir()
    moved = {key: shutil.copy(path, tmp_path / "moved") for key, path in common.items()}
    assert {r.status for r in read_comparison(compare([ENTRY], config={"common": moved}))} == {"completed"}


def test_fingerprints(tmp_path: Path, common: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """E9: content of files and folders, versions of named data sets, nothing for what is not there."""
    found = data_fingerprints(Cell({"optim": "a"}, common))
    assert found == {key: file_sha256(path) for key, path in common.items()}
    images = tmp_path / "images"
    (images / "cat").mkdir(parents=True)
    (images / "cat" / "1.png").write_bytes(b"one")
    cell = Cell({"optim": "a"}, {"data_dir": str(images)}, task="image")
    before = data_fingerprints(cell)
    (images / "cat" / "1.png").write_bytes(b"three")
    after = data_fingerprints(cell)
    (images / "cat" / "1.png").rename(images / "cat" / "2.png")
    assert len({before["data_dir"], after["data_dir"], data_fingerprints(cell)["data_dir"]}) == 3
    monkeypatch.setattr("hf_adafisher.experiments.comparison.identity._HASHED_BYTES", 2)
    identity._folder.cache_clear()
    assert str(data_fingerprints(cell)["data_dir"]).endswith("of names and sizes")
    assert data_fingerprints(Cell({"optim": "a"}, {"train_file": "nowhere"})) == {"train_file": None}
    for task, settings, text in (
        ("clm", {}, r"python-docs [0-9a-f]{64}"),
        ("clm", {"dataset": "wikitext-2"}, r"wikitext-2 [0-9a-f]{40}"),
        ("image", {}, r"digits of scikit-learn [\d.]+"),
        ("image", {"dataset": "owner/name"}, "owner/name"),
    ):
        found = data_fingerprints(Cell({"optim": "a"}, settings, task=task))
        assert re.fullmatch(text, str(found["dataset"]))


@pytest.mark.parametrize("name", ["dataset", "dataset_name"])
@pytest.mark.parametrize("task", ["clm", "image"])
def test_a_local_data_set_is_told_by_its_content(task: str, name: str, tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    cell = Cell({"optim": "a"}, {name: str(tmp_path / "d")}, task=task)
    (tmp_path / "d" / "train.jsonl").write_text("1")
    first = data_fingerprints(cell)
    (tmp_path / "d" / "train.jsonl").write_text("22")
    assert set(first) == {name} and first != data_fingerprints(cell)
    assert data_fingerprints(Cell({"optim": "a"}, {name: "owner/name"}, task=task)) == {"dataset": "owner/name"}


def test_the_source_code_stands_in_every_record(compare: Compare) -> None:
    """E9: version, commit and uncommitted changes, in the record, in a run's own results and in the report."""
    state = source_state()
    assert re.fullmatch("[0-9a-f]{40}", state["commit"]) and state["hf_adafisher"]
    assert state.items() <= software_versions().items()
    comparison = compare([ENTRY])
    comparison.run()
    record = json.loads((comparison.folder(comparison.cells[0]) / "command.json").read_text())
    assert record["software"] == state
    write_report(comparison)
    text = (comparison.output_dir / "report.md").read_text()
    assert f"| commit | {state['commit']} |" in text and "not all of the same source code" not in text


def test_an_installed_package_knows_the_commit_that_pip_wrote_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site, info = tmp_path / "site", tmp_path / "site" / "hf_adafisher-9.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Name: hf_adafisher\nVersion: 9\n")
    (info / "direct_url.json").write_text('{"url": "u", "vcs_info": {"vcs": "git", "commit_id": "c0ffee"}}')
    monkeypatch.syspath_prepend(str(site))
    assert source_state(site)["commit"] == "c0ffee"
    assert source_state(tmp_path)["commit"] == NO_COMMIT  # that of another copy is not its own


def test_mixed_source_code_is_said_beside_the_table(compare: Compare) -> None:
    """E9: two cells of different commits stay in one table, with a sentence."""
    comparison = compare([ENTRY])
    comparison.run()
    path = comparison.folder(comparison.cells[1]) / "command.json"
    record = json.loads(path.read_text())
    record["software"] |= {"commit": "c0ffee" * 6 + "abcd", "uncommitted_changes": "123456789abc"}
    path.write_text(json.dumps(record))
    sentence = "0.1.0 at commit c0ffeec0ffee with uncommitted changes 123456789abc (1 runs)"
    sentence = sentence.replace("0.1.0", record["software"]["hf_adafisher"])
    printed = write_report(comparison)
    for text in (printed, *((comparison.output_dir / f"report.{kind}").read_text() for kind in ("md", "html"))):
        assert "not all of the same source code" in text and sentence in text


def test_the_state_of_a_checkout(tmp_path: Path) -> None:
    """E9: clean and changed; a package that merely lies inside another project's checkout has none, and says so."""
    package = tmp_path / "hf_adafisher"
    package.mkdir()
    (package / "__init__.py").write_text("a = 1\n")
    assert source_state(tmp_path) == {"hf_adafisher": __version__, "commit": NO_COMMIT}
    assert describe_source(source_state(tmp_path)) == f"{__version__}, commit unknown, since it is no git checkout"
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q"], check=True)
    assert source_state(tmp_path)["commit"] == NO_COMMIT
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "a"], check=True)
    clean = source_state(tmp_path)
    assert clean["uncommitted_changes"] == "none" and "uncommitted" not in describe_source(clean)
    (package / "__init__.py").write_text("a = 2\n")
    changed = source_state(tmp_path)
    (package / "__init__.py").write_text("a = 3\n")
    assert changed["commit"] == clean["commit"]
    assert len({state["uncommitted_changes"] for state in (clean, changed, source_state(tmp_path))}) == 3


def test_a_result_without_a_record_is_not_accepted(compare: Compare, started: Started, tmp_path: Path) -> None:
    """E10: nothing says what it belongs to; ``common`` may have changed since."""
    comparison = compare([ENTRY], config={"common": {"max_steps": 5}})
    comparison.run()
    for cell in comparison.cells:
        (comparison.folder(cell) / "command.json").rename(tmp_path / f"{cell.folder_name}.json")
    changed = compare([ENTRY], config={"common": {"max_steps": 9}})
    results = read_comparison(changed)
    assert [r.status for r in results] == ["failed", "failed"]
    assert all("command.json is missing" in r.reason for r in results)
    for cell in comparison.cells:
        (tmp_path / f"{cell.folder_name}.json").rename(comparison.folder(cell) / "command.json")
    assert {r.status for r in read_comparison(comparison)} == {"completed"}
    stale = read_comparison(changed)
    assert all(r.status == "failed" and "max_steps: 5 there, 9 here" in r.reason for r in stale)


def test_keys_in_another_order_are_the_same_cell(compare: Compare, started: Started) -> None:
    """E10: in an entry, in ``common``, and numbers that are written in another way."""
    config = {"common": {"n_embd": 8, "warmup_steps": 1}}
    assert compare([{"optim": "adamw", "learning_rate": 0.1, "damping": 1}], config=config).run() == []
    same = {"common": {"warmup_steps": 1.0, "n_embd": 8}}
    assert compare([{"damping": 1.0, "optim": "adamw", "learning_rate": 1e-1}], config=same).run() == []
    assert len(started()) == 1
    with pytest.raises(ValueError, match="twice"):
        expand_cells({"cells": [{"optim": "a", "x": 1, "y": 2}, {"y": 2, "x": 1.0, "optim": "a"}]})


@pytest.mark.parametrize("entry", [{"learning_rate": []}, {"seeds": []}, {"optim": []}])
def test_an_empty_list_is_an_error(entry: dict[str, Any]) -> None:
    """E10: it was a comparison of no cells, and a success."""
    with pytest.raises(ValueError, match=r"'cells'\[0\], '\w+' must be a list with something in it, got \[\]"):
        expand_cells({"cells": [{"optim": "adamw", **entry}]})


@pytest.mark.parametrize(
    "settings",
    [
        {"optim": ".."}, {"optim": "../../x"}, {"optim": "/abs/path"}, {"optim": "."}, {"optim": "a/../.."},
        {"optim": "a", "train_file": "../../../esc"}, {"optim": "a", "x": "y" * 5000}, {"optim": "ä ö", "x": "\n"},
    ],
)  # fmt: skip
def test_no_name_leaves_the_output_folder(settings: dict[str, Any], compare: Compare, tmp_path: Path) -> None:
    """E11: whatever the settings are, every file is below the comparison's folder, in a folder with a plain name."""
    comparison = compare([settings])
    comparison.run()
    write_report(comparison)
    (folder,) = (path for path in (tmp_path / "out").iterdir() if path.is_dir())
    assert re.fullmatch(r"[a-z0-9][a-z0-9-]{0,30}-[0-9a-f]{10}", folder.name)
    assert {path.name for path in tmp_path.iterdir()} == {"out", "scripts"}
    assert json.loads((folder / "command.json").read_text())["arguments"] == settings


def test_the_folder_follows_from_the_settings_alone() -> None:
    """E11: other settings, another seed and another copy have other folders; a long name is cut."""
    cells = [
        Cell({"optim": "a", "x": x, "seed": seed}, copy=copy) for x in (1, 2) for seed in (0, 1) for copy in (1, 2)
    ]
    assert len({cell.folder_name for cell in cells}) == 8
    assert cells[0].folder_name == Cell({"seed": 0, "x": 1.0, "optim": "a"}, {"y": 3}).folder_name
    assert len(Cell({"optim": "o" * 300}).folder_name) == 41


def test_a_comparison_of_an_earlier_version_goes_on(compare: Compare, started: Started) -> None:
    """E11: finished cells in folders with the settings in their names, with the command line as their record."""
    comparison = compare([ENTRY], config={"common": {"n_embd": 8}})
    cell = comparison.cells[0]
    compare([{**ENTRY, "learning_rate": 0.1}], config={"common": {"n_embd": 8}}).run()
    old = comparison.folder(cell).rename(comparison.output_dir / cell.name)
    (old / "command.json").write_text(json.dumps(["--n_embd", "8", "--optim", "adamw", "--learning_rate", "0.1"]))
    assert comparison.folder(cell) == old and {r.status for r in read_comparison(comparison)} == {"completed"}
    assert "1 of 1 runs have no record" not in write_report(comparison)
    with pytest.raises(ValueError, match="n_embd: 8 there, 9 here"):
        compare([ENTRY], config={"common": {"n_embd": 9}}).run()
    (old / "command.json").unlink()  # as committed results are: readable, with a word about it
    assert "1 of 1 runs have no record of their arguments" in write_report(comparison)
