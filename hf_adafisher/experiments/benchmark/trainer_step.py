"""Time of a whole training step under Trainer: AdaFisherW's against that of ``adamw_torch_fused``, in turns."""

from __future__ import annotations

import contextlib
import tempfile
import threading
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.utils import logging as transformers_logging

from hf_adafisher.experiments.benchmark.measurement import compare_times, gpt2
from hf_adafisher.experiments.benchmark.step import T_COV
from hf_adafisher.experiments.runs.callbacks import StepTimer
from hf_adafisher.training.arguments import AdaFisherTrainingArguments
from hf_adafisher.training.trainer import AdaFisherTrainer

WARM_UP = 2
"""Turns that are not counted."""


class _Turns:
    """Turns of several threads in a fixed order, until one of them fails."""

    def __init__(self, count: int) -> None:
        self.count, self.now = count, 0
        self.failure: BaseException | None = None
        self._changed = threading.Condition()

    def wait(self, index: int) -> None:
        """Block until it is the turn of thread ``index``."""
        with self._changed:
            self._changed.wait_for(lambda: self.now == index or self.failure is not None)
        if self.failure is not None:
            raise RuntimeError("another run of this comparison failed") from self.failure

    def end(self, failure: BaseException | None = None) -> None:
        """Pass the turn to the next thread."""
        with self._changed:
            self.failure = self.failure or failure
            self.now = (self.now + 1) % self.count
            self._changed.notify_all()


class TurnTimer(StepTimer):
    """Times the steps of a run that passes its turn on after every T_COV of them."""

    def __init__(self, turns: _Turns, index: int) -> None:
        super().__init__()
        self.turns, self.index = turns, index

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Wait for the turn, then start the clock."""
        if state.global_step % T_COV == 0:
            self.turns.wait(self.index)
        super().on_step_begin(args, state, control, **kwargs)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop the clock, and pass the turn on after the last step of it."""
        super().on_step_end(args, state, control, **kwargs)
        if state.global_step % T_COV == 0:
            self.turns.end()

    def turn_ms(self) -> list[float]:
        """Mean duration of a step in each turn, in milliseconds."""
        return [1e3 * fmean(self.seconds[i : i + T_COV]) for i in range(0, len(self.seconds), T_COV)]


class _SameBatch(Dataset[dict[str, Tensor]]):
    def __init__(self, batch: dict[str, Tensor], length: int) -> None:
        self.batch, self.length = batch, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {key: value[index % len(value)] for key, value in self.batch.items()}


def measure_trainer(rounds: int, device: str = "cpu", **sizes: int) -> dict[str, dict[str, float]]:
    """Time forward, backward, clipping, step and zero_grad under Trainer, in milliseconds a step.

    All runs are real ``train()`` calls, each in a thread of its own; they take turns of ten steps, of which one is due
    for the paper's form of AdaFisherW.

    Args:
        rounds: Number of turns of each run that count.
        device: ``cpu`` or ``cuda``.
        sizes: Sizes of the GPT-2, see ``hf_adafisher.experiments.benchmark.measurement.gpt2``.
    """
    names = ("adamw_torch_fused", "adafisherw", "adafisherw root")
    turns, watches, threads = _Turns(len(names)), [], []
    steps = T_COV * (rounds + WARM_UP)
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        stack.callback(transformers_logging.set_verbosity, verbosity)
        for index, name in enumerate(names):
            watch = TurnTimer(turns, index)
            trainer = _trainer(name, folder, device, steps, watch, sizes)
            threads.append(threading.Thread(target=_run, args=(trainer, turns), daemon=True))
            watches.append(watch)
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if turns.failure is not None:
        raise turns.failure
    times: Sequence[list[float]] = [watch.turn_ms()[WARM_UP:] for watch in watches]
    return {f"Trainer step, {name}": compare_times(own, times[0]) for name, own in zip(names, times, strict=True)}


def _trainer(name: str, folder: str, device: str, steps: int, watch: TrainerCallback, sizes: dict[str, int]) -> Trainer:
    work = gpt2("cpu", **sizes)
    batch = len(work.batch["input_ids"])
    options: dict[str, Any] = {
        "output_dir": f"{folder}/{name}", "optim": name.partition(" ")[0], "learning_rate": 1e-4, "weight_decay": 0.01,
        "max_steps": steps, "per_device_train_batch_size": batch, "lr_scheduler_type": "constant",
        "logging_strategy": "no", "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
        "use_cpu": device == "cpu", "dataloader_pin_memory": device != "cpu",
    }  # fmt: skip
    data = _SameBatch(work.batch, batch * steps)
    if name.startswith("adafisherw"):
        paper: dict[str, Any] = {"step_size": "paper", "update_interval": T_COV}
        arguments = AdaFisherTrainingArguments(**options, **(paper if name == "adafisherw" else {}))
        return AdaFisherTrainer(work.model, arguments, train_dataset=data, callbacks=[watch])
    return Trainer(work.model, TrainingArguments(**options), train_dataset=data, callbacks=[watch])


def _run(trainer: Trainer, turns: _Turns) -> None:
    try:
        trainer.train()
    except BaseException as error:
        turns.end(error)
