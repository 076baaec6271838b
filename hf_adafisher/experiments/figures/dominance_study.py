"""A training run during which the full Kronecker factors of its layers are looked at."""

from __future__ import annotations

import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_adafisher.experiments.figures.dominance import Dominance, Spectrum, gershgorin_disks, spectrum_of
from hf_adafisher.experiments.figures.full_factors import (
    SIDES,
    SYMBOLS,
    FactorLayer,
    LayerFactors,
    collect_factors,
    factor_layers,
)
from hf_adafisher.experiments.figures.runs import AtSteps, OptimizerChoice, fixed_batches, prepare_run
from hf_adafisher.fisher.layers import find_rule
from hf_adafisher.fisher.layers.conv import ConvRule
from hf_adafisher.training.arguments import optimizer_name


@dataclass(frozen=True)
class StudyOptions:
    """What is looked at, and when.

    Attributes:
        layer: name of the module to be drawn; None for the middle one of those whose factors are both full.
        steps: optimizer steps, rising; the last one ends the training, and its learning rate schedule.
        examples: of the training data, without augmentation, evenly spread, the same at every step.
        noise: standard deviation of what is added off the diagonal, as a share of the mean diagonal entry.
        max_dim: longest side of a factor that is taken in full.
        all_layers: whether every layer is measured, or only the one to be drawn.
        disks: how many Gershgorin disks are drawn of a factor, at most: those with the largest radii.

    Raises:
        ValueError: a value out of its range.
    """

    layer: str | None = None
    steps: Sequence[int] = (50, 200)
    examples: int = 512
    noise: float = 1e-3
    max_dim: int = 4096
    all_layers: bool = True
    disks: int = 100

    def __post_init__(self) -> None:
        steps = list(self.steps)
        if not steps or steps[0] < 1 or any(after <= before for before, after in pairwise(steps)):
            raise ValueError(f"steps are {steps}; give numbers from 1 on that rise, such as --steps 50 200")
        if not (math.isfinite(self.noise) and self.noise >= 0.0):
            raise ValueError(f"noise is {self.noise}; it must be finite and at least 0 (0 adds nothing)")
        for name in ("examples", "max_dim", "disks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")


@dataclass(frozen=True)
class DrawnFactor:
    """One factor of the layer to be drawn, at one step.

    Attributes:
        step: optimizer step after which it was taken.
        side: ``INPUT`` or ``OUTPUT_GRAD``.
        dominance: how much of it the diagonal is.
        centres: of its Gershgorin disks, shape (d,).
        radii: of the disks, shape (d,).
        spectrum: its eigenvalues.
        by_nature: it has nothing but its diagonal, as the input factor of an Embedding.
    """

    step: int
    side: str
    dominance: Dominance
    centres: Tensor
    radii: Tensor
    spectrum: Spectrum
    by_nature: bool


@dataclass(frozen=True)
class MeasuredLayer:
    """A layer's row of the table at one step.

    Attributes:
        name: the module's.
        kind: the name of its rule.
        dimensions: d of both factors, by side.
        positions: N.
        measures: by side; without factors longer than max_dim.
        note: what else there is to say; may be empty.
    """

    name: str
    kind: str
    dimensions: Mapping[str, int]
    positions: int
    measures: Mapping[str, Dominance]
    note: str


@dataclass(frozen=True)
class FactorStudy:
    """What ``study_factors`` found.

    Attributes:
        title: model, data and optimizer.
        layer: name of the layer that is drawn.
        options: what was asked for.
        examples: how many were used.
        drawn: the layer's factors, step by step, the input's first.
        layers: the table of every step.
        skipped: layers that have a rule but no row, and why.
    """

    title: str
    layer: str
    options: StudyOptions
    examples: int
    drawn: list[DrawnFactor]
    layers: dict[int, list[MeasuredLayer]]
    skipped: dict[str, str]


