"""Draw differences from a reference with their intervals: a bar for each optimizer of a comparison, or variant.

    hf-adafisher figures differences out/text --output differences.svg
    hf-adafisher figures differences docs/results/step-sizes-variants/variants.json --output variants.svg

With --at, a line for each optimizer over several comparisons, such as models of different widths:

    hf-adafisher figures differences out/small out/middle out/large --at 128 256 512 --label "width of the model"
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from hf_adafisher.experiments.command_line import StrictParser
from hf_adafisher.experiments.figures.command_line import run_figure
from hf_adafisher.experiments.report.differences import REFERENCE, draw_differences, draw_trend, read_differences


def main(argv: Sequence[str] | None = None) -> int:
    """Draw it; return the exit status: 0, or 2 for bad input."""
    parser = StrictParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("sources", type=Path, nargs="+", help="folders of comparisons or archives, or a variants.json")
    add("--at", type=float, nargs="+", help="place of each of several sources on the horizontal axis")
    add("--label", default="size", help="of the horizontal axis with --at (default size)")
    add("--reference", default=REFERENCE, help=f"optimizer that is subtracted (default {REFERENCE})")
    add("--seeds", type=int, nargs="+", help="only runs with these (default: all that are no tuning seeds)")
    add("--metric", default="test loss", help="column of cells.csv (default test loss)")
    add("--output", type=Path, default=Path("differences.svg"), help="SVG or PNG; JSON stands beside it")
    given = parser.parse_args(argv)
    if len(given.at or [0]) != len(given.sources):
        parser.error(f"{len(given.sources)} sources need as many numbers after --at, got {len(given.at or [])}")

    def work() -> list[Path]:
        if given.at:
            return draw_trend(
                given.sources, given.at, given.label, given.output, given.reference, given.seeds, given.metric
            )
        found = read_differences(given.sources[0], given.reference, given.seeds, given.metric)
        print(draw_differences(given.output, found).alt)
        return [given.output, given.output.with_suffix(".json")]

    return run_figure(work)


if __name__ == "__main__":
    sys.exit(main())
