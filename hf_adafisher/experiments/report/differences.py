"""Differences from a reference with their intervals: a bar each, or lines over sizes or lengths of training."""

from __future__ import annotations

import gzip
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from hf_adafisher.experiments.comparison.schema import anything, listing, mapping, number, text
from hf_adafisher.experiments.drawing import (
    COLOURS,
    GREY_LINE,
    OPTIMIZER_COLOURS,
    PAPER,
    coloured_lines,
    label_line_ends,
    name_the_grey,
    new_figure,
    optimizer_base,
    optimizer_styles,
    plain_text,
    save_figure,
)
from hf_adafisher.experiments.report.paired import LEAST_SEEDS, Interval, paired_interval
from hf_adafisher.experiments.report.rates import read_cells
from hf_adafisher.experiments.report.results import SettingResults
from hf_adafisher.experiments.report.tables import Picture
from hf_adafisher.experiments.settings_files import parse_json, read_json

REFERENCE = "adamw"
_ROW = mapping(
    {"variant": text, "difference": number(), "low": number(), "high": number(), "seeds": number(2, whole=True)},
    others=anything,
    required=("variant",),
)
_VARIANTS = mapping({"metric": text, "rows": listing(_ROW, empty=False)}, others=anything, required=("metric", "rows"))


class Difference(NamedTuple):
    """One bar: the mean of the differences from the reference, the ends of its interval, and the number of seeds."""

    name: str
    mean: float
    low: float
    high: float
    seeds: int

    @property
    def clear(self) -> bool:
        """True where the interval leaves out 0."""
        return Interval(self.mean, self.low, self.high).leaves_out_0

    @property
    def described(self) -> str:
        """``name -0.21 (-0.23 to -0.19)``."""
        return f"{self.name} {self.mean:+.3g} ({self.low:+.3g} to {self.high:+.3g})"


class Differences(NamedTuple):
    """Bars of one picture.

    Attributes:
        metric: What is compared, with its unit.
        reference: Name of what is subtracted.
        bars: The best first.
        more_is_better: True for accuracies.
        interval: What the whiskers are.
    """

    metric: str
    reference: str
    bars: Sequence[Difference]
    more_is_better: bool
    interval: str


def paired_differences(best: Sequence[SettingResults], reference: str = REFERENCE) -> Differences | None:
    """Subtract the reference's test metric (without one: the metric that selects) from every other's, seed by seed.

    Args:
        best: Settings, the best first.
        reference: Name of an optimizer; its first setting counts.

    Returns:
        None if the reference did not run, or fewer than ``LEAST_SEEDS`` seeds are common with every other.
    """
    task = best[0].task if best else None
    base = next((setting for setting in best if setting.optim == reference), None)
    if task is None or base is None:
        return None
    names = [one.name for one in reversed(task.compared_metrics)]
    metric = next((name for name in names if base.mean(name) is not None), task.selection_metric)
    values = {}
    for setting in reversed(best):
        by_seed = setting.by_seed(metric)
        known = {seed: value for seed, value in by_seed.items() if value is not None}
        if len(known) == len(by_seed):  # the seeds that are left of one that diverged would flatter it
            values[setting.optim] = known
    unit = "" if metric.endswith("%") else " (nats)"
    return _subtract(values, reference, metric + unit, more_is_better=task.more_is_better)


def _subtract(
    values: Mapping[str, Mapping[Any, float]], reference: str, metric: str, *, more_is_better: bool
) -> Differences | None:
    """Differences of values by seed of each name; None without any that has enough seeds."""
    base = values[reference]
    common = {name: sorted(base.keys() & found.keys()) for name, found in values.items() if name != reference}
    common = {name: seeds for name, seeds in common.items() if len(seeds) >= LEAST_SEEDS}
    bars = []
    for name, seeds in common.items():
        pair = [values[name][seed] for seed in seeds], [base[seed] for seed in seeds]
        bars.append(Difference(name, *paired_interval(*pair, len(common)), len(seeds)))
    if not bars:
        return None
    bars.sort(key=lambda bar: -bar.mean if more_is_better else bar.mean)
    together = f"95 % intervals that hold together for all {len(bars)}" if len(bars) > 1 else "a 95 % interval"
    return Differences(metric, reference, bars, more_is_better, f"{together} (Student's t)")


