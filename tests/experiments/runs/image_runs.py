"""The image classification script as a function, and runs of it that take a second."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from hf_adafisher.experiments.runs.image import ImageRun
from tests.scripts import load_command

QUICK = ["--per_device_train_batch_size", "16", "--logging_steps", "1", "--disable_tqdm", "true", "--use_cpu"]
TINY = ["--model_options", "hidden_size=16,conv_width=8", "--image_size", "8"]
"""A CCT of two layers; with the default of two tokenizer layers its 8-pixel images become 4 tokens."""
TINY_RESNET = ["--model", "resnet18", "--image_size", "8"]
TINY_RESNET += ["--model_options", "hidden_sizes=[8,8],depths=[1,1],embedding_size=8"]


@cache
def _script() -> Any:
    return load_command("image")


def run(*flags: Any, quick: Sequence[str] = QUICK) -> int:
    """The script's exit status."""
    return _script().main([*quick, *map(str, flags)])


def prepared(*flags: Any) -> ImageRun:
    """What the script would train, every input checked."""
    return _script().prepared([*QUICK, *map(str, flags)])
