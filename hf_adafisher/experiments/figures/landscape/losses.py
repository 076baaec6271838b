"""Losses of a model at many points of weight space, several at a time."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from hf_adafisher.experiments.figures.landscape.model_state import load_buffers, load_weights


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
