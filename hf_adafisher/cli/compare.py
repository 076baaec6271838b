"""Compare optimizers: run every cell of a configuration, then write tables and pictures.

    hf-adafisher compare demo
    hf-adafisher compare python-docs-small --optimizers adamw sgd --seeds 0 1 --budget steps=400 --jobs 2
    hf-adafisher compare cct-cifar10 --local_data cifar10 --set image_size=24 cutout=8 --jobs 2
    hf-adafisher compare mine.json --dry_run

Presets: {presets}.

A cell is one optimizer with one setting and one seed; it is a process of its own and leaves one results.json. Cells
that have a result are not run again, so a killed comparison goes on where it was. A budget is steps=800, seconds=600 or
like=adafisherw:epochs=5 (the seconds that AdaFisherW needs for five epochs, for everybody); the step time of each
optimizer is then measured first. The output directory gets one folder a cell, report.html, report.md, cells.csv and
the report's pictures.
"""

from __future__ import annotations

import argparse
import logging
import shlex
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hf_adafisher.experiments.command_line import StrictParser
from hf_adafisher.experiments.comparison.cell_arguments import check_cells
from hf_adafisher.experiments.comparison.cells import set_arguments, use_local_data
from hf_adafisher.experiments.comparison.configuration import available_presets, load_configuration
from hf_adafisher.experiments.comparison.execution import BACKENDS
from hf_adafisher.experiments.comparison.forecast import forecast
from hf_adafisher.experiments.comparison.protocol import Comparison, create_comparison
from hf_adafisher.experiments.outputs import write_json
from hf_adafisher.experiments.report.write_report import describe_step_times, read_comparison, write_report

PROGRAMS = Path(__file__).resolve().parent
"""Folder of the programs that run cells, called by their paths: by ``-m``, a clone in the working directory would be
taken for the installed package."""
CONFIGURATION_FILE = "configuration.json"


def main(argv: Sequence[str] | None = None) -> int:
    """Run it; return 0, 1 if a cell failed or has no result, 2 for bad input, or 130 after Ctrl-C."""
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    arguments = _parser().parse_args(argv)
    arguments.config = arguments.preset or arguments.config
    given = [str(item) for item in (sys.argv[1:] if argv is None else argv) if item != "--report_only"]
    arguments.typed = ["hf-adafisher", "compare", *given]
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # a scheduler's way of saying Ctrl-C
    try:
        comparison = _comparison(arguments)
        if arguments.dry_run:
            print(forecast(comparison))
            return 0
        if arguments.list_commands:
            print("\n".join(comparison.commands()))
            return 0
        return _run(comparison, arguments)
    except (ValueError, OSError, ImportError) as error:
        print(f"ERROR: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on where it was", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)


def _run(comparison: Comparison, arguments: argparse.Namespace) -> int:
    failures: list[str] = []
    comparison.output_dir.mkdir(parents=True, exist_ok=True)
    write_json(comparison.output_dir / CONFIGURATION_FILE, comparison.config)
    if arguments.measure_only:
        failures = comparison.measure(arguments.retry_failed)
        print(describe_step_times(comparison))
        failed = any(time.seconds is None for time in comparison.step_times().values())
    else:
        if not arguments.report_only:
            failures = comparison.run(arguments.verbose, arguments.retry_failed)
        results = read_comparison(comparison)
        print(write_report(comparison, shlex.join(arguments.typed), results))
        failed = any(result.status == "failed" for result in results)
    print("\n".join(failures), end="\n" if failures else "")
    return 1 if failures or failed else 0


def _comparison(arguments: argparse.Namespace) -> Comparison:
    config: dict[str, Any] = load_configuration(arguments.config)
    if arguments.local_data is not None:
        config = use_local_data(config, arguments.local_data)
    given = {"budget": arguments.budget, "seeds": arguments.seeds}  # what --set must leave to them
    config = set_arguments({**config, **{key: value for key, value in given.items() if value}}, arguments.set)
    comparison = create_comparison(
        config,
        PROGRAMS,
        arguments.output_dir or Path("out") / arguments.config.stem,
        optimizers=arguments.optimizers,
        seeds=arguments.seeds,
        budget=arguments.budget,
        jobs=arguments.jobs,
        backend=arguments.backend,
    )
    if arguments.cell_timeout is not None and not arguments.cell_timeout > 0:
        raise ValueError(f"--cell_timeout is {arguments.cell_timeout}; it must be a positive number of seconds")
    if not arguments.report_only:  # results of earlier versions may have other arguments
        reference = [comparison.reference] if comparison.reference is not None else []
        check_cells([*comparison.cells, *reference])
    cells = [replace(cell, time_limit=arguments.cell_timeout) for cell in comparison.cells]
    return replace(comparison, cells=cells)


def _parser() -> argparse.ArgumentParser:
    about = str(__doc__).format(presets=", ".join(available_presets()))
    parser = StrictParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    config = parser.add_mutually_exclusive_group(required=True)
    config.add_argument("preset", nargs="?", type=Path, help="name of a preset, or JSON file with the cells")
    config.add_argument("--config", type=Path, help="the same, as an option")
    add("--output_dir", type=Path, help="folder of the comparison (default out/PRESET)")
    add("--optimizers", nargs="+", metavar="NAME", help="only these of the configuration")
    add("--seeds", nargs="+", type=int, metavar="N", help="instead of the configuration's")
    add("--budget", help="steps=800, seconds=600 or like=adafisherw:epochs=5, instead of the configuration's")
    add(
        "--local_data",
        type=Path,
        help="folder with texts (train.txt, valid.txt, test.txt) or images, instead of the dataset",
    )
    add(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE",
        help="shared arguments of the runs, instead of the configuration's or besides; null takes one out",
    )  # fmt: skip
    add("--jobs", type=int, default=1, help="runs at a time, with the cores divided (default 1)")
    add("--backend", choices=BACKENDS, default="local", help="where the cells run (default local)")
    add("--cell_timeout", type=float, metavar="SECONDS", help="stop a run after so long; it counts as failed")
    add("--retry_failed", action="store_true", help="run failed cells again")
    add("--verbose", action="store_true", help="show each run's own output")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--dry_run", action="store_true", help="only list the cells, and say about how long they take")
    instead.add_argument("--list_commands", action="store_true", help="only print the commands of the cells to run")
    instead.add_argument("--measure_only", action="store_true", help="only measure the step times")
    instead.add_argument("--report_only", action="store_true", help="only report what is there")
    return parser


if __name__ == "__main__":
    sys.exit(main())
