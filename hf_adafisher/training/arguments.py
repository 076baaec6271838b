"""TrainingArguments that know AdaFisher."""

from __future__ import annotations

import ast
import inspect
import logging
from dataclasses import dataclass, field, fields
from typing import Any

from transformers import TrainingArguments
from transformers.training_args import OptimizerNames

from hf_adafisher.optimizers.factory.catalog import (
    ADAFISHER_LEARNING_RATE,
    TRAINER_LEARNING_RATE,
    available_optimizers,
    optimizer_record,
)
from hf_adafisher.optimizers.factory.records import OptimizerRecord, did_you_mean
from hf_adafisher.optimizers.validation.checks import check_options, check_spectral_options

logger = logging.getLogger(__name__)

_ADAFISHER = ("adafisher", "adafisherw")
_SPECTRAL = "spectral-adafisher"
_FACTORED = (*_ADAFISHER, _SPECTRAL)
_ADAM = ("adam", "adamw")
_FACTORED_OPTIONS = ("beta", "ema_decay", "update_interval", "momentum_dtype")
_DAMPINGS = {"damping": _ADAFISHER, "relative_damping": (_SPECTRAL,)}
_ADAM_OPTIONS = ("adam_beta1", "adam_beta2", "adam_epsilon")
DEFAULT_LEARNING_RATE = ADAFISHER_LEARNING_RATE
_RECOMPUTING = ("every_n_layers", "offload")  # transformers' own; the others are torch's, whose default is reentrant
_CONSTANT_SCHEDULES = ("constant", "constant_with_warmup")


