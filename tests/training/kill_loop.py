"""Kills a training run again and again, restarts it each time, and compares its end with a run left alone.

    python -m tests.training.kill_loop --folder /tmp/kills --seed 0

prints one JSON line. One process imports everything once and forks a child for each start of the run, so that ten
restarts take seconds. A child is stopped with SIGKILL, which no Python code can notice, in one of these ways:

* in the middle of a file: the child writes part of it and kills itself, so that a truncated checkpoint is certain;
* while old checkpoints are deleted: half of one directory is gone;
* from outside, a few random milliseconds after a file of a checkpoint has appeared: wherever that is;
* from outside, a few random milliseconds after a training step has begun.
"""

from __future__ import annotations

import argparse
import gc
import io
import json
import os
import random
import select
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer_callback import TrainerState

from hf_adafisher import AdaFisherTrainer
from hf_adafisher.training.checkpoints import last_complete_checkpoint
from tests.model_zoo import family
from tests.training_helper import make_trainer, optimizer_of

STEPS, SAVE_STEPS = 45, 3
RECORD = family("gpt2")
INSIDE = ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")
APPEARED = ("config.json", "optimizer.pt")


@dataclass(frozen=True)
class Kill:
    """How and when one start of the run ends: at the `nth` checkpoint that it writes, or right after it."""

    kind: str  # "inside", "deleting", "appeared" or "step"
    nth: int
    file: str = ""
    share: float = 0.0  # of the file's bytes that reach the disk, or of the directory's files that are deleted
    delay: float = 0.0  # seconds from the event to the signal


def plan(seed: int) -> list[Kill]:
    """Ten kills in random order: five in the middle of a file, one in a deletion, four from outside.

    The first comes after a checkpoint is complete: before that there is nothing to resume from. Together they let at
    most 14 checkpoints be written, so none comes after the end of the run.
    """
    draw = random.Random(seed)
    # The last file before trainer_state.json is written to its end: then nothing but that mark is missing.
    shares = {file: draw.uniform(0, 0.98) for file in INSIDE} | {"rng_state.pth": 1.0}
    kills = [Kill("inside", draw.choice((1, 2)), file, shares[file]) for file in INSIDE]
    kills += [Kill("appeared", draw.choice((1, 2)), file, delay=draw.uniform(0, 0.03)) for file in APPEARED]
    kills += [Kill("step", 1, delay=draw.uniform(0, 0.03)) for _ in range(2)]
    kills += [Kill("deleting", 1, share=draw.random())]
    draw.shuffle(kills)
    kills[0] = replace(kills[0], nth=2)
    return kills


def trainer_for(folder: Path, report: Callable[[str], None], pause_at: int | None) -> AdaFisherTrainer:
    """The same run in every child: dropout, shuffling, accumulation, checkpoints in the middle of an interval.

    It waits for its end before the step after `pause_at`, however late a busy machine lets the signal come.
    """
    model = RECORD.build(seed=1)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.1

    class Progress(TrainerCallback):
        def on_step_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
            report(f"step {state.global_step}")
            if state.global_step == pause_at:
                time.sleep(60)
                raise TimeoutError("nobody killed this run")

    return make_trainer(
        folder,
        RECORD,
        model=model,
        train_dataset=RECORD.dataset(26),
        callbacks=[Progress()],
        max_steps=STEPS,
        save_strategy="steps",
        save_steps=SAVE_STEPS,
        save_total_limit=2,
        step_size="paper",
        damping=3e-3,
        learning_rate=0.02,
        update_interval=4,
        gradient_accumulation_steps=2,
        per_device_train_batch_size=2,
        weight_decay=0.01,
        logging_steps=1,
        log_curvature=False,
    )


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def arm(kill: Kill) -> None:
    """In a child: makes the writer of a file, or the deleter of a directory, stop in the middle for good."""
    if kill.kind == "deleting":

        def rmtree(path: Any, *args: Any, **kwargs: Any) -> None:
            files = sorted(Path(path).iterdir())
            for file in files[: 1 + int(kill.share * (len(files) - 1))]:
                file.unlink()
            die()

        shutil.rmtree = rmtree  # type: ignore[assignment]
        return
    written = 0
    save, save_json = torch.save, TrainerState.save_to_json

    def stop_here(path: Any) -> bool:
        nonlocal written
        written += Path(path).name == kill.file
        return Path(path).name == kill.file and written == kill.nth

    def half(path: Any, content: bytes) -> None:
        with open(path, "wb", buffering=0) as file:
            file.write(content[: int(kill.share * len(content))])
            die()

    def torch_save(value: Any, path: Any, *args: Any, **kwargs: Any) -> None:
        if stop_here(path):
            buffer = io.BytesIO()
            save(value, buffer, *args, **kwargs)
            half(path, buffer.getvalue())
        save(value, path, *args, **kwargs)

    def save_to_json(self: TrainerState, path: str) -> None:
        save_json(self, path)
        if stop_here(path):
            half(path, Path(path).read_bytes())

    torch.save, TrainerState.save_to_json = torch_save, save_to_json  # type: ignore[assignment]


