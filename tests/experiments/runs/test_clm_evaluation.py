"""How much a language modelling run evaluates: the first lines on request, nothing when it only times steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hf_adafisher.data.text import count_words


def test_the_first_lines_alone_are_evaluated(
    main: Any, command: list[str], files: dict[str, str], tmp_path: Path
) -> None:
    """Equal to a run whose files end after these lines, training text aside."""
    short = {}
    for split in ("validation", "test"):
        lines = Path(files[split]).read_text(encoding="utf-8").split("\n")[:20]
        short[split] = (tmp_path / f"{split}.txt", count_words(lines))
        short[split][0].write_text("\n".join(lines) + "\n", encoding="utf-8")
    shortened = [item for split, (path, _) in short.items() for item in (f"--{split}_file", str(path))]
    results = []
    for name, extra in (("limit", ["--max_eval_lines", "20"]), ("files", shortened)):
        assert (
            main([*command, "--max_steps", "1", "--save_strategy", "no", *extra, "--output_dir", str(tmp_path / name)])
            == 0
        )
        results.append(json.loads((tmp_path / name / "results.json").read_text()))
    for split, (_, words) in short.items():
        assert results[0][split] == results[1][split]
        assert results[0]["corpus"][split]["words"] == words


def test_a_timing_run_neither_evaluates_nor_saves(main: Any, command: list[str], tmp_path: Path) -> None:
    flags = ["--timing_only", "true", "--eval_strategy", "steps", "--save_steps", "1", "--output_dir", str(tmp_path)]
    assert main([*command, *flags]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert len(results["step_seconds"]) == results["steps"] == 4 and results["validation"] is None
    assert not list(tmp_path.glob("checkpoint-*")) and not (tmp_path / "model.safetensors").exists()


def test_a_limit_of_no_lines_is_refused(main: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert main(["--max_eval_lines", "0", "--output_dir", str(tmp_path)]) == 2
    assert "max_eval_lines is 0; it must be at least 1" in caplog.text
