"""Small models and data on the disk in the place of the Hub's, for ``--smoke``; nothing to copy here.

With ``--smoke`` every program of this folder trains for two steps on a CPU and without a network.
"""

from __future__ import annotations

import atexit
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

SMOKE = "--smoke" in sys.argv
if SMOKE:
    os.environ |= {"HF_HUB_OFFLINE": "1", "CI": "1"}  # CI: no telemetry of trl
    FOLDER = Path(tempfile.mkdtemp(prefix="smoke-"))
    atexit.register(shutil.rmtree, FOLDER, ignore_errors=True)

LIMITS: dict[str, Any] = {"max_steps": 2, "use_cpu": True, "bf16": False, "report_to": "none"} if SMOKE else {}
"""Further training arguments."""

WORDS = ["the cat sat on a mat", "the dog ran to the cat", "a mat is on the mat"]
TEMPLATE = "{% for turn in messages %}{{ turn['role'] + ': ' + turn['content'] + '\n' }}{% endfor %}"


def language_model(name: str) -> str:
    """The name of a model of the Hub, or a folder with a tiny one and its tokenizer."""
    if not SMOKE:
        return name
    from transformers import LlamaConfig, LlamaForCausalLM, set_seed

    from hf_adafisher.data.text.tokens import train_tokenizer

    tokenizer, folder = train_tokenizer(WORDS, 257), FOLDER / "language-model"
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    set_seed(0)  # equal weights in all processes
    sides = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 0)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sides, **ends)).save_pretrained(folder)
    return str(folder)


def image_model(name: str) -> str:
    """The name of a vision model of the Hub, or a folder with a tiny one and its image processor."""
    if not SMOKE:
        return name
    from transformers import ViTConfig, ViTImageProcessor, ViTModel, set_seed

    folder, sides = FOLDER / "image-model", {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    set_seed(0)
    ViTModel(ViTConfig(image_size=16, patch_size=4, num_attention_heads=2, **sides)).save_pretrained(folder)
    return str(folder)


def texts(name: str) -> str:
    """The name of a data set with a column ``text``, or a folder with one."""
    return _saved(name, {"text": WORDS * 100})


def chats(name: str) -> str:
    """The name of a data set with a column ``messages``, or a folder with one."""
    return _saved(name, {"messages": [_turn("user", "the cat") + _turn("assistant", words) for words in WORDS] * 8})


def preferences(name: str) -> str:
    """The name of a data set with the columns ``chosen`` and ``rejected``, or a folder with one."""
    prompt = _turn("user", "the cat")
    chosen, rejected = (prompt + _turn("assistant", words) for words in WORDS[:2])
    return _saved(name, {"chosen": [chosen] * 8, "rejected": [rejected] * 8})


def images(name: str) -> str:
    """The name of a data set with the columns ``img`` and ``label``, or a folder with one."""
    if not SMOKE:
        return name
    from datasets import ClassLabel, Features, Image
    from PIL.Image import new

    rows = {"img": [new("RGB", (16, 16), (60 * i, 0, 0)) for i in range(4)] * 2, "label": [0, 1, 2, 0] * 2}
    return _saved(name, rows, Features({"img": Image(), "label": ClassLabel(names=["cat", "dog", "mat"])}))


def _turn(role: str, content: str) -> list[dict[str, str]]:
    return [{"role": role, "content": content}]


def _saved(name: str, columns: dict[str, list[Any]], features: Any = None) -> str:
    if not SMOKE:
        return name
    from datasets import Dataset

    folder = FOLDER / name.replace("/", "-")
    folder.mkdir(exist_ok=True)
    Dataset.from_dict(columns, features=features).to_parquet(str(folder / "train-00000-of-00001.parquet"))
    return str(folder)
