"""Random SIGKILLs over training runs and comparisons, each started again until it has finished."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from hf_adafisher.data.text import load_corpus
from hf_adafisher.experiments.outputs import write_json
from hf_adafisher.experiments.runs.run import RESULTS_FILE
from hf_adafisher.training.checkpoints import CheckpointError, last_complete_checkpoint

STEPS, SAVE_STEPS, CELL_RATES, KILLS_PER_LOOP = 40, 8, (0.001, 0.01, 0.1), 6
_KEPT = (RESULTS_FILE, "command.json", "model.safetensors")
_MOMENTS = {
    "any time": None,
    "checkpoint": "checkpoint-*",
    "end of training": f"checkpoint-{STEPS}",
    "writing": ".unfinished",
    "results": RESULTS_FILE,
}
"""Moments of kills: a random time since the start, or one shortly after such a file has appeared."""
_DELAY_SECONDS, _POLL_SECONDS, _LIMIT_SECONDS = 0.3, 0.01, 900


@dataclass
class Loop:
    """One run or comparison that was killed and started again until its end.

    Attributes:
        kind: ``run`` or ``comparison``.
        folder: Its output directory.
        kills: Number of kills by moment.
        finished: It has all its results.
        equal: Weights are bitwise those of the undisturbed one.
        lost: Files of finished cells that a later start changed or removed.
        problem: Reason of an end that no kill explains, or an empty text.
    """

    kind: str
    folder: str
    kills: Counter[str] = field(default_factory=Counter)
    finished: bool = False
    equal: bool = False
    lost: list[str] = field(default_factory=list)
    problem: str = ""


class Soak:
    """Loops of runs and comparisons, several at a time.

    Args:
        scripts: Folder of ``clm.py`` and ``compare.py``.
        output_dir: Folder for the loops, new or empty.
        seed: Of the moments, the delays and the choice of the processes.
        on_kill: Called after each kill.

    Raises:
        ValueError: ``output_dir`` has files in it.
    """

    def __init__(self, scripts: Path, output_dir: Path, seed: int, on_kill: Callable[[], Any]) -> None:
        if output_dir.is_dir() and any(output_dir.iterdir()):
            raise ValueError(f"{output_dir} is not empty: give a new --output_dir, or delete it")
        self.scripts, self.output_dir, self.seed, self.on_kill = scripts, output_dir.resolve(), seed, on_kill
        self.kills = 0
        self.stopping = threading.Event()
        self._lock = threading.Lock()
        self.output_dir.mkdir(parents=True, exist_ok=True)
        self._common = self._write_inputs()
        self._seconds: dict[str, float] = {}

    def run(self, kills: int, jobs: int) -> list[Loop]:
        """Kill at least ``kills`` times, at most ``jobs - 1`` times more, and return the loops."""
        for kind in ("run", "comparison"):
            begin, loop = time.monotonic(), Loop(kind, str(self.output_dir / f"undisturbed-{kind}"))
            if self._attempt(loop, None, {}):
                raise RuntimeError(f"the undisturbed {kind} fails: {loop.problem}")
            self._seconds[kind] = time.monotonic() - begin
        loops: list[Loop] = []

        def work() -> None:
            while self.kills < kills and not self.stopping.is_set():
                with self._lock:
                    kind = ("run", "comparison")[len(loops) % 2]
                    loop = Loop(kind, str(self.output_dir / f"{kind}-{len(loops)}"))
                    loops.append(loop)
                    draw = random.Random(f"{self.seed}-{len(loops)}")
                self._finish(loop, draw, kills)

        with ThreadPoolExecutor(jobs) as pool:
            try:
                for worker in [pool.submit(work) for _ in range(jobs)]:
                    worker.result()
            finally:
                self.stopping.set()  # after Ctrl-C, the others end with their processes
        return loops

    def _finish(self, loop: Loop, draw: random.Random, kills: int) -> None:
        folder, ended = Path(loop.folder), False
        while not (ended or loop.problem or loop.lost or self.stopping.is_set()):
            kept = finished_files(folder)
            more = loop.kills.total() < KILLS_PER_LOOP and self.kills < kills
            status = self._attempt(loop, draw if more else None, kept)
            ended = status == 0 or (loop.kind == "run" and (folder / RESULTS_FILE).is_file())
        results = [json.loads(path.read_text(encoding="utf-8")) for path in _below(folder, RESULTS_FILE)]
        wanted = 1 if loop.kind == "run" else len(CELL_RATES)
        loop.finished = ended and [result["status"] for result in results] == ["completed"] * wanted
        loop.equal = weights(folder) == weights(self.output_dir / f"undisturbed-{loop.kind}")

    def _attempt(self, loop: Loop, draw: random.Random | None, kept: dict[str, str]) -> int:
        """Start it once more, and kill it at a random moment unless ``draw`` is None; return the exit status."""
        folder = Path(loop.folder)
        log = folder.with_suffix(".log")
        moment = draw.choice(list(_MOMENTS)) if draw else ""
        pattern = _MOMENTS.get(moment)
        delay = draw.uniform(0, _DELAY_SECONDS if pattern else self._seconds[loop.kind]) if draw else _LIMIT_SECONDS
        before = set(_below(folder, pattern)) if pattern else set()
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        # The parent alone leaves its cells running, as a scheduler or the kernel may do.
        victims = ["all", "parent", "child"] if draw and loop.kind == "comparison" else ["all"]
        victim, deadline = "", None if pattern else time.monotonic() + delay
        with log.open("wb") as file:
            process = subprocess.Popen(
                self._command(loop.kind, folder), stdout=file, stderr=file, env=environment, start_new_session=True
            )
            try:
                while process.poll() is None and not victim:
                    if pattern and deadline is None and set(_below(folder, pattern)) - before:
                        deadline = time.monotonic() + delay
                    if self.stopping.is_set() or (deadline is not None and time.monotonic() >= deadline):
                        victim = draw.choice(victims) if draw and not self.stopping.is_set() else "all"
                        _kill(process, victim)
                    time.sleep(_POLL_SECONDS)
                status = process.wait()
            finally:  # after Ctrl-C too
                _kill(process, "all")
        loop.lost += [name for name, value in kept.items() if finished_files(folder).get(name) != value]
        if draw and victim and status:
            loop.kills[moment] += 1
            with self._lock:
                self.kills += 1
            self.on_kill()
        elif status:
            loop.problem = f"exit status {status}: {log.read_text(encoding='utf-8', errors='replace')[-2000:]}"
        return status

    def _command(self, kind: str, folder: Path) -> list[str]:
        if kind == "comparison":
            config = str(self.output_dir / "comparison.json")
            words = ["compare.py", config]
        else:
            words = ["clm.py", *(f"--{key}={value}" for key, value in self._common.items())]
            with suppress(CheckpointError):  # killed in its first checkpoint: it starts anew
                words += ["--resume_from_checkpoint", "last"] if last_complete_checkpoint(folder) else []
        return [sys.executable, str(self.scripts / words[0]), *words[1:], "--output_dir", str(folder)]

    def _write_inputs(self) -> dict[str, Any]:
        common: dict[str, Any] = {
            **{"n_layer": 1, "n_embd": 16, "n_head": 2, "vocab_size": 300, "block_size": 16, "use_cpu": True},
            **{"per_device_train_batch_size": 4, "max_steps": STEPS, "save_steps": SAVE_STEPS, "disable_tqdm": True},
        }
        corpus = load_corpus()
        for split in ("train", "validation", "test"):
            path = self.output_dir / f"{split}.txt"
            path.write_text("\n".join(getattr(corpus, split)[:400]) + "\n", encoding="utf-8")
            common[f"{split}_file"] = str(path)
        cells = [{"optim": "adafisherw", "learning_rate": list(CELL_RATES)}]
        write_json(self.output_dir / "comparison.json", {"common": common, "cells": cells})
        return common


def summarize(loops: list[Loop]) -> dict[str, Any]:
    """Count kills, finished and equal loops and lost files, with every loop below."""
    return {
        "kills": sum(loop.kills.total() for loop in loops),
        "kills_by_moment": sum((loop.kills for loop in loops), Counter()),
        "loops": len(loops),
        "finished": sum(loop.finished for loop in loops),
        "equal": sum(loop.equal for loop in loops),
        "lost": sum(len(loop.lost) for loop in loops),
        "each": [vars(loop) for loop in loops],
    }


def finished_files(folder: Path) -> dict[str, str]:
    """Return hash and time of the files that a finished run or cell must keep, by path; equal ones may be new ones."""
    paths = [path.with_name(name) for path in _below(folder, RESULTS_FILE) for name in _KEPT]
    return {str(path): f"{_hash(path)} {path.stat().st_mtime_ns}" for path in paths if path.is_file()}


def weights(folder: Path) -> dict[str, str]:
    """Return the hashes of all final weights, by their places in the folder."""
    paths = [path.relative_to(folder) for path in _below(folder, "model.safetensors")]
    return {str(path): _hash(folder / path) for path in paths if not path.parent.name.startswith("checkpoint-")}


def _below(folder: Path, pattern: str) -> list[Path]:
    """Paths in a folder and those of its cells; what other processes delete meanwhile is left out."""
    return [
        Path(path) for depth in ("", "*/") for path in sorted(glob.glob(f"{glob.escape(str(folder))}/{depth}{pattern}"))
    ]


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _kill(process: subprocess.Popen[bytes], victim: str) -> None:
    """Kill ``all``, the ``parent`` alone, or the first ``child`` if there is one."""
    if process.poll() is not None:
        return
    children = []
    with suppress(psutil.NoSuchProcess):
        children = psutil.Process(process.pid).children(recursive=True)
    child_alone = victim == "child" and bool(children)
    if not child_alone:
        process.kill()
    for child in children[:1] if child_alone else children if victim == "all" else []:
        with suppress(psutil.NoSuchProcess):
            child.kill()
