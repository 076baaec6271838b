"""SpectralAdaFisher and its slow twin, step by step, from the same weights and over the same batches, in float64."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from hf_adafisher import SpectralAdaFisher
from tests.cases import CASES, Case, Head, mlp, regression
from tests.model_zoo import family
from tests.optimizers.test_lockstep import Pair, float64_model, run
from tests.reference import ReferenceSpectralAdaFisher, kind_of
from tests.training_helper import of_case, of_family

OPTIONS: dict[str, Any] = {
    "lr": 0.02,
    "beta": 0.9,
    "relative_damping": 0.1,
    "ema_decay": 0.8,
    "update_interval": 3,
    "weight_decay": 0.05,
}


def between(model: nn.Module) -> dict[Tensor, bool]:
    """Hidden matrices of a model without a config: those of layers but the first convolution and the last layer."""
    layers = [module for module in model.modules() if kind_of(module) in ("linear", "conv1d", "conv")]
    outside = [module.weight for module in model.modules() if kind_of(module) == "embedding"]
    outside += [*[layer.weight for layer in layers if kind_of(layer) == "conv"][:1], layers[-1].weight]
    hidden = {}
    for layer in layers:
        grouped = getattr(layer, "groups", 1) > 1
        if not grouped and not parametrize.is_parametrized(layer) and all(layer.weight is not w for w in outside):
            hidden[layer.weight] = kind_of(layer) == "conv1d"
    return hidden


def named(pattern: str) -> Any:
    """Hidden matrices of a transformers model: the weights of more than one axis whose whole name fits."""

    def find(model: nn.Module) -> dict[Tensor, bool]:
        return {
            module.weight: kind_of(module) == "conv1d"
            for name, module in model.named_modules()
            if re.fullmatch(pattern, name) and kind_of(module) in ("linear", "conv1d", "conv")
        }

    return find


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    """Matrices decay; vectors do not, and are damped a little more."""
    trainable = [param for param in model.parameters() if param.requires_grad]
    return [
        {"params": [param for param in trainable if param.dim() > 1]},
        {"params": [param for param in trainable if param.dim() <= 1], "weight_decay": 0.0, "relative_damping": 0.3},
    ]


class SpectralPair(Pair):
    """A model under SpectralAdaFisher, and a copy of it under the twin."""

    def __init__(self, model: nn.Module, hidden: Any = between, **options: Any) -> None:
        self.model, self.twin_model = model, copy.deepcopy(model)
        options = OPTIONS | options
        self.optimizer: Any = SpectralAdaFisher(self.model, groups_of(self.model), **options)
        options.pop("spectral_heads", None)  # the twin is told what moves as a matrix
        self.twin: Any = ReferenceSpectralAdaFisher(
            self.twin_model, groups_of(self.twin_model), hidden=hidden(self.twin_model), **options
        )


CLOSE: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-10}
"""A thousandth of what one step moves is far above it: the iteration makes rounding a few hundred times larger."""


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_cases(case: Case) -> None:
    """Five steps of every awkward model, refreshes at the first and at the fourth."""
    run(SpectralPair(case.build().double()), of_case(case.loss), steps=5, check_every=1, **CLOSE)


def test_a_layer_that_joins_between_two_refreshes() -> None:
    """Its curvature is that of each step's own gradient, three steps long, before the layer's rule takes over."""
    case = next(case for case in CASES if case.name == "used_late")
    pair = SpectralPair(case.build().double(), update_interval=5)
    run(pair, of_case(case.loss), steps=7, check_every=1, **CLOSE)


class TwoUses(nn.Module):
    """A hidden matrix that two layers share, and a convolution's weight, behind the first, that two others share."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.near, self.far = nn.Conv2d(2, 3, 1), nn.Conv2d(3, 4, 2), nn.Conv2d(3, 4, 2, dilation=2)
        self.far.weight = self.near.weight
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.head = Head(4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.stem(x))
        x = torch.tanh(self.near(x)[..., :3, :3] * self.far(x)).movedim(1, -1)
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))).movedim(-1, 1))


def test_uses_of_one_matrix_add_up() -> None:
    run(SpectralPair(TwoUses().double()), of_case(regression(2, 2, 5, 5)), steps=5, check_every=1, **CLOSE)


