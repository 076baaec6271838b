"""The optimizer and its slow twin, step by step, from the same weights and over the same batches.

Models are float64. The package keeps statistics of float64 models in float64 (float32 for every other dtype),
so the default tolerances of float64 hold unless a test says why not.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from hf_adafisher import AdaFisher, AdaFisherW
from tests.cases import CASES, Case, mlp, regression
from tests.model_zoo import FAMILIES, Family, family
from tests.reference import ReferenceAdaFisher
from tests.training_helper import StepLoss, of_case, of_family

OPTIONS: dict[str, Any] = {
    "lr": 0.02,
    "beta": 0.9,
    "damping": 0.1,
    "ema_decay": 0.8,
    "update_interval": 3,
    "weight_decay": 0.05,
}
FORMS = pytest.mark.parametrize("optimizer_class", [AdaFisher, AdaFisherW])


def told(where: str) -> Callable[[str], str]:
    """Puts the place of a mismatch before its description."""
    return lambda text: f"{where}: {text}"


def decay_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Matrices decay; vectors do not, and are damped a little more."""
    trainable = [param for param in model.parameters() if param.requires_grad]
    return [
        {"params": [param for param in trainable if param.dim() > 1]},
        {"params": [param for param in trainable if param.dim() <= 1], "weight_decay": 0.0, "damping": 0.2},
    ]


class Pair:
    """A model under the package's optimizer, and a copy of it under the twin."""

    def __init__(self, model: nn.Module, optimizer_class: type[AdaFisher], **options: Any) -> None:
        self.model, self.twin_model = model, copy.deepcopy(model)
        options = OPTIONS | options
        self.optimizer = optimizer_class(self.model, decay_groups(self.model), **options)
        self.twin = ReferenceAdaFisher(
            self.twin_model,
            decay_groups(self.twin_model),
            decoupled=optimizer_class is AdaFisherW,
            **options,
        )

    def step(self, loss: StepLoss, step: int) -> None:
        """The same step on both sides."""
        self.optimizer.zero_grad()
        loss(self.model, step).backward()
        self.optimizer.step()
        self.twin.zero_grad()
        loss(self.twin_model, step).backward()
        self.twin.step()

    def parameters(self) -> Iterator[tuple[str, nn.Parameter, nn.Parameter]]:
        """Name, parameter, the twin's parameter."""
        twins = self.twin_model.parameters()
        for (name, param), twin in zip(self.model.named_parameters(), twins, strict=True):
            yield name, param, twin

    def assert_equal_parameters(self, step: int, **tolerance: Any) -> None:
        """All of them, the frozen ones included."""
        for name, param, twin in self.parameters():
            assert_close(param, twin, **tolerance, msg=told(f"{name}, step {step}"))

    def assert_equal_diagonals(self, step: int, **tolerance: Any) -> None:
        """Of every parameter that has had a gradient, normalised and raw."""
        for name, param, twin in self.parameters():
            if not self.twin.slots.get(twin) or not self.twin.slots[twin].step:
                continue
            for normalized in (True, False):
                if not normalized and self.twin.slots[twin].provisional:
                    continue
                ours = self.optimizer.fisher_diagonal(param, normalized=normalized)
                assert ours.shape == param.shape, name
                assert_close(
                    ours,
                    self.twin.fisher_diagonal(twin, normalized=normalized),
                    **tolerance,
                    msg=told(f"diagonal of {name}, step {step}, normalized={normalized}"),
                )


def float64_model(record: Family) -> nn.Module:
    """A model of the family in float64, with weights large enough for every layer to matter.

    The usual initial weights of 0.02 leave a tiny model's attention with hardly a gradient, so they are
    multiplied by ten; T5's are large already. Fused kernels for experts know no float64: they run one by one.
    """
    model = record.build()
    model.set_experts_implementation("eager")
    if record.name != "t5":
        with torch.no_grad():
            for param in model.parameters():
                if param.dim() > 1:
                    param.mul_(10)
    return model.double()


