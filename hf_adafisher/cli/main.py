"""``hf-adafisher``: the tables of its commands and figures, and their call.

A command is a function of its arguments that returns the exit status. Its module is imported when it is called, so that
``--help`` of all of them is quick.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from importlib import import_module

from hf_adafisher.optimizers.factory.records import did_you_mean

PROGRAM = "hf-adafisher"
COMMANDS = {
    "clm": ("hf_adafisher.cli.clm:main", "train or fine-tune a causal language model"),
    "image": ("hf_adafisher.cli.image:main", "train or fine-tune an image classifier"),
    "compare": ("hf_adafisher.cli.compare:main", "compare optimizers by a preset or a file of your own"),
    "report": ("hf_adafisher.cli.report:main", "write the report of a comparison again"),
    "list": ("hf_adafisher.cli.list_optimizers:main", "list the optimizers and their options"),
    "doctor": ("hf_adafisher.cli.doctor:main", "say what is wrong with a run, after its first steps"),
    "benchmark": ("hf_adafisher.cli.benchmark:main", "time the steps of optimizers"),
    "figures": ("hf_adafisher.cli.main:figures", "draw the curvature, the loss and other figures"),
    "soak": ("hf_adafisher.cli.soak:main", "kill runs at random moments and check what is left"),
}
"""Commands by name: their function as ``module:function``, and what they do in one line."""
FIGURES = {
    "curvature": ("hf_adafisher.cli.figures:curvature", "step size of each layer over a run"),
    "differences": ("hf_adafisher.cli.figures:differences", "differences from a reference, with intervals"),
    "factors": ("hf_adafisher.cli.figures:factors", "how diagonal a layer's Kronecker factors are (Figure 3)"),
    "fisher-accuracy": ("hf_adafisher.cli.figures:fisher_accuracy", "how close the diagonal is to the exact one"),
    "fisher-histogram": (
        "hf_adafisher.cli.figures:fisher_histogram",
        "a layer's Fisher diagonal beside Adam's second moment (Figure 4)",
    ),
    "landscape": ("hf_adafisher.cli.figures:landscape", "paths of optimizers over the loss (Figure 1)"),
    "learning-rates": ("hf_adafisher.cli.figures:learning_rates", "loss against learning rate of comparisons"),
}
"""The figures of ``hf-adafisher figures``, as ``COMMANDS``."""

Commands = Mapping[str, tuple[str, str]]


def main(argv: Sequence[str] | None = None) -> int:
    """Call the command that the first word names; return its exit status."""
    from hf_adafisher import __version__

    words = list(sys.argv[1:] if argv is None else argv)
    if words == ["--version"]:
        print(f"hf_adafisher {__version__}")
        return 0
    about = "AdaFisher, AdaFisherW and SpectralAdaFisher for Hugging Face Transformers."
    return dispatch(PROGRAM, about, COMMANDS, words)


def figures(argv: Sequence[str] | None = None) -> int:
    """Draw the figure that the first word names; return its exit status."""
    return dispatch(f"{PROGRAM} figures", "Draw a figure, with its numbers as JSON.", FIGURES, argv)


def dispatch(program: str, about: str, commands: Commands, argv: Sequence[str] | None = None) -> int:
    """Call one of several commands.

    Args:
        program: Words that stand before the command's name.
        about: One sentence for the help.
        commands: As ``COMMANDS``.
        argv: The command's name, or ``--help``, and its arguments (default: ``sys.argv[1:]``).

    Returns:
        The command's exit status; 2 for an unknown name or none.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    name, rest = (words[0] if words else ""), words[1:]
    if name in ("-h", "--help"):
        print(describe(program, about, commands))
        return 0
    if name not in commands:
        problem = f"unknown command {name!r}{did_you_mean(name, commands)}" if name else "which command?"
        print(f"ERROR: {problem}\n\n{describe(program, about, commands)}", file=sys.stderr)
        return 2
    module, function = commands[name][0].split(":")
    sys.argv = [f"{program} {name}", *rest]  # the name in messages of argparse
    return int(getattr(import_module(module), function)(rest))


def describe(program: str, about: str, commands: Commands) -> str:
    """Return the help text: every command with its line."""
    width = max(map(len, commands)) + 2
    lines = [f"  {name:<{width}}{line}" for name, (_, line) in commands.items()]
    return "\n".join(
        [f"usage: {program} COMMAND ...", "", about, "", *lines, "", f"{program} COMMAND --help says more."]
    )
