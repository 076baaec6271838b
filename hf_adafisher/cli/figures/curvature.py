"""Draw the relative step size of each layer from the curvature record of a run.

The run is one of any Trainer with AdaFisher or AdaFisherW and callbacks=[CurvatureCallback()], which writes
curvature.jsonl into its folder:

    hf-adafisher figures curvature out
    hf-adafisher figures curvature out --layers "*.weight" --output weights.svg

It prints both ends of the ranking and the cost of recording. A layer's step is the root mean square of momentum / F
over that of its momentum, here divided by its median over all layers: above 1 the curvature speeds a layer up, below 1
it holds it back.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from hf_adafisher.experiments.command_line import StrictParser
from hf_adafisher.experiments.figures.command_line import run_figure
from hf_adafisher.experiments.figures.layers import draw_curvature


def main(argv: Sequence[str] | None = None) -> int:
    """Draw it; return the exit status: 0, or 2 without anything to draw."""
    parser = StrictParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of the run, or its curvature.jsonl")
    parser.add_argument(
        "--output",
        type=Path,
        help="SVG or PNG; its numbers stand beside it as JSON (default curvature.svg beside the record)",
    )
    parser.add_argument("--layers", default="*", help="show the parameters whose names fit this pattern (default *)")
    args = parser.parse_args(argv)
    return run_figure(lambda: draw_curvature(args.run, args.output, args.layers))


if __name__ == "__main__":
    sys.exit(main())
