"""The public names, and what importing them brings along."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import hf_adafisher

HEAVY = {"transformers", "accelerate", "datasets", "pandas", "scipy", "sympy", "matplotlib", "trl", "peft"}
HEAVY |= {"torch.distributed.tensor", "torch.distributed.fsdp", "torch._dynamo", "torch._inductor"}
PROGRAM = """
import json, sys, torch
before = set(sys.modules)
import hf_adafisher
print(json.dumps([*set(sys.modules) - before]))
"""


@pytest.mark.subprocess
def test_the_import_brings_nothing_heavy_along() -> None:
    """It is to cost little beside torch's: what takes long to import is for those who use it."""
    output = subprocess.run([sys.executable, "-c", PROGRAM], check=True, capture_output=True).stdout
    found = set(json.loads(output))
    assert "hf_adafisher.optimizers.adafisher" in found and not found & HEAVY
    assert len([name for name in found if not name.startswith("hf_adafisher")]) < 50


def test_every_public_name_is_listed_and_there() -> None:
    assert {"AdaFisherMixin", "AdaFisherTrainer", "AdaFisherTrainingArguments"} <= {*hf_adafisher.__all__}
    assert {*hf_adafisher.__all__, "__version__"} <= {*dir(hf_adafisher)}
    for name in hf_adafisher.__all__:
        assert getattr(hf_adafisher, name).__name__ == name
    with pytest.raises(AttributeError, match="has no attribute 'AdaFisherTrainr'"):
        hf_adafisher.AdaFisherTrainr  # noqa: B018


EXTRAS = ("PIL", "kornia", "sklearn", "timm", "torchvision")
CODE = """
import sys
sys.modules.update(dict.fromkeys(sys.argv[1:]))
import hf_adafisher
before = set(sys.modules)
from hf_adafisher.data.images import *
from hf_adafisher.data.text import *
print(*{name.split(".")[1] for name in set(sys.modules) - before if name.startswith("hf_adafisher.")})
print(load_images.__name__, load_corpus.__name__)
"""


@pytest.mark.subprocess
def test_public_names_need_no_extras_and_nothing_else_of_the_package() -> None:
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", CODE, *EXTRAS], cwd=root, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["data", "load_images", "load_corpus"], done.stderr