@dataclass
class AdaFisherTrainingArguments(TrainingArguments):
    """``transformers.TrainingArguments`` with ``optim="adafisherw"`` and AdaFisher's options.

    Every argument of TrainingArguments keeps its meaning and default, and every other ``optim`` of Trainer keeps
    working. Defaults that differ from the paper's (learning rate and damping 1e-3, ema_decay 0.8, update_interval 100)
    are for language models trained from scratch, by the README's tables "WikiText-2, eleven optimizers at equal time"
    (damping 3e-3 is the better of two, learning rates 0.03 and 0.04 are 0.01 nats apart) and "WikiText-2, every cell"
    (0.04 is the best at this damping). ``max_grad_norm`` stays at Trainer's 1.0, which they need. Fine-tuning was not
    measured: scan the learning rate downwards.

    Args:
        optim: ``adafisherw`` (default), or any other name of ``available_optimizers()``
            (``scripts/list_optimizers.py`` describes them), or of ``transformers.training_args.OptimizerNames``.
            ``sgd``, ``adafactor`` and ``schedule_free_adamw`` are in both: they are those of this package.
        learning_rate: Default 0.04 for AdaFisher(W), that of ``scripts/list_optimizers.py`` for every other optimizer
            of this package (5e-5 for ``sgd``, ``adam`` and ``adamw``), and Trainer's 5e-5 for Trainer's own. AdaFisher
            divides by a Fisher in [damping, 1 + damping], so its learning rates are not those of Adam.
        beta: Decay of the first moment of AdaFisher(W) and of spectral-adafisher, which share this and the options
            below but for their dampings, in [0, 1). Default 0.9.
        damping: The lambda of AdaFisher(W), > 0. Default 3e-3. Tune it together with the learning rate: the largest
            step of a value is ``learning_rate / damping`` times its momentum.
        relative_damping: The rho of spectral-adafisher, > 0, in units of the factors' means. Default 0.1.
        ema_decay: Decay gamma of the factors' moving average, in [0, 1). Default 0.95.
        update_interval: T_cov, optimizer steps between two refreshes of the factors, >= 1. Default 10.
        momentum_dtype: Dtype of AdaFisher's first moment. Default None: that of the weights; ``float32`` for weights in
            bfloat16.
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
        default=None, metadata={"help": "Default: 0.04 for AdaFisher(W); scripts/list_optimizers.py has the others'."}
    )
    beta: float = field(default=0.9, metadata={"help": "AdaFisher: decay of the first moment, in [0, 1)."})
    damping: float = field(default=3e-3, metadata={"help": "AdaFisher: lambda, > 0; tune together with learning_rate."})
    relative_damping: float = field(
        default=0.1, metadata={"help": "spectral-adafisher: rho, > 0, in units of the factors' means."}
    )
    ema_decay: float = field(
        default=0.95, metadata={"help": "AdaFisher: decay gamma of the factors' average, in [0, 1)."}
    )
    update_interval: int = field(default=10, metadata={"help": "AdaFisher: T_cov, steps between two refreshes, >= 1."})
    momentum_dtype: str | None = field(
        default=None, metadata={"help": "AdaFisher: dtype of the first moment; default: that of the weights."}
    )
    log_curvature: bool = field(
        default=True, metadata={"help": "AdaFisher: add curvature scalars to the training logs."}
    )

    def __post_init__(self) -> None:
        name = optimizer_name(self)
        ours = name in available_optimizers()
        _check_name(name)
        if self.learning_rate is None:
            self.learning_rate = default_learning_rate(name)
        self.optim = "adamw_torch" if ours else name  # passes Trainer's validation, which knows only its own names
        super().__post_init__()
        if ours:
            self.optim = name
        self._check_optimizer(name)

    def set_optimizer(
        self, name: Any = "adafisherw", learning_rate: float | None = None, *args: Any, **kwargs: Any
    ) -> AdaFisherTrainingArguments:
        """As in TrainingArguments, with AdaFisher's names, checks and default learning rates too.

        Raises:
            ValueError: As the constructor.
        """
        name = str(getattr(name, "value", name))
        _check_name(name)
        if learning_rate is None:
            learning_rate = default_learning_rate(name)
        ours = name in available_optimizers()
        super().set_optimizer("adamw_torch" if ours else name, learning_rate, *args, **kwargs)
        if ours:
            self.optim = name
        self._check_optimizer(name)
        return self

    def _check_optimizer(self, name: str) -> None:
        """Everything that can be known about the optimizer's options before there is a model."""
        if name in available_optimizers():
            options = self.optimizer_options()
            optimizer_record(name).check_names(options)
            own = {"lr": self.learning_rate, "weight_decay": self.weight_decay}
            if name in _FACTORED:
                group = {**_defaults_of(name), **options, **own, "params": ()}
                check = check_spectral_options if name == _SPECTRAL else check_options
                check(group, group, f"optim={name}")
            optimizer_record(name).check_values({**options, **own})
            self._refuse_unsupported(optimizer_record(name))
            self._warn_of_schedules()
        self._warn_ignored()

    def optimizer_options(self) -> dict[str, Any]:
        """Options for ``create_optimizer(self.optim, ...)`` beside learning rate and weight decay.

        Raises:
            ValueError: ``optim_args`` is not of the form ``key=value,key=value``.
        """
        options: dict[str, Any] = {}
        if self.optim in _FACTORED:
            options = {name: getattr(self, name) for name in _own_options(self.optim)}
        elif self.optim in _ADAM:
            options = {"betas": (self.adam_beta1, self.adam_beta2), "eps": self.adam_epsilon}
        return {**options, **parse_options(self.optim_args, "optim_args")}

    def _refuse_unsupported(self, record: OptimizerRecord) -> None:
        """The training modes that the optimizer cannot work with; those of a model are found when it is there.

        Several GPUs in one process (DataParallel) are seen by Trainer only, and refused there.
        """
        for mode, reason in self._unusual_modes().items():
            if mode in record.refuses:
                raise ValueError(f"optim={record.name} does not support {reason}, or use another optim")
        if record.name in _FACTORED and self.torch_compile and self.update_interval == 1:
            logger.warning(
                "torch_compile has no effect with update_interval=1: steps that refresh the factors run eagerly."
            )

    def _unusual_modes(self) -> dict[str, str]:
        """The modes that were asked for, by the words of ``OptimizerRecord.refuses``, with what to do instead."""
        shards = "it gives the optimizer flat shards instead of parameters"
        config = self.fsdp_config if isinstance(self.fsdp_config, dict) else {}
        fsdp = int(config.get("version", 2)) if self.fsdp else 0
        given = getattr(self, "activation_checkpointing_kwargs", None) or self.gradient_checkpointing_kwargs
        options = (
            {key: value for key, value in given.items() if key not in _RECOMPUTING} if isinstance(given, dict) else {}
        )
        recomputes = getattr(self, "activation_checkpointing", False) or self.gradient_checkpointing
        modes = {
            "DeepSpeed": (self.deepspeed, f"deepspeed: {shards}. Use fsdp (FSDP2) or torchrun without it"),
            "FSDP1": (fsdp == 1, f"FSDP1: {shards}. Set fsdp_config['version'] to 2 (the default)"),
            "FSDP2": (fsdp > 1, "fsdp: it shards the parameters. Use torchrun without it"),
            "torch.compile": (
                self.torch_compile,
                "torch_compile: its graphs have no second derivatives. Unset it",
            ),
            "fp16": (self.fp16, "fp16: the scale of the loss would be in the Hessian. Use bf16"),
            "reentrant checkpointing": (
                recomputes and options and options.get("use_reentrant", True),
                "reentrant activation checkpointing: it has no second derivatives. Set use_reentrant to False in "
                "activation_checkpointing_kwargs",
            ),
        }
        return {mode: reason for mode, (asked_for, reason) in modes.items() if asked_for}

    def _warn_of_schedules(self) -> None:
        schedule = str(getattr(self.lr_scheduler_type, "value", self.lr_scheduler_type))
        if self.optim == "schedule_free_adamw" and schedule not in _CONSTANT_SCHEDULES:
            logger.warning(
                "optim=schedule_free_adamw averages weights instead of lowering the learning rate, and "
                "lr_scheduler_type=%s lowers it too: use constant or constant_with_warmup.",
                schedule,
            )

    def _warn_ignored(self) -> None:
        """Say which optimizer settings were changed from their defaults but belong to another optimizer."""
        own = _own_options(self.optim)
        ignored = tuple(option for option in (*_FACTORED_OPTIONS, *_DAMPINGS) if option not in own)
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


