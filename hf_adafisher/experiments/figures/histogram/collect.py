"""Distribution of a layer's Fisher diagonal during training, beside Adam's second moment (AdaFisher, Fig. 4).

In the paper's figure the values by which AdaFisher divides lie close together, where Adam's second moment spans many
orders of magnitude.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Trainer

from hf_adafisher.experiments.figures.command_line import require_at_least
from hf_adafisher.experiments.figures.training_run import (
    StepCallback,
    check_same_start,
    prepare_papers_run,
    prepare_run,
    weights_by_layer,
)
from hf_adafisher.experiments.runs.callbacks import StopOnDivergence
from hf_adafisher.experiments.runs.run import PreparedRun
from hf_adafisher.optimizers.factory.create import available_optimizers, create_optimizer, did_you_mean
from hf_adafisher.training.arguments import optimizer_name

ROWS = 50
"""Default number of rows, approximately."""
PEERS = {"adafisher": "adam", "adafisherw": "adamw"}
"""Default of the second optimizer, by the first."""
_PEER_RATE = "learning_rate=0.001"
"""Its learning rate without a better one of ``prepare_run``: Trainer's own default, 5e-5, is for fine-tuning."""
_ROTATED = frozenset({"soap"})
"""Optimizers whose second moment is that of a rotated gradient, not of the weight's own values."""
_CHUNK = 1 << 22

Values = Callable[[Any, Tensor], Tensor]


@dataclass(frozen=True)
class HistogramSettings:
    """Settings of the two runs and of the histograms.

    Attributes:
        task: One of ``command_line.TASKS``.
        output: File of the picture.
        layer: Name of the module whose ``weight`` is counted.
        optimizers: Two names, as ``prepare_run`` reads them: AdaFisher or AdaFisherW, and one with a second moment;
            None for the one that fits the network, and Adam or AdamW at a learning rate of 0.001, on the digits at the
            best of those tried there.
        steps: Number of optimizer steps of each run, at least 1.
        every: Steps between two rows, from 1 to ``steps``; None for about 50 rows.
        bins_per_decade: Number of bins per decade, at least 1.
        further: Arguments of both runs.

    Raises:
        ValueError: A value outside its range.
    """

    task: str
    output: Path
    layer: str | None = None
    optimizers: Sequence[str] | None = None
    steps: int = 1000
    every: int | None = None
    bins_per_decade: int = 20
    further: Sequence[str] = ()

    def __post_init__(self) -> None:
        require_at_least(self, steps=1, bins_per_decade=1)
        if self.every is not None and not 1 <= self.every <= self.steps:
            raise ValueError(f"--every is {self.every}; it must be in 1..{self.steps}, the number of steps")
        if self.optimizers is not None and len(self.optimizers) != 2:
            raise ValueError(f"--optimizers has {len(self.optimizers)} names; give two, such as adafisher adam")

    @property
    def row_steps(self) -> list[int]:
        """Steps after which the values are counted; the last one is always among them."""
        every = self.every or max(1, round(self.steps / ROWS))
        return sorted({*range(every, self.steps + 1, every), self.steps})


@dataclass(frozen=True)
class HistogramRow:
    """Histogram of the values at one step.

    Attributes:
        step: Optimizer step after which the values were counted.
        first: Number of the first bin; bin ``k`` of ``b`` per decade holds ``10^(k/b) <= value < 10^((k+1)/b)``.
        counts: Number of values in that bin and those after it.
        zeros: Number of values of zero (or below), in no bin.
        not_finite: Number of values that are infinite or not a number, in no bin.
        quartiles: Minimum, first quartile, median, third quartile and maximum of the values in bins; empty without any.
    """

    step: int
    first: int
    counts: list[int]
    zeros: int
    not_finite: int
    quartiles: list[float]


def count_values(values: Tensor, step: int, bins_per_decade: int) -> HistogramRow:
    """Count values in logarithmic bins; see ``HistogramRow``.

    Args:
        values: At least one value, in any shape.
        step: Optimizer step of the row.
        bins_per_decade: Number of bins per decade, at least 1.
    """
    flat = values.detach().reshape(-1).cpu()
    finite = flat[flat.isfinite()]
    positive = finite[finite > 0]
    found: dict[int, int] = {}
    for part in positive.split(_CHUNK):
        bins = torch.floor(part.double().log10() * bins_per_decade).long()
        for number, count in zip(*(t.tolist() for t in bins.unique(return_counts=True)), strict=True):
            found[number] = found.get(number, 0) + count
    first = min(found, default=0)
    counts = [found.get(number, 0) for number in range(first, max(found, default=-1) + 1)]
    quartiles = np.quantile(positive.double().numpy(), (0, 0.25, 0.5, 0.75, 1)).tolist() if len(positive) else []
    return HistogramRow(step, first, counts, len(finite) - len(positive), len(flat) - len(finite), quartiles)


def choose_weight(model: nn.Module, layer: str | None) -> Tensor:
    """Weight of the layer of this name.

    Raises:
        ValueError: The model has no such layer, or it has no trainable weight; the message lists those that do.
    """
    weights = weights_by_layer(model)
    if layer not in weights:
        hint = "" if layer is None else did_you_mean(layer, weights)
        given = "--layer is missing" if layer is None else f"--layer is {layer!r}, which has no trainable weight{hint}"
        raise ValueError(f"{given}; layers that can be named: {', '.join(weights)}")
    return weights[layer]