def read_differences(source: Path, reference: str, seeds: Sequence[int] | None, metric: str) -> Differences:
    """Read differences from a comparison, or from the ``variants.json`` of a study.

    Args:
        source: Folder of a comparison or an archive (see ``read_cells``), or a file whose ``rows`` have ``variant``,
            ``difference``, ``low``, ``high`` and ``seeds``; there the row without a difference is the reference, and
            rows that name another ``reference`` are left out.
        reference: Name of the optimizer that all others are compared with.
        seeds: Runs with these alone; None: all that choose nothing (see ``tuning_seeds``).
        metric: Column of a loss.

    Raises:
        ValueError: The file or the folder has no differences; the message says why.
    """
    if source.is_file():
        content = read_json(source)
        _VARIANTS(content, str(source))
        base = next((row["variant"] for row in content["rows"] if "difference" not in row), "the reference")
        bars = [
            Difference(row["variant"], row["difference"], row["low"], row["high"], row["seeds"])
            for row in content["rows"]
            if {"difference", "low", "high", "seeds"} <= row.keys() and row.get("reference", base) == base
        ]
        if not bars:
            raise ValueError(f"{source} has no row with a difference, its interval and its seeds")
        more_is_better = content["metric"] == "accuracy"
        bars.sort(key=lambda bar: -bar.mean if more_is_better else bar.mean)
        label = content["metric"] + ("" if more_is_better else " (nats)")
        return Differences(label, base, bars, more_is_better, "95 % intervals (Student's t)")
    cells = read_cells(source, seeds, metric)
    if seeds is None:
        cells = cells[~cells["seed"].isin(tuning_seeds(source))]
    values = {}
    for optimizer, rows in cells.groupby("optimizer"):
        groups = rows.fillna({"learning rate": -1.0}).groupby(["setting", "learning rate"])
        settings = groups["loss"].agg(["size", "mean"]).sort_values(["size", "mean"], ascending=[False, True])
        kept = groups.get_group(settings.index[0])
        if kept["loss"].map(math.isfinite).all():  # the seeds that are left of one that diverged would flatter it
            values[str(optimizer)] = dict(zip(kept["seed"], kept["loss"], strict=True))
    if reference not in values:
        raise ValueError(f"{source} has no run of {reference!r} with these seeds; it has {', '.join(values)}")
    found = _subtract(values, reference, f"{metric} (nats)", more_is_better=False)
    if found is None:
        raise ValueError(f"{source}: no optimizer has {LEAST_SEEDS} seeds in common with {reference}")
    return found


def tuning_seeds(folder: Path) -> list[int]:
    """Read which seeds only chose settings, from an archive or from the configuration of a comparison's folder."""
    archive, live = folder / "runs.jsonl.gz", folder / "configuration.json"
    if archive.is_file():
        with gzip.open(archive) as file:
            config = parse_json(file.readline(), f"{archive}, line 1").get("configuration", {})
    else:
        config = read_json(live) if live.is_file() else {}
    return list(config.get("tuning_seeds", []))


