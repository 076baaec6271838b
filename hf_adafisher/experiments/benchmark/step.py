"""What an optimizer costs: its step against AdamW's, its memory, a training iteration, and how all of it grows."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm.auto import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    GPT2Config,
    LlamaConfig,
    ResNetConfig,
    ViTConfig,
)

from hf_adafisher.optimizers.adafisher import AdaFisherW
from hf_adafisher.optimizers.factory.create import available_optimizers, create_optimizer, optimizer_state_bytes

WARM_UP = 3
"""Rounds that are not counted: states are created, kernels compiled, memory touched for the first time."""
T_COV = 10


@dataclass(frozen=True)
class Workload:
    """A model and the batch that it is trained on."""

    model: nn.Module
    batch: dict[str, Tensor]

    def backward(self, create_graph: bool = False) -> None:
        """One forward and backward pass; gradients add up."""
        self.model(**self.batch).loss.backward(create_graph=create_graph)


def gpt2(
    device: str, *, width: int = 256, depth: int = 4, vocabulary: int = 8192, batch: int = 16, length: int = 128
) -> Workload:
    """A GPT-2 without dropout, equal weights for equal sizes."""
    config = GPT2Config(
        vocab_size=vocabulary, n_positions=512, n_embd=width, n_layer=depth, n_head=max(1, width // 64),
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return _language(config, device, batch, length)


def _language(config: Any, device: str, batch: int, length: int) -> Workload:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).to(device).train()
    ids = torch.randint(config.vocab_size, (batch, length), device=device)
    return Workload(model, {"input_ids": ids, "labels": ids})


def _vision(config: Any, device: str) -> Workload:
    torch.manual_seed(0)
    model = AutoModelForImageClassification.from_config(config).to(device).train()
    pixels = torch.randn(2, 3, 64, 64, device=device)
    return Workload(model, {"pixel_values": pixels, "labels": torch.tensor([0, 1], device=device)})


def _llama(device: str) -> Workload:
    config = LlamaConfig(
        vocab_size=16000, hidden_size=384, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=6,
        num_key_value_heads=2, use_cache=False,
    )  # fmt: skip
    return _language(config, device, 2, 32)


MODELS: dict[str, Callable[[str], Workload]] = {
    "gpt2-20m": lambda device: gpt2(device, width=384, depth=8, vocabulary=16000, batch=2, length=32),
    "llama": _llama,
    "vit": lambda device: _vision(
        ViTConfig(hidden_size=384, num_hidden_layers=8, num_attention_heads=6, intermediate_size=1536, image_size=64),
        device,
    ),
    "resnet": lambda device: _vision(ResNetConfig(embedding_size=64, hidden_sizes=[128, 256, 512, 1024]), device),
}


def timed(function: Callable[[], Any], device: str) -> float:
    """Milliseconds of one call: by CUDA events on a GPU, else by the clock."""
    if not device.startswith("cuda"):
        start = time.perf_counter()
        function()
        return 1e3 * (time.perf_counter() - start)
    start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start_event.record()
    function()
    end_event.record()
    torch.cuda.synchronize()
    return float(start_event.elapsed_time(end_event))


def alternate(
    functions: Mapping[str, Callable[[], float]], rounds: int, label: str, warm_up: int = WARM_UP
) -> dict[str, list[float]]:
    """Call all of them in every round, so that what else the machine does meets all alike.

    Returns:
        What they returned (milliseconds), without the first ``warm_up`` rounds.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    for index in tqdm(range(warm_up + rounds), desc=label, leave=False):
        for name, function in functions.items():
            value = function()
            if index >= warm_up:
                times[name].append(value)
    return times


def summary(times: Sequence[float], peer: Sequence[float]) -> dict[str, float]:
    """Median and quartiles of the times, and of the ratios to the peer's time in the same round; the fastest time."""
    ratios = [mine / theirs for mine, theirs in zip(times, peer, strict=True)]
    row: dict[str, float] = {"fastest_ms": min(times)}
    for name, values in (("ms", times), ("ratio", ratios)):
        low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
        row |= {name: middle, f"{name}_q1": low, f"{name}_q3": high}
    return row


