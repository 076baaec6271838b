"""How the Fisher diagonal's values are spread while a layer trains, beside Adam's second moment (AdaFisher, Fig. 4).

The paper's figure shows that the values by which AdaFisher divides lie close together, where Adam's second moment runs
over many orders of magnitude.
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

from hf_adafisher.experiments.figures.runs import (
    AtSteps,
    OptimizerChoice,
    check_same_start,
    optimizer_choice,
    prepare_run,
)
from hf_adafisher.experiments.runs.callbacks import StopOnDivergence
from hf_adafisher.experiments.runs.run import PreparedRun
from hf_adafisher.optimizers.factory.create import available_optimizers, create_optimizer, did_you_mean
from hf_adafisher.training.arguments import optimizer_name

ROWS = 50
"""About so many rows, unless told otherwise."""
PEERS = {"adafisher": "adam", "adafisherw": "adamw"}
"""Whose moment is drawn beside AdaFisher(W)'s diagonal."""
_PEER_RATE = "learning_rate=0.001"
"""Its learning rate where ``prepare_run`` knows no better one: Trainer's own default, 5e-5, is for fine-tuning."""
_ROTATED = frozenset({"soap"})
"""Optimizers whose second moment is not that of the weight's own values, but of their combinations."""
_CHUNK = 1 << 22

Values = Callable[[Any, Tensor], Tensor]


@dataclass(frozen=True)
class HistogramSettings:
    """What to train and what to draw.

    Attributes:
        task: one of ``runs.TASKS``.
        output: the picture.
        layer: name of the module whose ``weight`` is looked at.
        optimizers: two of them, as ``runs.optimizer_choice`` reads them: AdaFisher or AdaFisherW, and one with a second
            moment; None for the one that fits the network, and Adam or AdamW at a learning rate of 0.001, on the digits
            at the best of those tried there.
        steps: optimizer steps of each of the two runs, at least 1.
        every: steps between two rows, from 1 to ``steps``; None for about 50 rows.
        bins_per_decade: at least 1.
        further: arguments of both runs.

    Raises:
        ValueError: a value outside its range.
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
        for name in ("steps", "bins_per_decade"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} is {getattr(self, name)}; it must be at least 1")
        if self.every is not None and not 1 <= self.every <= self.steps:
            raise ValueError(f"--every is {self.every}; it must be in 1..{self.steps}, the number of steps")
        if self.optimizers is not None and len(self.optimizers) != 2:
            raise ValueError(f"--optimizers has {len(self.optimizers)} names; give two, such as adafisher adam")

    @property
    def row_steps(self) -> list[int]:
        """After which steps the values are counted; the last one is always among them."""
        every = self.every or max(1, round(self.steps / ROWS))
        return sorted({*range(every, self.steps + 1, every), self.steps})


@dataclass(frozen=True)
class Row:
    """The values of one step.

    Attributes:
        step: optimizer step after which they were counted.
        first: the first bin's number; bin ``k`` of ``b`` per decade holds ``10^(k/b) <= value < 10^((k+1)/b)``.
        counts: values in that bin and those after it.
        zeros: values of zero (or below), in no bin.
        not_finite: values that are infinite or not a number, in no bin.
        quartiles: smallest, first quartile, median, third quartile and largest of the values in bins; empty where
            there are none.
    """

    step: int
    first: int
    counts: list[int]
    zeros: int
    not_finite: int
    quartiles: list[float]


def count_values(values: Tensor, step: int, bins_per_decade: int) -> Row:
    """Counts values in logarithmic bins; see ``Row``.

    Args:
        values: of any shape, at least one.
        step: for the row.
        bins_per_decade: at least 1.
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
    return Row(step, first, counts, len(finite) - len(positive), len(flat) - len(finite), quartiles)


def weights_by_layer(model: nn.Module) -> dict[str, Tensor]:
    """The trainable weights of a model, of at least two values, by the names of the modules that own them."""
    owned = {name: module._parameters.get("weight") for name, module in model.named_modules() if name}
    return {name: p for name, p in owned.items() if p is not None and p.requires_grad and p.numel() > 1}


