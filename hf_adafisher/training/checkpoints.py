"""Is a Trainer checkpoint whole? Asked before a run is resumed from it.

A run that is killed while it saves, a full disk or a copy that was cut off leave a checkpoint of which only a part can
be read. transformers' own ``get_last_checkpoint`` takes the highest number whatever the directory holds, and
``Trainer`` then either fails in the reader of one file, without its name, or, where ``optimizer.pt``, ``scheduler.pt``
or the state of the random generators are missing, trains on without them and says nothing: another training than the
one that was interrupted.
"""

from __future__ import annotations

import json
import logging
import re
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from safetensors import safe_open

logger = logging.getLogger(__name__)

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_RANK = re.compile(r"rng_state_(\d+)\.pth")
_DISTCP = re.compile(rb"__\d+_\d+\.distcp")

# What resuming reads, by the names that Trainer gives it: one of each line must be there.
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
    """A checkpoint that no run can be resumed from; the message names the file and what is wrong with it."""


def check_checkpoint_files(checkpoint: Path) -> None:
    """Checks that every file which resuming needs is there, and that every file that is there is whole.

    Cheap, whatever the model's size: file sizes and tables of contents are compared, tensors are not read (a changed
    value goes unnoticed), and nothing is unpickled. ``trainer_state.json``, weights, optimizer, scheduler and random
    generators must be there. So a checkpoint of ``save_only_model=True`` is refused: Trainer would resume from it with
    a new optimizer and a new learning rate schedule, without a word. Files that resuming does not read
    (``config.json``, ``training_args.bin``, the tokenizer's) may be absent, but not damaged. What cannot be seen from
    outside is not demanded: ``scaler.pt`` (fp16 runs only), the ``rng_state_N.pth`` of ranks above the highest present.
    Nor does it show if another run overwrote some of the files and was stopped before the rest.

    The layouts known are those of a single process, DDP, PEFT, FSDP and DeepSpeed; not those of XLA's FSDP and
    SageMaker.

    Args:
        checkpoint: The ``checkpoint-N`` directory.

    Raises:
        CheckpointError: A file is missing, empty, truncated or unreadable; the message names it.
    """
    problem = _first_problem(Path(checkpoint))
    if problem is not None:
        raise CheckpointError(f"{problem}. Resume from another checkpoint")


def last_complete_checkpoint(output_dir: Path) -> Path | None:
    """The newest ``checkpoint-N`` in a run's directory that ``check_checkpoint_files`` accepts.

    Newer ones that are incomplete are skipped with one warning each, and left as they are.

    Args:
        output_dir: The run's directory; it need not exist.

    Returns:
        The directory with the highest N among the complete ones; None if there is no checkpoint at all.

    Raises:
        CheckpointError: There are checkpoints and none is complete. A run that silently started anew would overwrite
            the evidence, and cost the time already spent once more.
    """
    numbered = [(_CHECKPOINT.fullmatch(path.name), path) for path in _directories(Path(output_dir))]
    found = sorted(((int(match[1]), path) for match, path in numbered if match), reverse=True)
    problems = []
    for _, checkpoint in found:
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
    """The file that is missing or damaged and what is wrong with it, in words, or None."""
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
    """What resuming needs and the directory lacks."""

    def has(patterns: tuple[str, ...]) -> bool:
        return any(next(checkpoint.glob(pattern), None) is not None for pattern in patterns)

    if (checkpoint / "latest").is_file():  # DeepSpeed keeps weights, optimizer and often the schedule to itself
        yield from _deepspeed_problems(checkpoint)
    else:
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
    """The file that the weights should begin with, by what stands beside it."""
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
    """The table of contents stands at the end of a zip archive, so a truncated one has none."""
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            with archive.open(member):  # reads the header before the member's own bytes
                pass
        if not any(name.endswith("/data.pkl") for name in archive.namelist()):
            raise ValueError("it has no data.pkl: torch.save did not write it")


_READERS: dict[str, Callable[[Path], None]] = {
    "*.json": _read_json,
    "*.safetensors": _read_safetensors,
    "*/adapter_model.safetensors": _read_safetensors,
    **dict.fromkeys(
        (
            "pytorch_model*.bin",
            "adapter_model.bin",
            "*/adapter_model.bin",
            "training_args.bin",
            "optimizer.pt",
            "optimizer*.bin",
            "scheduler.pt",
            "scaler.pt",
            "rng_state*.pth",
        ),
        _read_torch,
    ),
}


def _distributed_problems(shards: Path) -> Iterator[str]:
    """A directory of torch.distributed.checkpoint: ``.metadata``, a pickle written last, names the other files."""
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


def _deepspeed_problems(checkpoint: Path) -> Iterator[str]:
    """DeepSpeed's own directory, which the file ``latest`` names; its engines differ in the format of the files."""
    tag = (checkpoint / "latest").read_text(encoding="utf-8", errors="replace").strip()
    files = list((checkpoint / tag).glob("*_states.pt")) if tag else []
    if not files:
        yield f"{checkpoint / 'latest'} names {tag!r}, where there are no *_states.pt"
    for path in sorted(files):
        if path.stat().st_size == 0:
            yield f"{path} is empty"


def _directories(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
