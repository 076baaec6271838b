"""Compare the divisors of optimizers with the exact diagonal of the Fisher, layer by layer.

A small model is trained with AdaFisher(W). Then the exact diagonal is computed from the gradients of single examples,
and four estimates of the same run are compared with it: AdaFisher's F~, the same before normalisation (S (x) H), Adam's
moving average of squared gradients, and K-FAC's divisor. Numbers are rank correlations, correlations of the
logarithms, and log10 of the ratio of the means; "exact, half and half" is the same between two halves of the examples.

The exact diagonal is that of the end, and the estimates are averages over the training, each with its own steps and
decay. A second table has controls that average as F~ does, S (x) H without its scaling layer by layer, and K-FAC with
a hundredth and a hundred times of the damping. A legend of all columns and rows is printed below the tables.

    hf-adafisher figures fisher-accuracy --steps 200 --seeds 0 1 2 --output figures/exact_fisher.svg
    hf-adafisher figures fisher-accuracy --kind true --steps 200 --output figures/true_fisher.svg
    hf-adafisher figures fisher-accuracy --task clm --n_layer 1 --n_embd 32 --n_head 2 --steps 50
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from hf_adafisher.experiments.figures.command_line import figure_parser, run_figure
from hf_adafisher.experiments.fisher_accuracy.evaluation import FisherSettings, compare_fisher
from hf_adafisher.experiments.fisher_accuracy.exact_fisher import KINDS
from hf_adafisher.experiments.fisher_accuracy.picture import CONTROL_COLUMNS, LEGEND, agreement_table, draw_agreement

TABLES = {
    "spearman": "Spearman's rank correlation with the exact diagonal",
    "log_pearson": "Pearson's correlation of logarithms",
    "log_scale": "log10 of mean(estimate) / mean(exact)",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Train, compare, print the tables and draw; return the exit status, 2 for bad input."""
    parser = figure_parser(__doc__, "figures/exact_fisher.svg")
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


if __name__ == "__main__":
    sys.exit(main())
