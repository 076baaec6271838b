"""Times of training iterations: passes with and without recording, steps with and without a refresh."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.optim import Optimizer

from hf_adafisher.experiments.benchmark.measurement import alternate, compare_times, timed
from hf_adafisher.experiments.benchmark.step import step_after_backward
from hf_adafisher.experiments.benchmark.workloads import Workload, gpt2
from hf_adafisher.optimizers.adafisher import AdaFisherW
from hf_adafisher.optimizers.factory.create import create_optimizer

T_COV = 10
LM_SCRATCH = {"width": 128, "depth": 3, "vocabulary": 4096, "batch": 8}
"""Sizes of the language model that docs/protocol.md tunes every optimizer on."""
LM_SCRATCH_OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw": {}, "adafisherw": {}, "spectral-adafisher": {}, "muon": {}, "soap": {"precondition_frequency": 1},
    "lamb": {}, "lion": {}, "schedule_free_adamw": {},
}  # fmt: skip
"""Optimizers of that comparison, with those of its options that change what a step costs."""


def measure_iteration(rounds: int, device: str = "cpu", compiled: bool = False, **sizes: int) -> dict[str, Any]:
    """Measure forward and backward passes with and without recording, and whole training iterations.

    A whole iteration is forward, backward, clipping and step; a round of it is ten of them. One of them is due for the
    paper's form, whose T_cov is 10.
    """
    result = _measure_recording(rounds, device, **sizes)
    result["rows"] |= _measure_whole(rounds, device, compiled, **sizes)
    return result


def measure_cost(rounds: int) -> dict[str, Any]:
    """Measure CPU time of whole iterations of the optimizers in the comparison of language models from scratch.

    The ratios turn AdamW's steps into as many of another optimizer as take equal time. CPU time does not count what
    other programs do meanwhile.
    """
    functions = {}
    for name, options in LM_SCRATCH_OPTIMIZERS.items():
        work = gpt2("cpu", **LM_SCRATCH)
        optimizer = create_optimizer(name, work.model, lr=1e-4, weight_decay=0.01, **options)
        if name == "schedule_free_adamw":
            optimizer.train()  # type: ignore[attr-defined]  # its steps refuse the mode of evaluation
        functions[name] = _cpu_time(_iterate(work, optimizer))
    times = alternate(functions, rounds, "whole iterations", warm_up=1)
    return {"rows": {f"whole iteration, {name}": compare_times(found, times["adamw"]) for name, found in times.items()}}


def _measure_recording(rounds: int, device: str, **sizes: int) -> dict[str, Any]:
    """Measure passes without an optimizer, with an idle one, and with a recording one; and their steps."""
    work = {key: gpt2(device, **sizes) for key in ("plain", "idle", "due")}
    idle = AdaFisherW(work["idle"].model, lr=1e-4, update_interval=10**9)
    due = AdaFisherW(work["due"].model, lr=1e-4, update_interval=1)
    for key, optimizer in (("idle", idle), ("due", due)):
        work[key].backward()
        optimizer.step()

    def backward(key: str) -> Callable[[], float]:
        def function() -> float:
            work[key].model.zero_grad()
            due.discard_statistics()
            return timed(work[key].backward, device)

        return function

    passes = alternate({key: backward(key) for key in work}, rounds, "forward + backward")
    steps = alternate(
        {"idle": step_after_backward(work["idle"], idle, device), "due": step_after_backward(work["due"], due, device)},
        rounds,
        "step",
    )
    refresh = statistics.median(a - b for a, b in zip(steps["due"], steps["idle"], strict=True))
    rows = {f"forward+backward, {key}": compare_times(values, passes["plain"]) for key, values in passes.items()}
    plain = rows["forward+backward, plain"]["ms"]
    return {"refresh_ms_in_step": refresh, "refresh_share": refresh / plain, "rows": rows}


def _measure_whole(rounds: int, device: str, compiled: bool, **sizes: int) -> dict[str, dict[str, float]]:
    """Measure iterations of AdaFisherW in both forms, SpectralAdaFisher, Muon if installed, and the fused AdamW."""
    choices: dict[str, tuple[str, dict[str, Any]]] = {
        "adamw fused": ("adamw", {"fused": True}),
        "adafisherw": ("adafisherw", {"step_size": "paper", "update_interval": T_COV, "compiled": compiled}),
        "adafisherw root": ("adafisherw", {"compiled": compiled}),
        "spectral-adafisher": ("spectral-adafisher", {}),
        "muon": ("muon", {}),
    }
    functions = {}
    for key, (name, options) in choices.items():
        work = gpt2(device, **sizes)
        try:
            optimizer = create_optimizer(name, work.model, lr=1e-4, weight_decay=0.01, **options)
        except ImportError:  # Muon's library
            continue
        functions[key] = _iterations(work, optimizer, device)
    whole = alternate(functions, rounds, "whole iterations", warm_up=1)
    return {f"whole iteration, {key}": compare_times(values, whole["adamw fused"]) for key, values in whole.items()}


def _iterations(work: Workload, optimizer: Optimizer, device: str) -> Callable[[], float]:
    iterate = _iterate(work, optimizer)
    return lambda: timed(iterate, device) / T_COV


def _iterate(work: Workload, optimizer: Optimizer) -> Callable[[], None]:
    """Function of ``T_COV`` iterations: forward, backward, clipping, step."""

    def iterations() -> None:
        for _ in range(T_COV):
            work.backward()
            nn.utils.clip_grad_norm_(work.model.parameters(), 1.0)
            optimizer.step()
            work.model.zero_grad()

    return iterations


def _cpu_time(iterate: Callable[[], None]) -> Callable[[], float]:
    """Function that returns the CPU milliseconds of one of ``iterate``'s iterations."""

    def function() -> float:
        start = time.process_time()
        iterate()
        return 1e3 * (time.process_time() - start) / T_COV

    return function
