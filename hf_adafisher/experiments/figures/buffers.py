"""Buffers of a model, and among them the running statistics of BatchNorm."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn


def flat_buffers(model: nn.Module, before: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Copies of the buffers on the CPU, by name.

    Args:
        model: whose.
        before: an earlier copy; what has not changed since is not copied again but shared with it.
    """
    before = before or {}
    copies = {name: buffer.detach().to("cpu", copy=True) for name, buffer in model.named_buffers()}
    return {
        name: before[name] if name in before and torch.equal(before[name], own) else own for name, own in copies.items()
    }


def load_buffers(model: nn.Module, buffers: Mapping[str, Tensor]) -> None:
    """Gives the buffers these values: the inverse of ``flat_buffers``."""
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])


def running_norms(model: nn.Module) -> dict[str, nn.modules.batchnorm._BatchNorm]:
    """The BatchNorm layers that keep running statistics, by name."""
    kind = nn.modules.batchnorm._BatchNorm
    return {name: m for name, m in model.named_modules() if isinstance(m, kind) and m.running_mean is not None}


def refresh_statistics(model: nn.Module, passes: Sequence[Callable[[nn.Module], object]]) -> None:
    """Makes the running statistics of BatchNorm those of given examples under the present weights.

    They become the mean over the batches, each with the same weight; all other layers stay in evaluation mode.

    Args:
        model: in evaluation mode, which it is left in.
        passes: each sends a batch through the model.
    """
    norms = list(running_norms(model).values())
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean
        norm.train()
    with torch.no_grad():
        for one in passes:
            one(model)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()