def child(folder: Path, kill: Kill | None, pipe: int) -> None:
    """One start of the run, from the last complete checkpoint if there is one, to its end if nothing stops it."""

    def report(line: str) -> None:
        os.write(pipe, f"{line}\n".encode())

    if kill is not None and kill.kind in ("inside", "deleting"):
        arm(kill)
    last = last_complete_checkpoint(folder)
    resumed = int(last.name.removeprefix("checkpoint-")) if last else 0
    report(f"resume {resumed}")
    from_outside = kill is not None and kill.kind in ("appeared", "step")
    trainer = trainer_for(folder, report, resumed + SAVE_STEPS * kill.nth + 2 if kill and from_outside else None)
    trainer.train(resume_from_checkpoint=str(last) if last else None)
    optimizer = optimizer_of(trainer)
    end = {
        "model": trainer.model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "losses": [(entry["step"], entry["loss"]) for entry in trainer.state.log_history if "loss" in entry],
        "start": RECORD.build(seed=1).state_dict(),
    }
    torch.save(end, folder / "end.pt")


class Child:
    """A forked start of the run, its reports and its log."""

    def __init__(self, folder: Path, kill: Kill | None, log: Path) -> None:
        self.log, self.resumed, self.step, self._text = log, -1, -1, b""
        self._pipe, write = os.pipe()
        os.set_blocking(self._pipe, False)
        self.pid = os.fork()
        if self.pid == 0:
            status = 1
            try:
                output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
                os.dup2(output, 1)
                os.dup2(output, 2)
                child(folder, kill, write)
                status = 0
            except BaseException:
                traceback.print_exc()
                sys.stderr.flush()
            finally:
                os._exit(status)  # never back into the parent's code
        os.close(write)

    def listen(self, seconds: float) -> bool:
        """Waits that long for reports; False once the child has gone."""
        if not select.select([self._pipe], [], [], seconds)[0]:
            return True
        data = os.read(self._pipe, 65536)
        *lines, self._text = (self._text + data).split(b"\n")
        for line in lines:
            word, number = line.split()
            setattr(self, {"resume": "resumed", "step": "step"}[word.decode()], int(number))
        return bool(data)

    def end(self) -> int:
        """Waits for it; the signal that killed it, or 0."""
        while self.listen(1.0):
            pass
        os.close(self._pipe)
        status = os.waitpid(self.pid, 0)[1]
        if not os.WIFSIGNALED(status) and os.waitstatus_to_exitcode(status) != 0:
            raise RuntimeError(f"a child failed:\n{self.log.read_text()}")
        return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def kill_from_outside(run: Child, folder: Path, kill: Kill) -> None:
    """Sends SIGKILL some milliseconds after the event that `kill` names."""
    while run.step < 0 and run.listen(1.0):
        pass
    step = run.resumed + SAVE_STEPS * kill.nth
    if kill.kind == "step":
        while run.step < step + 1 and run.listen(1.0):
            pass
    else:
        # A checkpoint that an earlier kill left half-written is written again: only files newer than this count.
        begun, path = time.time(), folder / f"checkpoint-{step}" / kill.file
        while run.step < step + 1 and run.listen(0.0):
            if path.is_file() and path.stat().st_mtime > begun:
                break
    time.sleep(kill.delay)
    os.kill(run.pid, signal.SIGKILL)


def complete_by_hand(checkpoint: Path) -> bool:
    """Whether a checkpoint of this run can be read to its end; slow, and nothing of the package."""
    try:
        for name in INSIDE[:-1]:
            torch.load(checkpoint / name, weights_only=False)
        json.loads((checkpoint / "trainer_state.json").read_text())
        return (checkpoint / "model.safetensors").stat().st_size > 0
    except Exception:
        return False


def equal(a: Any, b: Any) -> bool:
    """Bitwise, through dictionaries and lists."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(value, b[key]) for key, value in a.items())
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return bool(a == b)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)  # a forked child has none of its parent's threads, and would wait for them
    gc.collect()
    gc.freeze()  # accelerate collects garbage at the start of every run: not what was imported, again and again
    started, killed = time.time(), args.folder / "killed"
    alone = Child(args.folder / "alone", None, args.folder / "alone.log")
    summary: dict[str, Any] = {"alone_signal": alone.end(), "rounds": []}
    for number, kill in enumerate(plan(args.seed)):
        run = Child(killed, kill, args.folder / f"{number}.log")
        if kill.kind in ("appeared", "step"):
            kill_from_outside(run, killed, kill)
        received = run.end()
        left = sorted(int(path.name.split("-")[1]) for path in killed.glob("checkpoint-*"))
        broken = [step for step in left if not complete_by_hand(killed / f"checkpoint-{step}")]
        found = {"resumed": run.resumed, "step": run.step, "left": left, "broken": broken}
        skipped = run.log.read_text().count("Skipping ")
        summary["rounds"].append({**asdict(kill), "signal": received, "skipped": skipped, **found})
    last = Child(killed, None, args.folder / "last.log")
    summary |= {"last_signal": last.end(), "last_resumed": last.resumed, "steps": STEPS}
    summary["last_skipped"] = last.log.read_text().count("Skipping ")
    ends = [torch.load(args.folder / run / "end.pt", weights_only=True) for run in ("alone", "killed")]
    summary |= {f"{part}_equal": equal(*(end[part] for end in ends)) for part in ("model", "optimizer", "losses")}
    summary["logged_steps"] = [step for step, _ in ends[1]["losses"]]
    summary["weights_moved"] = not equal(ends[1]["model"], ends[1]["start"])
    summary["seconds"] = time.time() - started
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
