"""The mixin that makes a Trainer, or a subclass of one, build AdaFisher(W) by ``args.optim``."""

from __future__ import annotations

import contextlib
import logging
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer
from transformers import Trainer

from hf_adafisher.optimizers.adafisher import AdaFisher
from hf_adafisher.optimizers.base.hooked import HookedOptimizer
from hf_adafisher.optimizers.base.kronecker_diagonal import KroneckerDiagonalOptimizer
from hf_adafisher.optimizers.base.options import options_in_use
from hf_adafisher.optimizers.factory.create import available_optimizers, create_optimizer, optimizer_record
from hf_adafisher.optimizers.factory.learning_rates import (
    own_learning_rate,
    warn_of_learning_rate,
    warn_without_clipping,
)
from hf_adafisher.optimizers.validation.compilation import due_steps_run_eagerly
from hf_adafisher.optimizers.validation.training_modes import DATA_PARALLEL
from hf_adafisher.training.arguments import (
    AdaFisherTrainingArguments,
    adamws_learning_rate,
    chosen_optimizer,
    optimizer_name,
)
from hf_adafisher.training.hyperparameters import space_around
from hf_adafisher.training.resuming import ResumableTraining
from hf_adafisher.training.second_order import second_derivatives

logger = logging.getLogger(__name__)

_LOGGED = ("fisher_mean", "floor_share", "gradient_factor_share", "plain_share", "kl_factor", "dropped_refreshes")

_WITHOUT_HOOKS = ("fisher_mean", "floor_share")
"""Of the forms whose factors all come from gradients, and are never dropped."""


