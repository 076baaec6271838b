"""Completeness checks of Trainer checkpoints before a run is resumed.

A run killed while saving, a full disk, or an interrupted copy leaves an incomplete checkpoint. ``get_last_checkpoint``
of transformers takes the highest number without looking at the files. ``Trainer`` then fails without naming the file,
or, if optimizer, scheduler or random state are missing, silently continues without them.
"""

from __future__ import annotations

import json
import logging
import pickle
import random
import re
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from transformers.trainer_pt_utils import safe_globals

logger = logging.getLogger(__name__)

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_RANK = re.compile(r"rng_state_(\d+)\.pth")
_DISTCP = re.compile(rb"__\d+_\d+\.distcp")

# Files that resuming reads, by the names that Trainer gives them; one of each group must be there.
_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "adapter_model.safetensors",
    "adapter_model.bin",
    "*/adapter_model.safetensors",  # several adapters: each but "default" has its own directory
    "*/adapter_model.bin",
    "pytorch_model_fsdp*",  # a file, or a directory of shards
)
_OPTIMIZER = ("optimizer.pt", "optimizer*.bin", "optimizer_*")  # the last two are FSDP's
_SCHEDULER = ("scheduler.pt",)
_RNG = ("rng_state.pth", "rng_state_*.pth")


class CheckpointError(ValueError):
    """Checkpoint from which no run can be resumed; the message names the file and its damage."""


def check_checkpoint_files(checkpoint: Path) -> None:
    """Check that a checkpoint has all files that resuming needs, and that none of its files is damaged.

    The check compares file sizes and tables of contents, and unpickles what resuming loads, with tensors and plain
    values allowed only. It reads no tensors, so a changed value goes unnoticed. The time does not depend on the size
    of the model.

    ``trainer_state.json``, weights, optimizer, scheduler and random state are required. So a checkpoint of
    ``save_only_model=True`` is refused: Trainer would silently resume with a new optimizer and learning rate schedule.
    Files that resuming does not read (``config.json``, ``training_args.bin``, tokenizer) may be absent, but not
    damaged. ``scaler.pt`` and the ``rng_state_N.pth`` of ranks above the highest one present are not required, since
    the directory does not tell if the run had them. A mix of files from two runs is not detected.

    Supported layouts: single process, DDP, PEFT and FSDP; not FSDP of XLA and not SageMaker. DeepSpeed's own files are
    not checked.

    Args:
        checkpoint: The ``checkpoint-N`` directory.

    Raises:
        CheckpointError: A file is missing, empty, truncated or unreadable; the message names it.
    """
    problem = _first_problem(Path(checkpoint))
    if problem is not None:
        raise CheckpointError(f"{problem}. Resume from another checkpoint")


def last_complete_checkpoint(output_dir: Path) -> Path | None:
    """Newest ``checkpoint-N`` directory of a run that ``check_checkpoint_files`` accepts.

    Newer incomplete checkpoints are skipped with one warning each, and not changed.

    Args:
        output_dir: Directory of the run; it may be missing.

    Returns:
        The complete checkpoint with the highest N, or None if there is no checkpoint.

    Raises:
        CheckpointError: There are checkpoints, but none is complete. A new run would overwrite them.
    """
    numbered = [(_CHECKPOINT.fullmatch(path.name), path) for path in _directories(Path(output_dir))]
    checkpoints = sorted(((int(match[1]), path) for match, path in numbered if match), reverse=True)
    problems = []
    for _, checkpoint in checkpoints:
        problem = _first_problem(checkpoint)
        if problem is None:
            return checkpoint
        problems.append(problem)
        logger.warning("Skipping %s, which is no complete checkpoint: %s.", checkpoint, problem)
    if not problems:
        return None
    raise CheckpointError(
        f"no checkpoint in {str(output_dir)!r} is complete; of the newest, {problems[0]}. To start anew, move the "
        "checkpoint directories away or choose another output_dir"
    )


def _first_problem(checkpoint: Path) -> str | None:
    """Description of the first missing or damaged file, or None."""
    try:
        return next(_problems(checkpoint), None)
    except OSError as error:
        return f"{checkpoint} cannot be read ({_one_line(error)})"


def _problems(checkpoint: Path) -> Iterator[str]:
    if not checkpoint.is_dir():
        yield f"{checkpoint} is not a directory"
        return
    state = checkpoint / "trainer_state.json"
    if not state.is_file():
        yield f"{state} is missing: it is written last, so the run was probably stopped while it saved"
    yield from _missing(checkpoint)
    for pattern, read in _READERS.items():
        for path in sorted(checkpoint.glob(pattern)):
            # A killed writer of safetensors leaves a hidden temporary file, which stays when the same step is saved
            # again.
            if not path.name.startswith("."):
                yield from _damage(path, read)
    for index in sorted(checkpoint.glob("*.index.json")):
        for shard in _shards(json.loads(index.read_text(encoding="utf-8"))):
            if not (checkpoint / shard).is_file():
                yield f"{checkpoint / shard} is missing, a part of the weights by {index.name}"
    for pattern in ("optimizer_*", "pytorch_model_fsdp_*"):
        for shards in sorted(checkpoint.glob(pattern)):
            if shards.is_dir():
                yield from _distributed_problems(shards)


