"""Time and memory of ``step()``: AdaFisherW's against AdamW's, and every optimizer's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from hf_adafisher.experiments.benchmark.measurement import alternate, compare_times, peak_extra_bytes, timed, timer
from hf_adafisher.experiments.benchmark.workloads import MODELS, Workload
from hf_adafisher.optimizers.adafisher import AdaFisherW
from hf_adafisher.optimizers.factory.create import available_optimizers, create_optimizer, optimizer_state_bytes
from hf_adafisher.optimizers.spectral import SpectralAdaFisher

OURS, ROOT, SPECTRAL = "adafisherw", "adafisherw root", "spectral-adafisher"
"""Rows of AdaFisherW: the paper's form, and that by the root; and of SpectralAdaFisher."""


def _fill_gradients(params: Sequence[nn.Parameter]) -> None:
    torch.manual_seed(1)
    for p in params:
        p.grad = torch.randn_like(p) * 1e-3


def measure_step(name: str, rounds: int, device: str = "cpu", compiled: bool = False) -> dict[str, Any]:
    """Measure time and memory of ``step()`` of AdaFisherW in both forms, SpectralAdaFisher, AdamW fused and foreach.

    "adafisherw" is an idle step of the paper's form, "adafisherw root" one that divides by the root, and takes factors.
    """
    names = (OURS, ROOT, SPECTRAL, "adamw fused", "adamw foreach", *(("compiled", "compiled root") if compiled else ()))
    work = {key: MODELS[name](device) for key in names}
    params = {key: [p for p in w.model.parameters() if p.requires_grad] for key, w in work.items()}
    common: dict[str, Any] = {"lr": 1e-4, "weight_decay": 0.01}
    optimizers: dict[str, Optimizer] = {
        OURS: AdaFisherW(work[OURS].model, update_interval=10**9, **common),
        ROOT: AdaFisherW(work[ROOT].model, step_size="root", **common),
        SPECTRAL: SpectralAdaFisher(work[SPECTRAL].model, **common),
        "adamw fused": torch.optim.AdamW(params["adamw fused"], fused=True, **common),
        "adamw foreach": torch.optim.AdamW(params["adamw foreach"], foreach=True, **common),
    }
    if compiled:
        optimizers["compiled"] = AdaFisherW(work["compiled"].model, update_interval=10**9, compiled=True, **common)
        model = work["compiled root"].model
        optimizers["compiled root"] = AdaFisherW(model, step_size="root", compiled=True, **common)
    first, refresh = {}, {}
    for key, optimizer in optimizers.items():
        work[key].backward()
        if key == OURS:
            peak = peak_extra_bytes(optimizer.step, device)  # with the state, which this step creates
            refresh["peak_extra_bytes_due"] = peak - optimizer_state_bytes(optimizer)
        else:
            first[key] = timed(optimizer.step, device) / 1e3
        _fill_gradients(params[key])
    times = alternate({key: timer(o.step, device) for key, o in optimizers.items()}, rounds, name)
    rows = {key: compare_times(values, times["adamw fused"]) for key, values in times.items()}
    for key, optimizer in optimizers.items():
        rows[key] |= {
            "state_bytes": optimizer_state_bytes(optimizer),
            "peak_extra_bytes": peak_extra_bytes(optimizer.step, device),
        }
    rows[OURS] |= refresh
    for key in ("compiled", "compiled root") if compiled else ():
        rows[key]["first_step_seconds"] = first[key]
    largest = max(p.numel() * p.element_size() for p in params[OURS])
    foreach = {key: compare_times(times[key], times["adamw foreach"])["ratio"] for key in (OURS, ROOT, SPECTRAL)}
    return {
        "model": name,
        "parameters": sum(p.numel() for p in params[OURS]),
        "largest_parameter_bytes": largest,
        "state_ratio": rows[OURS]["state_bytes"] / rows["adamw fused"]["state_bytes"],
        "ratio_to_foreach": foreach,
        "rows": rows,
    }


def measure_optimizers(name: str, rounds: int, device: str = "cpu") -> dict[str, Any]:
    """Time ``step()`` of every installed optimizer by its record's defaults, alternating with a fused AdamW.

    A forward and backward pass, which is not timed, comes before every step, since some optimizers take statistics or
    second derivatives from it.
    """
    rows: dict[str, Any] = {}
    for optimizer_name in available_optimizers():
        ours, peer = MODELS[name](device), MODELS[name](device)
        try:
            optimizer = create_optimizer(optimizer_name, ours.model, lr=1e-5)
        except ImportError:
            continue
        fused = torch.optim.AdamW(peer.model.parameters(), lr=1e-5, fused=True)
        getattr(optimizer, "train", lambda: None)()  # schedule-free
        functions = {
            "own": step_after_backward(ours, optimizer, device),
            "peer": step_after_backward(peer, fused, device),
        }
        times = alternate(functions, rounds, optimizer_name)
        rows[optimizer_name] = compare_times(times["own"], times["peer"]) | {
            "state_ratio": optimizer_state_bytes(optimizer) / optimizer_state_bytes(fused)
        }
    return {"model": name, "rows": rows}


def step_after_backward(work: Workload, optimizer: Any, device: str) -> Callable[[], float]:
    """Function that runs a forward and backward pass and times the step after it."""

    def function() -> float:
        work.model.zero_grad()
        work.backward(create_graph=bool(getattr(optimizer, "needs_graph", False)))
        return timed(optimizer.step, device)

    return function
