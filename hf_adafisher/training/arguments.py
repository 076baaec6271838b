"""Training arguments for every optimizer by name, with the options of AdaFisher as fields."""

from __future__ import annotations

import ast
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, make_dataclass
from typing import Any, get_args, get_type_hints

import torch
from transformers import TrainingArguments
from transformers.training_args import OptimizerNames

from hf_adafisher.optimizers.factory.catalog import TRAINER_LEARNING_RATE, available_optimizers, optimizer_record
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

logger = logging.getLogger(__name__)

DEFAULT_LEARNING_RATE = optimizer_record("adafisherw").learning_rate.value
_ADAM = ("adam", "adamw")
_ADAM_OPTIONS = ("adam_beta1", "adam_beta2", "adam_epsilon")
_RECOMPUTING = ("every_n_layers", "offload")  # transformers' own; the others are torch's, whose default is reentrant
_CONSTANT_SCHEDULES = ("constant", "constant_with_warmup")


def argument_names(optim: str) -> tuple[str, ...]:
    """Names of the training arguments that are options of this optimizer of the package; none for any other."""
    own = optimizer_record(optim).options_class if optim in available_optimizers() else None
    return () if own is None else own.names(argument=True)


def _option_fields() -> list[tuple[str, Any, Any]]:
    """Fields for the options that are training arguments, those of most optimizers first."""
    users: dict[str, list[str]] = {}
    for optim in available_optimizers():
        for name in argument_names(optim):
            users.setdefault(name, []).append(optim)
    return [_option_field(name, users[name]) for name in sorted(users, key=lambda name: -len(users[name]))]


def _option_field(name: str, optims: list[str]) -> tuple[str, Any, Any]:
    """Name, type and field of the argument for an option that these optimizers have in common."""
    record = optimizer_record(optims[0])
    own = record.options_class
    assert own is not None
    kind: Any = get_type_hints(own)[name]
    if torch.dtype in get_args(kind):  # a command line has words only
        kind = str | None
    kind = kind if type(None) in get_args(kind) else kind | None
    defaults = {optim: optimizer_record(optim).option_defaults()[name] for optim in optims}
    alike = len(set(defaults.values())) == 1
    shown = str(defaults[optims[0]]) if alike else ", ".join(f"{value} ({key})" for key, value in defaults.items())
    shown += _of_other_forms(record, name)
    text = f"{', '.join(optims)}: {own.specifications()[name]}. Default: {shown}."
    return name, kind, field(default=None, metadata={"help": text})


def _of_other_forms(record: OptimizerRecord, name: str) -> str:
    """The option's defaults in the optimizer's other forms, where they differ, for the help text."""
    forms = record.forms if name != record.form else {}
    values = {form.rpartition(", ")[2]: record.option_defaults(**chosen)[name] for form, chosen in forms.items()}
    said = [f"{value} with {form}" for form, value in values.items() if value != values[record.name]]
    return f"; {', '.join(said)}" if said else ""


# Typed as Any, so that type checkers accept the generated arguments beside those of TrainingArguments.
OptionArguments: Any = make_dataclass("OptionArguments", _option_fields(), namespace={"__module__": __name__})