def peak_extra_bytes(function: Callable[[], Any], device: str) -> int:
    """The most memory that a call held beside what was there before, from the allocator's own records."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return int(torch.cuda.max_memory_allocated() - before)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    records = sorted((e for e in events if e["name"] == "[memory]"), key=lambda e: (e["ts"], e["args"]["Ev Idx"]))
    held = peak = 0
    for record in records:
        held += record["args"]["Bytes"]
        peak = max(peak, held)
    return peak


def _fill_gradients(params: Sequence[nn.Parameter]) -> None:
    torch.manual_seed(1)
    for p in params:
        p.grad = torch.randn_like(p) * 1e-3


def measure_step(name: str, rounds: int, device: str = "cpu", compiled: bool = False) -> dict[str, Any]:
    """``step()`` of AdaFisherW, of AdamW fused and foreach on the same shapes; also its state and its extra memory."""
    names = ("adafisherw", "adamw fused", "adamw foreach", *(("compiled",) if compiled else ()))
    work = {key: MODELS[name](device) for key in names}
    params = {key: [p for p in w.model.parameters() if p.requires_grad] for key, w in work.items()}
    common: dict[str, Any] = {"lr": 1e-4, "weight_decay": 0.01}
    optimizers: dict[str, Optimizer] = {
        "adafisherw": AdaFisherW(work["adafisherw"].model, update_interval=10**9, **common),
        "adamw fused": torch.optim.AdamW(params["adamw fused"], fused=True, **common),
        "adamw foreach": torch.optim.AdamW(params["adamw foreach"], foreach=True, **common),
    }
    if compiled:
        optimizers["compiled"] = AdaFisherW(work["compiled"].model, update_interval=10**9, compiled=True, **common)
    first, refresh = {}, {}
    for key, optimizer in optimizers.items():
        work[key].backward()
        if key == "adafisherw":
            peak = peak_extra_bytes(optimizer.step, device)  # the state, which this step creates, among it
            refresh["peak_extra_bytes_due"] = peak - optimizer_state_bytes(optimizer)
        else:
            first[key] = timed(optimizer.step, device) / 1e3
        _fill_gradients(params[key])
    times = alternate({key: timer(o.step, device) for key, o in optimizers.items()}, rounds, name)
    rows = {key: summary(values, times["adamw fused"]) for key, values in times.items()}
    for key, optimizer in optimizers.items():
        rows[key] |= {
            "state_bytes": optimizer_state_bytes(optimizer),
            "peak_extra_bytes": peak_extra_bytes(optimizer.step, device),
        }
    rows["adafisherw"] |= refresh
    if compiled:
        rows["compiled"]["first_step_seconds"] = first["compiled"]
    largest = max(p.numel() * p.element_size() for p in params["adafisherw"])
    foreach = summary(times["adafisherw"], times["adamw foreach"])["ratio"]
    return {
        "model": name,
        "parameters": sum(p.numel() for p in params["adafisherw"]),
        "largest_parameter_bytes": largest,
        "state_ratio": rows["adafisherw"]["state_bytes"] / rows["adamw fused"]["state_bytes"],
        "ratio_to_foreach": foreach,
        "rows": rows,
    }


def timer(function: Callable[[], Any], device: str) -> Callable[[], float]:
    """``timed``, to be called later."""
    return lambda: timed(function, device)


def measure_optimizers(name: str, rounds: int, device: str = "cpu") -> dict[str, Any]:
    """``step()`` of every installed optimizer by its record's defaults, each beside a fused AdamW of its own rounds.

    A forward and backward pass comes before every step, since some take statistics or second derivatives from it;
    it is not timed.
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
        functions = {"own": _after_backward(ours, optimizer, device), "peer": _after_backward(peer, fused, device)}
        times = alternate(functions, rounds, optimizer_name)
        rows[optimizer_name] = summary(times["own"], times["peer"]) | {
            "state_ratio": optimizer_state_bytes(optimizer) / optimizer_state_bytes(fused)
        }
    return {"model": name, "rows": rows}


