"""The numbers of comparisons and benchmarks in the README and in docs/results.md are those of the committed files."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from scipy import stats

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results"
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGE = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
DIGITS = {
    "validation loss": 4, "test loss": 4, "token perplexity": 1, "word perplexity": 1, "test word perplexity": 1,
    "validation accuracy %": 2, "test accuracy %": 2,
}  # fmt: skip
PLAIN = {"steps": ("steps", 1, 0), "ms per step": ("ms per step", 1, 0), "used s": ("seconds", 1, 1)}
PLAIN |= {"optimizer MiB": ("optimizer bytes", 2**20, 1)}


def cells(name: str) -> pd.DataFrame:
    return pd.read_csv(RESULTS / name / "cells.csv", dtype={"optim_args": str})


def rows(text: str) -> list[dict[str, str]]:
    """The first table of a text; bold is taken off."""
    lines = re.search(r"(?:^\|.*\n)+", text, re.M)
    assert lines is not None
    table = [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in lines[0].splitlines()]
    return [dict(zip(table[0], row, strict=True)) for row in table[2:]]


def spread(values: pd.Series, digits: int) -> str:
    mean = f"{values.mean():.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {values.std():.{digits}f}"


def select(table: pd.DataFrame, settings: str) -> pd.DataFrame:
    for setting in settings.split(", "):
        key, _, value = setting.partition("=")
        table = table[table[key] == (value if key == "optim_args" else float(value))]
    return table


@pytest.mark.parametrize("name", re.findall(r"<!-- (\S+-small\S*) -->", PAGE))
def test_a_table_of_the_best_settings(name: str) -> None:
    found, table = cells(name), rows(PAGE.partition(f"<!-- {name} -->")[2])
    assert sorted(row["optimizer"] for row in table) == sorted(found["optim"].unique())
    for row in table:
        best = select(found[found["optim"] == row["optimizer"]], row["best setting"])
        names = found[found["optim"] == row["optimizer"]]["cell"].str.replace(r",seed=\d+", "", regex=True)
        assert len(best) == names.value_counts().max()
        for column, text in row.items():
            if column in DIGITS:
                assert text == spread(best[column], DIGITS[column]), (row["optimizer"], column)
            elif column in PLAIN:
                source, unit, digits = PLAIN[column]
                assert text == f"{best[source].mean() / unit:.{digits}f}", (row["optimizer"], column)


def test_every_cell_of_the_sweep() -> None:
    found, table = cells("wikitext2-sweep"), rows(PAGE.partition("<!-- wikitext2-sweep -->")[2])
    assert len(table) == len(found)
    for row in table:
        optim, _, settings = row["run"].partition(", ")
        cell = select(found[found["optim"] == optim], settings)
        assert [spread(cell[name], DIGITS[name]) for name in list(row)[1:]] == list(row.values())[1:]


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


def test_floor_shares_and_gradient_norms() -> None:
    ends = {}
    with gzip.open(RESULTS / "wikitext2-small" / "runs.jsonl.gz", "rt", encoding="utf-8") as lines:
        for run in map(json.loads, list(lines)[1:]):
            if run["folder"].startswith("adafisherw,"):
                ends[run["folder"]] = [entry for entry in run["result"]["log_history"] if "grad_norm" in entry][-1]
    text = " ".join(PAGE.split())
    shares = [ends[f"adafisherw,damping=0.003,learning_rate={rate},seed=0"] for rate in (0.02, 0.03, 0.04, 0.06)]
    said = ", ".join(f"{entry['adafisher/floor_share']:.2f}" for entry in shares)
    assert f"(`adafisher/floor_share` at the end {said} at rates 0.02, 0.03, 0.04, 0.06 and damping 0.003)" in text
    norms = [entry["grad_norm"] for name, entry in ends.items() if "damping=0.003" in name]
    assert f"({min(norms):.2f} to {max(norms):.2f})" in text
    floors = [entry["adafisher/floor_share"] for entry in ends.values()]
    choose = (ROOT / "docs" / "choose.md").read_text(encoding="utf-8")
    assert f"It ends at {min(floors):.2f} to {max(floors):.2f}" in " ".join(choose.split())


def benchmark(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / "benchmark" / "benchmarks.json").read_text(encoding="utf-8"))[name]
    assert f"`{found['command']}`" in PAGE or name in ("step-vit", "step-resnet")
    return dict(found["results"]["rows"])


def ratio(row: dict[str, float]) -> str:
    return f"{row['ratio']:.2f} ({row['ratio_q1']:.2f} to {row['ratio_q3']:.2f})"


def test_the_tables_of_times() -> None:
    one, two = benchmark("step-threads1"), benchmark("step-threads2")
    for rows_ in (one, two):
        assert f"| {ratio(rows_['adafisherw'])} | {ratio(rows_['compiled'])} |" in PAGE
    shapes = [benchmark(f"step-{shape}") for shape in ("llama", "vit", "resnet")]
    for kind in ("adafisherw", "compiled"):
        assert f"| {', '.join(format(rows_[kind]['ratio'], '.2f') for rows_ in shapes)} |" in PAGE
    whole = benchmark("whole-iteration")
    for kind in ("whole iteration, adafisherw", "Trainer step, adafisherw", "forward+backward, due"):
        assert f"| {ratio(whole[kind])} |" in PAGE
    assert "; ".join(ratio(whole[f"whole iteration, {name}"]) for name in ("spectral-adafisher", "muon")) in PAGE
    steps = benchmark("all-optimizers")
    columns = rows(PAGE.partition("Every optimizer's `step()`")[2])[0]
    del columns["optimizer"]
    assert set(columns) == set(steps)
    for name, text in columns.items():
        assert text in (f"{steps[name]['ratio']:.2f}", f"{steps[name]['ratio']:.1f}"), name


NAMES = {
    "AdamW": "adamw",
    "AdaFisherW": "adafisherw",
    "spectral AdaFisher": "spectral-adafisher",
    "Muon": "muon",
}


@pytest.mark.parametrize(
    ("name", "metric", "digits"), [("step-sizes-text", "test loss", 3), ("step-sizes-vit", "test accuracy %", 1)]
)
def test_the_readmes_table_of_results(name: str, metric: str, digits: int) -> None:
    """Seeds 10 to 14, which chose nothing; intervals are Student's t of the differences seed by seed."""
    found = cells(name)
    runs = {str(optim): group.set_index("seed") for optim, group in found[found["seed"] >= 10].groupby("optim")}
    table = rows(README.partition("## What it gains")[2])
    first = 0 if name == "step-sizes-text" else 2
    for title, optim in NAMES.items():
        if optim not in runs:
            assert not table[first][title]
            continue
        assert table[first][title] == spread(runs[optim][metric], digits)
        if optim == "adamw":
            continue
        difference = runs[optim][metric] - runs["adamw"][metric]
        assert len(difference) == 5
        low, high = stats.ttest_1samp(difference, 0.0).confidence_interval(0.95)
        assert table[first + 1][title] == f"{difference.mean():+.{digits}f} ({low:+.{digits}f} to {high:+.{digits}f})"


