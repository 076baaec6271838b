"""Training arguments for every optimizer by name, with the options of AdaFisher as fields."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, fields
from typing import Any

from transformers import TrainingArguments
from transformers.training_args import OptimizerNames

from hf_adafisher.optimizers.factory.catalog import (
    TRAINER_LEARNING_RATE,
    available_optimizers,
    canonical_name,
    optimizer_record,
)
from hf_adafisher.optimizers.factory.learning_rates import default_learning_rate
from hf_adafisher.optimizers.factory.records import OptimizerRecord, did_you_mean
from hf_adafisher.optimizers.validation.training_modes import (
    COMPILE,
    DEEPSPEED,
    FP16,
    FSDP1,
    FSDP2,
    REENTRANT_CHECKPOINTING,
    TrainingMode,
)
from hf_adafisher.training.option_fields import (
    ArgumentsMeta,
    OptionArguments,
    argument_of,
    options_with_arguments,
    other_classes,
    parse_options,
    redeclare_fields,
    short_name_metadata,
    short_names,
)

logger = logging.getLogger(__name__)

DEFAULT_LEARNING_RATE = optimizer_record("adafisherw").learning_rate.value
_ADAM = ("adam", "adamw")
_ADAM_OPTIONS = ("adam_beta1", "adam_beta2", "adam_epsilon")
_RECOMPUTING = ("every_n_layers", "offload")  # transformers' own; the others are torch's, whose default is reentrant
_CONSTANT_SCHEDULES = ("constant", "constant_with_warmup")


@dataclass
class AdaFisherTrainingArguments(OptionArguments, TrainingArguments, metaclass=ArgumentsMeta):
    """``transformers.TrainingArguments`` with ``optim="adafisherw"`` and AdaFisher's options.

    Every argument of TrainingArguments keeps its meaning and default, and every other ``optim`` of Trainer keeps
    working. AdaFisher(W) divides by the root of the gradient's diagonal second moment (``step_size="root"``, measured
    in ``docs/step_sizes.md``): no hooks, and learning rates like those of Adam. ``step_size="paper"`` is the paper's
    rule with the paper's numbers: learning rate and damping 1e-3, ``ema_decay`` 0.8, ``update_interval`` 100.

    The options that ``AdaFisherOptions`` and ``SpectralAdaFisherOptions`` declare with ``argument=True`` are arguments
    here, with ``adafisher_`` before their names, so that they leave alone what other classes have (TRL's ``beta``).
    They are None unless they are given, which leaves them to the optimizer: ``--help`` shows meaning, range and default
    of each. Names without ``adafisher_`` are taken too (``damping=0.1``, ``--damping 0.1``) where the class has no
    other field of that name.

    To join it with another class of arguments, name both, in either order, under ``@dataclass``::

        @dataclass
        class MyConfig(AdaFisherTrainingArguments, DPOConfig): ...

    Args:
        optim: ``adafisherw`` (default), or any other name of ``available_optimizers()``
            (``hf-adafisher list`` describes them; hyphens and underscores are the same), or of
            ``transformers.training_args.OptimizerNames``.
            ``sgd``, ``adafactor`` and ``schedule_free_adamw`` are in both: they are those of this package.
        learning_rate: Default 0.004 for AdaFisher(W), 1e-3 with ``step_size="paper"``, that of
            ``hf-adafisher list`` for every other optimizer of this package (5e-5 for ``sgd``, ``adam`` and
            ``adamw``), and Trainer's 5e-5 for Trainer's own. The defaults of AdaFisher(W) and SpectralAdaFisher are for
            training from scratch: fine-tuning wants AdamW's rates (5e-5), and three times these (1.5e-4) for
            SpectralAdaFisher. Joined with a class that has a default of its own (``DPOConfig``: 1e-6), it is that one,
            and three times that one for SpectralAdaFisher. The paper's form divides by a Fisher
            in [damping, 1 + damping], so its learning rates are not those of Adam.
        adafisher_damping: Option of AdaFisher(W): what is added to the diagonal, in units of its mean. With
            ``step_size="paper"`` tune it together with the learning rate: the largest step of a value is
            ``learning_rate / damping`` times its momentum.
        adafisher_update_interval: Option of AdaFisher(W) with ``step_size="paper"``; otherwise every step has new
            factors.
        adafisher_log_curvature: Add a few curvature scalars (``adafisher/...``) to the training logs. Default True.
        optim_args: ``"key=value,..."``, further options of the optimizer that ``optim`` names.

    Raises:
        TypeError: A class that joins this one with another has no ``@dataclass``.
        ValueError: Unknown ``optim``, an argument given by both of its names with two values, malformed ``optim_args``
            or an option that the optimizer does not have, an option of AdaFisher out of its range, or a training mode
            that the optimizer does not support.
        ImportError: The library of the optimizer is not installed; the message holds the command that installs it.
    """

    # Redeclared as a plain string: the inherited type would make HfArgumentParser reject names it does not know.
    optim: str = field(default="adafisherw", metadata={"help": "adafisherw, adafisher, or any other optimizer name."})
    learning_rate: float | None = field(  # type: ignore[assignment]
        default=None,
        metadata={
            "help": f"Default: {DEFAULT_LEARNING_RATE} for AdaFisher(W), from scratch; `hf-adafisher list` has "
            "the others'."
        },
    )
    adafisher_log_curvature: bool = field(
        default=True,
        metadata={
            "help": "AdaFisher: add curvature scalars to the training logs.",
            **short_name_metadata("log_curvature"),
        },
    )

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        redeclare_fields(cls, AdaFisherTrainingArguments)

    def __getattr__(self, name: str) -> Any:
        if name in short_names(type(self)):
            return getattr(self, short_names(type(self))[name])
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "optim":
            value = canonical_name(value)
        super().__setattr__(short_names(type(self)).get(name, name), value)

    def __post_init__(self) -> None:
        name = optimizer_name(self)
        ours = name in available_optimizers()
        _check_name(name)
        if self.learning_rate is None:
            self.learning_rate = self._default_learning_rate(name)
        self.optim = "adamw_torch" if ours else name  # passes Trainer's validation, which knows only its own names
        super().__post_init__()
        if ours:
            self.optim = name
        self._check_optimizer(name)

    def set_optimizer(
        self, name: Any = "adafisherw", learning_rate: float | None = None, *args: Any, **kwargs: Any
    ) -> AdaFisherTrainingArguments:
        """Choose the optimizer as in TrainingArguments, with the names, checks and defaults of this package too.

        Raises:
            ValueError: As the constructor.
        """
        name = canonical_name(str(getattr(name, "value", name)))
        _check_name(name)
        if learning_rate is None:
            learning_rate = self._default_learning_rate(name)
        ours = name in available_optimizers()
        super().set_optimizer("adamw_torch" if ours else name, learning_rate, *args, **kwargs)
        if ours:
            self.optim = name
        self._check_optimizer(name)
        return self

    def _default_learning_rate(self, name: str) -> float:
        return default_learning_rate(name, self._given_options(name), adamws_learning_rate(type(self)))

    def _check_optimizer(self, name: str) -> None:
        """Check all that can be known of the optimizer's options before there is a model."""
        if name in available_optimizers():
            record, options = optimizer_record(name), self.optimizer_options()
            record.check_names(options)
            record.check_values({**options, "lr": self.learning_rate, "weight_decay": self.weight_decay})
            self._refuse_unsupported(record)
            self._warn_of_schedules()
        self._warn_ignored()

    def optimizer_options(self) -> dict[str, Any]:
        """Return the options given for ``create_optimizer(self.optim, ...)`` beside learning rate and weight decay.

        Raises:
            ValueError: ``optim_args`` is not of the form ``key=value,key=value``.
        """
        return self._given_options(self.optim)

    def _given_options(self, optim: str) -> dict[str, Any]:
        """Options of this optimizer that were given; those of Adam and AdamW always are."""
        given = {name: getattr(self, argument_of(name)) for name in options_with_arguments(optim)}
        options = {name: value for name, value in given.items() if value is not None}
        if optim in _ADAM:
            options = {"betas": (self.adam_beta1, self.adam_beta2), "eps": self.adam_epsilon}
        further = parse_options(self.optim_args, "optim_args")
        for name in options.keys() & further.keys() - {"betas", "eps"}:
            if options[name] != further[name]:
                raise ValueError(
                    f"{name} is {options[name]!r} as an argument and {further[name]!r} in optim_args: give one of them"
                )
        return {**options, **further}

    def _refuse_unsupported(self, record: OptimizerRecord) -> None:
        """Refuse the training modes that the optimizer cannot work with; those of a model are found when it is there.

        Several GPUs in one process (DataParallel) are seen by Trainer only, and refused there.
        """
        options = self.optimizer_options()
        needs = record.needs_with(options)
        for mode in self._modes():
            if mode.refused_by(needs):
                raise ValueError(mode.argument_refusal(record.name, needs))
        if self.torch_compile and COMPILE.support(needs) == "eager" and options.get("update_interval") == 1:
            logger.warning(
                "torch_compile has no effect with update_interval=1: steps that refresh the factors run eagerly."
            )

    def _modes(self) -> list[TrainingMode]:
        """Training modes that these arguments ask for."""
        config = self.fsdp_config if isinstance(self.fsdp_config, dict) else {}
        fsdp = int(config.get("version", 2)) if self.fsdp else 0
        given = getattr(self, "activation_checkpointing_kwargs", None) or self.gradient_checkpointing_kwargs
        options = (
            {key: value for key, value in given.items() if key not in _RECOMPUTING} if isinstance(given, dict) else {}
        )
        recomputes = getattr(self, "activation_checkpointing", False) or self.gradient_checkpointing
        asked_for = (
            (DEEPSPEED, self.deepspeed),
            (FSDP1, fsdp == 1),
            (FSDP2, fsdp > 1),
            (COMPILE, self.torch_compile),
            (FP16, self.fp16),
            (REENTRANT_CHECKPOINTING, recomputes and options and options.get("use_reentrant", True)),
        )
        return [mode for mode, asked in asked_for if asked]

    def _warn_of_schedules(self) -> None:
        schedule = str(getattr(self.lr_scheduler_type, "value", self.lr_scheduler_type))
        if self.optim == "schedule_free_adamw" and schedule not in _CONSTANT_SCHEDULES:
            logger.warning(
                "optim=schedule_free_adamw averages weights instead of lowering the learning rate, and "
                "lr_scheduler_type=%s lowers it too: use constant or constant_with_warmup.",
                schedule,
            )

    def _warn_ignored(self) -> None:
        """Warn of optimizer settings that were changed from their defaults but belong to another optimizer."""
        own = [argument_of(name) for name in options_with_arguments(optimizer_name(self))]
        ignored = tuple(f.name for f in fields(OptionArguments) if f.name not in own)
        if self.optim in available_optimizers() and self.optim not in _ADAM:
            ignored = (*ignored, *_ADAM_OPTIONS)
        defaults = {f.name: f.default for f in fields(self)}
        changed = [name for name in ignored if getattr(self, name) != defaults[name]]
        if changed:
            name = optimizer_name(self)
            known = optimizer_record(name).options() if name in available_optimizers() else []
            hint = ", ".join(
                f"{option}={getattr(self, argument_of(option))}" for option in known if argument_of(option) in changed
            )
            logger.warning(
                "optim=%s does not use %s: these settings have no effect%s.",
                name,
                ", ".join(changed),
                f' (its own are options: optim_args="{hint}")' if hint else "",
            )


def optimizer_name(args: TrainingArguments) -> str:
    """Return ``args.optim`` as a word; Trainer's own names are members of an enumeration."""
    return str(getattr(args.optim, "value", args.optim))


def chosen_optimizer(args: TrainingArguments) -> str | None:
    """Return the optimizer of this package that ``args`` stand for under AdaFisherMixin; None for Trainer's own.

    Arguments that know nothing of the package, at the default of their ``optim``, stand for AdaFisherW.
    """
    name = optimizer_name(args)
    if isinstance(args, AdaFisherTrainingArguments):
        return name if name in available_optimizers() else None
    default = next(f.default for f in fields(args) if f.name == "optim")
    return "adafisherw" if name == getattr(default, "value", default) else None


def adamws_learning_rate(arguments: type) -> float:
    """Learning rate for AdamW that a class of arguments stands for: that of what it joins with this package's.

    TRL's configurations have rates of their own; for all others it is Trainer's default.
    """
    ours = issubclass(arguments, AdaFisherTrainingArguments)
    classes = other_classes(arguments, AdaFisherTrainingArguments) if ours else [arguments]
    rates = [f.default for one in classes for f in fields(one) if f.name == "learning_rate"]
    return next((rate for rate in rates if isinstance(rate, float)), TRAINER_LEARNING_RATE)


def _check_name(name: str) -> None:
    known = list(dict.fromkeys([*available_optimizers(), *(member.value for member in OptimizerNames)]))
    if name not in known:
        raise ValueError(f"unknown optim {name!r}{did_you_mean(name, known)}; available: {', '.join(known)}")
