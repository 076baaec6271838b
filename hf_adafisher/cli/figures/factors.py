"""Draw the Kronecker factors of a layer during training (Figure 3 of the AdaFisher paper).

AdaFisher keeps the diagonals of ``H = mean x x^T`` (inputs) and ``S = mean g g^T`` (output gradients). This computes
both in full after chosen optimizer steps and draws their Gershgorin disks and their eigenvalues, unchanged, with noise
off the diagonal, and of the diagonal alone; a table and NAME_layers.svg show the diagonal dominance of every layer.

    hf-adafisher figures factors --layer cct.layers.0.intermediate --steps 50 200 --output figures/factors.svg
    hf-adafisher figures factors --task clm --n_layer 1 --n_embd 32 --n_head 2 --steps 5 --optim adamw
    hf-adafisher figures factors --task image --model resnet18 --dataset cifar10 --layer classifier --steps 100

A wrong name of a layer is answered with those that there are.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from hf_adafisher.experiments.figures.command_line import figure_parser, run_figure
from hf_adafisher.experiments.figures.factors.picture import layer_table, write_factor_pictures
from hf_adafisher.experiments.figures.factors.study import FactorSettings, study_factors


def main(argv: Sequence[str] | None = None) -> int:
    """Train, draw, and print the table; return the exit status, 2 for bad input."""
    parser = figure_parser(__doc__, "figures/factors.svg")
    add, default = parser.add_argument, FactorSettings
    add("--layer", help="name of the module to draw (default: one in the middle)")
    add("--steps", type=int, nargs="+", default=list(default.steps), help="ascending (default 50 200)")
    add("--optim", dest="optimizer", help="NAME or NAME:argument=value,... (default: the run's)")
    add("--examples", type=int, default=default.examples, help="of the training data (default 512)")
    add("--noise", type=float, default=default.noise, help="off the diagonal, in shares of its mean")
    add("--max_dim", type=int, default=default.max_dim, help="longest side of a factor (default 4096)")
    add("--disks", type=int, default=default.disks, help="to draw of a factor, at most (default 100)")
    add("--all_layers", action=argparse.BooleanOptionalAction, default=True,
        help="measure every layer, not only the one drawn (default on)")  # fmt: skip
    args, further = parser.parse_known_args(argv)

    def work() -> list[Path]:
        study = study_factors(FactorSettings(**vars(args), further=further))
        files = write_factor_pictures(study, args.output)
        for step, layers in study.layers.items():
            print(f"\nEnergy on the diagonals at step {step} ({study.title}):\n\n{layer_table(layers).markdown()}")
        for name, why in study.skipped.items():
            print(f"left out: {name} ({why})")
        return files

    return run_figure(work)


if __name__ == "__main__":
    sys.exit(main())
