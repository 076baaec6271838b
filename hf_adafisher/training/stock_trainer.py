"""The error of a Trainer without AdaFisherMixin that is to build an optimizer of this package."""

from __future__ import annotations

from typing import Any, NoReturn

from hf_adafisher.optimizers.factory.catalog import available_optimizers
from hf_adafisher.training.arguments import optimizer_name


def _refuse_stock_trainer(context: Any) -> NoReturn:
    """Raise ValueError where a Trainer without AdaFisherMixin is to build an optimizer of this package."""
    name = optimizer_name(context.args)
    raise ValueError(
        f"optim={name!r} is an optimizer of hf_adafisher, which this Trainer cannot build: use AdaFisherTrainer or "
        "AdaFisherMixin (class MyTrainer(AdaFisherMixin, Trainer)), or give Trainer "
        f"optimizer_cls_and_kwargs=(OptimizerFactory, {{'name': {name!r}}})"
    )


def explain_to_stock_trainers() -> None:
    """Enter names in the table by which Trainer finds optimizers; of all others it says only that they are unsupported.

    Without this table, which is transformers' own affair, that is what it says.
    """
    try:
        from transformers.trainer_optimizer import _OPTIMIZER_HANDLERS as known
    except ImportError:
        return
    for name in available_optimizers():
        known.setdefault(name, _refuse_stock_trainer)
