"""The root form of AdaFisher(W) and SpectralAdaFisher, and their slow twin, step by step, in float64.

The tests tell the twin which parameters are hidden matrices, embeddings and output layers.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from hf_adafisher import AdaFisher, AdaFisherW, SpectralAdaFisher
from tests.cases import CASES, Case, Experts, Head, convnet, mlp, regression
from tests.model_zoo import FAMILIES, Family, family
from tests.optimizers.test_lockstep import Pair, float64_model, run
from tests.reference import ReferenceRoot, kind_of
from tests.training_helper import of_case, of_family

OPTIONS: dict[str, Any] = {"lr": 0.02, "beta": 0.9, "ema_decay": 0.8, "weight_decay": 0.05}
CLASSES = (AdaFisher, AdaFisherW, SpectralAdaFisher)
EVERY = pytest.mark.parametrize("optimizer_class", CLASSES)
CLOSE: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-9}
"""A hundredth of what one step moves is far above it. Gradients that are zero but for rounding (a bias before a
BatchNorm, those of keys) make steps of up to 1e-10, and the iteration makes rounding a few hundred times larger."""


class Roles:
    """Weights of a model by what they do: ``hidden`` matrices, the ``first`` convolution, tables and heads.

    Args:
        model: A model without a config, whose head is its last layer.
    """

    def __init__(self, model: nn.Module) -> None:
        layers = [module for module in model.modules() if kind_of(module) in ("linear", "conv1d", "conv")]
        tables = [module.weight for module in model.modules() if kind_of(module) == "embedding"]
        first = [layer.weight for layer in layers if kind_of(layer) == "conv"][:1]
        self.ends = tables + [layer.weight for layer in layers[-1:]]
        self.first = [weight for weight in first if all(weight is not end for end in self.ends)]
        outside = [*self.ends, *self.first]
        self.hidden = [
            layer.weight
            for layer in layers
            if getattr(layer, "groups", 1) == 1
            and not parametrize.is_parametrized(layer)
            and all(layer.weight is not weight for weight in outside)
        ]
        grouped = [layer.weight for layer in layers if getattr(layer, "groups", 1) > 1]
        self.ends = [
            end for end in self.ends if all(end is not weight for weight in grouped) or end is layers[-1].weight
        ]
        self.first = [weight for weight in self.first if all(weight is not group for group in grouped)]


class NamedRoles(Roles):
    """Of a transformers model: hidden matrices whose whole names fit a pattern, embeddings and heads by theirs."""

    def __init__(self, model: nn.Module, hidden: str, ends: str) -> None:
        weights = {
            name: module.weight
            for name, module in model.named_modules()
            if kind_of(module) in ("linear", "conv1d", "conv", "embedding")
        }
        self.hidden = [weight for name, weight in weights.items() if re.fullmatch(hidden, name)]
        self.ends = [weight for name, weight in weights.items() if re.fullmatch(ends, name)]
        self.first = [
            weight for name, weight in weights.items() if name.endswith(("embedder.convolution", "projection"))
        ]


def without(params: Iterable[Tensor], others: Iterable[Tensor]) -> list[Tensor]:
    """Those that are none of the others."""
    ids = {id(other) for other in others}
    return [param for param in params if id(param) not in ids]


class RootPair(Pair):
    """A model under an optimizer without hooks, and a copy of it under the twin."""

    def __init__(
        self,
        model: nn.Module,
        optimizer_class: Any,
        roles: Any = Roles,
        heads: bool = False,
        groups: bool = True,
        **options: Any,
    ) -> None:
        self.model, self.twin_model = model, copy.deepcopy(model)
        spectral = optimizer_class is SpectralAdaFisher
        damping = "relative_damping" if spectral else "damping"
        options = OPTIONS | options
        ours = {**options, **({"spectral_heads": heads} if spectral else {"step_size": "root"})}
        self.optimizer = optimizer_class(self.model, self.groups(self.model, damping) if groups else None, **ours)
        known = roles(self.twin_model)
        matrices = [*known.hidden, *known.first, *([known.ends[-1]] if heads else [])] if spectral else []
        self.twin: Any = ReferenceRoot(
            self.twin_model,
            self.groups(self.twin_model, "damping"),
            small=without(self.twin_model.parameters(), [*known.hidden, *known.ends]),
            matrices=matrices,
            decoupled=optimizer_class is not AdaFisher,
            damping=0.1,
            **options,
        )
        self.moved_as_matrices = {id(matrix) for matrix in matrices}

    @staticmethod
    def groups(model: nn.Module, damping: str) -> list[dict[str, Any]]:
        """Matrices decay; vectors do not, are damped more, and averaged over fewer steps."""
        trainable = [param for param in model.parameters() if param.requires_grad]
        vectors = {"weight_decay": 0.0, damping: 0.3, "ema_decay": 0.6}
        return [
            {"params": [param for param in trainable if param.dim() > 1], damping: 0.1},
            {"params": [param for param in trainable if param.dim() <= 1], **vectors},
        ]

    def assert_equal_diagonals(self, step: int, **tolerance: Any) -> None:
        """Of every parameter that moves by one and has several values: hidden matrices of the spectral form do not."""
        for name, param, twin in self.parameters():
            slot = self.twin.slots.get(twin)
            if slot is None or not slot.step or id(twin) in self.moved_as_matrices or param.numel() == 1:
                continue
            for normalized in (True, False):
                torch.testing.assert_close(
                    self.optimizer.fisher_diagonal(param, normalized=normalized),
                    self.twin.fisher_diagonal(twin, normalized=normalized),
                    **tolerance,
                    msg=lambda text, name=name: f"diagonal of {name}, step {step}: {text}",
                )


@EVERY
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_cases_by_the_root(case: Case, optimizer_class: Any) -> None:
    """Five steps of every awkward model."""
    run(RootPair(case.build().double(), optimizer_class), of_case(case.loss), steps=5, check_every=1, **CLOSE)


WIDE = {
    "mlp": (lambda: mlp(12, 16, 10), regression(7, 12), {2}),
    "experts": (lambda: Experts(10, 12), regression(7, 10), {1, 2}),
    "conv": (lambda: convnet(nn.Conv2d(2, 9, 2), nn.Conv2d(9, 12, 2), channels=12), regression(2, 2, 4, 4), {1, 2}),
    "patches": (lambda: convnet(nn.Conv2d(3, 10, 9), channels=10), regression(2, 3, 10, 10), {1, 2}),
}
"""Models with axes that are long enough for a factor of their own, and the numbers of factors of their matrices."""


@EVERY
@pytest.mark.parametrize("name", WIDE)
def test_rows_and_columns_by_the_root(name: str, optimizer_class: Any) -> None:
    """Five steps of models in which rows and columns have factors: of a layer, a stack, a kernel, a large kernel."""
    build, loss, numbers = WIDE[name]
    pair = RootPair(build().double(), optimizer_class)
    run(pair, of_case(loss), steps=5, check_every=1, **CLOSE)
    if optimizer_class is not SpectralAdaFisher:
        states = [pair.optimizer.state[p] for p in pair.model.parameters() if p.dim() > 1]
        assert {sum(key.startswith("axis") for key in state) for state in states} == numbers


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


@EVERY
def test_several_uses_of_one_matrix_are_one_gradient(optimizer_class: Any) -> None:
    run(RootPair(TwoUses().double(), optimizer_class), of_case(regression(2, 2, 5, 5)), 5, 1, **CLOSE)


@pytest.mark.parametrize("most", [None, 0.05, 0.002])
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("name", ["tied", "conv_batch_norm", "bare_parameter"])
def test_spectral_options_by_the_root(name: str, nesterov: bool, most: float | None) -> None:
    """No bound, the default's, which some steps reach, and one that all matrices and tables reach."""
    case = next(case for case in CASES if case.name == name)
    pair = RootPair(case.build().double(), SpectralAdaFisher, max_relative_step=most, nesterov=nesterov)
    run(pair, of_case(case.loss), 5, 1, **CLOSE)


