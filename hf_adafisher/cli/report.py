"""Write the report of a comparison again, or archive the comparison; or hold pages against archives. Nothing is run.

    hf-adafisher report out/lm-scratch                                       # of a comparison's folder
    hf-adafisher report out/lm-scratch --archive docs/results/lm-scratch
    hf-adafisher report docs/results/lm-scratch                              # of an archive: in its place
    hf-adafisher report docs/results/lm-scratch --output_dir out/report      # with HTML and all pictures
    hf-adafisher report --write docs README.md                               # tables in pages, from archives
    hf-adafisher report --check docs README.md                               # is every number that of its file?

A comparison leaves its configuration in its folder. Cells without a result are left out. An archive is runs.jsonl.gz,
with every run's results.json as a line, and report.md and cells.csv made from it; pictures that stand beside it are
drawn again. Paths below the folder that HF_ADAFISHER_DATA names are archived with the variable's name.

In pages (*.md of a folder that has results/ in it, and single files) a table stands between two lines

    <!-- results: NAME VIEW -->
    <!-- end of NAME VIEW -->

and --write makes it from results/NAME: VIEW is claims (may be left out), summary, paired, tuning or runs. A table of
other measurements follows a line that names its files, <!-- source: docs/results/a.json docs/results/b/cells.csv -->
(FILE.json#KEY: of one key alone; seeds=20-24: of these seeds alone; a row has the numbers of one setting or row of
them), and one of numbers that were not measured <!-- no measurement -->. --check prints what is wrong, with page and
line, and exits 1.
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
from hf_adafisher.experiments.report.pages import check_pages, renew_pages
from hf_adafisher.experiments.report.write_report import write_report


def main(argv: Sequence[str] | None = None) -> int:
    """Write it; return 0, 1 where a check finds something, 2 where there is no comparison, result or page."""
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.ERROR)
    parser = StrictParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="output directory of a comparison, or an archive")
    target = parser.add_mutually_exclusive_group()
    target.add_argument("--archive", type=Path, metavar="FOLDER", help="write an archive of the comparison there")
    target.add_argument("--output_dir", type=Path, metavar="FOLDER", help="of an archive: write the whole report there")
    target.add_argument("--write", type=Path, nargs="+", metavar="PAGES", help="renew the tables that archives give")
    target.add_argument("--check", type=Path, nargs="+", metavar="PAGES", help="exit 1 where a number has no file")
    arguments = parser.parse_args(argv)
    pages = arguments.write or arguments.check
    if (arguments.folder is None) == (pages is None):
        parser.error("give the folder of a comparison or of an archive, or pages to --write or --check")
    try:
        if arguments.check:
            problems = check_pages(arguments.check, PROGRAMS)
            print("\n".join(problems) or "every table is that of its file")
            return 1 if problems else 0
        if arguments.write:
            print(_written(renew_pages(arguments.write, PROGRAMS)) or "nothing to renew")
            return 0
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
