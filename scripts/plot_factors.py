"""Draws how diagonal the Kronecker factors of a layer are while a model trains (Figure 3 of the AdaFisher paper).

AdaFisher keeps the diagonals of ``H = mean x x^T`` (inputs) and ``S = mean g g^T`` (output gradients). This takes both
in full after chosen optimizer steps and draws their Gershgorin disks and their eigenvalues, as they are, with noise off
the diagonal, and of the diagonal alone; a table and NAME_layers.png show the same shares for every layer.

    python scripts/plot_factors.py --layer cct.layers.0.intermediate --steps 50 200 --output figures/factors.png
    python scripts/plot_factors.py --task clm --n_layer 1 --n_embd 32 --n_head 2 --steps 5 --optim adamw
    python scripts/plot_factors.py --task image --model resnet18 --dataset cifar10 --layer classifier --steps 100

A wrong name of a layer is answered with those that there are.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from hf_adafisher.experiments.figures.dominance_picture import layer_table, write_factor_pictures
from hf_adafisher.experiments.figures.dominance_study import StudyOptions, study_factors
from hf_adafisher.experiments.figures.runs import figure_parser, optimizer_choice, run_figure


def main(argv: Sequence[str] | None = None) -> int:
    """Trains, draws, prints the table; returns the exit status, 2 for bad input."""
    parser = figure_parser(__doc__, "figures/factors.png")
    default = StudyOptions()
    parser.add_argument("--layer", help="name of the module to draw (default: one in the middle)")
    parser.add_argument("--steps", type=int, nargs="+", default=list(default.steps), help="rising (default 50 200)")
    parser.add_argument("--optim", type=optimizer_choice, help="NAME or NAME:argument=value,... (default: the run's)")
    parser.add_argument("--examples", type=int, default=default.examples, help="of the training data (default 512)")
    parser.add_argument("--noise", type=float, default=default.noise, help="off the diagonal, in shares of its mean")
    parser.add_argument("--max_dim", type=int, default=default.max_dim, help="longest side of a factor (default 4096)")
    parser.add_argument("--disks", type=int, default=default.disks, help="to draw of a factor, at most (default 100)")
    everything = {"action": argparse.BooleanOptionalAction, "default": True}
    parser.add_argument("--all_layers", help="measure every layer, not only the one drawn (default on)", **everything)
    args, further = parser.parse_known_args(argv)

    def work() -> list[Path]:
        chosen = (args.layer, args.steps, args.examples, args.noise, args.max_dim, args.all_layers, args.disks)
        options = StudyOptions(*chosen)
        study = study_factors(args.task, args.output, options, args.optim, further)
        files = write_factor_pictures(study, args.output)
        for step, layers in study.layers.items():
            print(f"\nEnergy on the diagonals at step {step} ({study.title}):\n\n{layer_table(layers).markdown()}")
        for name, why in study.skipped.items():
            print(f"left out: {name} ({why})")
        return files

    return run_figure(work)


if __name__ == "__main__":
    sys.exit(main())
