"""Earlier runs in the same folder.

Their checkpoints to resume from are checked before anything is touched, and their files are kept until the new run is
complete, then replaced in one go.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from hf_adafisher.experiments.outputs import json_ready
from hf_adafisher.experiments.runs.arguments import RunTrainingArguments
from hf_adafisher.experiments.runs.run import DATA_FILE, RESULTS_FILE
from hf_adafisher.optimizers.factory.create import available_optimizers, optimizer_record
from hf_adafisher.training.arguments import optimizer_name
from hf_adafisher.training.checkpoints import check_checkpoint_files, last_complete_checkpoint
from hf_adafisher.training.curvature_callback import CURVATURE_FILE

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


STAGING_FOLDER = ".unfinished"
"""Folder for the files of a run until all of them are there."""
_SET_ASIDE = "earlier-run-"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_WEIGHTS = ("model*.safetensors*", "pytorch_model*.bin*", "adapter_model*")


class SetAside(TrainerCallback):
    """Move what an earlier run left out of the way when the first step begins, and not before.

    ``last`` would otherwise resume from the earlier run's checkpoints, and Trainer delete them one by one. Checkpoints
    that the run itself goes on from stay in their place.

    Args:
        resumed_from: Checkpoint that the run goes on from, or None.
    """

    def __init__(self, resumed_from: str | None) -> None:
        self.resumed_from = resumed_from

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Move checkpoints, and of a run that starts anew the record of the curvature."""
        if not state.is_world_process_zero:
            return
        folder = Path(args.output_dir or ".")
        own = self.resumed_from is not None and Path(self.resumed_from).resolve().parent == folder.resolve()
        steps = {path: _CHECKPOINT.fullmatch(path.name) for path in folder.glob("checkpoint-*")}
        moved = [path for path, step in steps.items() if step and not (own and int(step[1]) <= state.global_step)]
        if self.resumed_from is None:
            moved += folder.glob(CURVATURE_FILE)
        if moved:
            number = 1 + max((int(path.name.removeprefix(_SET_ASIDE)) for path in _set_aside(folder)), default=0)
            target = folder / f"{_SET_ASIDE}{number}"
            target.mkdir()
            for path in moved:
                os.replace(path, target / path.name)
            logger.info("checkpoints of an earlier run are kept in %s until this run is complete", target)


def swap_in(staging: Path, folder: Path, results_file: str, others: Iterable[str]) -> None:
    """Move the files of a complete run into its folder, the results last: they stand beside this run's files only.

    Args:
        staging: Folder with the files; it is removed.
        folder: Folder of the run.
        results_file: Name of the results. From the removal of an earlier run's to the end, the run counts as
            unfinished.
        others: Names of further files that an earlier run may have left.
    """
    new = {path.name for path in staging.iterdir()}
    (folder / results_file).unlink(missing_ok=True)
    for name in others:
        if name not in new:
            (folder / name).unlink(missing_ok=True)
    if any(path.match(pattern) for path in staging.iterdir() for pattern in _WEIGHTS):
        # Shards of an earlier model: from_pretrained could read them for this one's.
        for path in {path for pattern in _WEIGHTS for path in folder.glob(pattern) if path.is_file()}:
            path.unlink()
    for name in sorted(new, key=lambda name: name == results_file):
        if (folder / name).is_dir():
            shutil.rmtree(folder / name)
        os.replace(staging / name, folder / name)
    staging.rmdir()
    for path in _set_aside(folder):
        shutil.rmtree(path)


def _set_aside(folder: Path) -> list[Path]:
    return [path for path in folder.glob(f"{_SET_ASIDE}*") if path.name.removeprefix(_SET_ASIDE).isdecimal()]