def choose_weight(model: nn.Module, layer: str | None) -> Tensor:
    """The weight of a layer.

    Raises:
        ValueError: there is no such layer, or it has no weight that trains; the message lists those that do.
    """
    weights = weights_by_layer(model)
    if layer not in weights:
        hint = "" if layer is None else did_you_mean(layer, weights)
        given = "--layer is missing" if layer is None else f"--layer is {layer!r}, which has no trainable weight{hint}"
        raise ValueError(f"{given}; layers that can be named: {', '.join(weights)}")
    return weights[layer]


def fisher_values(optimizer: Any, weight: Tensor) -> Tensor:
    """AdaFisher's damped, normalised diagonal; raises RuntimeError without statistics."""
    return optimizer.fisher_diagonal(weight)


def second_moment(optimizer: Any, weight: Tensor) -> Tensor:
    """Adam's moving average of squared gradients, bias-corrected: ``v / (1 - beta2^t)``.

    Raises:
        RuntimeError: the optimizer has none of the weight's shape.
    """
    state: dict[str, Any] = optimizer.state.get(weight, {})
    moment = state.get("exp_avg_sq")
    group = next(group for group in optimizer.param_groups if any(p is weight for p in group["params"]))
    if moment is None or moment.shape != weight.shape or "betas" not in group:
        raise RuntimeError("there is no exp_avg_sq of the weight's shape")
    count = state.get("step", group.get("step", group.get("k")))
    return moment.detach().double() / (1.0 - group["betas"][1] ** float(count))


def prepare_pair(settings: HistogramSettings) -> list[tuple[PreparedRun, Values]]:
    """Both runs, and how the values of each are read; all inputs checked: same start, same data.

    Raises:
        ValueError: optimizers without a Fisher diagonal or a second moment, no such layer, an argument that would let
            the second run start elsewhere or see other data, several processes, and what ``runs.prepare_run`` refuses.
    """
    given = settings.optimizers or (None, None)

    def prepared(text: str | None) -> PreparedRun:
        choice: OptimizerChoice | None = None if text is None else optimizer_choice(text)
        return prepare_run(settings.task, settings.steps, settings.output, choice, settings.further)

    first = prepared(given[0])
    name = optimizer_name(first.training_args)
    if name not in PEERS:
        raise ValueError(f"the first optimizer is {name!r}; it must be adafisher or adafisherw, whose F is drawn")
    choose_weight(first.model, settings.layer)
    peer = given[1] or (PEERS[name] if settings.task == "digits" else f"{PEERS[name]}:{_PEER_RATE}")
    second = prepared(peer)
    check_second_moment(second)
    check_same_start({given[0] or name: first, peer: second})
    return [(first, fisher_values), (second, second_moment)]


def check_second_moment(run: PreparedRun) -> None:
    """Raises ValueError unless the run's optimizer has a second moment, as one step of a tiny layer shows."""
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
    """Trains both optimizers and counts the weight's values; the trainings are what they would be without that.

    Returns:
        What ``draw_histograms`` draws and the JSON file holds.

    Raises:
        ValueError: see ``prepare_pair``, all before any training; a layer that gets no gradient.
    """
    runs = prepare_pair(settings)
    weight = choose_weight(runs[0][0].model, settings.layer)
    told = {"task": settings.task, "layer": settings.layer, "shape": list(weight.shape), "steps": settings.steps}
    told |= {"bins_per_decade": settings.bins_per_decade, "seed": runs[0][0].training_args.seed}
    damping = runs[0][0].training_args.optimizer_options()["damping"]
    told |= runs[0][0].describe()
    panels = []
    while runs:
        run, values = runs.pop(0)  # its model and optimizer are not needed while the next one trains
        panels.append(collect_panel(settings, run, values))
    panels[0]["damping"] = damping
    return {**told, "panels": panels}


def collect_panel(settings: HistogramSettings, run: PreparedRun, values: Values) -> dict[str, Any]:
    """Trains one optimizer and counts the values of its rows."""
    rows: list[Row] = []

    def count(step: int, model: nn.Module, optimizer: Any) -> None:
        try:
            found = values(optimizer, choose_weight(model, settings.layer))
        except RuntimeError as error:
            raise ValueError(f"layer {settings.layer!r} got no gradient in {step} steps: {error}") from error
        rows.append(count_values(found, step, settings.bins_per_decade))

    watch = StopOnDivergence()
    trainer = run.new_trainer([AtSteps(settings.row_steps, count), watch])  # sets the seed: same order of the data
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
