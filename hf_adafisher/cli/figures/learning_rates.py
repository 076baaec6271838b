"""Draw loss against learning rate of several comparisons side by side, from the cells.csv that their reports wrote.

    hf-adafisher figures learning-rates out/text out/vit --titles "From scratch" "Fine-tuning" --output rates.svg

With --relative, how much a wrong rate costs: rates relative to each optimizer's best one, from an eighth to eight times
of it, losses above the best one's, and the band of 2 % of perplexity. A label has the factor of rates within that band.

    hf-adafisher figures learning-rates out/text --relative --seeds 0 1 2 --output forgiveness.svg
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from hf_adafisher.experiments.command_line import StrictParser
from hf_adafisher.experiments.figures.command_line import run_figure
from hf_adafisher.experiments.report.rates import draw_rates


def main(argv: Sequence[str] | None = None) -> int:
    """Draw it; return the exit status: 0, or 2 for bad input."""
    parser = StrictParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", help="folders of comparisons")
    parser.add_argument("--titles", nargs="+", help="a title for each (default the folders' names)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the sweep over rates (default 0)")
    parser.add_argument("--relative", action="store_true", help="relative to each optimizer's best rate")
    parser.add_argument("--output", type=Path, default=Path("rates.svg"), help="SVG or PNG; JSON stands beside it")
    arguments = parser.parse_args(argv)
    titles = arguments.titles or [folder.name for folder in arguments.folders]
    if len(titles) != len(arguments.folders):
        parser.error(f"{len(arguments.folders)} folders need as many --titles, got {len(titles)}")
    seeds, output = arguments.seeds, arguments.output
    return run_figure(lambda: draw_rates(arguments.folders, titles, output, seeds, relative=arguments.relative))


if __name__ == "__main__":
    sys.exit(main())