def test_the_readmes_table_of_costs() -> None:
    found = cells("step-sizes-text")
    runs = found[found["seed"] >= 10].groupby("optim")
    state, times = rows(README.partition("## What it costs")[2])
    for title, optim in NAMES.items():
        group = runs.get_group(optim)
        assert state[title] == f"{group['optimizer bytes'].mean() / 2**20:.1f}"
        assert times[title] == spread(group["ms per step"], 0)


STEP_SIZES = (ROOT / "docs" / "step_sizes.md").read_text(encoding="utf-8")
SPECTRAL = (ROOT / "docs" / "spectral.md").read_text(encoding="utf-8")
CLAIM = range(10, 15)
"""Seeds that chose nothing."""


def interval(first: Any, second: Any, digits: int) -> str:
    """Mean difference and its 95 % interval by Student's t, pair by pair."""
    found = stats.ttest_rel(first, second).confidence_interval(0.95)
    mean = sum(a - b for a, b in zip(first, second, strict=True)) / len(first)
    return f"{mean:+.{digits}f} ({found.low:+.{digits}f} to {found.high:+.{digits}f})"


@pytest.mark.parametrize(
    ("name", "column", "digits"), [("step-sizes-llama", "test loss", 3), ("step-sizes-resnet18", "test accuracy %", 1)]
)
def test_a_table_of_step_sizes(name: str, column: str, digits: int) -> None:
    """Mean and deviation over five seeds, and the difference from the first row."""
    found = cells(name)
    values = []
    for row in rows(STEP_SIZES.partition(f"<!-- {name} -->")[2]):
        label, rate = re.fullmatch(r"(.+), ([\d.e-]+)(?: \(default\))?", row[""]).groups()  # type: ignore[union-attr]
        optim = label.lower().replace("spectral adafisher", "spectral-adafisher")
        of = found[(found["optim"] == optim) & (found["learning_rate"] == float(rate)) & found["seed"].isin(CLAIM)]
        values.append(of.sort_values("seed")[column])
        text, difference = list(row.values())[1:]
        assert len(values[-1]) == 5 and text == spread(values[-1], digits)
        assert difference == (interval(values[-1].tolist(), values[0].tolist(), digits) if len(values) > 1 else "")


