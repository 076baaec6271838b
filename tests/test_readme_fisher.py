"""The tables of the exact Fisher in docs/results.md hold what the committed files say."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from hf_adafisher.experiments.fisher_accuracy.agreement import HALVES, TOGETHER
from tests.scripts import as_command

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results" / "fisher"
FILES = {
    "digits, empirical": "digits-empirical",
    "digits, true": "digits-true",
    "GPT-2 (2 layers, 64 wide), empirical": "gpt2-empirical",
}
ESTIMATES = {
    "fisher": "AdaFisher's F",
    "product": "S (x) H: the same, not normalised",
    "second_moment": "Adam's second moment",
    "kfac": "K-FAC, damping 0.01",
    HALVES: "exact, half of the examples against the other half",
}
CONTROLS = {
    "exact_window": "exact, averaged as F",
    "second_moment_window": "second moment, averaged as F",
    "fisher_against_window": "F against exact, averaged as F",
    "product_against_window": "S (x) H against exact, averaged as F",
    "product_unscaled": "S (x) H, unscaled",
    "kfac_weaker": "K-FAC, damping 0.0001",
    "kfac_stronger": "K-FAC, damping 1",
}


def found(name: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return result


def table(columns: dict[str, str]) -> str:
    """Mean and standard deviation over three seeds, of the mean over layers and of all values together."""
    lines = ["| | " + " | ".join(columns.values()) + " |", "|" + "---|" * (len(columns) + 1)]
    for ending, pooled in (("", False), (", all values together", True)):
        for title, name in FILES.items():
            result = found(name)
            (together,) = [row["measures"] for row in result["layers"] if row["layer"] == TOGETHER]
            spreads = [(together if pooled else result["mean"])[key]["spearman"] for key in columns]
            assert all(spread["seeds"] == 3 for spread in spreads)
            cells = [f"{spread['mean']:.2f} ± {spread['sd']:.2f}" for spread in spreads]
            lines.append(f"| {title}{ending} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def test_the_tables_are_those_of_the_files() -> None:
    """To renew them: `python -m tests.test_readme_fisher`."""
    text = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    for columns in (ESTIMATES, CONTROLS):
        assert table(columns) in text, table(columns)


def test_the_text_below_has_no_other_numbers() -> None:
    text = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    below = text.partition(table(CONTROLS))[2].partition("\n## ")[0]
    numbers = set(re.findall(r"\b0\.\d\d\b", below))
    shown = set(re.findall(r"\b0\.\d\d\b", table(ESTIMATES) + table(CONTROLS)))
    assert len(numbers) > 5 and numbers <= shown


def test_the_files_are_of_the_readmes_commands() -> None:
    text = " ".join((ROOT / "docs" / "results.md").read_text(encoding="utf-8").split())
    for name in FILES.values():
        result = found(name)
        assert (result["kfac_damping"], result["seeds"], result["steps"]) == (0.01, [0, 1, 2], 200)
        assert result["kind"] == name.partition("-")[2]
        assert as_command(result["command"]).partition(" --output")[0].replace(" --kind true", "") in text
        layers = result["complete_layers"]
        assert all(entry["layers"] == layers for each in result["mean"].values() for entry in each.values())


if __name__ == "__main__":
    print(table(ESTIMATES), table(CONTROLS), sep="\n\n")
