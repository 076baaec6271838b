r"""Draw histograms of a layer's Fisher diagonal, step by step (Figure 4 of the AdaFisher paper).

AdaFisher's diagonal, by which its momentum is divided, stands beside the second moment of Adam, which starts from the
same weights and sees the same data. Both are counted in logarithmic bins; the lines are the quartiles.

    hf-adafisher figures fisher-histogram --layer cct.layers.0.intermediate --steps 300 --output figures/histogram.svg
    hf-adafisher figures fisher-histogram --task clm --n_layer 1 --n_embd 32 --n_head 2 --steps 20 \
        --layer transformer.h.0.mlp.c_fc
    hf-adafisher figures fisher-histogram --task image --model resnet18 --dataset cifar10 --layer classifier.1 \
        --optimizers adafisher:learning_rate=0.01 adam:learning_rate=0.001

A wrong name of a layer, or none, is answered with those that there are.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from hf_adafisher.experiments.figures.command_line import figure_parser, run_figure
from hf_adafisher.experiments.figures.histogram.collect import HistogramSettings, collect_histograms
from hf_adafisher.experiments.figures.histogram.picture import draw_histograms, spread_in_decades


def main(argv: Sequence[str] | None = None) -> int:
    """Train both, draw, and print the spread of the values; return the exit status, 2 for bad input."""
    parser = figure_parser(__doc__, "figures/histogram.svg")
    parser.add_argument("--layer", help="name of the module whose weight is counted")
    parser.add_argument(
        "--optimizers",
        nargs="+",
        help="AdaFisher(W) and one with a second moment, NAME or NAME:argument=value,... (default: that of the "
        "network, and Adam or AdamW with a learning rate that trains from scratch)",
    )
    parser.add_argument("--steps", type=int, default=1000, help="of each run (default 1000)")
    parser.add_argument("--every", type=int, help="steps between two rows (default: about 50 rows)")
    parser.add_argument("--bins_per_decade", type=int, default=20, help="(default 20)")
    args, further = parser.parse_known_args(argv)

    def work() -> list[Path]:
        found = collect_histograms(HistogramSettings(**vars(args), further=further))
        files = draw_histograms(found, args.output)
        for panel in found["panels"]:
            row = panel["rows"][-1]
            middle_half, full = spread_in_decades(row)
            print(
                f"{panel['optimizer']}, step {row['step']}: the middle half of the values spans {middle_half:.2f} "
                f"decades, all of them {full:.2f}"
            )
        return files

    return run_figure(work)


if __name__ == "__main__":
    sys.exit(main())
