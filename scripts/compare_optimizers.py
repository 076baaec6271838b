"""Compares optimizers: runs every cell of a configuration with run_clm.py, then prints a table and draws pictures.

    python scripts/compare_optimizers.py --config scripts/configs/demo.json --output_dir out/demo
    python scripts/compare_optimizers.py --config scripts/configs/wikitext2-sweep.json --jobs 2 --output_dir out/sweep

Cells that have a result are not run again, so a killed comparison goes on where it was. The output directory gets
one folder a cell, comparison.json, comparison.md, curves.png and learning_rates.png.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from hf_adafisher.experiments.compare import expand_cells, local_files, run_cells
from hf_adafisher.experiments.summary import summarize


def main(argv: Sequence[str] | None = None) -> int:
    """Run it; returns 0, or 1 if a cell failed, or 2 for bad input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="JSON file with the cells")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder of the comparison")
    parser.add_argument(
        "--local_data", type=Path, help="folder with train.txt, valid.txt, test.txt, instead of the dataset"
    )
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, with the cores divided (default 1)")
    parser.add_argument("--dry_run", action="store_true", help="only list the cells")
    parser.add_argument("--report_only", action="store_true", help="only report what is there")
    parser.add_argument("--verbose", action="store_true", help="show each run's own output")
    arguments = parser.parse_args(argv)
    failures = []
    try:
        config = json.loads(arguments.config.read_text(encoding="utf-8"))
        if arguments.local_data is not None:
            common = {key: value for key, value in config.get("common", {}).items() if key != "dataset"}
            config["common"] = {**common, **local_files(arguments.local_data)}
        cells = expand_cells(config)
        if arguments.dry_run:
            print("\n".join(cell.name for cell in cells))
            return 0
        if not arguments.report_only:
            program = Path(__file__).resolve().parent / "run_clm.py"
            failures = run_cells(cells, program, arguments.output_dir, arguments.jobs, arguments.verbose)
        print(summarize(cells, arguments.output_dir))
    except (ValueError, OSError) as error:
        print(f"ERROR: {error}", file=sys.stderr)
        return 2
    print("\n".join(failures), end="\n" if failures else "")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
