"""Time AdaFisherW's step against AdamW's, a training iteration, and the growth of both.

    hf-adafisher benchmark --model gpt2-20m --rounds 15 --json out/step.json
    hf-adafisher benchmark --model gpt2-20m --compiled --rounds 15
    hf-adafisher benchmark --all-optimizers --rounds 15
    hf-adafisher benchmark --whole-iteration --rounds 15
    hf-adafisher benchmark --comparison-cost lm-scratch --rounds 6 --threads 1
    hf-adafisher benchmark --scaling --plot out/scaling.svg
    hf-adafisher benchmark --count-operators --json out/operators.json

All that is compared runs alternately in this one process; medians are shown, with quartiles. Operators are counted on
the CPU.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from hf_adafisher.experiments.benchmark.counts import measure_operators, operators_table
from hf_adafisher.experiments.benchmark.measurement import MODELS, as_table
from hf_adafisher.experiments.benchmark.scaling import draw_scaling, measure_scaling
from hf_adafisher.experiments.benchmark.step import (
    COMPARED,
    measure_cost,
    measure_iteration,
    measure_optimizers,
    measure_step,
)
from hf_adafisher.experiments.benchmark.trainer_step import measure_trainer
from hf_adafisher.experiments.command_line import StrictParser
from hf_adafisher.experiments.outputs import hardware, software_versions, write_json


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and write the result; return 0."""
    parser = StrictParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(MODELS), help="default gpt2-20m")
    parser.add_argument("--rounds", type=int, default=15, help="alternating rounds (default 15, at least 2)")
    parser.add_argument("--threads", type=int, help="CPU threads of torch (default: torch's)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda, which is timed by CUDA events (default cpu)")
    parser.add_argument("--compiled", action="store_true", help="also AdaFisherW(compiled=True)")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--all-optimizers", action="store_true", help="step() of every installed optimizer")
    mode.add_argument("--whole-iteration", action="store_true", help="due and idle steps, whole training iterations")
    mode.add_argument(
        "--comparison-cost", nargs="?", const="lm-scratch", choices=list(COMPARED),
        help="CPU time of iterations in a preset (without its name: lm-scratch)",
    )  # fmt: skip
    mode.add_argument("--scaling", action="store_true", help="growth with width, depth, vocabulary and batch")
    mode.add_argument("--count-operators", action="store_true", help="operators that an idle step launches, on the CPU")
    parser.add_argument("--json", type=Path, help="file for the result")
    parser.add_argument("--plot", type=Path, help="picture for --scaling")
    arguments = parser.parse_args(argv)
    if arguments.rounds < 2:
        parser.error(f"--rounds must be at least 2, got {arguments.rounds}")
    if arguments.plot and not arguments.scaling:
        parser.error("--plot belongs to --scaling")
    if arguments.comparison_cost and (arguments.model or arguments.device != "cpu" or arguments.compiled):
        parser.error("--comparison-cost has its preset's model on the CPU: leave out --model, --device and --compiled")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    load, rounds, device = os.getloadavg()[0], arguments.rounds, arguments.device
    model = arguments.model or "gpt2-20m"
    if arguments.scaling:
        result = measure_scaling(rounds, device)
    elif arguments.whole_iteration:
        result = measure_iteration(rounds, device, arguments.compiled)
        result["rows"] |= measure_trainer(rounds, device)
    elif arguments.comparison_cost:
        result = measure_cost(arguments.comparison_cost, rounds)
    elif arguments.all_optimizers:
        result = measure_optimizers(model, rounds, device)
    elif arguments.count_operators:
        result = measure_operators(arguments.compiled)
        print(operators_table(result["operators"]))
    else:
        result = measure_step(model, rounds, device, arguments.compiled)
    if "rows" in result:
        print(as_table(result["rows"]))
    for name, points in result.get("points", {}).items():
        for point in points:
            print(name, ", ".join(f"{key} {value:.4g}" for key, value in point.items()))
    for name, fit in result.get("fits", {}).items():
        print(f"{name}, all points:", ", ".join(f"{key} {value:.4g}" for key, value in fit.items()))
    for key, ratio in result.get("ratio_to_foreach", {}).items():
        print(f"{key}: {ratio:.3g} times AdamW's foreach form")
    print(", ".join(f"{key}: {value:.4g}" for key, value in result.items() if isinstance(value, float | int)))
    print(f"load average before the run: {load:.2f}; threads: {torch.get_num_threads()}; device: {device}")
    result |= {"rounds": rounds, "load": load, "hardware": hardware(), "software": software_versions()}
    for path in (arguments.json, arguments.plot):
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
    if arguments.json:
        write_json(arguments.json, result)
    if arguments.plot:
        draw_scaling(arguments.plot, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
