"""Every optimizer by name."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from hf_adafisher.optimizers.adafisher import AdaFisher, AdaFisherW
from hf_adafisher.optimizers.checks import ADAFISHER_KEYS, check_kind, refuse_compilation
from hf_adafisher.optimizers.param_groups import decay_groups


@dataclass(frozen=True)
class OptimizerRecord:
    """What the factory knows about one optimizer.

    Attributes:
        name: The name for ``create_optimizer`` and ``--optim``.
        cls: The optimizer class.
        needs_model: Whether the class takes the model before the parameter groups.
        defaults: Options that differ from the class's own defaults, the learning rate included.
        checkpoint_keys: Options that every saved parameter group of this optimizer has and other kinds lack.
        paper: Where it was published.
        decoupled: Its ``decoupled_weight_decay``, None where it has no such option.
    """

    name: str
    cls: type[Optimizer]
    needs_model: bool
    defaults: Mapping[str, Any]
    checkpoint_keys: frozenset[str]
    paper: str
    decoupled: bool | None = None

    def options(self) -> list[str]:
        """Names of the options that ``create_optimizer`` accepts beside ``lr`` and ``weight_decay``."""
        names = inspect.signature(self.cls.__init__).parameters
        return sorted(set(names) - {"self", "model", "params", "lr", "weight_decay"})

    def check_groups(self, groups: Iterable[Mapping[str, Any]]) -> None:
        """Raises ValueError if saved parameter groups were not written by this optimizer."""
        check_kind(self.name, self.checkpoint_keys, self.decoupled, groups)

    def check_names(self, options: Iterable[str]) -> None:
        """Raises ValueError for the first option that this optimizer does not have, with those it has."""
        for name in options:
            if name in ("lr", "learning_rate", "weight_decay"):
                raise ValueError(
                    f"{name} is an argument of its own (learning_rate, weight_decay), not one of the options"
                )
            if name not in self.options():
                known = self.options()
                raise ValueError(
                    f"{self.name} has no option {name!r}{did_you_mean(name, known)}; "
                    f"its options: lr, weight_decay, {', '.join(known)}"
                )


_ADAFISHER_PAPER = "Gomes et al., ICLR 2025, arXiv 2405.16397"
_RECORDS = {
    record.name: record
    for record in (
        OptimizerRecord("adafisher", AdaFisher, True, {}, ADAFISHER_KEYS, _ADAFISHER_PAPER, False),
        OptimizerRecord("adafisherw", AdaFisherW, True, {}, ADAFISHER_KEYS, _ADAFISHER_PAPER, True),
        # Momentum 0.9 is what the paper's tables and nearly every SGD baseline use; torch's default is 0.
        OptimizerRecord(
            "sgd",
            torch.optim.SGD,
            False,
            {"momentum": 0.9},
            frozenset({"momentum", "nesterov"}),
            "Sutskever et al., ICML 2013",
        ),
        OptimizerRecord(
            "adam",
            torch.optim.Adam,
            False,
            {},
            frozenset({"betas", "amsgrad"}),
            "Kingma and Ba, ICLR 2015, arXiv 1412.6980",
            False,
        ),
        OptimizerRecord(
            "adamw",
            torch.optim.AdamW,
            False,
            {},
            frozenset({"betas", "amsgrad"}),
            "Loshchilov and Hutter, ICLR 2019, arXiv 1711.05101",
            True,
        ),
    )
}
_FUSED_DEVICES = frozenset({"cpu", "cuda"})


def available_optimizers() -> list[str]:
    """Names that :func:`create_optimizer`, ``--optim`` and ``AdaFisherTrainingArguments(optim=...)`` accept."""
    return list(_RECORDS)


def optimizer_record(name: str) -> OptimizerRecord:
    """The record of an optimizer. Raises ValueError for an unknown name, with the known ones and the nearest."""
    if name not in _RECORDS:
        raise ValueError(f"unknown optimizer {name!r}{did_you_mean(name, _RECORDS)}; available: {', '.join(_RECORDS)}")
    return _RECORDS[name]


def did_you_mean(word: str, known: Collection[str]) -> str:
    """``", did you mean 'x'?"`` for the known word nearest to ``word``, or nothing where none is near."""
    near = difflib.get_close_matches(str(word).lower(), list(known), n=1)
    return f", did you mean {near[0]!r}?" if near else ""


def create_optimizer(
    name: str,
    model: nn.Module,
    *,
    lr: float | None = None,
    weight_decay: float = 0.0,
    decay_names: Collection[str] | None = None,
    **options: Any,
) -> Optimizer:
    """Build an optimizer by name, with Trainer's parameter groups: no weight decay on biases and normalisation layers.

    Args:
        name: One of :func:`available_optimizers`.
        model: The model to train; its trainable parameters are used.
        lr: Learning rate. Default: the optimizer class's own.
        weight_decay: For the parameters that are decayed. Default 0.
        decay_names: Names of the parameters to decay, instead of Trainer's rule.
        **options: Further options of the optimizer class (``damping=``, ``betas=``, ``momentum=``, ...).

    Returns:
        The optimizer. It refuses to load a checkpoint that another kind of optimizer wrote.

    Raises:
        ValueError: Unknown name or option (the message lists the known ones), nothing to train, a value out of range.
    """
    record = optimizer_record(name)
    record.check_names(options)
    groups = decay_groups(model, weight_decay, decay_names)
    arguments = {**record.defaults, **options, **({} if lr is None else {"lr": lr})}
    if "fused" in record.options() and not {"fused", "foreach", "differentiable"} & arguments.keys():
        # What Trainer's default optimizer does; without it the comparison would be against a slow peer.
        params = [p for group in groups for p in group["params"]]
        arguments["fused"] = all(p.device.type in _FUSED_DEVICES and p.is_floating_point() for p in params)
    if record.needs_model:
        return record.cls(model, groups, **arguments)  # type: ignore[arg-type]
    optimizer = record.cls(groups, **arguments)
    optimizer.register_load_state_dict_pre_hook(lambda _, state: record.check_groups(state["param_groups"]))
    return optimizer


class OptimizerFactory:
    """What a stock ``Trainer(optimizer_cls_and_kwargs=(OptimizerFactory, {...}))`` accepts.

    Trainer calls ``OptimizerFactory()(model, **kwargs)`` when it is about to train, with the model in its place. It
    does not pass its own ``learning_rate`` and ``weight_decay``: ``lr`` must be among the arguments, and
    ``weight_decay`` is 0 unless it is.

    Example:
        >>> kwargs = {"name": "adafisherw", "lr": 0.04, "damping": 3e-3, "update_interval": 10}
        >>> optimizer_cls_and_kwargs = (OptimizerFactory, kwargs)
    """

    def __call__(self, model: nn.Module, *, lr: float, name: str = "adafisherw", **kwargs: Any) -> Optimizer:
        """:func:`create_optimizer` with the model first.

        Raises:
            TypeError: Without ``lr``.
            ValueError: As :func:`create_optimizer`, and for AdaFisher(W) where Trainer is to compile the model.
        """
        if optimizer_record(name).needs_model:
            refuse_compilation(name)
        return create_optimizer(name, model, lr=lr, **kwargs)


def optimizer_state_bytes(optimizer: Any) -> int:
    """Bytes of all tensors in an optimizer's state (moments, factors, counters), without the gradients.

    Args:
        optimizer: A torch optimizer, or accelerate's wrapper of one.
    """
    return sum(
        value.numel() * value.element_size()
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    )