def draw_differences(path: Path, differences: Differences) -> Picture:
    """Draw a bar with its interval for each, the best on top; hollow where the interval does not leave out 0.

    Args:
        path: SVG or PNG; the numbers stand beside it as JSON.
        differences: To draw.

    Returns:
        The texts of the picture.
    """
    bars = differences.bars
    figure, (axes,) = new_figure(1, 1, (8.5, 1.1 + 0.32 * len(bars)))
    styles = optimizer_styles(bar.name for bar in bars)
    for place, bar in enumerate(bars):
        known = optimizer_base(bar.name) in OPTIMIZER_COLOURS
        colour = styles[bar.name]["color"] if known else COLOURS[0]
        face = {"facecolor": colour if bar.clear else PAPER, "edgecolor": colour, "linewidth": 1.2}
        axes.barh(place, bar.mean, height=0.62, **face)
        whiskers = [[bar.mean - bar.low], [bar.high - bar.mean]]
        axes.errorbar(bar.mean, place, xerr=whiskers, color="black", linewidth=1.1, capsize=3)
        values = f"{bar.mean:+.3f}  ({bar.low:+.3f} to {bar.high:+.3f})"
        axes.annotate(values, (1.02, place), xycoords=("axes fraction", "data"), va="center", fontsize=9)
    axes.axvline(0.0, color="black", linewidth=1.0)
    axes.set_yticks(range(len(bars)), [plain_text(bar.name) for bar in bars], fontsize=9)
    axes.set_ylim(len(bars) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")
    better = "higher" if differences.more_is_better else "lower"
    axes.set_xlabel(plain_text(f"{differences.metric} minus that of {differences.reference!r}; {better} is better"))
    numbers = {**differences._asdict(), "bars": [bar._asdict() for bar in bars]}
    save_figure(figure, path, numbers)
    return Picture(_caption(differences), _in_words(differences))


def _caption(differences: Differences) -> str:
    fewest, most = (f(bar.seeds for bar in differences.bars) for f in (min, max))
    seeds = f"{fewest}" if fewest == most else f"{fewest} to {most}"
    return (
        f"Differences of {differences.metric} from {differences.reference}, seed by seed: mean over {seeds} seeds, "
        f"with {differences.interval}. A hollow bar is one whose interval does not leave out 0."
    )


def _in_words(differences: Differences) -> str:
    sign = 1 if differences.more_is_better else -1
    ahead = [bar.described for bar in differences.bars if bar.clear and bar.mean * sign > 0]
    behind = [bar.described for bar in differences.bars if bar.clear and bar.mean * sign < 0]
    level = [bar.described for bar in differences.bars if not bar.clear]
    parts = [(ahead, "better"), (level, "not told apart"), (behind, "worse")]
    found = "; ".join(f"{what}: {', '.join(bars)}" for bars, what in parts if bars)
    return f"Bar chart of differences of {differences.metric} from {differences.reference}. {found}."


def draw_trend(
    sources: Sequence[Path],
    sizes: Sequence[float],
    label: str,
    output: Path,
    reference: str = REFERENCE,
    seeds: Sequence[int] | None = None,
    metric: str = "test loss",
) -> list[Path]:
    """Draw the differences of several comparisons over a size or a length, a line with intervals for each optimizer.

    An optimizer that stands in one of several comparisons alone has no line and is left out.

    Args:
        sources: See ``read_differences``.
        sizes: Place of each on the horizontal axis, above 0.
        label: What it is, with its unit.
        output: SVG or PNG; the numbers stand beside it as JSON.
        reference: See ``read_differences``.
        seeds: See ``read_differences``.
        metric: See ``read_differences``.

    Returns:
        The files written.

    Raises:
        ValueError: See ``read_differences``; or a size is not above 0 or stands there twice, or no optimizer
            stands in two comparisons.
    """
    if any(not size > 0 for size in sizes):
        raise ValueError(f"sizes must be above 0, got {list(sizes)}")
    if len(set(sizes)) < len(sizes):
        raise ValueError(f"sizes must differ, got {list(sizes)}")
    found = [read_differences(source, reference, seeds, metric) for source in sources]
    rows = [(size, *bar) for size, one in zip(sizes, found, strict=True) for bar in one.bars]
    table = pd.DataFrame(rows, columns=["size", *Difference._fields]).sort_values("size")
    if len(found) > 1:
        table = table[table.duplicated("name", keep=False)]
        if table.empty:
            raise ValueError(
                f"no optimizer or variant but the reference stands in two of {', '.join(map(str, sources))}"
            )
    ranked = list(table.groupby("name")["mean"].mean().sort_values(ascending=not found[0].more_is_better).index)
    coloured, styles = coloured_lines(ranked), optimizer_styles(ranked)
    figure, (axes,) = new_figure(1, 1, (7.0, 4.4))
    ends = []
    for index, name in enumerate(ranked):
        line = table[table["name"] == name]
        places = line["size"] * 1.02 ** (index - len(ranked) / 2)  # whiskers at one size stand beside each other
        style = styles[name] if name in coloured else GREY_LINE
        reach = [line["mean"] - line["low"], line["high"] - line["mean"]]
        axes.errorbar(places, line["mean"], yerr=reach, capsize=2, **style)
        if name in coloured:
            ends.append((places.iloc[-1], line["mean"].iloc[-1], name, style["color"]))
    axes.axhline(0.0, color="black", linewidth=1.0)
    axes.set_xscale("log")
    axes.set_xticks(sorted(set(sizes)), [f"{size:g}" for size in sorted(set(sizes))])
    axes.minorticks_off()
    better = "higher" if found[0].more_is_better else "lower"
    axes.set(xlabel=plain_text(label), ylabel=f"{found[0].metric} minus that of {reference}\n({better} is better)")
    name_the_grey(figure, [name for name in ranked if name not in coloured])
    label_line_ends(axes, ends)
    lines = {name: rows.drop(columns="name").to_dict("list") for name, rows in table.groupby("name")}
    return save_figure(figure, output, {"metric": found[0].metric, "reference": reference, "over": label, **lines})
