"""The commands of ``hf-adafisher figures``: a function each, whose docstring is its help.

They return the exit status: 0, or 2 for bad input.
"""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Sequence
from pathlib import Path

from hf_adafisher.experiments.command_line import StrictParser
from hf_adafisher.experiments.drawing import save_figure
from hf_adafisher.experiments.figures.command_line import figure_parser, run_figure
from hf_adafisher.experiments.figures.factors.picture import layer_table, write_factor_pictures
from hf_adafisher.experiments.figures.factors.study import FactorSettings, study_factors
from hf_adafisher.experiments.figures.histogram.collect import HistogramSettings, collect_histograms
from hf_adafisher.experiments.figures.histogram.picture import draw_histograms, spread_in_decades
from hf_adafisher.experiments.figures.landscape.picture import draw_landscape
from hf_adafisher.experiments.figures.landscape.trace import trace_landscape
from hf_adafisher.experiments.figures.landscape.trajectories import LandscapeSettings
from hf_adafisher.experiments.figures.layers import draw_curvature
from hf_adafisher.experiments.fisher_accuracy.evaluation import FisherSettings, compare_fisher
from hf_adafisher.experiments.fisher_accuracy.exact_fisher import KINDS
from hf_adafisher.experiments.fisher_accuracy.picture import CONTROL_COLUMNS, LEGEND, agreement_table, draw_agreement
from hf_adafisher.experiments.report.differences import REFERENCE, draw_differences, draw_trend, read_differences
from hf_adafisher.experiments.report.rates import draw_rates

TABLES = {
    "spearman": "Spearman's rank correlation with the exact diagonal",
    "log_pearson": "Pearson's correlation of logarithms",
    "log_scale": "log10 of mean(estimate) / mean(exact)",
}


def curvature(argv: Sequence[str] | None = None) -> int:
    """Draw the relative step size of each layer from the curvature record of a run.

    The run is one of any Trainer with AdaFisher or AdaFisherW and callbacks=[CurvatureCallback()], which writes
    curvature.jsonl into its folder:

        hf-adafisher figures curvature out
        hf-adafisher figures curvature out --layers "*.weight" --output weights.svg

    It prints both ends of the ranking and the cost of recording. A layer's step is the root mean square of momentum / F
    over that of its momentum, here divided by its median over all layers: above 1 the curvature speeds a layer up,
    below 1 it holds it back.
    """
    parser = _parser(curvature.__doc__)
    parser.add_argument("run", type=Path, help="folder of the run, or its curvature.jsonl")
    parser.add_argument(
        "--output",
        type=Path,
        help="SVG or PNG; its numbers stand beside it as JSON (default curvature.svg beside the record)",
    )
    parser.add_argument("--layers", default="*", help="show the parameters whose names fit this pattern (default *)")
    args = parser.parse_args(argv)
    return run_figure(lambda: draw_curvature(args.run, args.output, args.layers))


def differences(argv: Sequence[str] | None = None) -> int:
    """Draw differences from a reference with their intervals: a bar for each optimizer of a comparison, or variant.

        hf-adafisher figures differences out/text --output differences.svg
        hf-adafisher figures differences docs/results/step-sizes-variants/variants.json --output variants.svg

    With --at, a line for each optimizer that stands in two or more comparisons, such as models of different widths:

        hf-adafisher figures differences out/small out/middle out/large --at 128 256 512 --label "width of the model"
    """
    parser = _parser(differences.__doc__)
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


def factors(argv: Sequence[str] | None = None) -> int:
    """Draw the Kronecker factors of a layer during training (Figure 3 of the AdaFisher paper).

    AdaFisher keeps the diagonals of ``H = mean x x^T`` (inputs) and ``S = mean g g^T`` (output gradients). This
    computes both in full after chosen optimizer steps and draws their Gershgorin disks and their eigenvalues,
    unchanged, with noise off the diagonal, and of the diagonal alone; a table and NAME_layers.svg show the diagonal
    dominance of every layer.

        hf-adafisher figures factors --layer cct.layers.0.intermediate --steps 50 200 --output figures/factors.svg
        hf-adafisher figures factors --task clm --n_layer 1 --n_embd 32 --n_head 2 --steps 5 --optim adamw
        hf-adafisher figures factors --task image --model resnet18 --dataset cifar10 --layer classifier --steps 100

    A wrong name of a layer is answered with those that there are.
    """
    parser = figure_parser(str(factors.__doc__), "figures/factors.svg")
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


