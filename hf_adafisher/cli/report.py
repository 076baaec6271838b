"""Write the report of a comparison again, from the results in its folder.

    hf-adafisher report out/wikitext2-small

A comparison leaves its configuration there. Cells without a result are left out, and nothing is run.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from hf_adafisher.cli.compare import CONFIGURATION_FILE, PROGRAMS
from hf_adafisher.experiments.command_line import StrictParser
from hf_adafisher.experiments.comparison.configuration import load_configuration
from hf_adafisher.experiments.comparison.protocol import create_comparison
from hf_adafisher.experiments.report.write_report import write_report


def main(argv: Sequence[str] | None = None) -> int:
    """Write it; return 0, or 2 for a folder without a comparison or without results."""
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.ERROR)
    parser = StrictParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="output directory of a comparison")
    folder = parser.parse_args(argv).folder
    try:
        if not (folder / CONFIGURATION_FILE).is_file():
            raise FileNotFoundError(
                f"{folder} has no {CONFIGURATION_FILE}, so it is no comparison's folder, or an earlier version's: "
                "hf-adafisher compare PRESET --report_only --output_dir FOLDER"
            )
        config = load_configuration(folder / CONFIGURATION_FILE)
        print(write_report(create_comparison(config, PROGRAMS, folder), f"hf-adafisher report {folder}"))
    except (ValueError, OSError) as error:
        print(f"ERROR: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
