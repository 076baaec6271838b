"""Table of the figures, ``hf-adafisher figures NAME``."""

from __future__ import annotations

from collections.abc import Sequence

from hf_adafisher.cli.main import dispatch

FIGURES = {
    "curvature": ("hf_adafisher.cli.figures.curvature:main", "step size of each layer over a run"),
    "differences": ("hf_adafisher.cli.figures.differences:main", "differences from a reference, with intervals"),
    "factors": ("hf_adafisher.cli.figures.factors:main", "how diagonal a layer's Kronecker factors are (Figure 3)"),
    "fisher-accuracy": ("hf_adafisher.cli.figures.fisher_accuracy:main", "how close the diagonal is to the exact one"),
    "fisher-histogram": (
        "hf_adafisher.cli.figures.fisher_histogram:main",
        "a layer's Fisher diagonal beside Adam's second moment (Figure 4)",
    ),
    "landscape": ("hf_adafisher.cli.figures.landscape:main", "paths of optimizers over the loss (Figure 1)"),
    "learning-rates": ("hf_adafisher.cli.figures.learning_rates:main", "loss against learning rate of comparisons"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Draw the figure that the first word names; return its exit status."""
    return dispatch("hf-adafisher figures", "Draw a figure, with its numbers as JSON.", FIGURES, argv)
