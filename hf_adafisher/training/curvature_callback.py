"""Trainer callback that records the curvature of every layer in a file and in Trainer's integrations."""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.trainer_callback import CallbackHandler

from hf_adafisher.optimizers.adafisher import AdaFisher
from hf_adafisher.optimizers.diagnostics.layer_curvature import layer_curvature, needs_every_process
from hf_adafisher.optimizers.validation.environment import unwrapped

logger = logging.getLogger(__name__)

CURVATURE_FILE = "curvature.jsonl"
"""File name of the record in ``args.output_dir``."""


class CurvatureCallback(TrainerCallback):
    """Record the curvature of every layer after each refresh of AdaFisher(W)'s factors, under any Trainer.

    With ``step_size="root"`` every step refreshes them, and a record costs about as much as a few steps of the
    optimizer: ``CurvatureCallback(every=50)``.

    ``Trainer(..., callbacks=[CurvatureCallback()])`` writes one JSON line per refresh to ``curvature.jsonl`` in
    ``args.output_dir``. Process 0 writes it immediately. A line has these keys:

    * ``step``: Number of optimizer steps, the one with the refresh included.
    * ``epoch``: Epoch as Trainer counts it.
    * ``refresh``: Number of the refresh.
    * ``layers``: Values of ``hf_adafisher.optimizers.diagnostics.layer_curvature.layer_curvature`` by the names of all
      parameters with factors: ``fisher_min``, ``fisher_median``, ``fisher_max``, ``condition_number``,
      ``floor_share``, ``update_rms``, ``step_gain``. Non-finite values are null.
    * ``record_seconds``: Time spent on recording since the previous line. A GPU is synchronized before and after the
      record, so that its work is counted and that of the step is not.
    * ``interval_seconds``: Time since the previous line, or since training began. It includes the cost of
      synchronization.

    A resumed run continues the file: lines of steps after the checkpoint are dropped, since the run repeats these
    steps. A new run starts a new file.

    The values also go to every integration of ``report_to``, as ``curvature/<parameter>/<number>``. They bypass
    Trainer's ``log``, which would print hundreds of numbers per refresh and keep them in every checkpoint. A Trainer
    other than AdaFisherTrainer needs ``callback.attach(trainer)`` before ``train()`` for this.

    Training is bitwise the same. DDP needs no communication for the record, FSDP2 one small all-reduce. With any other
    optimizer, nothing is recorded, with one warning.

    Args:
        every: Number of refreshes from one record to the next, >= 1; the first refresh is recorded. Default 1.
        report: Send the values to ``report_to`` too; False writes the file only. Default True.

    Raises:
        ValueError: ``every`` is no integer >= 1.
    """

    def __init__(self, every: int = 1, report: bool = True) -> None:
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"every is {every!r}; it must be a whole number of refreshes, at least 1")
        self.every = every
        self.report = report
        self._refreshes = 0
        self._layers: dict[str, dict[str, float]] | None = None
        self._handler: CallbackHandler | None = None
        self._reporters: list[TrainerCallback] = []
        self._spent = self._since = 0.0

    def attach(self, trainer: Trainer) -> None:
        """Report to the integrations of this Trainer, which does not pass them to callbacks.

        Args:
            trainer: Trainer with this callback, before its ``train()``.
        """
        self._handler = trainer.callback_handler

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the record: drop lines after the step from which the run starts, and find the integrations."""
        optimizer = unwrapped(kwargs.get("optimizer"))
        self._layers, self._reporters = None, []
        if not isinstance(optimizer, AdaFisher):
            logger.warning(
                "CurvatureCallback records nothing: it needs AdaFisher or AdaFisherW, and the optimizer is %s.",
                type(optimizer).__name__,
            )
            return
        self._refreshes = _refreshes(optimizer)
        self._spent, self._since = 0.0, time.perf_counter()
        if state.is_world_process_zero:
            _drop_lines_after(state.global_step, _record_file(args))
            if self.report:
                self._reporters = self._integrations(args, kwargs.get("optimizer"))

    def _integrations(self, args: TrainingArguments, optimizer: Any) -> list[TrainerCallback]:
        """Integrations of the attached Trainer, if it is the one with this optimizer; else a warning names them."""
        if self._handler is not None and self._handler.optimizer is optimizer:
            kinds: tuple[Any, ...] = tuple(INTEGRATION_TO_CALLBACK.values())
            return [other for other in self._handler.callbacks if isinstance(other, kinds)]
        unheard = [name for name in args.report_to or () if name != "none"]
        if unheard:
            logger.warning(
                "CurvatureCallback writes its file only: for report_to=%s use AdaFisherTrainer, or call "
                "callback.attach(trainer) before train().",
                ", ".join(unheard),
            )
        return []

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Compute the layers' curvature while the learning rate is still that of the step."""
        optimizer = unwrapped(kwargs.get("optimizer"))
        if not isinstance(optimizer, AdaFisher) or _refreshes(optimizer) == self._refreshes:
            return
        self._refreshes = _refreshes(optimizer)
        if (self._refreshes - 1) % self.every == 0 and (state.is_world_process_zero or needs_every_process(optimizer)):
            devices = {p.device for group in optimizer.param_groups for p in group["params"]}
            _wait_for(devices)  # or the time of the step's own kernels would count as the record's
            begin = time.perf_counter()
            self._layers = layer_curvature(optimizer)
            _wait_for(devices)
            self._spent += time.perf_counter() - begin

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write and report the record after Trainer has counted the step."""
        layers, self._layers = self._layers, None
        if layers is None or not state.is_world_process_zero:
            return
        begin = time.perf_counter()
        line = {
            "step": state.global_step,
            "epoch": state.epoch,
            "refresh": self._refreshes,
            "record_seconds": round(self._spent, 6),
            "interval_seconds": round(begin - self._since, 6),
            "layers": {name: _finite_or_none(numbers) for name, numbers in layers.items()},
        }
        file = _record_file(args)
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line, allow_nan=False) + "\n")
        logs = {
            f"curvature/{name}/{key}": value
            for name, numbers in layers.items()
            for key, value in numbers.items()
            if math.isfinite(value)
        }
        for reporter in self._reporters:
            reporter.on_log(args, state, control, logs=dict(logs), **kwargs)
        self._spent, self._since = time.perf_counter() - begin, begin


def read_curvature(file: Path) -> list[dict[str, Any]]:
    """Read the lines that ``CurvatureCallback`` wrote; an unfinished last line of a killed run is dropped.

    Args:
        file: The ``curvature.jsonl`` of a run.

    Returns:
        The lines in order, each as a dictionary.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: A line was not written by ``CurvatureCallback``.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist: train with callbacks=[CurvatureCallback()] first")
    texts = file.read_text(encoding="utf-8").split("\n")
    unfinished = texts.pop()
    lines = [_parsed(text) for text in texts]
    if None in lines:
        number = lines.index(None) + 1
        raise ValueError(f"{file}, line {number}, is no line of a CurvatureCallback: {texts[number - 1][:60]!r}")
    last = _parsed(unfinished)
    return [line for line in [*lines, last] if line is not None]