class AdaFisherMixin(ResumableTraining):
    """AdaFisher(W), and every other optimizer by name, in any Trainer: ``class MyTrainer(AdaFisherMixin, SFTTrainer)``.

    It goes with ``transformers.Trainer``, ``Seq2SeqTrainer``, the trainers of TRL and subclasses of your own, and
    stands before them; the constructor is theirs. The arguments are AdaFisherTrainingArguments; where the trainer needs
    a class of its own, as those of TRL do, a class of both::

        @dataclass
        class MyConfig(AdaFisherTrainingArguments, DPOConfig): ...

    ``args.optim`` may then name every optimizer of ``available_optimizers()``. Arguments that know nothing of this
    package (``DPOConfig``) work too: where they leave ``optim`` at its default, AdaFisherW trains with their
    ``learning_rate`` and ``weight_decay`` and its own defaults, which is logged; any other ``optim`` is Trainer's.
    Optimizers passed as ``optimizers=`` or ``optimizer_cls_and_kwargs=`` come first, as in Trainer, and so does an
    overridden ``get_decay_parameter_names``.

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

    While AdaFisher(W) or SpectralAdaFisher trains, each training log gets ``adafisher/fisher_mean`` and
    ``floor_share``, with hooks ``gradient_factor_share`` and ``dropped_refreshes`` too (see
    ``AdaFisher.curvature_summary``), so every ``report_to`` shows them; with K-FAC ``kfac/plain_share``, ``kl_factor``
    and ``dropped_refreshes``.

    Raises:
        TypeError: When a subclass is defined: a Trainer stands before the mixin, and would shadow it.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for first in cls.__mro__[: cls.__mro__.index(AdaFisherMixin)]:
            if issubclass(first, Trainer) and not issubclass(first, AdaFisherMixin):
                raise TypeError(
                    f"{cls.__name__} would train without AdaFisher, since {first.__name__} comes before "
                    f"AdaFisherMixin: write class {cls.__name__}(AdaFisherMixin, {first.__name__})"
                )

    def create_optimizer(self, model: torch.nn.Module | None = None) -> Optimizer:
        """Build ``args.optim`` on ``model`` (default: ``self.model``) unless an optimizer was given; returns it.

        Raises:
            ValueError: An option of the optimizer is out of range or unknown, or one process drives several GPUs.
        """
        args = self.args
        name = chosen_optimizer(args)
        given = self.optimizer is not None or self.optimizer_cls_and_kwargs is not None
        model = self.model if model is None else model
        assert model is not None
        if not given:
            self._warn_of_settings(name or optimizer_name(args), model)
        if given or name is None:
            with due_steps_run_eagerly():
                return super().create_optimizer(model)
        options = self._given_options()
        needs = optimizer_record(name).needs_with(options)
        if args.n_gpu > 1 and DATA_PARALLEL.refused_by(needs):
            raise ValueError(DATA_PARALLEL.argument_refusal(name, needs, f"{args.n_gpu} GPUs in one process"))
        self.optimizer = create_optimizer(
            name,
            model,
            lr=args.learning_rate,
            weight_decay=args.weight_decay,
            decay_names=self.get_decay_parameter_names(model),
            **options,
        )
        return self.optimizer

    def _given_options(self) -> dict[str, Any]:
        return self.args.optimizer_options() if isinstance(self.args, AdaFisherTrainingArguments) else {}

    def _warn_of_settings(self, name: str, model: Any) -> None:
        """Warn of arguments that do not suit the optimizer."""
        args, options, rate = self.args, self._given_options(), self.args.learning_rate
        if name != optimizer_name(args):
            logger.warning(
                "%s has no optimizer of hf_adafisher in it: training with optim=%s and learning_rate=%s. For options "
                "use AdaFisherTrainingArguments, or a class of both; for AdamW, optim='adamw_torch'.",
                type(args).__name__,
                name,
                rate,
            )
        elif not isinstance(args, AdaFisherTrainingArguments):
            return  # a choice of Trainer's own optimizers and rates
        assert rate is not None
        adamws, weights = adamws_learning_rate(type(args)), getattr(model, "name_or_path", None)
        warn_of_learning_rate(name, options, rate, adamws=adamws, weights=weights)
        warn_without_clipping(name, options, args.max_grad_norm)

    def hyperparameter_search(self, hp_space: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Search as Trainer does; its default space goes around the optimizer's own learning rate.

        Without ``hp_space`` the rates are a tenth to ten times of that rate: that for fine-tuning where the model has
        pretrained weights, and from scratch otherwise. All other arguments are Trainer's.
        """
        name, args_class = chosen_optimizer(self.args), type(self.args)
        if hp_space is None and name is not None:
            weights = getattr(self.model, "name_or_path", None)
            rate = own_learning_rate(name, self._given_options(), adamws_learning_rate(args_class), weights)
            hp_space = None if rate is None else space_around(rate, lambda: self.hp_search_backend)
        return super().hyperparameter_search(hp_space, *args, **kwargs)

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
        if (
            getattr(self, "loss_is_scaled_for_ga", None) is False
        ):  # a loss of the trainer's own, which is a mean over the batch
            return None
        if items <= 0 or not (self.model_accepts_loss_kwargs or self.compute_loss_func is not None):
            return None
        # Otherwise each process counts its own.
        return items if self.args.average_tokens_across_devices else items * self.accelerator.num_processes

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log; training logs get AdaFisher's or K-FAC's curvature scalars (``args.adafisher_log_curvature``)."""
        optimizer = self._raw_optimizer()
        if (
            isinstance(optimizer, HookedOptimizer)
            and "loss" in logs
            and getattr(self.args, "adafisher_log_curvature", True)
        ):
            kind = "adafisher" if isinstance(optimizer, KroneckerDiagonalOptimizer) else "kfac"
            summary: dict[str, float] = getattr(optimizer, "curvature_summary", dict)()
            names = _WITHOUT_HOOKS if getattr(optimizer, "divides_by_root", False) else _LOGGED
            logs |= {f"{kind}/{key}": summary[key] for key in names if key in summary}
        super().log(logs, start_time)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write the model card, with the optimizer and the options that were really used."""
        optimizer, used = self._raw_optimizer(), {}
        factored = isinstance(optimizer, KroneckerDiagonalOptimizer)
        group = self.optimizer.param_groups[0] if self.optimizer is not None else {}
        options = options_in_use(optimizer, lr=self.args.learning_rate)
        if options:
            used["optim"] = _own_name(optimizer)  # the arguments may say otherwise, or know nothing of this package
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
                card.read_text(encoding="utf-8").rstrip()
                + f"\n\n### Optimizer\n\nTrained with {kind}, {ours}{paper}.\n",
                encoding="utf-8",
            )


def _own_name(optimizer: Optimizer) -> str:
    """The name of an optimizer of this package."""
    records = [optimizer_record(name) for name in available_optimizers()]
    return next(record.name for record in records if record.needs_model and record.cls is type(optimizer))
