"""The update of one parameter."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from hf_adafisher.fisher.forms import Term, diagonal_of


def update_parameter(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    terms: Sequence[Term],
    *,
    step: int,
    lr: float,
    beta: float,
    damping: float,
    weight_decay: float,
    decoupled: bool,
) -> None:
    """One step of AdaFisher (``decoupled=False``) or AdaFisherW (``decoupled=True``), in place.

    ``m <- beta m + (1 - beta) g``, then ``theta <- theta - lr m / (1 - beta^step) / F``, where ``F`` is the damped
    diagonal. AdaFisher adds ``weight_decay * theta`` to ``g``; AdaFisherW subtracts ``lr * weight_decay * theta``.
    There is no square root over F.

    Args:
        param: The parameter, updated in place.
        grad: Its gradient; left as it is.
        exp_avg: First moment ``m``, updated in place.
        terms: The parameter's factors, normalised and spread (see :mod:`hf_adafisher.fisher.forms`).
        step: Number of updates of this parameter, this one included.
    """
    grad = grad.to(exp_avg.dtype)
    if weight_decay and not decoupled:
        grad = grad.add(param.to(exp_avg.dtype), alpha=weight_decay)
    exp_avg.lerp_(grad, 1.0 - beta)
    diagonal = diagonal_of(terms, param, damping)
    if weight_decay and decoupled:
        param.mul_(1.0 - lr * weight_decay)
    param.addcdiv_(exp_avg, diagonal, value=-lr / (1.0 - beta**step))
