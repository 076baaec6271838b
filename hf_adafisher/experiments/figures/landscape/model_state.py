"""Weights and buffers of a model as values to copy and restore, and losses at many points of weight space."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Trainable parameters by name; one with several names (tied weights) has its first."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def flat_weights(model: nn.Module) -> Tensor:
    """Copy of the trainable parameters in one float32 vector on the CPU, shape (d,)."""
    parts = [parameter.detach().to("cpu", torch.float32).reshape(-1) for parameter in trainable(model).values()]
    return torch.cat([torch.empty(0), *parts])


def load_weights(model: nn.Module, vector: Tensor) -> None:
    """Set the trainable parameters to these values: the inverse of ``flat_weights``."""
    parameters = list(trainable(model).values())
    with torch.no_grad():
        for parameter, part in zip(parameters, vector.split([p.numel() for p in parameters]), strict=True):
            parameter.copy_(part.view_as(parameter))


def copy_buffers(model: nn.Module, before: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Copies of the buffers on the CPU, by name.

    Args:
        model: Owner of the buffers.
        before: An earlier copy; buffers that have not changed since are shared with it.
    """
    before = before or {}
    copies = {name: buffer.detach().to("cpu", copy=True) for name, buffer in model.named_buffers()}
    return {
        name: before[name] if name in before and torch.equal(before[name], own) else own for name, own in copies.items()
    }


def load_buffers(model: nn.Module, buffers: Mapping[str, Tensor]) -> None:
    """Set the buffers to these values: the inverse of ``copy_buffers``."""
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])


def batch_norms_with_statistics(model: nn.Module) -> dict[str, nn.modules.batchnorm._BatchNorm]:
    """BatchNorm layers that keep running statistics, by name."""
    kind = nn.modules.batchnorm._BatchNorm
    return {name: m for name, m in model.named_modules() if isinstance(m, kind) and m.running_mean is not None}


def refresh_statistics(model: nn.Module, passes: Sequence[Callable[[nn.Module], object]]) -> None:
    """Recompute the running statistics of BatchNorm from given examples under the present weights.

    They become the mean over the batches, each with the same weight; all other layers stay in evaluation mode.

    Args:
        model: Model in evaluation mode, in which it is left.
        passes: Each runs the model on one batch.
    """
    norms = list(batch_norms_with_statistics(model).values())
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean
        norm.train()
    with torch.no_grad():
        for forward in passes:
            forward(model)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()


def losses_at(
    model: nn.Module,
    vectors: Sequence[Callable[[], Tensor]],
    loss: Callable[[nn.Module], float],
    *,
    buffers: Sequence[Mapping[str, Tensor]] | None = None,
    jobs: int = 1,
    label: str = "losses",
    progress: bool = True,
) -> list[float]:
    """Evaluate the loss of a model at many vectors of weights.

    Every job is a thread with a copy of the model in evaluation mode, so the model itself is not touched, and torch
    computes with one thread in each of them: losses do not depend on the number of jobs. Threads, not processes: torch
    releases the interpreter lock while it computes, and a new process would first import everything again.

    Args:
        model: Its frozen parameters are used as they are.
        vectors: Each returns values of the trainable parameters, shape (d,).
        loss: Loss of a model; called by several threads at a time, on different models.
        buffers: Buffers (BatchNorm's running statistics) for each vector; None for the model's own with all.
        jobs: Number of threads.
        label: Title of the progress bar.
        progress: Show the progress bar.

    Returns:
        One loss for each vector, in their order; some may be infinite or nan.
    """
    copies = [copy.deepcopy(model).eval() for _ in range(min(jobs, len(vectors)))]
    results = [float("nan")] * len(vectors)

    def work(index: int) -> int:
        own = copies.pop()
        try:
            load_weights(own, vectors[index]())
            if buffers is not None:
                load_buffers(own, buffers[index])
            results[index] = float(loss(own))
        finally:
            copies.append(own)
        return index

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # threads that start later take it over
    pool = ThreadPoolExecutor(max(len(copies), 1))
    try:
        futures = [pool.submit(work, index) for index in range(len(vectors))]
        for future in tqdm(as_completed(futures), desc=label, total=len(futures), disable=not progress):
            future.result()
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)
    return results