def _after_backward(work: Workload, optimizer: Any, device: str) -> Callable[[], float]:
    def function() -> float:
        work.model.zero_grad()
        work.backward(create_graph=bool(getattr(optimizer, "needs_graph", False)))
        return timed(optimizer.step, device)

    return function


def measure_iteration(rounds: int, device: str = "cpu", compiled: bool = False, **sizes: int) -> dict[str, Any]:
    """Forward and backward passes with and without recording, and whole training iterations at T_cov = 10.

    A whole iteration is forward, backward, clipping and step; a round of it is T_cov of them, one of them due.
    """
    result = _measure_recording(rounds, device, **sizes)
    result["rows"] |= _measure_whole(rounds, device, compiled, **sizes)
    return result


def _measure_recording(rounds: int, device: str, **sizes: int) -> dict[str, Any]:
    """Passes of a model without an optimizer, with one that is idle, and with one that records; and their steps."""
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
        {"idle": _after_backward(work["idle"], idle, device), "due": _after_backward(work["due"], due, device)},
        rounds,
        "step",
    )
    refresh = statistics.median(a - b for a, b in zip(steps["due"], steps["idle"], strict=True))
    rows = {f"forward+backward, {key}": summary(values, passes["plain"]) for key, values in passes.items()}
    plain = rows["forward+backward, plain"]["ms"]
    return {"refresh_ms_in_step": refresh, "refresh_share": refresh / plain, "rows": rows}


def _measure_whole(rounds: int, device: str, compiled: bool, **sizes: int) -> dict[str, dict[str, float]]:
    """Whole training iterations under AdaFisherW, the spectral one and Muon if installed, and the fused AdamW."""
    given: dict[str, tuple[str, dict[str, Any]]] = {
        "adamw fused": ("adamw", {"fused": True}),
        "adafisherw": ("adafisherw", {"update_interval": T_COV, "compiled": compiled}),
        "spectral-adafisher": ("spectral-adafisher", {"update_interval": T_COV}),
        "muon": ("muon", {}),
    }
    functions = {}
    for key, (name, options) in given.items():
        work = gpt2(device, **sizes)
        try:
            optimizer = create_optimizer(name, work.model, lr=1e-4, weight_decay=0.01, **options)
        except ImportError:  # Muon's library
            continue
        functions[key] = _iterations(work, optimizer, device)
    whole = alternate(functions, rounds, "whole iterations", warm_up=1)
    return {f"whole iteration, {key}": summary(values, whole["adamw fused"]) for key, values in whole.items()}


def _iterations(work: Workload, optimizer: Optimizer, device: str) -> Callable[[], float]:
    def iterations() -> None:
        for _ in range(T_COV):
            work.backward()
            nn.utils.clip_grad_norm_(work.model.parameters(), 1.0)
            optimizer.step()
            work.model.zero_grad()

    return lambda: timed(iterations, device) / T_COV


def as_table(rows: Mapping[str, Mapping[str, float]]) -> str:
    """A Markdown table: medians with quartiles, and whatever memory was measured."""
    extra = [key for key in ("state_bytes", "peak_extra_bytes", "state_ratio") if any(key in r for r in rows.values())]
    lines = ["| | ms | quartiles | x peer | quartiles |" + "".join(f" {key} |" for key in extra)]
    lines.append("|---" * (5 + len(extra)) + "|")
    for name, row in rows.items():
        cells = [name, f"{row['ms']:.2f}", f"{row['ms_q1']:.2f} .. {row['ms_q3']:.2f}"]
        cells += [f"{row['ratio']:.3f}", f"{row['ratio_q1']:.3f} .. {row['ratio_q3']:.3f}"]
        cells += [f"{row[key]:.3g}" if key == "state_ratio" else f"{int(row[key])}" for key in extra if key in row]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
