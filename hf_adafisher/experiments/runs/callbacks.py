"""Trainer callbacks of experiments: step times, one bar for the run, and an early end of diverged runs."""

from __future__ import annotations

import logging
import math
import statistics
import sys
import time
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import (
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import has_length
from transformers.utils import logging as hf_logging

logger = logging.getLogger(__name__)

_LOG_SECONDS = 10.0
"""Pause between two states of a bar that a file keeps."""


class StepTimer(TrainerCallback):
    """Stopwatch of optimizer steps: forward, backward and update of all micro-batches.

    Evaluation, logging and saving do not count. Every entry of Trainer's log history gets the training seconds so far
    (``train_seconds``), which checkpoints keep: a resumed run counts on from there.

    Attributes:
        seconds: Duration of each step taken, in order.
        cpu_seconds: The same in seconds of the process on all its cores, which do not count other programs' work.
        total: Seconds of all steps, those before a resume included.
    """

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.cpu_seconds: list[float] = []
        self.total = 0.0
        self._start = self._cpu_start = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Restore the total of a resumed run."""
        self.total = next(
            (entry["train_seconds"] for entry in state.log_history[::-1] if "train_seconds" in entry), 0.0
        )

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clocks."""
        self._start, self._cpu_start = _now(), time.process_time()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stop the clocks."""
        self.seconds.append(_now() - self._start)
        self.cpu_seconds.append(time.process_time() - self._cpu_start)
        self.total += self.seconds[-1]
        if control.should_save and not control.should_log:  # a checkpoint must hold the total of its own step
            state.log_history.append({"step": state.global_step, "train_seconds": self.total})

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Add the total to the newest entry of the history; Trainer passes callbacks a copy of it."""
        if state.log_history:
            state.log_history[-1]["train_seconds"] = self.total

    def summary(self, warmup: int = 5) -> dict[str, float | int | None]:
        """Return the step times in milliseconds.

        Both figures matter: a step that refreshes the curvature costs more than the others, which the mean
        shows and the median does not.

        Args:
            warmup: First steps left out, at most half of all (allocation and caches make them slow).

        Returns:
            median_ms, mean_ms, mean_cpu_ms (None without a step), steps measured, warm-up steps left out.
        """
        warmup = min(warmup, len(self.seconds) // 2)
        kept = [1000 * seconds for seconds in self.seconds[warmup:]]
        return {
            "median_ms": statistics.median(kept) if kept else None,
            "mean_ms": statistics.fmean(kept) if kept else None,
            "mean_cpu_ms": 1000 * statistics.fmean(self.cpu_seconds[warmup:]) if kept else None,
            "steps": len(kept),
            "warmup_steps": warmup,
        }


class RunBar(TrainerCallback):
    """One bar for a run: steps, time left, the newest training and validation loss; then one for the evaluation."""

    def __init__(self) -> None:
        self._bar: tqdm[Any] | None = None
        self._training = False
        self._losses: dict[str, str] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Show the bar."""
        if state.is_world_process_zero:
            self._training = True
            self._open("training", state.max_steps, state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Count a step."""
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show the losses."""
        for key, name in (("loss", "loss"), ("eval_loss", "validation")):
            if key in (logs or {}):
                self._losses[name] = f"{logs[key]:.4g}"  # type: ignore[index]
        if self._bar is not None:
            self._bar.set_postfix(self._losses)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Close the bar, which stays on the screen."""
        self._training = False
        self._close()

    def on_prediction_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        eval_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        """Count a batch of the evaluation at the end; those during training are part of it."""
        if self._bar is None and state.is_world_process_zero:
            self._open("evaluation", len(eval_dataloader) if has_length(eval_dataloader) else None)
        if self._bar is not None and not self._training:
            self._bar.update()

    def on_predict(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: Any, **kwargs: Any
    ) -> None:
        """Close the bar of the evaluation."""
        self._close()

    def _open(self, name: str, total: int | None, done: int = 0) -> None:
        unit = "step" if self._training else "batch"
        pause = 0.1 if sys.stderr.isatty() else _LOG_SECONDS
        self._bar = tqdm(total=total, initial=done, desc=name, unit=unit, dynamic_ncols=True, mininterval=pause)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        self._bar = None


def show_progress(trainer: Trainer, verbose: bool) -> None:
    """Replace transformers' bars and Trainer's printed logs by one bar, which ``disable_tqdm`` leaves out.

    Args:
        trainer: Not yet started.
        verbose: Leave everything as it is instead.
    """
    if verbose:
        hf_logging.enable_progress_bar()
        return
    hf_logging.disable_progress_bar()  # one for each file of weights that is written
    for shown in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(shown)
    if not trainer.args.disable_tqdm:
        trainer.add_callback(RunBar())


class StopOnDivergence(TrainerCallback):
    """Early stopping at the first logged loss that is not finite: from there on nothing can be learned.

    Needs ``logging_nan_inf_filter=False``, or Trainer never logs such a loss.

    Attributes:
        diverged_at: Step at which it was seen, or None.
    """

    def __init__(self) -> None:
        self.diverged_at: int | None = None

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Check the training and validation loss just logged."""
        losses = [(logs or {}).get(key, 0.0) for key in ("loss", "eval_loss")]
        if self.diverged_at is None and not all(math.isfinite(loss) for loss in losses):
            self.diverged_at = state.global_step
            control.should_training_stop = True
            logger.warning(
                "the loss is no longer finite at step %d: training stops. Try a smaller learning rate, "
                "a larger damping or a smaller max_grad_norm",
                state.global_step,
            )


def _now() -> float:
    if torch.accelerator.is_available():  # kernels run asynchronously there: wait for what was started
        torch.accelerator.synchronize()
    return time.perf_counter()
