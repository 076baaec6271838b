"""Imports of ``hf_adafisher.data``: its public names, and what they need."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

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


def test_public_names_need_no_extras_and_nothing_else_of_the_package() -> None:
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", CODE, *EXTRAS], cwd=root, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["data", "load_images", "load_corpus"], done.stderr
