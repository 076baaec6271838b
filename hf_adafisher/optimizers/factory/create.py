"""Optimizers by name: the one place that builds them."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from hf_adafisher.optimizers.baselines.second_derivatives import prepare_model
from hf_adafisher.optimizers.factory.catalog import available_optimizers, optimizer_record
from hf_adafisher.optimizers.factory.learning_rates import warn_of_learning_rate, warn_without_clipping
from hf_adafisher.optimizers.factory.param_groups import decay_groups
from hf_adafisher.optimizers.factory.records import OptimizerRecord, did_you_mean
from hf_adafisher.optimizers.validation.checkpoints import warn_changed_options
from hf_adafisher.optimizers.validation.compilation import refuse_compilation
from hf_adafisher.optimizers.validation.models import check_model, modes_of
from hf_adafisher.optimizers.validation.training_modes import COMPILE, COMPILE_BY_A_STOCK_TRAINER, Needs

__all__ = [
    "OptimizerFactory",
    "OptimizerRecord",
    "available_optimizers",
    "create_optimizer",
    "did_you_mean",
    "optimizer_record",
    "optimizer_state_bytes",
]

_FUSED_DEVICES = frozenset({"cpu", "cuda"})
_NOT_COMPARED = frozenset({"fused", "foreach", "capturable"})
"""Options that decide how a step is computed, not its result."""
_FUSED_WHOLE = frozenset({"sgd"})
"""Optimizers whose fused kernel does not know FSDP2's sharded parameters."""


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

    Some optimizers treat some weights otherwise than the rest, and get groups that say so: ``muon`` (hidden matrices;
    the rest under its AdamW, with ``adamw_lr``), ``shampoo`` (no embeddings, no side above ``max_side``: these go to
    AdamW, with ``adamw_lr``), ``soap`` (embeddings along their width only) and ``lars`` (``vector_lr`` for biases and
    norms). In your own loop, ``adahessian`` and ``sophia`` need ``loss.backward(create_graph=optimizer.needs_graph)``,
    and attention is switched to a kind that has second derivatives; ``schedule_free_adamw`` needs
    ``optimizer.train()`` before training and ``optimizer.eval()`` before evaluating or saving the model.

    Args:
        name: One of ``available_optimizers``; hyphens and underscores are the same.
        model: The model to train; its trainable parameters are used.
        lr: Learning rate. Default: that of ``hf-adafisher list``, as all other defaults; they are those of
            ``AdaFisherTrainingArguments(optim=name)``.
        weight_decay: For the parameters that are decayed. Default 0.
        decay_names: Names of the parameters to decay, instead of Trainer's rule.
        **options: Further options of the optimizer class (``damping=``, ``betas=``, ``momentum=``, ...).

    Returns:
        The optimizer. It refuses to load a checkpoint that another kind of optimizer wrote.

    Raises:
        ValueError: Unknown name or option (the message lists the known ones), nothing to train, a value out of range,
            or a model that the optimizer does not work with (compiled, sharded).
        ImportError: The optimizer's library is not installed; the message holds the command that installs it.
    """
    record = optimizer_record(name)
    name = record.name
    record.check_names(options)
    arguments = record.arguments(options if lr is None else {**options, "lr": lr})
    record.check_values({**arguments, "weight_decay": weight_decay})
    groups = decay_groups(model, weight_decay, decay_names)
    if not record.needs_model:  # those that need the model look at it themselves
        check_model(model, name, record.needs)
    if record.create_graph:
        prepare_model(model, name)
    params = [p for group in groups for p in group["params"]]
    if "fused" in record.options() and not {"fused", "foreach", "differentiable"} & arguments.keys():
        # What Trainer's default optimizer does; without it the comparison would be against a slow peer.
        able = all(p.device.type in _FUSED_DEVICES and p.is_floating_point() for p in params)
        sharded = any(mode.refused_by(Needs.SHAPES | Needs.WHOLE_PARAMETERS) for mode in modes_of(model))
        # A late buffer of zeros (below) is what SGD's own first step makes only without dampening.
        arguments["fused"] = able and not (sharded and name in _FUSED_WHOLE) and not arguments.get("dampening")
    if record.groups is not None:
        groups = record.groups(model, groups, arguments)
    build: Callable[..., Optimizer] = record.cls
    optimizer = build(model, groups, **arguments) if record.needs_model else build(groups, **arguments)
    if isinstance(optimizer, torch.optim.SGD) and arguments.get("fused"):
        optimizer.register_step_pre_hook(_give_late_buffers)
    optimizer.register_load_state_dict_pre_hook(functools.partial(_check_checkpoint, record))
    return optimizer


def _give_late_buffers(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """Give parameters whose first gradient comes late a momentum of zeros, as a step pre-hook.

    torch's fused SGD fails where some parameters have a momentum buffer and some have none.
    """
    for group in optimizer.param_groups:
        moving = [p for p in group["params"] if p.grad is not None] if group["momentum"] else []
        late = [p for p in moving if optimizer.state[p].get("momentum_buffer") is None]
        if len(late) < len(moving):
            for p in late:
                optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)


def _check_checkpoint(record: OptimizerRecord, optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Check a state before it is loaded, and warn of the options that it changes."""
    if not record.resumable:
        raise ValueError(f"{record.name} cannot go on from a checkpoint: start without the optimizer state")
    if not record.needs_model:  # those do it themselves, as with what changes
        record.check_groups(state["param_groups"])
    saved, own = len(state["param_groups"]), len(optimizer.param_groups)
    if saved != own:
        raise ValueError(
            f"the checkpoint has {saved} parameter groups, this {record.name} has {own}: it was written with other "
            "options that decide the groups, for another model or by another optimizer; resume with those that wrote it"
        )
    if not record.needs_model:
        names = {"weight_decay", *record.options()} - _NOT_COMPARED
        warn_changed_options(optimizer.param_groups, state["param_groups"], names)