@pytest.mark.parametrize("exponents", [(0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (0.25, 0.75)])
@pytest.mark.parametrize("name", ["mlp", "transposed_linear", "conv_batch_norm"])
def test_exponents(name: str, exponents: tuple[float, float]) -> None:
    """Of the input and of the output factor, whichever axis they lie along."""
    case = next(case for case in CASES if case.name == name)
    options = dict(zip(("input_exponent", "output_exponent"), exponents, strict=True))
    run(SpectralPair(case.build().double(), **options), of_case(case.loss), steps=3, check_every=2, **CLOSE)


def test_momentum_of_the_present() -> None:
    """Instead of Nesterov's, one step ahead."""
    run(SpectralPair(mlp(5, 8, 7, 3).double(), nesterov=False), of_case(regression(9, 5)), 5, 4, **CLOSE)


@pytest.mark.parametrize("most", [None, 0.05, 0.002])
@pytest.mark.parametrize("name", ["tied", "conv_batch_norm", "bare_parameter"])
def test_bounds_of_steps(name: str, most: float | None) -> None:
    """None, the default's, which some steps reach, and one that all matrices and tables reach."""
    case = next(case for case in CASES if case.name == name)
    run(SpectralPair(case.build().double(), max_relative_step=most), of_case(case.loss), 5, 1, **CLOSE)


def heads_too(model: nn.Module) -> dict[Tensor, bool]:
    """Hidden matrices, and a head: the weight of the embedding, where it is tied to that."""
    return between(model) | {model.head.weight: False}


@pytest.mark.parametrize("name", ["tied", "untied", "padding_idx_tied"])
def test_spectral_heads(name: str) -> None:
    case = next(case for case in CASES if case.name == name)
    pair = SpectralPair(case.build().double(), heads_too, spectral_heads=True)
    run(pair, of_case(case.loss), steps=5, check_every=4, **CLOSE)


def test_fifty_steps_and_changing_options() -> None:
    """A schedule writes into the groups between steps; both sides follow."""
    pair = SpectralPair(mlp(5, 8, 7, 3).double())
    loss = of_case(regression(9, 5))
    for step in range(50):
        for group in (*pair.optimizer.param_groups, *pair.twin.groups):
            group["lr"] = 0.02 / (1 + step)
            group["weight_decay"] = 0.01 * step
        pair.step(loss, step)
        pair.assert_equal_parameters(step, **CLOSE)
    pair.assert_equal_diagonals(step, **CLOSE)


def test_micro_batches_of_different_sizes() -> None:
    """Three backward passes a step: their positions add up, whatever their sizes."""

    def loss(model: nn.Module, step: int) -> Tensor:
        parts = [regression(rows, 5)(model, torch.Generator().manual_seed(10 * step + rows)) for rows in (2, 7, 4)]
        for part in parts[:-1]:
            part.backward()
        return parts[-1]

    run(SpectralPair(mlp(5, 8, 3).double()), loss, steps=5, check_every=1, **CLOSE)


HIDDEN = {
    "gpt2": r"transformer\.h\.\d\.(attn|mlp)\.c_\w+",
    "llama": r"model\.layers\.\d\.(self_attn|mlp)\.\w+",
    "bert": r"bert\.(encoder\.layer\.\d\..*dense|.*query|.*key|.*value|pooler\.dense)",
    "resnet": r"resnet\.encoder\..*convolution",
}


@pytest.mark.parametrize("name", HIDDEN)
def test_transformers(name: str) -> None:
    """Tied head and Conv1D; RMSNorm and grouped queries; a classification head; convolutions."""
    record = family(name)
    pair = SpectralPair(float64_model(record), named(HIDDEN[name]))
    run(pair, of_family(record, n=3, seq=8), steps=5, check_every=4, **CLOSE)


def test_float32() -> None:
    """The same in float32 over a few steps: the twin stays in float64."""
    record = family("gpt2")
    pair = SpectralPair(float64_model(record).float(), named(HIDDEN["gpt2"]))
    run(pair, of_family(record, n=3, seq=8), steps=3, check_every=2, rtol=1e-4, atol=1e-5, check_dtype=False)
