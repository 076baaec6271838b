r"""Draw the trajectories of several optimizers, from one start, over the loss of their plane (Figure 1).

    hf-adafisher figures landscape --optimizers adafisher adam sgd --steps 100 --output out/fig1.png
    hf-adafisher figures landscape --task clm --n_layer 2 --n_embd 64 --n_head 2 \
        --optimizers adafisherw adamw:learning_rate=0.001 --output out/clm.png

The plane is spanned by the two principal components of all trajectories. It goes through their common start, so that
every path begins at its true loss; with --origin mean it goes through the mean of all snapshots. Other planes have two
random directions around the first optimizer's end, or two of your own, with filter normalisation (Li et al. 2018):

    hf-adafisher figures landscape --plane random --plane_seed 1 --output out/random.png
    hf-adafisher figures landscape --plane directions.pt --output out/own.png

with ``torch.save([{name: tensor, ...}, {name: tensor, ...}], "directions.pt")`` for the file, with the names and shapes
of the model's trainable parameters.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from hf_adafisher.experiments.drawing import save_figure
from hf_adafisher.experiments.figures.command_line import figure_parser, run_figure
from hf_adafisher.experiments.figures.landscape.picture import draw_landscape
from hf_adafisher.experiments.figures.landscape.trace import trace_landscape
from hf_adafisher.experiments.figures.landscape.trajectories import LandscapeSettings


def main(argv: Sequence[str] | None = None) -> int:
    """Train, draw, and return the exit status, 2 for bad input."""
    parser = figure_parser(str(__doc__), "out/landscape.png")
    add = parser.add_argument
    add("--optimizers", nargs="+", default=["adafisher", "adam", "sgd"], metavar="NAME[:ARGUMENT=VALUE,...]",
        help="the first one's end is the centre of planes other than pca (default adafisher adam sgd)")  # fmt: skip
    add("--steps", type=int, default=100, help="optimizer steps (default 100)")
    add("--every", type=int, help="steps between snapshots of the weights (default: about 50 snapshots)")
    add("--grid", type=int, default=25, help="points on each axis of the grid of losses (default 25)")
    add("--plane", default="pca", help="pca, random, or a .pt file with two directions (default pca)")
    add("--origin", help="of a pca plane: start, where all begin, or mean, of all snapshots (default start)")
    add("--plane_seed", type=int, default=0, help="of the random directions (default 0)")
    add("--extent", type=float, help="reach of the grid from the centre, at least (default: pca 0, else 1)")
    add("--examples", type=int, default=256, help="training examples for the loss, not augmented (default 256)")
    add("--jobs", type=int, help="threads that compute losses (default: as many as torch uses)")
    add("--snapshot_memory", type=float, default=2.0, help="GiB for snapshots, at most (default 2)")
    arguments, further = parser.parse_known_args(argv)

    def work() -> list[Path]:
        numbers = trace_landscape(LandscapeSettings(**vars(arguments), further=further))
        return save_figure(draw_landscape(numbers), arguments.output, numbers)

    return run_figure(work)


if __name__ == "__main__":
    sys.exit(main())