def fisher_accuracy(argv: Sequence[str] | None = None) -> int:
    """Compare the divisors of optimizers with the exact diagonal of the Fisher, layer by layer.

    A small model is trained with AdaFisher(W). Then the exact diagonal is computed from the gradients of single
    examples, and four estimates of the same run are compared with it: AdaFisher's F~, the same before normalisation (S
    (x) H), Adam's moving average of squared gradients, and K-FAC's divisor. Numbers are rank correlations, correlations
    of the logarithms, and log10 of the ratio of the means; "exact, half and half" is the same between two halves of the
    examples.

    The exact diagonal is that of the end, and the estimates are averages over the training, each with its own steps and
    decay. A second table has controls that average as F~ does, S (x) H without its scaling layer by layer, and K-FAC
    with a hundredth and a hundred times of the damping. A legend of all columns and rows is printed below the tables.

        hf-adafisher figures fisher-accuracy --steps 200 --seeds 0 1 2 --output figures/exact_fisher.svg
        hf-adafisher figures fisher-accuracy --kind true --steps 200 --output figures/true_fisher.svg
        hf-adafisher figures fisher-accuracy --task clm --n_layer 1 --n_embd 32 --n_head 2 --steps 50
    """
    parser = figure_parser(str(fisher_accuracy.__doc__), "figures/exact_fisher.svg")
    parser.add_argument("--optimizer", help="adafisher or adafisherw, or NAME:argument=value,... (default: the task's)")
    parser.add_argument("--steps", type=int, default=200, help="of the training (default 200)")
    parser.add_argument(
        "--kind", default="empirical", help=f"the exact Fisher: {' or '.join(KINDS)} (default empirical)"
    )
    parser.add_argument("--examples", type=int, default=512, help="of the training data (default 512)")
    parser.add_argument("--draws", type=int, default=1, help="labels an example, true Fisher of language models only")
    parser.add_argument("--kfac_damping", type=float, default=1e-2, help="lambda of K-FAC, untuned (default 0.01)")
    parser.add_argument("--max_factor_dim", type=int, default=2048, help="of K-FAC's full factors (default 2048)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="one training each (default 0)")
    args, further = parser.parse_known_args(argv)

    def work() -> list[Path]:
        settings = FisherSettings(**vars(args), further=further)
        found = compare_fisher(settings)
        for measure, title in TABLES.items():
            print(f"\n{title}:\n\n{agreement_table(found, measure).markdown()}")
            print(f"{title}, controls:\n\n{agreement_table(found, measure, CONTROL_COLUMNS).markdown()}")
        print(LEGEND.format(damping=f"{args.kfac_damping:g}"))
        return draw_agreement(found, args.output)

    return run_figure(work)


def fisher_histogram(argv: Sequence[str] | None = None) -> int:
    r"""Draw histograms of a layer's Fisher diagonal, step by step (Figure 4 of the AdaFisher paper).

    AdaFisher's diagonal, by which its momentum is divided, stands beside the second moment of Adam, which starts from
    the same weights and sees the same data. Both are counted in logarithmic bins; the lines are the quartiles.

        hf-adafisher figures fisher-histogram --layer cct.layers.0.intermediate --steps 300
        hf-adafisher figures fisher-histogram --task clm --n_layer 1 --n_embd 32 --n_head 2 --steps 20 \
            --layer transformer.h.0.mlp.c_fc
        hf-adafisher figures fisher-histogram --task image --model resnet18 --dataset cifar10 --layer classifier.1 \
            --optimizers adafisher:learning_rate=0.01 adam:learning_rate=0.001

    A wrong name of a layer, or none, is answered with those that there are.
    """
    parser = figure_parser(str(fisher_histogram.__doc__), "figures/histogram.svg")
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


def landscape(argv: Sequence[str] | None = None) -> int:
    r"""Draw the trajectories of several optimizers, from one start, over the loss of their plane (Figure 1).

        hf-adafisher figures landscape --optimizers adafisher adam sgd --steps 100 --output out/fig1.png
        hf-adafisher figures landscape --task clm --n_layer 2 --n_embd 64 --n_head 2 \
            --optimizers adafisherw adamw:learning_rate=0.001 --output out/clm.png

    The plane is spanned by the two principal components of all trajectories. It goes through their common start, so
    that every path begins at its true loss; with --origin mean it goes through the mean of all snapshots. Other planes
    have two random directions around the first optimizer's end, or two of your own, with filter normalisation (Li et
    al. 2018):

        hf-adafisher figures landscape --plane random --plane_seed 1 --output out/random.png
        hf-adafisher figures landscape --plane directions.pt --output out/own.png

    with ``torch.save([{name: tensor, ...}, {name: tensor, ...}], "directions.pt")`` for the file, with the names and
    shapes of the model's trainable parameters.
    """
    parser = figure_parser(str(landscape.__doc__), "out/landscape.png")
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


def learning_rates(argv: Sequence[str] | None = None) -> int:
    """Draw loss against learning rate of several comparisons side by side, from the cells.csv that their reports wrote.

        hf-adafisher figures learning-rates out/text out/vit --titles "From scratch" "Fine-tuning" --output rates.svg

    With --relative, how much a wrong rate costs: rates relative to each optimizer's best one, from an eighth to eight
    times of it, losses above the best one's, and the band of 2 % of perplexity. A label has the factor of rates within
    that band.

        hf-adafisher figures learning-rates out/text --relative --seeds 0 1 2 --output forgiveness.svg
    """
    parser = _parser(learning_rates.__doc__)
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


def _parser(docstring: str | None) -> StrictParser:
    return StrictParser(
        description=inspect.cleandoc(str(docstring)), formatter_class=argparse.RawDescriptionHelpFormatter
    )
