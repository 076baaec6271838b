"""Kill training runs and comparisons at random moments, start them again, and compare their ends with undisturbed ones.

    hf-adafisher soak --kills 200 --jobs 2 --seed 0 --output_dir out/soak

A kill is a SIGKILL in the middle of imports, training, a checkpoint, evaluation or writing. Every run and comparison
must finish when it is started again, with bitwise the weights of an undisturbed one, and no file of a finished cell may
change. soak.json in the output directory has the counts, and each loop of kills and starts.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm.auto import tqdm

from hf_adafisher.experiments.command_line import StrictParser
from hf_adafisher.experiments.outputs import write_json
from hf_adafisher.experiments.soak import Soak, summarize

PROGRAMS = Path(__file__).resolve().parent
"""Folder of the programs that are killed."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run it; return 0, 1 if anything was lost, unfinished or unequal, 2 for bad input, or 130 after Ctrl-C."""
    parser = StrictParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="kills in all (default 200)")
    parser.add_argument("--jobs", type=int, default=2, help="runs and comparisons at a time (default 2)")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments (default 0)")
    parser.add_argument("--output_dir", type=Path, default=Path("out/soak"), help="new folder (default out/soak)")
    arguments = parser.parse_args(argv)
    for name in ("kills", "jobs"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(arguments, name)}")
    logger = logging.getLogger("hf_adafisher")
    level = logger.level
    logger.setLevel(logging.ERROR)  # incomplete checkpoints are what is wanted here
    try:
        with tqdm(total=arguments.kills, desc="kills") as bar:
            soak = Soak(PROGRAMS, arguments.output_dir, arguments.seed, bar.update)
            summary = summarize(soak.run(arguments.kills, arguments.jobs))
    except (ValueError, OSError, RuntimeError) as error:
        print(f"ERROR: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    finally:
        logger.setLevel(level)
    write_json(arguments.output_dir / "soak.json", summary)
    each = summary.pop("each")
    print(json.dumps(summary))
    for loop in each:
        if not (loop["finished"] and loop["equal"]) or loop["lost"]:
            print(f"{loop['folder']}: lost {loop['lost']}, {loop['problem'] or 'other weights'}", file=sys.stderr)
    return int(summary["lost"] > 0 or summary["finished"] < summary["loops"] or summary["equal"] < summary["loops"])


if __name__ == "__main__":
    sys.exit(main())
