"""Draw loss against learning rate of several comparisons side by side, from the cells.csv that their reports wrote.

hf-adafisher figures learning-rates out/text out/vit --titles "From scratch" "Fine-tuning" --output rates.png
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
    parser.add_argument("--seed", type=int, default=0, help="of the sweep over learning rates (default 0)")
    parser.add_argument("--output", type=Path, default=Path("rates.png"), help="PNG; SVG and JSON stand beside it")
    arguments = parser.parse_args(argv)
    titles = arguments.titles or [folder.name for folder in arguments.folders]
    if len(titles) != len(arguments.folders):
        parser.error(f"{len(arguments.folders)} folders need as many --titles, got {len(titles)}")
    return run_figure(lambda: draw_rates(arguments.folders, titles, arguments.output, arguments.seed))


if __name__ == "__main__":
    sys.exit(main())