def test_the_table_of_what_was_tried() -> None:
    found = json.loads((RESULTS / "step-sizes-variants" / "variants.json").read_text(encoding="utf-8"))["rows"]
    plain = found[0]["values"]
    table = rows(SPECTRAL.partition("<!-- variants -->")[2])
    assert [row["variant"] for row in table] == [row["variant"] for row in found]
    for shown, row in zip(table, found, strict=True):
        values = row["values"]
        assert int(shown["seeds"]) == len(values)
        assert shown["test loss"] == f"{sum(values.values()) / len(values):.3f}"
        pair = list(values.values()), [plain[seed] for seed in values]
        assert shown["difference"] == ("" if values is plain else interval(*pair, 3))


def test_the_table_of_adapters() -> None:
    found = json.loads((RESULTS / "step-sizes-lora" / "lora.json").read_text(encoding="utf-8"))["ranks"]
    names = ["AdamW", "AdaFisherW", "spectral AdaFisher", "the same with a metric of the pair"]
    expected = [(rank[2:], row) for rank, of in found.items() for row in of.values()]
    table = rows(STEP_SIZES.partition("<!-- lora -->")[2])
    for i, (shown, (rank, row)) in enumerate(zip(table, expected, strict=True)):
        assert (shown["rank"], shown["optimizer, rate"]) == (rank, f"{names[i % 4]}, {row['best']}")
        assert shown["validation loss"] == f"{sum(row['losses']) / 5:.3f}"
        for column, name in (("minus AdamW's", "adamw"), ("minus the spectral AdaFisher's", "spectral")):
            other = found[f"r={rank}"][name]["losses"]
            assert shown[column] == ("" if other == row["losses"] else interval(row["losses"], other, 3))


def test_the_steps_without_hooks() -> None:
    found = json.loads((RESULTS / "benchmark" / "benchmarks.json").read_text(encoding="utf-8"))
    large, small = (row for row in rows(PAGE.partition("<!-- root-step root-small-tensors -->")[2]))
    for shown, name in ((large, "root-step"), (small, "root-small-tensors")):
        assert f"`{found[name]['command']}`" == shown["command"]
    times = found["root-step"]["results"]["rows"]
    for column, name, digits in (
        ("AdaFisherW by the root", "adafisherw root", 2), ("`compiled=True`", "compiled root", 2),
        ("spectral AdaFisher", "spectral-adafisher", 1), ("AdamW, foreach", "adamw foreach", 2),
    ):  # fmt: skip
        assert large[column] == f"{times[name]['ratio']:.{digits}f}"
    ratios = found["root-small-tensors"]["results"]["ratio_to_foreach"]
    assert small["AdaFisherW by the root"] == f"{ratios['adafisherw root']:.2f}"
    assert small["spectral AdaFisher"] == f"{ratios['spectral-adafisher']:.2f}"