class OptimizerFactory:
    """Optimizer factory for a stock ``Trainer(optimizer_cls_and_kwargs=(OptimizerFactory, {...}))``.

    Trainer calls ``OptimizerFactory()(model, **kwargs)`` when it is about to train, with the model in its place.
    ``learning_rate`` and ``weight_decay`` are those of its training arguments, unless ``lr`` and ``weight_decay`` are
    among the ``kwargs``.

    Example:
        >>> kwargs = {"name": "adafisherw", "damping": 0.1}
        >>> optimizer_cls_and_kwargs = (OptimizerFactory, kwargs)
    """

    def __call__(
        self, model: nn.Module, *, lr: float | None = None, name: str = "adafisherw", **kwargs: Any
    ) -> Optimizer:
        """Call ``create_optimizer`` with the model first.

        Args:
            model: The model to train.
            lr: Learning rate. Default: that of the Trainer that calls; in your own loop the optimizer's own.
            name: One of ``available_optimizers``. Default ``adafisherw``.
            **kwargs: ``weight_decay`` (default: likewise, or 0), ``decay_names`` and options of the optimizer.

        Raises:
            ValueError: As ``create_optimizer``, and where Trainer is to compile the model: for optimizers that need
                second derivatives, and under a stock Trainer for those with hooks (AdaFisher(W) with
                ``step_size="paper"``, K-FAC).
        """
        record = optimizer_record(name)
        name = record.name
        record.check_names({key for key in kwargs if key not in ("weight_decay", "decay_names")})
        options = {key: value for key, value in kwargs.items() if key in record.options()}
        needs = record.needs_with(options)
        if COMPILE_BY_A_STOCK_TRAINER.refused_by(needs):
            refuse_compilation(name, second_derivatives=COMPILE.refused_by(needs))
        trainer = _calling_trainer()
        if trainer is not None:
            lr = trainer.args.learning_rate if lr is None else lr
            kwargs.setdefault("weight_decay", trainer.args.weight_decay)
            warn_of_learning_rate(name, options, lr, weights=getattr(model, "name_or_path", None))
            warn_without_clipping(name, options, trainer.args.max_grad_norm)
        return create_optimizer(name, model, lr=lr, **kwargs)


def _calling_trainer() -> Any:
    """The Trainer whose ``create_optimizer`` is running, or None.

    Trainer hands a factory the model alone, so that its arguments are found among its callers.
    """
    trainer = getattr(sys.modules.get("transformers.trainer"), "Trainer", ())
    frame = inspect.currentframe()
    while frame is not None:
        found = frame.f_locals.get("self") if frame.f_code.co_name == "create_optimizer" else None
        if isinstance(found, trainer):
            return found
        frame = frame.f_back
    return None


def optimizer_state_bytes(optimizer: Any) -> int:
    """Count the bytes of all tensors in an optimizer's state (moments, factors, counters), without the gradients.

    Args:
        optimizer: A torch optimizer, or accelerate's wrapper of one.
    """
    return sum(
        tensor.numel() * tensor.element_size() for state in optimizer.state.values() for tensor in _tensors(state)
    )


def _tensors(value: Any) -> Iterable[torch.Tensor]:
    """Yield the tensors in a state, also those in lists and dictionaries in it."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item)
