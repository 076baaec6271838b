"""List the optimizers that --optim, AdaFisherTrainingArguments and create_optimizer accept, with their properties.

hf-adafisher list
hf-adafisher list --markdown        # the table of docs/reference.md
hf-adafisher list --json
hf-adafisher list --modes           # its table of training modes, with who refuses them
hf-adafisher list --memory          # the table of docs/choose.md: state by the size of the model
hf-adafisher list --schema          # the JSON schema of the configurations of hf-adafisher compare
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from hf_adafisher.experiments.command_line import StrictParser
from hf_adafisher.optimizers.factory.optimizer_table import as_json, as_markdown, as_text, modes_as_markdown


def main(argv: Sequence[str] | None = None) -> int:
    """Print the list, in the form asked for; return 0."""
    parser = StrictParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--markdown", action="store_true", help="as a Markdown table")
    form.add_argument("--json", action="store_true", help="as JSON")
    form.add_argument("--modes", action="store_true", help="the training modes that some of them refuse, as Markdown")
    form.add_argument("--memory", action="store_true", help="state by the size of the model, as Markdown")
    form.add_argument("--schema", action="store_true", help="the JSON schema of configurations of comparisons")
    arguments = parser.parse_args(argv)
    chosen = {
        "markdown": as_markdown,
        "json": as_json,
        "modes": modes_as_markdown,
        "memory": _memory,
        "schema": _schema,
    }
    render = next((function for name, function in chosen.items() if getattr(arguments, name)), as_text)
    print(render())
    return 0


def _memory() -> str:
    from hf_adafisher.experiments.benchmark.counts import memory_as_markdown  # transformers takes seconds to import

    return memory_as_markdown()


def _schema() -> str:
    from hf_adafisher.experiments.comparison.configuration import configuration_schema

    return json.dumps(configuration_schema(), indent=2)


if __name__ == "__main__":
    sys.exit(main())