def _parsed(text: str) -> dict[str, Any] | None:
    try:
        line = json.loads(text)
    except ValueError:
        return None
    return line if isinstance(line, dict) and isinstance(line.get("layers"), dict) and "step" in line else None


def _drop_lines_after(step: int, file: Path) -> None:
    """Keep the lines up to ``step``; the file is replaced atomically, or removed if no line is left."""
    if not file.exists():
        return
    partial = file.with_name(file.name + ".partial")
    kept = 0
    with file.open(encoding="utf-8") as old, partial.open("w", encoding="utf-8") as new:
        for text in old:
            line = _parsed(text)
            if line is not None and line["step"] <= step:
                new.write(text.rstrip("\n") + "\n")
                kept += 1
    if kept:
        os.replace(partial, file)
    else:
        partial.unlink()
        file.unlink()


def _wait_for(devices: Iterable[torch.device]) -> None:
    """Wait until all launched kernels have ended; a CPU runs them synchronously."""
    accelerator = torch.accelerator.current_accelerator()
    for device in devices:
        if accelerator is not None and device.type == accelerator.type:
            torch.accelerator.synchronize(device)


def _record_file(args: TrainingArguments) -> Path:
    return Path(args.output_dir or ".") / CURVATURE_FILE


def _refreshes(optimizer: AdaFisher) -> int:
    return int(optimizer.param_groups[0]["refreshes"])


def _finite_or_none(numbers: Mapping[str, float]) -> dict[str, float | None]:
    return {key: value if math.isfinite(value) else None for key, value in numbers.items()}