def _missing(checkpoint: Path) -> Iterator[str]:
    """Descriptions of files that resuming needs and the directory lacks."""

    def has(patterns: tuple[str, ...]) -> bool:
        return any(next(checkpoint.glob(pattern), None) is not None for pattern in patterns)

    # DeepSpeed, which only torch's optimizers can run under, has its own files, and loads them by itself.
    if not (checkpoint / "latest").is_file():
        if not has(_WEIGHTS):
            yield f"{checkpoint / _expected_weights(checkpoint)} is missing: the checkpoint has no weights"
        for name, patterns in (("optimizer.pt", _OPTIMIZER), ("scheduler.pt", _SCHEDULER)):
            if not has(patterns):
                yield (
                    f"{checkpoint / name} is missing (save_only_model=True saves none): resuming without it would be "
                    "another training, though a new run can start from the weights with from_pretrained"
                )
    if not has(_RNG):
        yield f"{checkpoint / 'rng_state.pth'} is missing: without it dropout and shuffling go other ways"
    matches = (_RANK.fullmatch(path.name) for path in checkpoint.glob("rng_state_*.pth"))
    ranks = {int(match[1]) for match in matches if match}
    for rank in range(min(ranks, default=0), max(ranks, default=0)):  # a node may have only its own ranks' files
        if rank not in ranks:
            yield f"{checkpoint / f'rng_state_{rank}.pth'} is missing, one process's random generators"


def _expected_weights(checkpoint: Path) -> str:
    """Name of the missing weights file, judged by the files beside it."""
    if any(checkpoint.glob("model-*-of-*.safetensors")):
        return "model.safetensors.index.json"
    if any(checkpoint.glob("pytorch_model-*-of-*.bin")):
        return "pytorch_model.bin.index.json"
    return "adapter_model.safetensors" if (checkpoint / "adapter_config.json").is_file() else "model.safetensors"


def _damage(path: Path, read: Callable[[Path], None]) -> Iterator[str]:
    try:
        if path.stat().st_size == 0:
            yield f"{path} is empty"
        else:
            read(path)
    except OSError as error:
        yield f"{path} cannot be read ({_one_line(error)})"
    except Exception as error:  # readers fail in many ways on damaged bytes
        yield f"{path} is truncated or damaged ({_one_line(error)})"


def _read_json(path: Path) -> None:
    value = json.loads(path.read_text(encoding="utf-8"))
    is_state = isinstance(value, dict) and isinstance(value.get("global_step"), int)
    if path.name == "trainer_state.json" and not is_state:
        raise ValueError("it has no global_step: Trainer did not write it")
    if path.name.endswith(".index.json") and not all(isinstance(shard, str) for shard in _shards(value)):
        raise ValueError("its weight_map does not name files")


def _shards(index: Any) -> list[str]:
    return sorted(set(index["weight_map"].values()))


def _read_safetensors(path: Path) -> None:
    with safe_open(path, framework="pt"):  # compares the header with the file's size
        pass


def _read_torch(path: Path) -> None:
    """Read the table of contents, which is at the end of a zip archive, so a truncated one has none."""
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            with archive.open(member):  # reads the header before the member's own bytes
                pass
        if not any(name.endswith("/data.pkl") for name in archive.namelist()):
            raise ValueError("it has no data.pkl: torch.save did not write it")


def _read_state(path: Path) -> None:
    """Read the structure of a file that resuming loads, as Trainer does: nothing but tensors and plain values.

    Tensors are mapped, not read. A pickle that names anything else is refused before anything of it is run.
    """
    _read_torch(path)
    with safe_globals():
        foreign = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        if foreign:
            raise ValueError(f"it names {', '.join(sorted(foreign))}, which no checkpoint needs, and is not loaded")
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except pickle.UnpicklingError as error:
            raise ValueError("its pickle cannot be read") from error
    if not isinstance(state, dict):
        raise ValueError(f"it holds a {type(state).__name__}")
    if path.name == "optimizer.pt" and not (
        isinstance(state.get("state"), dict)
        and isinstance(state.get("param_groups"), list)
        and all(isinstance(group, dict) for group in state["param_groups"])
    ):
        raise ValueError("it has no state and param_groups: no optimizer wrote it")
    if path.name.startswith("rng_state"):
        random.Random().setstate(state["python"])
        np.random.RandomState().set_state(state["numpy"])
        torch.Generator().set_state(state["cpu"])
    if path.name.startswith("pytorch_model") and not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ValueError("it holds other things than weights")


_READERS: dict[str, Callable[[Path], None]] = {
    "*.json": _read_json,
    "*.safetensors": _read_safetensors,
    "*/adapter_model.safetensors": _read_safetensors,
    **dict.fromkeys(
        (
            "pytorch_model*.bin",
            "adapter_model.bin",
            "*/adapter_model.bin",
            "optimizer.pt",
            "optimizer*.bin",
            "scheduler.pt",
            "scaler.pt",
            "rng_state*.pth",
        ),
        _read_state,
    ),
    "training_args.bin": _read_torch,  # resuming does not load it, and it is a pickle of any class
}


def _distributed_problems(shards: Path) -> Iterator[str]:
    """Problems in a directory of torch.distributed.checkpoint; ``.metadata``, written last, names the other files."""
    metadata = shards / ".metadata"
    if not metadata.is_file():
        yield f"{metadata} is missing"
        return
    content = metadata.read_bytes()
    if not content.endswith(b"."):  # the end of every pickle; unpickling it could run any code
        yield f"{metadata} is {'truncated or damaged' if content else 'empty'}"
    for name in sorted({match.decode() for match in _DISTCP.findall(content)}):
        if not (shards / name).is_file():
            yield f"{shards / name} is missing"
        elif (shards / name).stat().st_size == 0:
            yield f"{shards / name} is empty"


def _directories(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
