"""hf-adafisher soak on programs that take half a second: it finds what is lost, unequal or unfinished."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.scripts import load_command

# Stands in for clm.py and compare.py. A start that finds a trace of an earlier one FAULTS.
FAKE = """
import json, pathlib, sys, time
out = pathlib.Path(sys.argv[sys.argv.index("--output_dir") + 1])
again = (out / "started").exists()
out.mkdir(exist_ok=True)
(out / "started").touch()
if again:
    FAULT
for cell in ("a", "b", "c") if "compare" in sys.argv[0] else (".",):
    folder = out / cell
    folder.mkdir(exist_ok=True)
    if (folder / "results.json").exists():
        continue
    for name in ("checkpoint-8", "checkpoint-40", ".unfinished"):
        (folder / name).mkdir(exist_ok=True)
        time.sleep(0.05)
    (folder / "model.safetensors").write_text(weights if again else "weights")
    (folder / ".results").write_text(json.dumps({"status": "completed"}))
    (folder / ".results").rename(folder / "results.json")
    time.sleep(0.1)
"""
FAULTS = {
    "none": 'weights = "weights"',
    "unequal": 'weights = "others"',
    "unfinished": "sys.exit(3)",
    "lost": 'weights = "weights"; [path.unlink() for path in out.glob("*/results.json")]',
}


@pytest.mark.subprocess
@pytest.mark.parametrize("fault", FAULTS)
def test_the_soak_finds(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script: Any = load_command("soak")
    for name in ("clm.py", "compare.py"):
        (tmp_path / name).write_text(FAKE.replace("FAULT", FAULTS[fault]))
    monkeypatch.setattr(script, "PROGRAMS", tmp_path)
    out = tmp_path / "out"
    flags = ["--kills", "12", "--jobs", "2", "--output_dir", str(out)]
    assert script.main(flags) == (0 if fault == "none" else 1)
    summary = json.loads((out / "soak.json").read_text())
    assert 12 <= summary["kills"] <= 13 and sum(summary["kills_by_moment"].values()) == summary["kills"]
    assert len(summary["kills_by_moment"]) >= 3 and {loop["kind"] for loop in summary["each"]} == {"run", "comparison"}
    assert sum(sum(loop["kills"].values()) for loop in summary["each"]) == summary["kills"]
    assert (summary["finished"] < summary["loops"]) == (fault in ("unfinished", "lost"))
    assert (summary["equal"] < summary["loops"]) == (fault != "none")
    assert (summary["lost"] > 0) == (fault == "lost")
    assert ("exit status 3" in capsys.readouterr().err) == (fault == "unfinished")
    assert script.main(flags) == 2 and "is not empty" in capsys.readouterr().err


@pytest.mark.subprocess
def test_an_undisturbed_failure_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script: Any = load_command("soak")
    monkeypatch.setattr(script, "PROGRAMS", tmp_path)
    (tmp_path / "clm.py").write_text("raise SystemExit('no such option')")
    assert script.main(["--kills", "1", "--output_dir", str(tmp_path / "out")]) == 2
    assert "the undisturbed run fails: exit status 1: no such option" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        script.main(["--kills", "0"])
