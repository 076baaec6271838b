"""The image classification script as a function, and runs of it that take a second."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from hf_adafisher.experiments.image import ImageRun

SCRIPT = Path(__file__).parents[2] / "scripts" / "run_image_classification.py"
QUICK = ["--per_device_train_batch_size", "16", "--logging_steps", "1", "--disable_tqdm", "true", "--use_cpu"]
TINY = ["--model_options", "hidden_size=16,conv_width=8", "--image_size", "8"]
"""A CCT of two layers; with the default of two tokenizer layers its 8-pixel images become 4 tokens."""
TINY_RESNET = ["--model", "resnet18", "--image_size", "8"]
TINY_RESNET += ["--model_options", "hidden_sizes=[8,8],depths=[1,1],embedding_size=8"]


@cache
def _script() -> Any:
    spec = importlib.util.spec_from_file_location("run_image_classification", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(*flags: Any, quick: Sequence[str] = QUICK) -> int:
    """The script's exit status."""
    return _script().main([*quick, *map(str, flags)])


def prepared(*flags: Any) -> ImageRun:
    """What the script would train, every input checked."""
    return _script().prepared([*QUICK, *map(str, flags)])


def read_results(output: Path) -> dict[str, Any]:
    """results.json, which must be strict JSON."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads((output / "results.json").read_text(), parse_constant=refuse)
