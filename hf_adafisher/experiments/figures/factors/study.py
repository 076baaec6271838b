"""Study of the full Kronecker factors of a model's layers during its training."""

from __future__ import annotations

import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_adafisher.experiments.figures.command_line import require_at_least
from hf_adafisher.experiments.figures.factors.full_factors import (
    SIDES,
    SYMBOLS,
    DiagonalDominance,
    FactorLayer,
    LayerFactors,
    Spectrum,
    collect_factors,
    factor_layers,
    gershgorin_disks,
    spectrum_of,
)
from hf_adafisher.experiments.figures.training_run import (
    StepCallback,
    fixed_batches,
    prepare_run,
    trainable_weight,
)
from hf_adafisher.fisher.layers import find_rule
from hf_adafisher.fisher.layers.conv import ConvRule
from hf_adafisher.training.arguments import optimizer_name


@dataclass(frozen=True)
class FactorSettings:
    """Settings of the training run and of its factors.

    Attributes:
        task: One of ``command_line.TASKS``.
        output: File of the picture.
        layer: Name of the module to draw; None for the middle one of those whose factors are both full.
        optimizer: As ``prepare_run`` reads it; None for the script's own choice.
        steps: Optimizer steps of the factors, ascending; the last one ends training and its learning rate schedule.
        examples: Number of training examples, without augmentation, evenly spread, fixed for all steps.
        noise: Standard deviation of the noise off the diagonal, as a share of the mean diagonal entry.
        max_dim: Longest side of a factor that is computed in full.
        all_layers: Measure every layer, not only the one to draw.
        disks: Largest number of Gershgorin disks to draw of a factor: those with the largest radii.
        further: Arguments of the run.

    Raises:
        ValueError: A value outside its range.
    """

    task: str
    output: Path
    layer: str | None = None
    optimizer: str | None = None
    steps: Sequence[int] = (50, 200)
    examples: int = 512
    noise: float = 1e-3
    max_dim: int = 4096
    all_layers: bool = True
    disks: int = 100
    further: Sequence[str] = ()

    def __post_init__(self) -> None:
        steps = list(self.steps)
        if not steps or steps[0] < 1 or any(after <= before for before, after in pairwise(steps)):
            raise ValueError(f"--steps are {steps}; give numbers from 1 on that rise, such as --steps 50 200")
        if not (math.isfinite(self.noise) and self.noise >= 0.0):
            raise ValueError(f"--noise is {self.noise}; it must be finite and at least 0 (0 adds nothing)")
        require_at_least(self, examples=1, max_dim=1, disks=1)


@dataclass(frozen=True)
class DrawnFactor:
    """One factor of the layer to draw, at one step.

    Attributes:
        step: Optimizer step after which it was computed.
        side: ``INPUT`` or ``OUTPUT_GRAD``.
        dominance: Its diagonal dominance.
        centres: Centres of its Gershgorin disks, shape (d,).
        radii: Radii of the disks, shape (d,).
        spectrum: Its eigenvalues.
        by_nature: True for a factor that is diagonal by nature, as the input factor of an Embedding.
    """

    step: int
    side: str
    dominance: DiagonalDominance
    centres: Tensor
    radii: Tensor
    spectrum: Spectrum
    by_nature: bool


@dataclass(frozen=True)
class MeasuredLayer:
    """Diagonal dominance of one layer's factors at one step.

    Attributes:
        name: Name of the module.
        kind: Name of its rule.
        dimensions: Dimension d of both factors, by side.
        positions: Number of positions N.
        dominance: By side; without factors longer than max_dim.
        note: Properties that the numbers depend on; may be empty.
    """

    name: str
    kind: str
    dimensions: Mapping[str, int]
    positions: int
    dominance: Mapping[str, DiagonalDominance]
    note: str


@dataclass(frozen=True)
class FactorStudy:
    """Factors of a training run.

    Attributes:
        title: Model, data and optimizer.
        layer: Name of the layer to draw.
        settings: Settings of the study.
        examples: Number of examples that were used.
        drawn: Factors of the layer, step by step, the input's first.
        layers: All measured layers, by step.
        skipped: Reasons by the names of layers that have a rule but no factors.
    """

    title: str
    layer: str
    settings: FactorSettings
    examples: int
    drawn: list[DrawnFactor]
    layers: dict[int, list[MeasuredLayer]]
    skipped: dict[str, str]