def run(pair: Pair, loss: StepLoss, steps: int, check_every: int, **tolerance: Any) -> None:
    """Step and compare: the parameters always, the diagonals every `check_every` steps and at the last."""
    for step in range(steps):
        pair.step(loss, step)
        pair.assert_equal_parameters(step, **tolerance)
        if step % check_every == 0 or step == steps - 1:
            pair.assert_equal_diagonals(step, **tolerance)


@FORMS
def test_mlp(optimizer_class: type[AdaFisher]) -> None:
    """Fifty steps of an MLP."""
    pair = Pair(mlp(5, 8, 7, 3).double(), optimizer_class)
    run(pair, of_case(regression(9, 5)), steps=50, check_every=4)


@FORMS
def test_changing_options(optimizer_class: type[AdaFisher]) -> None:
    """A schedule writes into the groups between steps; both sides follow."""
    pair = Pair(mlp(5, 8, 3).double(), optimizer_class)
    loss = of_case(regression(9, 5))
    for step in range(12):
        for group in (*pair.optimizer.param_groups, *pair.twin.groups):
            group["lr"] = 0.02 / (1 + step)
            group["weight_decay"] = 0.01 * step
        pair.step(loss, step)
        pair.assert_equal_parameters(step)
    pair.assert_equal_diagonals(step)


@FORMS
def test_micro_batches_of_different_sizes(optimizer_class: type[AdaFisher]) -> None:
    """Three backward passes a step: one refresh over all positions of all of them, whatever their sizes."""

    def loss(model: nn.Module, step: int) -> Tensor:
        parts = [regression(rows, 5)(model, torch.Generator().manual_seed(10 * step + rows)) for rows in (2, 7, 4)]
        for part in parts[:-1]:
            part.backward()
        return parts[-1]

    run(Pair(mlp(5, 8, 3).double(), optimizer_class), loss, steps=8, check_every=1)


@FORMS
def test_only_forwards_that_train_count(optimizer_class: type[AdaFisher]) -> None:
    """Evaluation and forwards without a backward leave no trace; a backward in eval mode trains as any other (E19)."""
    train = regression(6, 5)

    def loss(model: nn.Module, step: int) -> Tensor:
        generator = torch.Generator().manual_seed(step)
        with torch.no_grad():
            train(model, generator)
        train(model, generator)
        model.eval()
        (100 * train(model, generator)).backward()
        model.train()
        return train(model, generator)

    run(Pair(mlp(5, 8, 3).double(), optimizer_class), loss, steps=5, check_every=1)


def test_float32() -> None:
    """The same in float32, with its default tolerances, over a few steps: the twin stays in float64."""
    record = family("gpt2")
    pair = Pair(float64_model(record).float(), AdaFisherW)
    loss = of_family(record, n=3, seq=8)
    for step in range(4):
        pair.step(loss, step)
        for name, param, twin in pair.parameters():
            assert param.dtype == torch.float32
            ours, theirs = pair.optimizer.fisher_diagonal(param), pair.twin.fisher_diagonal(twin)
            assert ours.dtype == torch.float32
            assert_close(ours, theirs.float(), msg=told(f"diagonal of {name}, step {step}"))
    pair.assert_equal_parameters(step)


@FORMS
@pytest.mark.parametrize("name", ["gpt2", "llama", "bert"])
def test_transformers(name: str, optimizer_class: type[AdaFisher]) -> None:
    """Fifty steps: a tied head and Conv1D; RMSNorm and grouped queries; a classification head."""
    record = family(name)
    pair = Pair(float64_model(record), optimizer_class)
    run(pair, of_family(record, n=3, seq=8), steps=50, check_every=10)


@FORMS
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_cases(case: Case, optimizer_class: type[AdaFisher]) -> None:
    """Eight steps of every awkward model."""
    run(Pair(case.build().double(), optimizer_class), of_case(case.loss), steps=8, check_every=1)


@pytest.mark.slow
@pytest.mark.parametrize("record", FAMILIES, ids=lambda record: record.name)
def test_families(record: Family) -> None:
    """Four steps of every model family, so that both kinds of step and two refreshes are seen."""
    run(Pair(float64_model(record), AdaFisherW), of_family(record, n=3, seq=8), steps=4, check_every=1)
