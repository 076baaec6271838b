"""Growth of an optimizer's costs with each size of a model, and its picture."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hf_adafisher.experiments.benchmark.measurement import Workload, alternate, gpt2, timed, timer
from hf_adafisher.experiments.drawing import line_style, new_figure, write_picture
from hf_adafisher.optimizers.adafisher import AdaFisherW

BASE = {"width": 256, "depth": 4, "vocabulary": 4096, "batch": 8}
SERIES = {
    "width": (128, 256, 384, 512),
    "depth": (2, 4, 8, 12),
    "vocabulary": (2048, 4096, 8192, 16384),
    "batch": (2, 4, 8, 16),
}

PANELS = (
    ("parameters", "step_ms", "step() that is not due, ms"),
    ("activations", "factor_ms", "factors of a due step, ms"),
)
"""Panels of the picture: the x axis, the y axis, and the label of the latter."""


def measure_scaling(rounds: int, device: str = "cpu", series: Mapping[str, Sequence[int]] = SERIES) -> dict[str, Any]:
    """Measure an idle step and the factors of a due one for each size of a GPT-2, the others held at ``BASE``."""
    points: dict[str, list[dict[str, float]]] = {}
    for name, sizes in series.items():
        for size in sizes:
            options = {**BASE, name: size}
            plain, recorded = gpt2(device, **options), gpt2(device, **options)
            idle = AdaFisherW(plain.model, lr=1e-4, update_interval=10**9)
            due = AdaFisherW(recorded.model, lr=1e-4, update_interval=1)
            for work, optimizer in ((plain, idle), (recorded, due)):
                work.backward()
                optimizer.step()

            def iteration(work: Workload, optimizer: Optimizer) -> Callable[[], float]:
                def function() -> float:
                    work.model.zero_grad()
                    return timed(work.backward, device) + timed(optimizer.step, device)

                return function

            times = alternate(
                {"step": timer(idle.step, device), "idle": iteration(plain, idle), "due": iteration(recorded, due)},
                rounds,
                f"{name} {size}",
            )
            factors = [a - b for a, b in zip(times["due"], times["idle"], strict=True)]
            points.setdefault(name, []).append(
                {
                    "size": size,
                    "parameters": sum(p.numel() for p in plain.model.parameters()),
                    "activations": _activations(recorded),
                    "step_ms": statistics.median(times["step"]),
                    "factor_ms": statistics.median(factors),
                }
            )
            due.close()
    together = [point for line in points.values() for point in line]
    return {"base": BASE, "points": points, "fits": {y: straight_line(together, x, y) for x, y, _ in PANELS}}


def straight_line(points: Sequence[Mapping[str, float]], x: str, y: str) -> dict[str, float]:
    """Fit the least squares line through all points.

    Returns:
        ``ms_per_million`` units of ``x``, ``intercept_ms``, and ``r_squared``, the share of the variance of ``y`` that
        the line explains: 1 for exactly linear growth.
    """
    millions, values = [point[x] / 1e6 for point in points], [point[y] for point in points]
    slope, intercept = statistics.linear_regression(millions, values)
    r_squared = statistics.correlation(millions, values) ** 2
    return {"ms_per_million": slope, "intercept_ms": intercept, "r_squared": r_squared}


def _activations(work: Workload) -> int:
    """Count the inputs and outputs of the layers with parameters in one forward pass, which factors are sums over."""
    total = 0

    def count(module: nn.Module, inputs: Any, output: Tensor) -> None:
        nonlocal total
        total += inputs[0].numel() + output.numel()

    layers = [m for m in work.model.modules() if next(m.parameters(recurse=False), None) is not None]
    handles = [layer.register_forward_hook(count) for layer in layers]
    with torch.no_grad():
        work.model(**work.batch)
    for handle in handles:
        handle.remove()
    return total


def draw_scaling(path: Path, result: Mapping[str, Any]) -> None:
    """Draw an idle step over the parameters and the time for factors over the activations."""
    figure, panels = new_figure(1, 2, (11, 4.5), sharey=False)
    for axes, (x, y, label) in zip(panels, PANELS, strict=True):
        for index, (name, points) in enumerate(result["points"].items()):
            points = sorted(points, key=lambda point: point[x])
            axes.plot(
                [p[x] / 1e6 for p in points], [p[y] for p in points], **line_style(index), label=f"growing {name}"
            )
        fit, end = result["fits"][y], max(p[x] / 1e6 for points in result["points"].values() for p in points)
        line = [fit["intercept_ms"], fit["intercept_ms"] + fit["ms_per_million"] * end]
        text = f"{fit['ms_per_million']:.2f} ms a million, R² {fit['r_squared']:.2f}"
        axes.plot([0, end], line, color="black", linestyle=":", label=text)
        axes.set(xlabel=f"{x}, millions", ylabel=label, xlim=(0, None), ylim=(0, None))
        axes.legend()
    write_picture(figure, path)