@pytest.mark.parametrize("name", ["tied", "untied", "padding_idx_tied"])
def test_spectral_heads(name: str) -> None:
    """The weight of the head moves as a matrix: that of the embedding, where it is tied to it."""
    case = next(case for case in CASES if case.name == name)
    run(RootPair(case.build().double(), SpectralAdaFisher, heads=True), of_case(case.loss), 5, 4, **CLOSE)


@EVERY
def test_fifty_steps_and_changing_options(optimizer_class: Any) -> None:
    """A schedule writes into the groups between steps; both sides follow."""
    pair = RootPair(mlp(5, 8, 7, 3).double(), optimizer_class)
    loss = of_case(regression(9, 5))
    for step in range(50):
        for group in (*pair.optimizer.param_groups, *pair.twin.groups):
            group["lr"] = 0.02 / (1 + step)
            group["weight_decay"] = 0.01 * step
        pair.step(loss, step)
        pair.assert_equal_parameters(step, **CLOSE)
    pair.assert_equal_diagonals(step, **CLOSE)


NAMES = {
    "gpt2": (r"transformer\.h\.\d\.(attn|mlp)\.c_\w+", r"transformer\.wte|transformer\.wpe|lm_head"),
    "llama": (r"model\.layers\.\d\.(self_attn|mlp)\.\w+", r"model\.embed_tokens|lm_head"),
    "bert": (
        r"bert\.(encoder\.layer\.\d\..*dense|.*query|.*key|.*value|pooler\.dense)",
        r"bert\.embeddings\..*_embeddings|classifier",
    ),
    "resnet": (r"resnet\.encoder\..*convolution", r"classifier\.1"),
}


@EVERY
@pytest.mark.parametrize("name", NAMES)
def test_transformers_by_the_root(name: str, optimizer_class: Any) -> None:
    """Tied head and Conv1D; RMSNorm and grouped queries; a classification head; convolutions."""
    record = family(name)
    pair = RootPair(float64_model(record), optimizer_class, lambda model: NamedRoles(model, *NAMES[name]))
    run(pair, of_family(record, n=3, seq=8), steps=5, check_every=4, **CLOSE)


@EVERY
def test_float32_by_the_root(optimizer_class: Any) -> None:
    """The same in float32 over a few steps: the twin stays in float64."""
    record = family("gpt2")
    pair = RootPair(float64_model(record).float(), optimizer_class, lambda model: NamedRoles(model, *NAMES["gpt2"]))
    run(pair, of_family(record, n=3, seq=8), steps=3, check_every=2, rtol=1e-4, atol=1e-5, check_dtype=False)


@EVERY
@pytest.mark.slow
@pytest.mark.parametrize("record", FAMILIES, ids=lambda record: record.name)
def test_every_parameter_of_a_family_moves_by_the_root(record: Family, optimizer_class: Any) -> None:
    """Four steps: every trainable parameter with a gradient moves, and stays finite."""
    model = float64_model(record)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = optimizer_class(model, **({} if optimizer_class is SpectralAdaFisher else {"step_size": "root"}))
    loss, seen, moved = of_family(record, n=3, seq=8), set(), set()
    for step in range(4):
        optimizer.zero_grad()
        loss(model, step).backward()
        seen |= {name for name, p in model.named_parameters() if p.grad is not None and bool(p.grad.any())}
        optimizer.step()
        moved |= {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert seen == moved
    assert all(bool(p.isfinite().all()) for p in model.parameters())