def fisher_values(optimizer: Any, weight: Tensor) -> Tensor:
    """AdaFisher's damped, normalised diagonal; RuntimeError without statistics."""
    return optimizer.fisher_diagonal(weight)


def second_moment(optimizer: Any, weight: Tensor) -> Tensor:
    """Adam's moving average of squared gradients, bias-corrected: ``v / (1 - beta2^t)``.

    Raises:
        RuntimeError: The optimizer has none of the weight's shape.
    """
    state: dict[str, Any] = optimizer.state.get(weight, {})
    moment = state.get("exp_avg_sq")
    group = next(group for group in optimizer.param_groups if any(p is weight for p in group["params"]))
    if moment is None or moment.shape != weight.shape or "betas" not in group:
        raise RuntimeError("there is no exp_avg_sq of the weight's shape")
    count = state.get("step", group.get("step", group.get("k")))
    return moment.detach().double() / (1.0 - group["betas"][1] ** float(count))


def prepare_pair(settings: HistogramSettings) -> list[tuple[PreparedRun, Values]]:
    """Prepare both runs with the functions that read their values, and check optimizers, layer, start and data.

    Raises:
        ValueError: Optimizers without a Fisher diagonal or a second moment, no such layer, an argument that changes the
            start or the data of the second run, several processes, or an error of ``prepare_run``.
    """
    chosen, peer = settings.optimizers or (None, None)

    first = prepare_papers_run(settings.task, settings.steps, settings.output, chosen, settings.further)
    name = optimizer_name(first.training_args)
    if name not in PEERS:
        raise ValueError(f"the first optimizer is {name!r}; it must be adafisher or adafisherw, whose F is drawn")
    choose_weight(first.model, settings.layer)
    peer = peer or (PEERS[name] if settings.task == "digits" else f"{PEERS[name]}:{_PEER_RATE}")
    second = prepare_run(settings.task, settings.steps, settings.output, peer, settings.further)
    check_second_moment(second)
    check_same_start({chosen or name: first, peer: second})
    return [(first, fisher_values), (second, second_moment)]


def check_second_moment(run: PreparedRun) -> None:
    """Refuse an optimizer without a second moment, found by one step of a tiny layer."""
    name, args = optimizer_name(run.training_args), run.training_args
    refusal = f"the second optimizer is {name!r}, which has no exp_avg_sq of a weight's values; use adam, adamw or lamb"
    if name in _ROTATED:
        raise ValueError(refusal)
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Using backward\\(\\) with create_graph=True")
        layer = nn.Linear(4, 3)
        tiny = nn.Sequential(layer)
        if name in available_optimizers():
            optimizer: Any = create_optimizer(name, tiny, lr=args.learning_rate, **args.optimizer_options())
        else:
            cls, options = Trainer.get_optimizer_cls_and_kwargs(args)
            optimizer = cls(tiny.parameters(), **options)
        getattr(optimizer, "train", lambda: None)()
        tiny(torch.randn(2, 4)).square().sum().backward(create_graph=getattr(optimizer, "needs_graph", False))
        optimizer.step()
    try:
        second_moment(optimizer, layer.weight)
    except RuntimeError as error:
        raise ValueError(refusal) from error


def collect_histograms(settings: HistogramSettings) -> dict[str, Any]:
    """Train both optimizers and count the weight's values, which does not change the runs.

    Returns:
        The numbers that ``draw_histograms`` draws and the JSON file holds.

    Raises:
        ValueError: See ``prepare_pair``, all before any training; a layer that gets no gradient.
    """
    runs = prepare_pair(settings)
    weight = choose_weight(runs[0][0].model, settings.layer)
    args = runs[0][0].training_args
    provenance = {"task": settings.task, "layer": settings.layer, "shape": list(weight.shape), "steps": settings.steps}
    provenance |= {"bins_per_decade": settings.bins_per_decade, "seed": args.seed, **runs[0][0].describe()}
    panels = []
    while runs:
        run, values = runs.pop(0)  # frees its model and optimizer while the next one trains
        panels.append(collect_panel(settings, run, values))
    panels[0]["damping"] = args.optimizer_options()["damping"]
    return {**provenance, "panels": panels}


def collect_panel(settings: HistogramSettings, run: PreparedRun, values: Values) -> dict[str, Any]:
    """Train one optimizer and count the values of its rows."""
    rows: list[HistogramRow] = []

    def count(step: int, model: nn.Module, optimizer: Any) -> None:
        try:
            found = values(optimizer, choose_weight(model, settings.layer))
        except RuntimeError as error:
            raise ValueError(f"layer {settings.layer!r} got no gradient in {step} steps: {error}") from error
        rows.append(count_values(found, step, settings.bins_per_decade))

    watch = StopOnDivergence()
    trainer = run.new_trainer([StepCallback(settings.row_steps, count), watch])  # sets the seed: same order of the data
    trainer.train()
    first = min((row.first for row in rows if row.counts), default=0)
    last = max((row.first + len(row.counts) for row in rows if row.counts), default=0)
    shown = []
    for row in rows:
        padded = [0] * (row.first - first) + row.counts if row.counts else []
        shown.append({**asdict(row), "counts": padded + [0] * (last - first - len(padded))})
        del shown[-1]["first"]
    return {
        "optimizer": optimizer_name(run.training_args),
        "learning_rate": run.training_args.learning_rate,
        "diverged_at": watch.diverged_at,
        "log10_edges": [number / settings.bins_per_decade for number in range(first, last + 1)],
        "rows": shown,
    }
