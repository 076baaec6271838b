"""Checkpoints to resume from, found and checked before anything of the earlier run is touched."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import get_last_checkpoint

from hf_adafisher.experiments.outputs import json_ready
from hf_adafisher.experiments.runs.arguments import RunTrainingArguments
from hf_adafisher.experiments.runs.run import DATA_FILE, RESULTS_FILE
from hf_adafisher.optimizers.factory.create import available_optimizers, optimizer_record
from hf_adafisher.training.arguments import optimizer_name
from hf_adafisher.training.checkpoints import check_checkpoint_files, last_complete_checkpoint

logger = logging.getLogger(__name__)


def find_checkpoint(output_dir: Path, resume: str | bool | None) -> str | None:
    """Return the checkpoint directory to resume from, or None.

    Args:
        output_dir: The run's directory. A warning says so if it holds an earlier run that is not resumed.
        resume: A checkpoint directory; "last" or "true" for the latest complete one in ``output_dir``; None or
            "false" to start anew.

    Raises:
        FileNotFoundError: No such checkpoint.
        CheckpointError: A file of it is missing or damaged, or "last" finds damaged ones only.
    """
    word = str(resume).lower()
    if resume is None or word == "false":
        earlier = output_dir.is_dir() and get_last_checkpoint(str(output_dir)) is not None
        if earlier or (output_dir / RESULTS_FILE).exists():
            logger.warning(
                "%s holds an earlier run; this one starts anew and replaces its files when it is complete "
                "(to continue it: --resume_from_checkpoint last)",
                output_dir,
            )
        return None
    if word in ("last", "true"):
        last = last_complete_checkpoint(output_dir)
        if last is None:
            raise FileNotFoundError(
                f"no checkpoint to resume from in {str(output_dir)!r}: give the --output_dir of the run, "
                "or the path of a checkpoint"
            )
        return str(last)
    if not Path(str(resume)).is_dir():
        raise FileNotFoundError(
            f"{str(resume)!r} is not a checkpoint directory: give the path of a checkpoint-N directory, or last for "
            "the latest in --output_dir"
        )
    check_checkpoint_files(Path(str(resume)))
    return str(resume)


def check_resumable(checkpoint: Path, training_args: RunTrainingArguments) -> None:
    """Check that a run can be resumed from a checkpoint.

    One that has all its steps can, unless its results are there: the run was killed before it had written them.

    Raises:
        ValueError: Another optimizer wrote it, it has more than ``max_steps`` steps, or the run has finished.
    """
    state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    done, wanted = state.global_step, training_args.max_steps
    if 0 < wanted < done:
        raise ValueError(f"{checkpoint} has {done} steps and --max_steps is {wanted}: give at least {done}")
    if wanted == done and _has_results(Path(training_args.output_dir or "."), state):
        raise ValueError(
            f"{checkpoint} has {done} steps and --max_steps is {wanted}: the run has finished; "
            "to train on, raise --max_steps"
        )
    saved, name = checkpoint / "optimizer.pt", optimizer_name(training_args)
    if saved.is_file() and name in available_optimizers():
        groups = torch.load(saved, map_location="cpu", weights_only=True, mmap=True)["param_groups"]
        optimizer_record(name).check_groups(groups)


def check_dtype(checkpoint: Path, dtype: torch.dtype) -> None:
    """Raise ValueError if the weights of a checkpoint have another type than the model that goes on from it."""
    config = checkpoint / "config.json"
    saved = json.loads(config.read_text(encoding="utf-8")).get("dtype") if config.is_file() else None
    if saved is not None and f"torch.{saved}" != str(dtype):
        raise ValueError(f"the weights of {checkpoint} are {saved}, the model's {dtype}: give --dtype {saved}")


def _has_results(output_dir: Path, state: TrainerState) -> bool:
    """Compare logs, which have the times of every run: results of an earlier run do not count."""
    try:
        history = json.loads((output_dir / RESULTS_FILE).read_text(encoding="utf-8"))["log_history"]
    except (OSError, ValueError, LookupError, TypeError):
        return False
    return bool(history[: len(state.log_history)] == json_ready(state.log_history))


def warn_of_changed_data(checkpoint: Path, hashes: Mapping[str, Mapping[str, str]]) -> None:
    """Log a warning if the data is not that of the run that wrote a checkpoint.

    Args:
        checkpoint: The ``checkpoint-N`` directory.
        hashes: Of the data as it is now; see ``PreparedRun.data_hashes``.
    """
    record = checkpoint / DATA_FILE
    if not record.is_file():
        return
    before = json.loads(record.read_text(encoding="utf-8"))
    changed = [split for split in {**before, **hashes} if before.get(split) != hashes.get(split)]
    if changed:
        logger.warning(
            "the data has changed since %s was written (%s): the run goes on with the new data, so it is neither the "
            "one before nor one of its own; for a clean result start anew",
            checkpoint,
            ", ".join(changed),
        )