def _own_options(name: str) -> tuple[str, ...]:
    """The arguments above that are options of this optimizer."""
    if name not in _FACTORED:
        return ()
    return (*_FACTORED_OPTIONS, *(damping for damping, names in _DAMPINGS.items() if name in names))


def _defaults_of(name: str) -> dict[str, Any]:
    """What the optimizer's class has as the defaults of its options."""
    parameters = inspect.signature(optimizer_record(name).cls.__init__).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}


def optimizer_name(args: TrainingArguments) -> str:
    """``args.optim`` as a word; Trainer's own names are members of an enumeration."""
    return str(getattr(args.optim, "value", args.optim))


def default_learning_rate(optim: str) -> float:
    """The learning rate of ``optim`` where none is given."""
    return optimizer_record(optim).learning_rate.value if optim in available_optimizers() else TRAINER_LEARNING_RATE


def _check_name(name: str) -> None:
    known = list(dict.fromkeys([*available_optimizers(), *(member.value for member in OptimizerNames)]))
    if name not in known:
        raise ValueError(f"unknown optim {name!r}{did_you_mean(name, known)}; available: {', '.join(known)}")


def parse_options(text: str | None, argument: str) -> dict[str, Any]:
    """``"a=1,b=(0.9, 0.99),c=true"`` as a dictionary of Python values.

    Args:
        text: None or empty for no options.
        argument: What the text was given as.

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
