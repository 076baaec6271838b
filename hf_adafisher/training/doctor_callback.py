"""Trainer callback that diagnoses the first steps of a run."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_adafisher.optimizers.base.kronecker_diagonal import KroneckerDiagonalOptimizer
from hf_adafisher.optimizers.diagnostics.diagnosis import Diagnosis
from hf_adafisher.optimizers.validation.environment import unwrapped

logger = logging.getLogger(__name__)

DIAGNOSIS_FILE = "diagnosis.json"
"""File name of the diagnosis in ``args.output_dir``."""


class DoctorCallback(TrainerCallback):
    """Say after a few steps what is wrong with the run for AdaFisher(W) or SpectralAdaFisher, under any Trainer.

    ``Trainer(..., callbacks=[DoctorCallback()])`` watches the first steps, prints what
    ``hf_adafisher.AdaFisher.diagnose`` finds and writes it to ``diagnosis.json`` in ``args.output_dir``. Training is
    bitwise the same. The watched steps are all logged, since Trainer tells the norm of the gradient before clipping in
    its log only; from then on the callback does nothing. With any other optimizer it does nothing at all, with one
    warning.

    Args:
        steps: Number of steps to watch, those that a loss scaler skips included, >= 1. A run that ends earlier is
            diagnosed at its end. Default 20.
        stop: End training with the diagnosis. Default False.

    Attributes:
        diagnosis: The diagnosis, None until it is made.

    Raises:
        ValueError: ``steps`` is no integer >= 1.
    """

    def __init__(self, steps: int = 20, stop: bool = False) -> None:
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise ValueError(f"steps is {steps!r}; it must be a whole number of steps to watch, at least 1")
        self.steps = steps
        self.stop = stop
        self.diagnosis: Diagnosis | None = None
        self._watching = False
        self._seen = self._skipped = 0
        self._grad_norms: list[float] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin to watch, anew where an attempt ran out of memory and another one starts."""
        optimizer = unwrapped(kwargs.get("optimizer"))
        self._watching = isinstance(optimizer, KroneckerDiagonalOptimizer)
        self.diagnosis, self._grad_norms = None, []
        self._seen = self._skipped = 0
        if not self._watching:
            logger.warning(
                "DoctorCallback says nothing: it knows AdaFisher, AdaFisherW and SpectralAdaFisher, and the optimizer "
                "is %s.",
                type(optimizer).__name__,
            )

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Count the step, and whether the loss scaler skipped it."""
        if self._watching:
            self._seen += 1
            self._skipped += bool(getattr(kwargs["optimizer"], "step_was_skipped", False))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ask for a log line, which holds the norm of the gradient."""
        control.should_log |= self._watching

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Note the norm, and diagnose once all steps were watched."""
        if not self._watching or "grad_norm" not in (logs or {}):
            return
        self._grad_norms.append(float(logs["grad_norm"]))  # type: ignore[index]
        if self._seen >= self.steps:
            self._diagnose(args, state, kwargs["optimizer"])
            control.should_training_stop |= self.stop

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Diagnose a run that has ended before."""
        if self._watching and self._seen:
            self._diagnose(args, state, kwargs["optimizer"])

    def _diagnose(self, args: TrainingArguments, state: TrainerState, optimizer: Any) -> None:
        """Diagnose on every process, as sharded parameters need it, and show it on the first."""
        self._watching = False
        self.diagnosis = unwrapped(optimizer).diagnose(
            grad_norms=self._grad_norms, max_grad_norm=args.max_grad_norm, skipped_steps=self._skipped
        )
        if state.is_world_process_zero:
            print(self.diagnosis, flush=True)
            file = Path(args.output_dir or ".") / DIAGNOSIS_FILE
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(self.diagnosis.as_dict(), indent=2, allow_nan=False) + "\n", encoding="utf-8")