def choose_layer(model: nn.Module, options: StudyOptions) -> FactorLayer:
    """The layer to be drawn.

    Raises:
        ValueError: no such layer, or neither of its factors is small enough; the message lists those that are.
    """
    layers = factor_layers(model, options.max_dim)
    drawable = {name: layer for name, layer in layers.items() if len(layer.cut) < len(SIDES)}
    if not drawable:
        raise ValueError(f"no layer of this model has a Kronecker factor of at most {options.max_dim} (--max_dim) rows")
    if options.layer is None:
        full = [layer for layer in drawable.values() if not layer.cut and not layer.by_nature] or list(
            drawable.values()
        )
        return full[len(full) // 2]
    if options.layer not in drawable:
        why = (
            f"both factors are longer than --max_dim {options.max_dim}" if options.layer in layers else "there is none"
        )
        raise ValueError(f"layer is {options.layer!r}: {why}; layers that can be named: {', '.join(drawable)}")
    return drawable[options.layer]


def study_factors(
    task: str,
    output: Path,
    options: StudyOptions,
    optimizer: OptimizerChoice | None = None,
    further: Sequence[str] = (),
) -> FactorStudy:
    """Trains, and takes the factors after the steps asked for; the training is the one it would be without that.

    Args:
        task: see ``prepare_run``, as for the other arguments.
        output: the picture to be written later.
        options: what to look at.
        optimizer: None for the script's own choice.
        further: further arguments of the run.

    Raises:
        ValueError: the layer's name, what ``prepare_run`` refuses, and factors that are not finite.
    """
    run = prepare_run(task, max(options.steps), output, optimizer, further)
    layer = choose_layer(run.model, options)
    trainer = run.new_trainer([])
    with torch.random.fork_rng():  # a data loader draws a seed
        batches = fixed_batches(trainer, trainer.train_dataset, options.examples)  # type: ignore[arg-type]
    drawn: list[DrawnFactor] = []
    layers: dict[int, list[MeasuredLayer]] = {}
    skipped: dict[str, str] = {}

    def loss_of(model: nn.Module, batch: dict[str, Any]) -> Tensor:
        with trainer.compute_loss_context_manager():
            loss = trainer.compute_loss(model, batch)
        assert isinstance(loss, Tensor)  # without return_outputs it is one
        return loss

    def look(step: int, model: nn.Module, _: Any) -> None:
        only = None if options.all_layers else layer.name
        found = collect_factors(model, batches, loss_of, options.max_dim, only, not trainer.args.disable_tqdm)
        if layer.name not in found:
            raise ValueError(
                f"layer {layer.name!r} records nothing: the model does not call it, or it computes something else "
                f"than its class; layers that do: {', '.join(found)}"
            )
        layers[step] = [measure_layer(factors) for factors in found.values()]
        drawn.extend(draw_factors(step, found[layer.name], options.noise))
        if options.all_layers:
            skipped.update(skipped_layers(model, found))

    trainer.add_callback(AtSteps(options.steps, look))
    trainer.train()
    about = run.describe()
    title = f"{about['model']['type']} on {about['corpus']['name']}, {optimizer_name(run.training_args)}"
    return FactorStudy(title, layer.name, options, sum(len(b["labels"]) for b in batches), drawn, layers, skipped)


def draw_factors(step: int, factors: LayerFactors, noise: float) -> list[DrawnFactor]:
    """What there is to draw of a layer's factors; those that are cut are left out."""
    drawn = []
    for side, dominance in factors.measured().items():
        moment = factors.moments[side].double().cpu()
        centres, radii = gershgorin_disks(moment)
        by_nature = moment.dim() == 1
        drawn.append(DrawnFactor(step, side, dominance, centres, radii, spectrum_of(moment, noise), by_nature))
    return drawn


def measure_layer(factors: LayerFactors) -> MeasuredLayer:
    """A row of the table."""
    layer, notes = factors.layer, []
    dimensions = {side: len(factors.moments[side]) for side in SIDES}
    if factors.broadcast:
        notes.append("S of gradients summed over a batch")
    notes += [f"{SYMBOLS[side]} too long" for side in SIDES if side in layer.cut]
    notes += [f"{SYMBOLS[side]} diagonal by nature" for side in SIDES if side in layer.by_nature]
    name = layer.rule.name
    return MeasuredLayer(layer.name, name, dimensions, factors.positions, factors.measured(), ", ".join(notes))


def skipped_layers(model: nn.Module, found: Container[str]) -> dict[str, str]:
    """Trainable layers without a row and why; normalisation layers, whose blocks are diagonal anyway, are not named."""
    skipped = {}
    for name, module in model.named_modules():
        weight, rule = module._parameters.get("weight"), find_rule(module)
        if rule is None or weight is None or not weight.requires_grad or name in found:
            continue
        if rule.full_factor_shapes(module) is not None:
            skipped[name] = "records nothing: not called, or it computes something else than its class"
        elif isinstance(rule, ConvRule):
            skipped[name] = "a grouped convolution, which is many small layers"
    return skipped
