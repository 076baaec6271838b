"""Command lines of the figures: common arguments, exit status and messages."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hf_adafisher.experiments.command_line import StrictParser
from hf_adafisher.experiments.drawing import require_matplotlib
from hf_adafisher.experiments.figures.reserved_arguments import TASKS


def figure_parser(description: str, output: str) -> argparse.ArgumentParser:
    """Create a parser with the common arguments ``--task`` and ``--output``.

    Use ``parse_known_args``: the remaining words are arguments of the run.

    Args:
        description: Docstring of the script.
        output: Default of ``--output``.
    """
    parser = StrictParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Every other argument is the run's, as its script knows it: --model, --dataset, --seed and so on.",
    )
    tasks = "; ".join(f"{name}: {what}" for name, what in TASKS.items())
    parser.add_argument("--task", choices=TASKS, default="digits", help=f"{tasks} (default digits)")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path(output),
        help=f"SVG or PNG; its numbers stand beside it as JSON (default {output})",
    )
    return parser


def run_figure(main: Callable[[], list[Path]]) -> int:
    """Run a figure's script and report its files, or one line for bad input or a missing extra.

    Args:
        main: Makes the figure and returns the files that it wrote.

    Returns:
        The exit status: 0, or 2 for an error.
    """
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.INFO)
    for library in ("httpx", "datasets", "matplotlib"):
        logging.getLogger(library).setLevel(logging.WARNING)
    try:
        require_matplotlib()
        files = main()
    except (ValueError, OSError, ImportError) as error:
        logging.error("%s", " ".join(str(error).split()))
        return 2
    print("written: " + ", ".join(str(file) for file in files))
    return 0


def require_at_least(settings: Any, **bounds: int) -> None:
    """Check settings against their lower bounds; None is in range.

    Raises:
        ValueError: A setting is below its bound; the message names the argument.
    """
    for name, bound in bounds.items():
        value = getattr(settings, name)
        if value is not None and value < bound:
            raise ValueError(f"--{name} is {value}; it must be at least {bound}")
