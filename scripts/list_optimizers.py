"""List the optimizers that --optim, AdaFisherTrainingArguments and create_optimizer accept, with their properties.

python scripts/list_optimizers.py
python scripts/list_optimizers.py --markdown        # the README's table
python scripts/list_optimizers.py --json
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from hf_adafisher.experiments.command_line import StrictParser
from hf_adafisher.optimizers.factory.optimizer_table import as_json, as_markdown, as_text


def main(argv: Sequence[str] | None = None) -> int:
    """Print it; returns 0."""
    parser = StrictParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--markdown", action="store_true", help="as a Markdown table")
    form.add_argument("--json", action="store_true", help="as JSON")
    arguments = parser.parse_args(argv)
    print(as_markdown() if arguments.markdown else as_json() if arguments.json else as_text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
