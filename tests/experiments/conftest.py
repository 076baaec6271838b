"""One small run, and the command line for more of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hf_adafisher.data.text import load_corpus
from hf_adafisher.experiments.comparison.protocol import Comparison, create_comparison
from tests.scripts import load_command, name_of

TINY = ["--n_layer", "1", "--n_embd", "16", "--n_head", "2", "--vocab_size", "300", "--block_size", "16"]
QUICK = ["--per_device_train_batch_size", "4", "--logging_steps", "1", "--disable_tqdm", "true", "--use_cpu"]


@pytest.fixture(scope="session")
def main() -> Any:
    return load_command("clm").main


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Three small files of real text."""
    folder, corpus = tmp_path_factory.mktemp("text"), load_corpus()
    paths = {}
    for split, lines in (("train", 400), ("validation", 40), ("test", 41)):
        paths[split] = str(folder / f"{split}.txt")
        Path(paths[split]).write_text("\n".join(getattr(corpus, split)[:lines]) + "\n", encoding="utf-8")
    return paths


@pytest.fixture(scope="session")
def command(files: dict[str, str]) -> list[str]:
    flags = [item for split, path in files.items() for item in (f"--{split}_file", path)]
    return [*TINY, *QUICK, *flags, "--max_steps", "4"]


@pytest.fixture(scope="session")
def finished(main: Any, command: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of four steps with checkpoints at 2 and 4."""
    output = tmp_path_factory.mktemp("finished")
    assert main([*command, "--save_steps", "2", "--output_dir", str(output)]) == 0
    return output


# Stands in for a training run: the loss is a function of the learning rate and the seed, of images the accuracy another
# one. A negative learning rate fails, a large one diverges, and while the comparison has a file "hang" the run waits.
# Steps take 0.1 s (adamw) or 0.2 s, every tenth one second more; of a timing run the first ten are slower.
FAKE_RUN = """
import json, os, pathlib, sys, time
a = dict(zip(sys.argv[1::2], sys.argv[2::2]))
out, lr = pathlib.Path(a["--output_dir"]), float(a.get("--learning_rate", 0.1))
seed, steps, adam = int(a.get("--seed", 0)), int(a.get("--max_steps", 7)), a["--optim"] == "adamw"
with open(out.parent / "started.txt", "a") as f:
    f.write(out.name + " " + os.environ["OMP_NUM_THREADS"] + "\\n")
while (out.parent / "hang").exists():
    time.sleep(0.02)
if lr < 0 or a["--optim"] == "broken":
    sys.exit("Traceback and so on\\nValueError: lr is negative")
seconds = [(0.1 if adam else 0.2) + (step % 10 == 0) for step in range(steps)]
result = {"status": "completed", "steps": steps, "steps_per_epoch": 25, "optimizer_state_bytes": 2**20,
          "hardware": {"device": "fake", "torch_threads": int(os.environ["OMP_NUM_THREADS"])},
          "versions": {"torch": "9.9"}, "train_seconds": sum(seconds), "step_time": {"mean_ms": 12.0}}
if a.get("--timing_only") == "true":
    result |= {"step_seconds": [100.0] * 10 + seconds[10:], "validation": None}
else:
    loss = None if lr > 1 else 4 + (lr - 0.1) ** 2 + adam + seed / 8
    split = {"loss": loss, "token_perplexity": loss, "word_perplexity": loss}
    if "image" in sys.argv[0]:
        accuracy = 0.99 if loss is None else 0.875 - abs(lr - 0.3) - adam / 8 - seed / 64
        split = {"loss": loss, "accuracy": accuracy, "top5_accuracy": 0.75 + accuracy / 4, "examples": 64}
    history = [{"step": s, "loss": 6 - s / steps, "train_seconds": s / 4} for s in (1, steps)]
    history += [{"step": s, "eval_loss": (loss or 9) + 1 - s / steps, "train_seconds": s / 4} for s in (1, steps)]
    for entry in history[2:] if "accuracy" in split else []:
        entry["eval_accuracy"] = split["accuracy"] * entry["step"] / steps
    result |= {"status": "completed" if loss else "diverged", "seed": seed, "validation": split, "test": split,
               "diverged_at_step": None if loss else 3, "log_history": history}
(out / "results.json").write_text(json.dumps(result))
"""


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """A program like clm.py that is done at once; beside it, one like image.py."""
    path = tmp_path / "scripts" / "clm.py"
    path.parent.mkdir()
    for script in (path, path.with_name("image.py")):
        script.write_text(FAKE_RUN)
    return path


@pytest.fixture
def compare(program: Path, tmp_path: Path) -> Callable[..., Comparison]:
    """Makes a comparison of fake runs in ``tmp_path / "out"``."""

    def create(entries: list[dict[str, Any]], **options: Any) -> Comparison:
        config = {"cells": entries, **options.pop("config", {})}
        return create_comparison(config, program.parent, tmp_path / "out", **options)

    return create


@pytest.fixture
def started(tmp_path: Path) -> Callable[..., list[str]]:
    """Names of the runs that were started, in order, and their threads."""

    def read(folder: str = "out") -> list[str]:
        path = tmp_path / folder / "started.txt"
        lines = path.read_text().splitlines() if path.is_file() else []
        return [f"{name_of(path.parent / cell)} {threads}" for cell, threads in map(str.split, lines)]

    return read
