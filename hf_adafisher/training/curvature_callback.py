"""A record of every layer's curvature while a Trainer trains: a file of JSON lines, and whatever Trainer reports to."""

from __future__ import annotations

import gc
import json
import logging
import math
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.trainer_callback import CallbackHandler

from hf_adafisher.optimizers.adafisher import AdaFisher
from hf_adafisher.optimizers.diagnostics.layer_curvature import layer_curvature, needs_every_process
from hf_adafisher.optimizers.validation.environment import unwrapped

logger = logging.getLogger(__name__)

CURVATURE_FILE = "curvature.jsonl"
"""The name of the record in ``args.output_dir``."""


class CurvatureCallback(TrainerCallback):
    """Records the curvature of every layer whenever AdaFisher(W) has refreshed its factors; for any Trainer.

    ``Trainer(..., callbacks=[CurvatureCallback()])`` writes one line a refresh to ``curvature.jsonl`` in
    ``args.output_dir``, at once, by process 0:

    * ``step``: optimizer steps made, the one with the refresh included; ``epoch``; ``refresh``: its number;
    * ``layers``: for the name of every parameter with statistics, which begins with its module's, the numbers of
      ``hf_adafisher.optimizers.diagnostics.layer_curvature.layer_curvature``: ``fisher_min``, ``fisher_median``,
      ``fisher_max``, ``condition_number``, ``floor_share``, ``update_rms``, ``step_gain``. What is not finite is null;
    * ``record_seconds``: what the record has cost since the line before, and ``interval_seconds``: the time since
      then, or since training began. A device that works on its own (a GPU) is waited for on either side of the record,
      so that all of the record's work and none of the step's counts. What the waiting itself costs the run, whose
      processor cannot prepare the next kernels meanwhile, is in ``interval_seconds`` alone.

    A resumed run goes on with the file: lines of steps after the checkpoint are dropped, as the run makes them again.
    A run that starts from the beginning starts the file anew.

    The same numbers go to every integration of ``report_to``, as ``curvature/<parameter>/<number>``. Trainer's own
    ``log`` would also print them and keep them in every checkpoint, hundreds of numbers a refresh, so they are handed
    to the integrations alone: console and ``log_history`` stay as they are.

    Training is the same to the bit. DDP needs no communication for it, FSDP2 one small all-reduce. With any other
    optimizer one warning says that there is nothing to record.

    Args:
        every: Record every so many refreshes, >= 1, beginning with the first. Default 1.
        report: Whether ``report_to`` hears of it; False writes the file only. Default True.

    Raises:
        ValueError: ``every`` is no whole number >= 1.
    """

    def __init__(self, every: int = 1, report: bool = True) -> None:
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"every is {every!r}; it must be a whole number of refreshes, at least 1")
        self.every = every
        self.report = report
        self._refreshes = 0
        self._layers: dict[str, dict[str, float]] | None = None
        self._reporters: list[TrainerCallback] = []
        self._spent = self._since = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Takes up the file where the run does."""
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
                self._reporters = _reporters_beside(self, kwargs.get("optimizer"))

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Looks at the layers while the learning rate is still that of the step."""
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
        """Writes and reports, now that Trainer has counted the step."""
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
    """The lines that ``CurvatureCallback`` wrote, in order; a last one that a killed run left unfinished is left
    out.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A line is something else.
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
    """Keep the lines up to ``step``, and none of them half: the file is replaced as a whole, or removed."""
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


def _reporters_beside(callback: TrainerCallback, optimizer: Any) -> list[TrainerCallback]:
    """The integrations among the callbacks of the Trainer that runs ``callback`` with this optimizer.

    Trainer tells a callback nothing of the others, so the list that holds it is looked for, once a training. The
    optimizer tells it from that of an earlier Trainer with the same callback.
    """
    kinds: tuple[Any, ...] = tuple(INTEGRATION_TO_CALLBACK.values())
    handlers = [found for found in gc.get_objects() if issubclass(type(found), CallbackHandler)]
    mine = [h for h in handlers if h.optimizer is optimizer and any(other is callback for other in h.callbacks)]
    return [other for handler in mine for other in handler.callbacks if isinstance(other, kinds)]


def _wait_for(devices: Iterable[torch.device]) -> None:
    """Until every kernel that was launched has ended; nothing for a CPU, where they end before the next line."""
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
