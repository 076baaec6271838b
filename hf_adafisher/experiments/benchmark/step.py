"""Times of ``step()`` and of training iterations: AdaFisherW's against AdamW's, and every optimizer's."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn
from torch.optim import Optimizer
from transformers import PreTrainedModel

from hf_adafisher.experiments.benchmark.measurement import (
    MODELS,
    Workload,
    alternate,
    compare_times,
    gpt2,
    peak_extra_bytes,
    timed,
    timer,
)
from hf_adafisher.experiments.runs.image import scale_learning_rates
from hf_adafisher.models import layer_decay_scales
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


T_COV = 10
LM_SCRATCH = {"width": 128, "depth": 3, "heads": 4, "vocabulary": 4096, "positions": 128, "batch": 8, "length": 128}
"""Sizes of the language model that docs/protocol.md tunes every optimizer on."""
LAYER_DECAY = 0.75
"""Of the preset vit-finetune. It makes a parameter group of every layer, which costs a step time."""
COMPARED: dict[str, dict[str, dict[str, Any]]] = {
    "lm-scratch": {
        "adamw": {}, "adafisherw": {}, "spectral-adafisher": {}, "muon": {}, "soap": {"precondition_frequency": 1},
        "soap, bases of every 2nd step": {"precondition_frequency": 2},
        "soap, bases of every 4th step": {"precondition_frequency": 4},
        "lamb": {}, "lion": {}, "schedule_free_adamw": {},
    },
    "vit-finetune": {"adamw": {}, "adafisherw": {}, "spectral-adafisher": {}, "muon": {}},
}  # fmt: skip
"""The optimizers of each preset, with those options that change what a step costs; text after a comma is a label."""


def measure_iteration(rounds: int, device: str = "cpu", compiled: bool = False, **sizes: int) -> dict[str, Any]:
    """Measure forward and backward passes with and without recording, and whole training iterations.

    A whole iteration is forward, backward, clipping and step; a round of it is ten of them. One of them is due for the
    paper's form, whose T_cov is 10.
    """
    result = _measure_recording(rounds, device, **sizes)
    result["rows"] |= _measure_whole(rounds, device, compiled, **sizes)
    return result


def measure_cost(preset: str, rounds: int) -> dict[str, Any]:
    """Measure CPU time of whole iterations of a comparison's optimizers on its model.

    The ratios turn AdamW's steps into as many of another optimizer as take equal time. CPU time does not count what
    other programs do meanwhile.

    Args:
        preset: One of ``COMPARED``.
        rounds: Alternating rounds, of ten iterations each.
    """
    functions = {}
    for row, options in COMPARED[preset].items():
        work, optimizer = compared_optimizer(preset, row.split(",")[0], options)
        getattr(optimizer, "train", lambda: None)()  # schedule-free
        functions[row] = _cpu_time(_iterate(work, optimizer))
    times = alternate(functions, rounds, "whole iterations", warm_up=1)
    rows = {f"whole iteration, {row}": compare_times(found, times["adamw"]) for row, found in times.items()}
    return {"preset": preset, "parameters": sum(p.numel() for p in work.model.parameters()), "rows": rows}


def compared_optimizer(preset: str, name: str, options: Mapping[str, Any]) -> tuple[Workload, Optimizer]:
    """Create a comparison's model with a batch, and one of its optimizers."""
    work = gpt2("cpu", **LM_SCRATCH) if preset == "lm-scratch" else MODELS["vit-small"]("cpu")
    optimizer = create_optimizer(name, work.model, lr=1e-4, weight_decay=0.01, **options)
    if preset == "vit-finetune":
        scales = layer_decay_scales(cast(PreTrainedModel, work.model), LAYER_DECAY)
        scale_learning_rates(optimizer, work.model, scales)
    return work, optimizer


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
