"""A Trainer that builds AdaFisher(W) by ``args.optim``."""

from __future__ import annotations

import contextlib
import errno
import functools
import inspect
import json
import logging
import pickle
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch.optim import Optimizer
from transformers import Trainer
from transformers.trainer import SCALER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_adafisher.optimizers.adafisher import AdaFisher
from hf_adafisher.optimizers.base.hooked import HookedOptimizer
from hf_adafisher.optimizers.base.kronecker_diagonal import KroneckerDiagonalOptimizer
from hf_adafisher.optimizers.base.options import options_in_use
from hf_adafisher.optimizers.factory.create import available_optimizers, create_optimizer, optimizer_record
from hf_adafisher.optimizers.validation.compilation import due_steps_run_eagerly
from hf_adafisher.optimizers.validation.environment import unwrapped
from hf_adafisher.optimizers.validation.training_modes import DATA_PARALLEL
from hf_adafisher.training.arguments import (
    DEFAULT_LEARNING_RATE,
    TRAINER_LEARNING_RATE,
    AdaFisherTrainingArguments,
    default_learning_rate,
    optimizer_name,
    parse_options,
)
from hf_adafisher.training.callbacks import AdaFisherCallback
from hf_adafisher.training.checkpoints import CheckpointError, check_checkpoint_files, last_complete_checkpoint
from hf_adafisher.training.curvature_callback import CurvatureCallback
from hf_adafisher.training.renamed_weights import check_weights_fit, has_renamed_weights, load_renamed_weights
from hf_adafisher.training.second_order import second_derivatives

logger = logging.getLogger(__name__)

_IMPLEMENTATION = {"lr", "params", "foreach", "fused", "capturable", "differentiable"}
"""Keys of groups that are no options of the algorithm, or change in every step."""
_LOGGED = ("fisher_mean", "floor_share", "gradient_factor_share", "plain_share", "kl_factor", "dropped_refreshes")


