"""Trainer callbacks of experiments: step times, and an early end of diverged runs."""

from __future__ import annotations

import logging
import math
import statistics
import time
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

logger = logging.getLogger(__name__)


class StepTimer(TrainerCallback):
    """Stopwatch of optimizer steps: forward, backward and update of all micro-batches.

    Evaluation, logging and saving do not count. Every entry of Trainer's log history gets the training seconds so far
    (``train_seconds``), which checkpoints keep: a resumed run counts on from there.

    Attributes:
        seconds: Duration of each step taken, in order.
        total: Seconds of all steps, those before a resume included.
    """

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.total = 0.0
        self._start = 0.0

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
        """Start the clock."""
        self._start = _now()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stop the clock."""
        self.seconds.append(_now() - self._start)
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
            median_ms, mean_ms (None without a step), steps measured, warm-up steps left out.
        """
        warmup = min(warmup, len(self.seconds) // 2)
        kept = [1000 * seconds for seconds in self.seconds[warmup:]]
        return {
            "median_ms": statistics.median(kept) if kept else None,
            "mean_ms": statistics.fmean(kept) if kept else None,
            "steps": len(kept),
            "warmup_steps": warmup,
        }


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
