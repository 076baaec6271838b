"""Write the report of a comparison again, or archive the comparison; nothing is run.

    hf-adafisher report out/wikitext2-small                                       # of a comparison's folder
    hf-adafisher report out/wikitext2-small --archive docs/results/wikitext2-small
    hf-adafisher report docs/results/wikitext2-small                              # of an archive: in its place
    hf-adafisher report docs/results/wikitext2-small --output_dir out/report      # with HTML and all pictures

A comparison leaves its configuration in its folder. Cells without a result are left out. An archive is runs.jsonl.gz,
with every run's results.json as a line, and report.md and cells.csv made from it; pictures that stand beside it are
drawn again. Paths below the folder that HF_ADAFISHER_DATA names are archived with the variable's name.
"""

from __future__ import annotations

import argparse
import logging
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from hf_adafisher.cli.compare import CONFIGURATION_FILE, PROGRAMS
from hf_adafisher.experiments.command_line import StrictParser
from hf_adafisher.experiments.comparison.configuration import load_configuration
from hf_adafisher.experiments.comparison.protocol import Comparison, create_comparison, with_measured_jobs
from hf_adafisher.experiments.report.archive import ARCHIVE_FILE, pack, report_archive
from hf_adafisher.experiments.report.write_report import write_report


def main(argv: Sequence[str] | None = None) -> int:
    """Write it; return 0, or 2 for a folder without a comparison or without results."""
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.ERROR)
    parser = StrictParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="output directory of a comparison, or an archive")
    target = parser.add_mutually_exclusive_group()
    target.add_argument("--archive", type=Path, metavar="FOLDER", help="write an archive of the comparison there")
    target.add_argument("--output_dir", type=Path, metavar="FOLDER", help="of an archive: write the whole report there")
    arguments = parser.parse_args(argv)
    try:
        print(_report(arguments.folder, arguments.archive, arguments.output_dir))
    except (ValueError, OSError) as error:
        print(f"ERROR: {error}", file=sys.stderr)
        return 2
    return 0


def _report(folder: Path, archive: Path | None, output_dir: Path | None) -> str:
    if (folder / ARCHIVE_FILE).is_file():
        if archive is not None:
            raise ValueError(f"{folder} is an archive already: leave out --archive")
        return _written(report_archive(folder, PROGRAMS, output_dir))
    if output_dir is not None:
        raise ValueError(f"{folder} has no {ARCHIVE_FILE}: --output_dir is for archives")
    comparison = _comparison(folder)
    if archive is None:
        return write_report(comparison, f"hf-adafisher report {folder}")
    pack(comparison, _command(folder), archive)
    return _written([archive / ARCHIVE_FILE, *report_archive(archive, PROGRAMS)])


def _comparison(folder: Path) -> Comparison:
    if not (folder / CONFIGURATION_FILE).is_file():
        raise FileNotFoundError(
            f"{folder} has no {CONFIGURATION_FILE} and no {ARCHIVE_FILE}, so it is no comparison's folder, or an "
            "earlier version's: hf-adafisher compare PRESET --report_only --output_dir FOLDER"
        )
    config = load_configuration(folder / CONFIGURATION_FILE)
    return with_measured_jobs(create_comparison(config, PROGRAMS, folder))


def _command(folder: Path) -> str:
    """The command that made a comparison, which its report alone knows."""
    report = folder / "report.md"
    found = re.search(r"^## Command\n+```bash\n(.*)\n```", report.read_text("utf-8") if report.exists() else "", re.M)
    return found[1] if found else ""


def _written(paths: Sequence[Path]) -> str:
    return "\n".join(f"written: {path}" for path in paths)


if __name__ == "__main__":
    sys.exit(main())