def choose_layer(model: nn.Module, settings: FactorSettings) -> FactorLayer:
    """Choose the layer to draw.

    Raises:
        ValueError: No such layer, or neither of its factors is small enough; the message lists those that are.
    """
    name, max_dim = settings.layer, settings.max_dim
    layers = factor_layers(model, max_dim)
    drawable = {key: layer for key, layer in layers.items() if len(layer.too_long) < len(SIDES)}
    if not drawable:
        raise ValueError(f"no layer of this model has a Kronecker factor of at most {max_dim} (--max_dim) rows")
    if name is None:
        full = [layer for layer in drawable.values() if not layer.too_long and not layer.by_nature]
        candidates = full or list(drawable.values())
        return candidates[len(candidates) // 2]
    if name not in drawable:
        why = f"both factors are longer than --max_dim {max_dim}" if name in layers else "there is none"
        raise ValueError(f"--layer is {name!r}: {why}; layers that can be named: {', '.join(drawable)}")
    return drawable[name]


def study_factors(settings: FactorSettings) -> FactorStudy:
    """Train, and compute the factors after the chosen steps, which does not change the training.

    Raises:
        ValueError: No such layer, an error of ``prepare_run``, or factors that are not finite.
    """
    run = prepare_run(settings.task, max(settings.steps), settings.output, settings.optimizer, settings.further)
    layer = choose_layer(run.model, settings)
    trainer = run.new_trainer([])
    with torch.random.fork_rng():  # a data loader draws a seed
        batches = fixed_batches(trainer, trainer.train_dataset, settings.examples)  # type: ignore[arg-type]
    drawn: list[DrawnFactor] = []
    layers: dict[int, list[MeasuredLayer]] = {}
    skipped: dict[str, str] = {}

    def loss_of(model: nn.Module, batch: dict[str, Any]) -> Tensor:
        with trainer.compute_loss_context_manager():
            loss = trainer.compute_loss(model, batch)
        assert isinstance(loss, Tensor)  # without return_outputs it is one
        return loss

    def observe(step: int, model: nn.Module, _: Any) -> None:
        only = None if settings.all_layers else layer.name
        found = collect_factors(model, batches, loss_of, settings.max_dim, only, not trainer.args.disable_tqdm)
        if layer.name not in found:
            raise ValueError(
                f"layer {layer.name!r} records nothing: the model does not call it, or it computes something else "
                f"than its class; layers that do: {', '.join(found)}"
            )
        layers[step] = [measure_layer(factors) for factors in found.values()]
        drawn.extend(draw_factors(step, found[layer.name], settings.noise))
        if settings.all_layers:
            skipped.update(skipped_layers(model, found))

    trainer.add_callback(StepCallback(settings.steps, observe))
    trainer.train()
    about = run.describe()
    title = f"{about['model']['type']} on {about['corpus']['name']}, {optimizer_name(run.training_args)}"
    return FactorStudy(title, layer.name, settings, sum(len(b["labels"]) for b in batches), drawn, layers, skipped)


def draw_factors(step: int, factors: LayerFactors, noise: float) -> list[DrawnFactor]:
    """Disks and spectra of a layer's factors, without those that are too long."""
    drawn = []
    for side, dominance in factors.dominance().items():
        moment = factors.moments[side].double().cpu()
        centres, radii = gershgorin_disks(moment)
        by_nature = moment.dim() == 1
        drawn.append(DrawnFactor(step, side, dominance, centres, radii, spectrum_of(moment, noise), by_nature))
    return drawn


def measure_layer(factors: LayerFactors) -> MeasuredLayer:
    """Diagonal dominance of a layer's factors."""
    layer, notes = factors.layer, []
    dimensions = {side: len(factors.moments[side]) for side in SIDES}
    if factors.broadcast:
        notes.append("S of gradients summed over a batch")
    notes += [f"{SYMBOLS[side]} too long" for side in SIDES if side in layer.too_long]
    notes += [f"{SYMBOLS[side]} diagonal by nature" for side in SIDES if side in layer.by_nature]
    name = layer.rule.name
    return MeasuredLayer(layer.name, name, dimensions, factors.positions, factors.dominance(), ", ".join(notes))


def skipped_layers(model: nn.Module, found: Container[str]) -> dict[str, str]:
    """Trainable layers without factors, with the reason.

    Normalisation layers, whose blocks are diagonal anyway, are not named.
    """
    skipped = {}
    for name, module in model.named_modules():
        rule = find_rule(module)
        if rule is None or trainable_weight(module) is None or name in found:
            continue
        if rule.full_factor_shapes(module) is not None:
            skipped[name] = "records nothing: not called, or it computes something else than its class"
        elif isinstance(rule, ConvRule):
            skipped[name] = "a grouped convolution, which is many small layers"
    return skipped
