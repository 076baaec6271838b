"""One small run, and the command line for more of them."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from hf_adafisher.data import load_corpus

SCRIPT = Path(__file__).parents[2] / "scripts" / "run_clm.py"
TINY = ["--n_layer", "1", "--n_embd", "16", "--n_head", "2", "--vocab_size", "300", "--block_size", "16"]
QUICK = ["--per_device_train_batch_size", "4", "--logging_steps", "1", "--disable_tqdm", "true", "--use_cpu"]


@pytest.fixture(scope="session")
def main() -> Any:
    spec = importlib.util.spec_from_file_location("run_clm", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


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
