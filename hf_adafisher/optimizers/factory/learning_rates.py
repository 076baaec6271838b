"""Learning rates by default, the usual ones of each optimizer, and warnings of others."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from hf_adafisher.optimizers.factory.catalog import TRAINER_LEARNING_RATE, available_optimizers, optimizer_record

logger = logging.getLogger(__name__)

FAR = 20.0
"""A learning rate is pointed out where it is this many times below or above the usual ones."""


def default_learning_rate(
    optim: str, options: Mapping[str, Any] | None = None, adamws: float = TRAINER_LEARNING_RATE
) -> float:
    """Return the learning rate of ``optim`` with these options where none is given.

    Args:
        optim: One of ``available_optimizers()``, or another name that Trainer knows.
        options: Its options.
        adamws: What the training arguments have for AdamW. A configuration of TRL with a rate of its own is for one
            objective on pretrained weights: optimizers that take AdamW's rates for fine-tuning, or a multiple of them,
            get this one, or the multiple. Default: Trainer's, which stands for nothing of that kind.

    Raises:
        ValueError: An option that the optimizer does not have.
    """
    if optim not in available_optimizers():
        return adamws
    record = optimizer_record(optim)
    record.check_names(options or {})
    rate = record.default_learning_rate(options or {})
    if rate == TRAINER_LEARNING_RATE:
        return adamws
    tuned = record.fine_tuning_rate if rate == record.learning_rate.value else None  # not in another form
    if adamws == TRAINER_LEARNING_RATE or tuned is None:
        return rate
    return float(f"{adamws * tuned / TRAINER_LEARNING_RATE:.6g}")  # three times 1e-6 is 3e-6


def usual_learning_rates(
    optim: str, options: Mapping[str, Any], adamws: float = TRAINER_LEARNING_RATE, weights: str | None = None
) -> dict[float, str]:
    """Return the optimizer's own learning rates with what each is for; none where it has Trainer's default.

    Args:
        optim: As ``default_learning_rate``.
        options: Its options.
        adamws: As ``default_learning_rate``.
        weights: Where the model's weights come from; empty for new ones, None where the model does not say.
    """
    if optim not in available_optimizers():
        return {}
    record = optimizer_record(optim)
    rate = record.default_learning_rate(options)
    if rate == TRAINER_LEARNING_RATE:
        return {}
    values = record.option_defaults(**options)
    if values.get("step_size") == "paper":  # steps are momentum times lr / damping, whose default is 1
        return {values["damping"]: "the damping"}
    if record.fine_tuning_rate is None:
        return {rate: "the default"}
    tuning, scratch = {record.fine_tuning_rate: "for fine-tuning"}, {rate: "from scratch"}
    usual = {**tuning, **scratch} if weights is None else tuning if weights else scratch
    own = default_learning_rate(optim, options, adamws)
    return usual if own == rate else {own: "by these arguments' default", **usual}


def own_learning_rate(
    optim: str, options: Mapping[str, Any], adamws: float = TRAINER_LEARNING_RATE, weights: str | None = None
) -> float | None:
    """Return the usual learning rate that suits a run best; None where the optimizer has Trainer's default.

    Args:
        optim: As ``default_learning_rate``.
        options: Its options.
        adamws: As ``default_learning_rate``.
        weights: As ``usual_learning_rates``.
    """
    usual, right = usual_learning_rates(optim, options, adamws, weights), default_learning_rate(optim, options, adamws)
    return right if right in usual else next(iter(usual), None)


def warn_of_learning_rate(
    optim: str,
    options: Mapping[str, Any],
    rate: float,
    *,
    adamws: float = TRAINER_LEARNING_RATE,
    weights: str | None = None,
) -> None:
    """Log one warning where ``rate`` is a default that was not meant for this run, or far from the usual ones.

    Args:
        optim: As ``default_learning_rate``.
        options: Its options.
        rate: The training arguments' ``learning_rate``.
        adamws: As ``default_learning_rate``.
        weights: As ``usual_learning_rates``.
    """
    usual = usual_learning_rates(optim, options, adamws, weights)
    right = default_learning_rate(optim, options, adamws)
    record = optimizer_record(optim) if usual else None
    # A default is told from the same number by being the very object of a record: whoever writes it has chosen it.
    if weights and record and record.fine_tuning_rate is not None and rate is record.learning_rate.value:
        logger.warning(
            "optim=%s runs with its default learning_rate=%s, which is for training from scratch. To fine-tune the "
            "weights of %r, set learning_rate: %s is a good start.",
            optim,
            rate,
            weights,
            record.fine_tuning_rate,
        )
    elif usual and not min(usual) / FAR <= rate <= max(usual) * FAR:
        logger.warning(
            "optim=%s runs with learning_rate=%s, more than %g times %s its usual ones (%s): set learning_rate.",
            optim,
            rate,
            FAR,
            "below" if rate < min(usual) else "above",
            ", ".join(f"{value:g} {meaning}" for value, meaning in sorted(usual.items())),
        )
    elif not usual and rate != right and any(rate is default_learning_rate(name) for name in available_optimizers()):
        logger.warning(
            "optim=%s runs with learning_rate=%s, the default of other optimizers; its own is %s.", optim, rate, right
        )


def warn_without_clipping(optim: str, options: Mapping[str, Any], max_grad_norm: float | None) -> None:
    """Log a warning where the paper's form of AdaFisher(W) gets gradients of any length."""
    if optim not in available_optimizers() or max_grad_norm:
        return
    if optimizer_record(optim).option_defaults(**options).get("step_size") == "paper":
        logger.warning(
            "optim=%s with step_size='paper' moves by the length of the gradient, and max_grad_norm=%s leaves it as it "
            "is, by which training often diverges: set max_grad_norm, 1.0 is Trainer's default.",
            optim,
            max_grad_norm,
        )
