"""Earlier runs in the same folder: kept until the new run is complete, then replaced in one go."""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_adafisher.training.curvature_callback import CURVATURE_FILE

logger = logging.getLogger(__name__)

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