@dataclass
class AdaFisherTrainingArguments(OptionArguments, TrainingArguments):
    """``transformers.TrainingArguments`` with ``optim="adafisherw"`` and AdaFisher's options.

    Every argument of TrainingArguments keeps its meaning and default, and every other ``optim`` of Trainer keeps
    working. AdaFisher(W) divides by the root of the gradient's diagonal second moment (``step_size="root"``, measured
    in ``docs/step_sizes.md``): no hooks, and learning rates like those of Adam. ``step_size="paper"`` is the paper's
    rule with the paper's numbers: learning rate and damping 1e-3, ``ema_decay`` 0.8, ``update_interval`` 100.

    The options that ``AdaFisherOptions`` and ``SpectralAdaFisherOptions`` declare with ``argument=True`` are arguments
    here. They are None unless they are given, which leaves them to the optimizer: ``--help`` shows meaning, range and
    default of each.

    Args:
        optim: ``adafisherw`` (default), or any other name of ``available_optimizers()``
            (``scripts/list_optimizers.py`` describes them), or of ``transformers.training_args.OptimizerNames``.
            ``sgd``, ``adafactor`` and ``schedule_free_adamw`` are in both: they are those of this package.
        learning_rate: Default 0.004 for AdaFisher(W), 1e-3 with ``step_size="paper"``, that of
            ``scripts/list_optimizers.py`` for every other optimizer of this package (5e-5 for ``sgd``, ``adam`` and
            ``adamw``), and Trainer's 5e-5 for Trainer's own. The defaults of AdaFisher(W) and SpectralAdaFisher are for
            training from scratch: fine-tuning wants AdamW's rates (5e-5) and 3e-4. The paper's form divides by a Fisher
            in [damping, 1 + damping], so its learning rates are not those of Adam.
        damping: Option of AdaFisher(W): what is added to the diagonal, in units of its mean. With
            ``step_size="paper"`` tune it together with the learning rate: the largest step of a value is
            ``learning_rate / damping`` times its momentum.
        update_interval: Option of AdaFisher(W) with ``step_size="paper"``; otherwise every step has new factors.
        log_curvature: Add a few curvature scalars (``adafisher/...``) to the training logs. Default True.
        optim_args: ``"key=value,..."``, further options of the optimizer that ``optim`` names.

    Raises:
        ValueError: Unknown ``optim``, malformed ``optim_args`` or an option that the optimizer does not have, an
            option of AdaFisher out of its range, or a training mode that the optimizer does not support.
        ImportError: The library of the optimizer is not installed; the message holds the command that installs it.
    """

    # Redeclared as a plain string: the inherited type would make HfArgumentParser reject names it does not know.
    optim: str = field(default="adafisherw", metadata={"help": "adafisherw, adafisher, or any other optimizer name."})
    learning_rate: float | None = field(  # type: ignore[assignment]
        default=None,
        metadata={
            "help": f"Default: {DEFAULT_LEARNING_RATE} for AdaFisher(W), from scratch; scripts/list_optimizers.py has "
            "the others'."
        },
    )
    log_curvature: bool = field(
        default=True, metadata={"help": "AdaFisher: add curvature scalars to the training logs."}
    )

    def __post_init__(self) -> None:
        name = optimizer_name(self)
        ours = name in available_optimizers()
        _check_name(name)
        if self.learning_rate is None:
            self.learning_rate = default_learning_rate(name, self._given_options(name))
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
        name = str(getattr(name, "value", name))
        _check_name(name)
        if learning_rate is None:
            learning_rate = default_learning_rate(name, self._given_options(name))
        ours = name in available_optimizers()
        super().set_optimizer("adamw_torch" if ours else name, learning_rate, *args, **kwargs)
        if ours:
            self.optim = name
        self._check_optimizer(name)
        return self

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
        options = {name: getattr(self, name) for name in argument_names(optim) if getattr(self, name) is not None}
        if optim in _ADAM:
            options = {"betas": (self.adam_beta1, self.adam_beta2), "eps": self.adam_epsilon}
        return {**options, **parse_options(self.optim_args, "optim_args")}

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
        own = argument_names(optimizer_name(self))
        ignored = tuple(f.name for f in fields(OptionArguments) if f.name not in own)
        if self.optim in available_optimizers() and self.optim not in _ADAM:
            ignored = (*ignored, *_ADAM_OPTIONS)
        defaults = {f.name: f.default for f in fields(self)}
        changed = [name for name in ignored if getattr(self, name) != defaults[name]]
        if changed:
            name = optimizer_name(self)
            known = optimizer_record(name).options() if name in available_optimizers() else []
            hint = ", ".join(f"{option}={getattr(self, option)}" for option in changed if option in known)
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


def default_learning_rate(optim: str, options: Mapping[str, Any] | None = None) -> float:
    """Return the learning rate of ``optim`` with these options where none is given."""
    if optim not in available_optimizers():
        return TRAINER_LEARNING_RATE
    record = optimizer_record(optim)
    record.check_names(options or {})
    return record.default_learning_rate(options or {})


def _check_name(name: str) -> None:
    known = list(dict.fromkeys([*available_optimizers(), *(member.value for member in OptimizerNames)]))
    if name not in known:
        raise ValueError(f"unknown optim {name!r}{did_you_mean(name, known)}; available: {', '.join(known)}")


def parse_options(text: str | None, argument: str) -> dict[str, Any]:
    """Parse ``"a=1,b=(0.9, 0.99),c=true"`` into a dictionary of Python values.

    Args:
        text: The options; None or empty for none.
        argument: Name of the argument that holds them, for the message.

    Raises:
        ValueError: It is not of this form.
    """
    if not text:
        return {}
    try:
        call = ast.parse(f"f({text})", mode="eval").body
        if not isinstance(call, ast.Call) or call.args:
            raise ValueError("not of the form key=value")
        names = [keyword.arg for keyword in call.keywords]
        if None in names or len(set(names)) < len(names):
            raise ValueError("not of the form key=value, or one key twice")
        return {str(keyword.arg): _literal(keyword.value) for keyword in call.keywords}
    except (SyntaxError, ValueError):
        raise ValueError(
            f'{argument} must look like "key=value,key=value", each key once, with numbers, words, true, false, none '
            f"or (tuples), got {text!r}"
        ) from None


def _literal(node: ast.expr) -> Any:
    if isinstance(node, ast.Name):  # a shell has eaten the quotes
        return {"true": True, "false": False, "none": None}.get(node.id.lower(), node.id)
    return ast.literal_eval(node)
