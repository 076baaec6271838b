"""Draws which layers the curvature speeds up and which it holds back, from the record of a run.

The run is one of any Trainer with AdaFisher or AdaFisherW and callbacks=[CurvatureCallback()], which writes
curvature.jsonl into its folder:

    python scripts/plot_curvature.py out
    python scripts/plot_curvature.py out --layers "*.weight" --output weights.png

It prints the layers at both ends and what recording cost. A layer's step is the root mean square of momentum / F over
that of its momentum: how far the curvature lets it move for what its gradients ask, here divided by the same of the
layer in the middle of the model.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from hf_adafisher.experiments.command_line import StrictParser
from hf_adafisher.experiments.figures.curvature_picture import draw_curvature
from hf_adafisher.experiments.figures.runs import run_figure


def main(argv: Sequence[str] | None = None) -> int:
    """Draws it; returns the exit status: 0, or 2 where there is nothing to draw."""
    parser = StrictParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of the run, or its curvature.jsonl")
    parser.add_argument(
        "--output", type=Path, help="PNG; SVG and JSON stand beside it (default curvature.png beside the record)"
    )
    parser.add_argument("--layers", default="*", help="show the parameters whose names fit this pattern (default *)")
    args = parser.parse_args(argv)
    return run_figure(lambda: draw_curvature(args.run, args.output, args.layers))


if __name__ == "__main__":
    sys.exit(main())
