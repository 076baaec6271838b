"""Saving and resuming of a Trainer: checks, whole checkpoints, evaluated weights."""

from __future__ import annotations

import contextlib
import errno
import functools
import inspect
import json
import logging
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from transformers.trainer import SCALER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_adafisher.optimizers.validation.environment import unwrapped
from hf_adafisher.training.arguments import AdaFisherTrainingArguments, parse_options
from hf_adafisher.training.callbacks import AdaFisherCallback
from hf_adafisher.training.checkpoints import CheckpointError, check_checkpoint_files, last_complete_checkpoint
from hf_adafisher.training.curvature_callback import CurvatureCallback
from hf_adafisher.training.option_fields import argument_of
from hf_adafisher.training.renamed_weights import check_weights_fit, has_renamed_weights, load_renamed_weights

if TYPE_CHECKING:  # a mixin has no base but the Trainer that it is mixed with
    from transformers import Trainer as AnyTrainer
else:
    AnyTrainer = object

logger = logging.getLogger(__name__)

_IMPLEMENTATION = {"lr", "params", "foreach", "fused", "capturable", "differentiable"}
"""Keys of groups that are no options of the algorithm, or change in every step."""


class ResumableTraining(AnyTrainer):
    """Mixin for a Trainer: checkpoints are checked before they are used, and written whole."""

    @functools.cached_property
    def checkpoint_files(self) -> dict[str, Any]:
        """JSON files by name, with their contents, that every checkpoint gets besides Trainer's."""
        return {}

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train as Trainer does; a checkpoint is checked before it is used.

        ``resume_from_checkpoint=True`` takes the newest checkpoint that is complete, with a warning for every newer one
        that is not: a run that was killed while it saved goes on from the one before.

        Raises:
            CheckpointError: A file of the given checkpoint, or of every checkpoint there is, is missing or truncated.
            ValueError: The checkpoint is another optimizer's or another model's.
        """
        if resume_from_checkpoint is True:
            choice = [last_complete_checkpoint(Path(self.args.output_dir or "."))]
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                torch.distributed.broadcast_object_list(choice)  # all processes resume from the same one
            found = choice[0]
            resume_from_checkpoint = True if found is None else str(found)  # True without any is Trainer's own error
        elif resume_from_checkpoint:
            check_checkpoint_files(Path(resume_from_checkpoint))
        if not any(isinstance(callback, AdaFisherCallback) for callback in self.callback_handler.callbacks):
            self.add_callback(AdaFisherCallback())
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, CurvatureCallback):
                callback.attach(self)
        output = super().train(resume_from_checkpoint, *args, **kwargs)
        self._show_evaluated_weights()
        return output

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model; with schedule-free optimizers, the weights that are evaluated."""
        self._show_evaluated_weights()
        with _naming(output_dir or self.args.output_dir):
            super().save_model(output_dir, _internal_call)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        """Load a checkpoint, also where its weights have other names than the model's; refuse another model's."""
        target, checkpoint = self.model if model is None else model, Path(resume_from_checkpoint)
        assert target is not None
        with _as_checkpoint_errors(checkpoint):
            if not self._load_renamed_weights(target, checkpoint):
                if not self.is_fsdp_enabled and not self.is_deepspeed_enabled:
                    check_weights_fit(target, checkpoint)
                super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        self._show_evaluated_weights()  # or a later evaluation would do it to the weights that are now loaded
        if not self._load_renamed_weights(self.model, Path(str(self.state.best_model_checkpoint))):
            super()._load_best_model()

    def _load_renamed_weights(self, model: Any, checkpoint: Path) -> bool:
        """Load weights that Trainer would leave out; whether there were any. FSDP and DeepSpeed have other files."""
        if self.is_fsdp_enabled or self.is_deepspeed_enabled or not has_renamed_weights(model, checkpoint):
            return False
        load_renamed_weights(model, checkpoint)
        return True

    def _show_evaluated_weights(self) -> None:
        """Trainer switches a schedule-free optimizer back when it trains on, but to evaluation when it evaluates only.

        The state that a checkpoint gets is then that of the weights beside it.
        """
        if callable(getattr(self._raw_optimizer(), "eval", None)):
            self._raw_optimizer().eval()

    def _raw_optimizer(self) -> Any:
        return unwrapped(self.optimizer)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """Save a checkpoint; one that an earlier run left in this place does not count as complete meanwhile."""
        folder = Path(self._get_output_dir(trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        with _naming(folder):
            if self.args.should_save:
                (folder / TRAINER_STATE_NAME).unlink(missing_ok=True)
                folder.mkdir(parents=True, exist_ok=True)
                for name, content in self.checkpoint_files.items():
                    (folder / name).write_text(json.dumps(content), encoding="utf-8")
            super()._save_checkpoint(model, trial)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load optimizer and scheduler; an error about the optimizer's state names the checkpoint."""
        if checkpoint is None:
            return
        asked_for = _options(self._raw_optimizer())
        with _as_checkpoint_errors(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)
            _check_options(self._raw_optimizer(), asked_for, Path(checkpoint))
        self._record_options(asked_for, checkpoint)

    def _load_scaler(self, checkpoint: str | None) -> None:
        """Load the state of the loss scaler; a file of one, where this run has none, is not used."""
        if checkpoint is not None and getattr(self.accelerator, "scaler", None) is None:
            scaler = Path(checkpoint) / SCALER_NAME
            if scaler.is_file():
                logger.warning("%s is not used: this run does not scale its loss (fp16).", scaler)
            return
        with _as_checkpoint_errors(checkpoint):
            super()._load_scaler(checkpoint)

    def _record_options(self, asked_for: list[dict[str, Any]], checkpoint: str) -> None:
        """Set the arguments to the options that came with the checkpoint and train on, and warn where others were."""
        changed: dict[str, tuple[Any, Any]] = {}
        signature = inspect.signature(type(self._raw_optimizer()).__init__).parameters
        known = {*signature, "initial_lr", "weight_decay"} - _IMPLEMENTATION  # groups have counters too
        for before, after in zip(asked_for, _options(self._raw_optimizer()), strict=True):
            for key, value in before.items():
                if key in known and _differ(value, after[key]):
                    changed.setdefault("learning_rate" if key == "initial_lr" else key, (value, after[key]))
        if not changed or not isinstance(self.args, AdaFisherTrainingArguments):
            return
        logger.warning(
            "resumed from %s, which trains on with its own options: %s. For other ones, start anew.",
            checkpoint,
            ", ".join(f"{key}={used} (not {asked})" for key, (asked, used) in changed.items()),
        )
        given, others = self.args.optimizer_options(), parse_options(self.args.optim_args, "optim_args")
        for key, (asked, used) in changed.items():
            if key == "learning_rate" and asked != self.args.learning_rate:  # groups with shares of it
                self.args.learning_rate = (self.args.learning_rate or 0.0) * (used / asked if asked else 1.0)
            elif key in ("learning_rate", "weight_decay"):
                setattr(self.args, key, used)
            elif key in {*given} - {*others} and hasattr(self.args, argument_of(key)):
                setattr(self.args, argument_of(key), used)
            elif key == "betas" and key not in others:
                self.args.adam_beta1, self.args.adam_beta2 = used
            elif key == "eps" and key not in others:
                self.args.adam_epsilon = used
            else:
                others[key] = used
        self.args.optim_args = ",".join(f"{key}={value!r}" for key, value in others.items()) or self.args.optim_args

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Train an epoch; from a checkpoint that has all steps, none, where Trainer would make one step more."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)


@contextlib.contextmanager
def _as_checkpoint_errors(checkpoint: Any) -> Iterator[None]:
    """Name the checkpoint in whatever its damaged or foreign contents raise."""
    try:
        yield
    except CheckpointError:
        raise
    except (ValueError, TypeError, LookupError, AttributeError, RuntimeError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"cannot resume from {checkpoint}: {error}") from error


@contextlib.contextmanager
def _naming(folder: Any) -> Iterator[None]:
    """Name the folder in the error of a full disk, which torch and safetensors raise without it."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
        full = full or "PytorchStreamWriter failed writing" in str(error)
        if full and getattr(error, "filename", None) is None:
            raise OSError(errno.ENOSPC, f"cannot be saved ({error})", str(folder)) from error
        raise


def _options(optimizer: Any) -> list[dict[str, Any]]:
    """Options of each group, without the parameters."""
    groups = getattr(optimizer, "param_groups", ())
    return [{key: value for key, value in group.items() if key != "params"} for group in groups]


def _differ(one: Any, other: Any) -> bool:
    """Compare option values; lists and tuples are alike, and counters, which are tensors, do not count."""
    if isinstance(one, torch.Tensor) or isinstance(other, torch.Tensor):
        return False
    both = [tuple(value) if isinstance(value, list) else value for value in (one, other)]
    return bool(both[0] != both[1])


def _check_options(optimizer: Any, wanted: list[dict[str, Any]], checkpoint: Path) -> None:
    """Check that the groups just loaded have the options of the optimizer; torch takes those of any other."""
    groups = getattr(optimizer, "param_groups", ())
    missing = sorted({key for own, group in zip(wanted, groups, strict=True) for key in own if key not in group})
    if missing:
        raise CheckpointError(
            f"{checkpoint / 'optimizer.pt'} was written by another optimizer than {type(optimizer).__name__}: it has "
            f"no {', '.join(missing)}. Resume with the optimizer that wrote it"
        )
