"""Run the first steps of a training run, and say what is wrong with it for AdaFisher(W) or SpectralAdaFisher.

The words after "doctor" are those of the run, its command first:

    hf-adafisher doctor clm --model_name_or_path gpt2 --dataset wikitext-2 --learning_rate 1e-4
    hf-adafisher doctor image --dataset cifar10 --model resnet18 --step_size paper --max_grad_norm 0
    hf-adafisher doctor clm config.json --steps 50 --json diagnosis.json

The run keeps its schedule and stops after these steps; nothing is written to its folder, evaluated or reported. The
exit status is 0 if nothing was found, 1 if something was, 2 for bad input.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PrinterCallback, ProgressCallback
from transformers.trainer_utils import IntervalStrategy

from hf_adafisher.experiments.command_line import StrictParser
from hf_adafisher.experiments.runs.checkpoints import find_checkpoint
from hf_adafisher.experiments.runs.clm_arguments import parse_clm_arguments
from hf_adafisher.experiments.runs.clm_setup import prepare_clm_run
from hf_adafisher.experiments.runs.image_arguments import parse_image_arguments
from hf_adafisher.experiments.runs.image_setup import prepare_image_run
from hf_adafisher.optimizers.base.kronecker_diagonal import KroneckerDiagonalOptimizer
from hf_adafisher.optimizers.diagnostics.diagnosis import Diagnosis
from hf_adafisher.optimizers.factory.catalog import available_optimizers, optimizer_record
from hf_adafisher.training.arguments import optimizer_name
from hf_adafisher.training.checkpoints import CheckpointError
from hf_adafisher.training.doctor_callback import DoctorCallback

TASKS: dict[str, tuple[Any, Any]] = {
    "clm": (parse_clm_arguments, prepare_clm_run),
    "image": (parse_image_arguments, prepare_image_run),
}
"""The runs: parser of the arguments, and what prepares a run of them."""


def main(argv: Sequence[str] | None = None) -> int:
    """Diagnose a run; return the exit status: 0 for a healthy one, 1 with findings, 2 for bad input."""
    parser = StrictParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=TASKS, help="the run's command; its own arguments follow")
    parser.add_argument("--steps", type=int, default=20, help="steps to watch (default 20)")
    parser.add_argument("--json", type=Path, help="write the diagnosis to this file too")
    args, words = parser.parse_known_args(argv)
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    try:
        if args.json is not None:
            args.json.parent.mkdir(parents=True, exist_ok=True)
        diagnosis = diagnose_run(args.task, words, args.steps)
        if args.json is not None:
            text = json.dumps(diagnosis.as_dict(), indent=2, allow_nan=False)
            args.json.write_text(text + "\n", encoding="utf-8")
    except (ValueError, OSError, ImportError, CheckpointError) as error:
        logging.error("%s", " ".join(str(error).split()))
        return 2
    return 0 if diagnosis.healthy else 1


def diagnose_run(task: str, words: Sequence[str], steps: int) -> Diagnosis:
    """Train the first steps of a run in a folder that is then removed; the diagnosis is printed too.

    Args:
        task: One of ``TASKS``.
        words: The command line of the run.
        steps: Number of steps to watch, >= 1.

    Raises:
        ValueError: As the run; ``steps`` below 1, another optimizer, a checkpoint that has all steps.
    """
    parse, prepare = TASKS[task]
    callback = DoctorCallback(steps, stop=True)
    *others, training = parse(list(words))
    if training.timing_only or (training.do_eval and not training.do_train):
        raise ValueError("the doctor watches training: leave --do_eval and --timing_only out")
    if training.resume_from_checkpoint:
        folder = Path(training.output_dir or ".")
        training.resume_from_checkpoint = find_checkpoint(folder, training.resume_from_checkpoint)
    with tempfile.TemporaryDirectory() as folder_of_run:
        training.output_dir = folder_of_run
        training.save_strategy = training.eval_strategy = IntervalStrategy.NO
        training.load_best_model_at_end = training.push_to_hub = False
        training.report_to = []
        run = prepare(*others, training)
        check_optimizer(optimizer_name(training))
        trainer = run.new_trainer([callback])
        for shows_logs in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(shows_logs)
        trainer.train(resume_from_checkpoint=run.checkpoint)
    if callback.diagnosis is None:
        raise ValueError(f"{run.checkpoint} has all steps of the run: there is none left to watch")
    return callback.diagnosis


def check_optimizer(name: str) -> None:
    """Check that the doctor knows an optimizer.

    Raises:
        ValueError: It does not; the message lists those it knows.
    """
    records = [optimizer_record(known) for known in available_optimizers()]
    own = [one.name for one in records if one.needs_model and issubclass(one.cls, KroneckerDiagonalOptimizer)]
    if name not in own:
        raise ValueError(f"there is no diagnosis with optim={name}: the doctor knows {', '.join(own)}")


if __name__ == "__main__":
    sys.exit(main())