class AdaFisherTrainer(Trainer):
    """``transformers.Trainer``, and ``args.optim`` may name every optimizer of ``available_optimizers()``.

    Use it with ``hf_adafisher.AdaFisherTrainingArguments``; the constructor is Trainer's. Optimizers passed as
    ``optimizers=`` or ``optimizer_cls_and_kwargs=`` come first, as in Trainer, and so does an overridden
    ``get_decay_parameter_names``.

    AdaFisher(W) and SpectralAdaFisher read gradients, and need nothing from a Trainer. Optimizers with hooks, which are
    AdaFisher(W) with ``step_size="paper"`` and K-FAC, do: the steps that refresh the factors run eagerly, whatever of
    the model is compiled in whatever way (compiled graphs do not run hooks), statistics of steps that a loss scaler
    skips are dropped, and the scale of the loss is taken out of the recorded factors: they are those of each position's
    own loss, whatever the batch size, the accumulation, the number of processes and the loss scale. Gradient factors
    and those of position tables are taken from the gradient as the optimizer gets it, scaled back and clipped. K-FAC is
    told how many terms the loss has.

    With AdaHessian and Sophia the backward passes of the steps that estimate the Hessian keep their graph. Optimizers
    that train other weights than those they evaluate (schedule-free) are switched to the latter before every
    checkpoint, and when training ends.

    While AdaFisher(W) or SpectralAdaFisher trains, each training log gets ``adafisher/fisher_mean``, ``floor_share``,
    ``gradient_factor_share`` and ``dropped_refreshes`` (see ``AdaFisher.curvature_summary``), so every ``report_to``
    shows them; with K-FAC ``kfac/plain_share``, ``kl_factor`` and ``dropped_refreshes``.
    """

    @functools.wraps(Trainer.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.checkpoint_files: dict[str, Any] = {}
        """JSON files by name, with their contents, that every checkpoint gets besides Trainer's."""
        if not any(isinstance(callback, AdaFisherCallback) for callback in self.callback_handler.callbacks):
            self.add_callback(AdaFisherCallback())

    def create_optimizer(self, model: torch.nn.Module | None = None) -> Optimizer:
        """Build ``args.optim`` on ``model`` (default: ``self.model``) unless an optimizer was given; returns it.

        Raises:
            ValueError: An option of the optimizer is out of range or unknown, or one process drives several GPUs.
        """
        name, args = optimizer_name(self.args), self.args
        given = self.optimizer is not None or self.optimizer_cls_and_kwargs is not None
        ours = isinstance(args, AdaFisherTrainingArguments)
        if not given and not ours:
            logger.warning(
                "AdaFisherTrainer got %s, which does not know AdaFisher, and trains with optim=%s: pass "
                "AdaFisherTrainingArguments to train with AdaFisher.",
                type(args).__name__,
                name,
            )
        if not given and ours:
            _warn_of_a_foreign_default(name, args.learning_rate)
        if given or not ours or name not in available_optimizers():
            with due_steps_run_eagerly():
                return super().create_optimizer(model)
        assert isinstance(args, AdaFisherTrainingArguments)
        needs = optimizer_record(name).needs_with(args.optimizer_options())
        if args.n_gpu > 1 and DATA_PARALLEL.refused_by(needs):
            raise ValueError(DATA_PARALLEL.argument_refusal(name, needs, f"{args.n_gpu} GPUs in one process"))
        model = self.model if model is None else model
        assert model is not None
        _warn_of_fine_tuning(name, args.learning_rate, model)
        self.optimizer = create_optimizer(
            name,
            model,
            lr=args.learning_rate,
            weight_decay=args.weight_decay,
            decay_names=self.get_decay_parameter_names(model),
            **args.optimizer_options(),
        )
        return self.optimizer

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
            elif key in ("learning_rate", "weight_decay") or (hasattr(self.args, key) and key in {*given} - {*others}):
                setattr(self.args, key, used)
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

    def training_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Run a training step, eagerly where hooks record factors, with the loss's scale known.

        Those for which AdaHessian and Sophia estimate the Hessian keep the gradients' graph.
        """
        optimizer = self._raw_optimizer()
        eager: AbstractContextManager[Any] = contextlib.nullcontext()
        if isinstance(optimizer, HookedOptimizer) and optimizer.recording:
            optimizer.gradient_scale = self._gradient_scale(num_items_in_batch)
            if hasattr(optimizer, "loss_terms"):
                optimizer.loss_terms = self._loss_terms(num_items_in_batch) or 1.0
            eager = optimizer.eager_if_due()  # whoever compiled what, it would not run the hooks
        with eager, second_derivatives(self.accelerator, optimizer, model):
            return super().training_step(model, inputs, num_items_in_batch)

    def _gradient_scale(self, num_items: torch.Tensor | int | None) -> float:
        """Factor of each position's loss in the loss averaged over processes, where Trainer counts items.

        Where it counts none, the loss is the mean over a batch, and the loss scaler alone multiplies it.
        """
        scale, scaler = 1.0 / (self._loss_terms(num_items) or 1.0), getattr(self.accelerator, "scaler", None)
        return scale if scaler is None else scale * scaler.get_scale()

    def _loss_terms(self, num_items: torch.Tensor | int | None) -> float | None:
        """Number of items that the loss is the mean of, over all processes; None where Trainer counts none."""
        items = 0.0 if num_items is None else float(num_items)
        if items <= 0 or not (self.model_accepts_loss_kwargs or self.compute_loss_func is not None):
            return None
        # Otherwise each process counts its own.
        return items if self.args.average_tokens_across_devices else items * self.accelerator.num_processes

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log; training logs get AdaFisher's or K-FAC's curvature scalars (``args.log_curvature``)."""
        optimizer = self._raw_optimizer()
        if isinstance(optimizer, HookedOptimizer) and "loss" in logs and getattr(self.args, "log_curvature", True):
            kind = "adafisher" if isinstance(optimizer, KroneckerDiagonalOptimizer) else "kfac"
            summary: dict[str, float] = getattr(optimizer, "curvature_summary", dict)()
            logs |= {f"{kind}/{key}": summary[key] for key in _LOGGED if key in summary}
        super().log(logs, start_time)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write the model card, with the optimizer and the options that were really used."""
        optimizer, used = self._raw_optimizer(), {}
        factored = isinstance(optimizer, KroneckerDiagonalOptimizer)
        group = self.optimizer.param_groups[0] if self.optimizer is not None else {}
        options = options_in_use(optimizer, lr=self.args.learning_rate)
        if options:
            used["optim_args"] = ", ".join(f"{key}={value}" for key, value in options.items())
        elif isinstance(group.get("betas"), (tuple, list)):  # the card shows the arguments' for all of Adam's kin
            used["adam_beta1"], used["adam_beta2"] = group["betas"][:2]
            used["adam_epsilon"] = group.get("eps", self.args.adam_epsilon)
        previous = {key: getattr(self.args, key) for key in used}
        vars(self.args).update(used)
        try:
            super().create_model_card(*args, **kwargs)
        finally:
            vars(self.args).update(previous)
        card = Path(self.args.output_dir or ".") / "README.md"
        if factored and self.is_world_process_zero() and card.is_file():
            kind = type(optimizer).__name__
            paper = (
                "[AdaFisher: Adaptive Second Order Optimization via Fisher Information]"
                "(https://arxiv.org/abs/2405.16397) (ICLR 2025), implemented in hf_adafisher"
            )
            ours = "" if isinstance(optimizer, AdaFisher) else "hf_adafisher's own, after "
            card.write_text(
                card.read_text(encoding="utf-8") + f"\n### Optimizer\n\nTrained with {kind}, {ours}{paper}.\n",
                encoding="utf-8",
            )


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


def _warn_of_fine_tuning(name: str, learning_rate: float | None, model: Any) -> None:
    """Defaults for training from scratch are far too large for pretrained weights."""
    record, source = optimizer_record(name), getattr(model, "name_or_path", "")
    # The record's own object: whoever writes the same number has chosen it.
    if source and record.fine_tuning_rate is not None and learning_rate is record.learning_rate.value:
        logger.warning(
            "optim=%s runs with its default learning_rate=%s, which is for training from scratch. To fine-tune the "
            "weights of %r, set learning_rate: %s is a good start.",
            name,
            learning_rate,
            source,
            record.fine_tuning_rate,
        )


def _warn_of_a_foreign_default(name: str, learning_rate: float) -> None:
    """``dataclasses.replace(args, optim=...)`` keeps the learning rate, and defaults are up to 60,000 times apart."""
    right, defaults = default_learning_rate(name), [default_learning_rate(other) for other in available_optimizers()]
    # Most defaults are numbers that one may well choose, so they are told by being the very object of the record.
    kept = any(learning_rate is default for default in defaults)
    telling = (DEFAULT_LEARNING_RATE, TRAINER_LEARNING_RATE, max(defaults))
    if name in available_optimizers() and learning_rate == optimizer_record(name).fine_tuning_rate:
        return
    if learning_rate != right and (kept or learning_rate in telling):
        logger.warning(
            "optim=%s runs with learning_rate=%s, the default of other optimizers; its own is %s.",
            name,
            learning_rate,
            right,
        )
