"""What must hold for every model, drawn at random: small trees of layers, frozen, tied, in groups, in any precision.

A `Setup` is plain data, so that a failing example prints as something to read. `build` makes the model of a setup, the
same one each time; `Run` trains it. Sizes are tiny, and the loss has bounded gradients that are clipped besides, so
that no model diverges. PROPERTY_EXAMPLES raises the number of examples of each property for a longer search.
"""

from __future__ import annotations

import copy
import io
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close
from transformers.pytorch_utils import Conv1D

from hf_adafisher import AdaFisher, AdaFisherW
from tests.reference import ReferenceAdaFisher

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")

WORDS = 5
STEPS = 5
EXAMPLES = int(os.environ.get("PROPERTY_EXAMPLES", "90"))
PROPERTY = settings(
    max_examples=EXAMPLES,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)

# --------------------------------------------------------------------------------------------------
# Setups
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    """One layer of a chain; norms and bare parameters keep the width, and `shape` is theirs."""

    kind: str
    width: int
    bias: bool = True
    shape: tuple[int, ...] = ()
    after: str = "nothing"
    """What becomes of the output; "tanh_" and "add_" overwrite it in place."""
    residual: bool = False
    active: tuple[bool, ...] = (True,) * STEPS
    """The steps in which a residual layer takes part."""
    again: bool = False
    """Whether it is called a second time, on half of its output (where it keeps the width)."""


@dataclass(frozen=True)
class Fork:
    """Two chains over the same input, whose outputs are added."""

    left: tuple[Layer, ...]
    right: tuple[Layer, ...]


@dataclass(frozen=True)
class Stem:
    """What comes before the tree: "rows" (nothing), "tokens" (an embedding), or a convolution of one or two axes."""

    kind: str
    channels: int = 1
    kernel: int = 1
    padding: int | str = 0
    padding_mode: str = "zeros"
    groups: int = 1
    norm: str = "none"


@dataclass(frozen=True)
class Options:
    """Options of one parameter group."""

    lr: float
    damping: float
    weight_decay: float
    beta: float
    ema_decay: float


@dataclass(frozen=True)
class Setup:
    """A model, its data, its optimizer and the number of steps."""

    stem: Stem
    tree: tuple[Layer | Fork, ...]
    width: int
    """Channels after the stem."""
    inner: tuple[int, ...]
    rows: tuple[int, ...]
    """Size of the first axis of each micro-batch of a step; `inner` are the axes between it and the channels."""
    dtype: torch.dtype
    strided_input: bool
    storage: tuple[str, ...]
    """Storage of the parameters, in turn."""
    frozen: tuple[int, ...]
    frozen_in_groups: bool
    ties: tuple[int, ...]
    groups: tuple[Options, ...]
    members: tuple[int, ...]
    """The group of each parameter, in turn."""
    optimizer: type[AdaFisher]
    momentum_dtype: str | None
    update_interval: int
    steps: int
    loop: str
    """How the loop resets gradients and steps: with the optimizer, with the model, or with a closure."""
    seed: int


WIDTHS = st.integers(1, 6)
ACTIVE = st.one_of(st.just((True,) * STEPS), st.tuples(*[st.booleans()] * STEPS))


@st.composite
def layers(draw: st.DrawFn, width: int, inner: tuple[int, ...], out: int | None = None) -> Layer:
    """A layer for an input of that width; of the width `out`, where it is given."""
    kinds = ["linear", "linear", "conv1d"]
    if out in (None, width):
        kinds += ["layernorm", "rmsnorm", "scale", "shift"]
    kind = draw(st.sampled_from(kinds))
    bias, after = draw(st.booleans()), draw(st.sampled_from(["nothing", "tanh", "tanh_", "add_"]))
    if kind in ("linear", "conv1d"):
        new = out or draw(WIDTHS)
        square = new == width
        return Layer(
            kind,
            new,
            bias=bias,
            after=after,
            residual=square and draw(st.booleans()),
            active=draw(ACTIVE) if square else (True,) * STEPS,
            again=square and draw(st.booleans()),
        )
    if kind in ("scale", "shift"):
        shapes: list[tuple[int, ...]] = [(), (1,), (width,), (1, width)]
        if inner:
            shapes.append((inner[-1], width))
        return Layer(kind, width, shape=draw(st.sampled_from(shapes)), active=draw(ACTIVE))
    shape = (inner[-1], width) if inner and draw(st.booleans()) else (width,)
    # A norm over one or two values hardly lets a gradient through: rounding noise alone, if nothing passes beside it.
    residual = draw(st.booleans()) or torch.Size(shape).numel() < 3
    return Layer(kind, width, bias=bias, shape=shape, after=after, residual=residual, active=draw(ACTIVE))


@st.composite
def chains(draw: st.DrawFn, width: int, inner: tuple[int, ...], out: int | None, longest: int) -> tuple[Layer, ...]:
    """Up to `longest` layers; the last has the width `out`, where it is given."""
    chain: list[Layer] = []
    for _ in range(draw(st.integers(1, longest)) - 1):
        chain.append(draw(layers(width, inner)))
        width = chain[-1].width
    return (*chain, draw(layers(width, inner, out)))


@st.composite
def stems(draw: st.DrawFn) -> Stem:
    """Any stem."""
    kind = draw(st.sampled_from(["rows", "tokens", "image1d", "image2d", "rows", "tokens"]))
    if not kind.startswith("image"):
        return Stem(kind)
    padding, modes = draw(st.sampled_from([0, 1, "same"])), ["zeros", "zeros", "circular"]
    return Stem(
        kind,
        channels=draw(st.sampled_from([1, 2, 4])),
        kernel=draw(st.sampled_from([1, 2])),
        padding=padding,
        padding_mode=draw(st.sampled_from(modes)),
        groups=draw(st.sampled_from([1, 1, 2])),
        norm=draw(st.sampled_from(["none", "batch", "group"])),
    )


def some_options(random: Random, decays: bool) -> Options:
    """Learning rate and damping such that a step changes something and nothing explodes."""
    return Options(
        lr=random.choice([0.05, 0.2]),
        damping=random.choice([0.1, 0.5]),
        weight_decay=random.choice([0.0, 0.1]) if decays else 0.0,
        beta=random.choice([0.0, 0.5, 0.9]),
        ema_decay=random.choice([0.0, 0.5, 0.95]),
    )


DTYPES = (torch.float64, torch.float32, torch.bfloat16)


@st.composite
def setups(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = DTYPES, empty: bool = True, decays: bool = True) -> Setup:
    """Any setup; `empty` allows steps in which no micro-batch has a row, `decays` weight decay.

    Hypothesis draws the model, whose parts it shrinks. It likes equal and extreme values, so that combinations of
    options would hardly come up: those come from a generator of its.
    """
    stem, random = draw(stems()), draw(st.randoms(use_true_random=True))
    if stem.kind.startswith("image"):
        inner = (3,) if stem.kind == "image1d" else (2, 3)
        width = draw(st.sampled_from([2, 4, 6])) if stem.norm == "group" or stem.groups > 1 else draw(WIDTHS)
        rows = tuple(draw(st.lists(st.integers(1, 3), min_size=1, max_size=2)))
        if stem.groups > stem.channels:
            stem = replace(stem, groups=1)
        position_axes: tuple[int, ...] = ()  # the layer sees other numbers of pixels than the image has
    else:
        inner = tuple(draw(st.lists(st.integers(1, 4), max_size=2)))
        width = draw(WIDTHS)
        rows = tuple(draw(st.lists(st.sampled_from([1, 2, 3, 4, 4, 0]), min_size=1, max_size=2)))
        if not (empty or any(rows)):
            rows = (*rows[1:], 2)
        position_axes = inner
    tree: list[Layer | Fork] = []
    at = width
    for _ in range(draw(st.integers(1, 3))):
        if draw(st.integers(0, 3)) == 3:
            out = draw(WIDTHS)
            pair = [draw(chains(at, position_axes, out, 2)) for _ in range(2)]
            tree.append(Fork(*pair))
            at = out
        else:
            tree.append(draw(layers(at, position_axes)))
            at = tree[-1].width
    return Setup(
        stem=stem,
        tree=tuple(tree),
        width=width,
        inner=inner,
        rows=rows,
        dtype=random.choice(dtypes),
        strided_input=random.random() < 0.5,
        storage=tuple(random.choices(["plain", "transposed", "strided", "offset"], k=5)),
        frozen=tuple(random.choices(range(30), k=random.choice([0, 0, 1, 2, 3]))),
        frozen_in_groups=random.random() < 0.5,
        ties=tuple(random.choices(range(30), k=random.choice([0, 1, 2]))),
        groups=tuple(some_options(random, decays) for _ in range(random.randint(1, 3))),
        members=tuple(random.choices(range(3), k=5)),
        optimizer=random.choice([AdaFisher, AdaFisherW]),
        momentum_dtype=random.choice([None, None, "float32", "bfloat16"]),
        update_interval=random.randint(1, 4),
        steps=random.randint(1, STEPS),
        loop=random.choice(["optimizer", "model", "closure"]),
        seed=random.randrange(1000),
    )


# --------------------------------------------------------------------------------------------------
# Models
# --------------------------------------------------------------------------------------------------


class Bare(nn.Module):
    """A parameter of its own that multiplies, or is added to, what comes in."""

    def __init__(self, kind: str, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.kind, self.value = kind, nn.Parameter(torch.randn(shape))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.value if self.kind == "scale" else x + self.value


class Block(nn.Module):
    """A layer and what surrounds it."""

    def __init__(self, spec: Layer, width: int) -> None:
        super().__init__()
        self.spec, self.clock = spec, 0
        if spec.kind == "linear":
            self.layer: nn.Module = nn.Linear(width, spec.width, bias=spec.bias)
        elif spec.kind == "conv1d":
            self.layer = Conv1D(spec.width, width)
        elif spec.kind == "layernorm":
            self.layer = nn.LayerNorm(spec.shape, eps=0.1, bias=spec.bias)
        elif spec.kind == "rmsnorm":
            self.layer = nn.RMSNorm(spec.shape, eps=0.1)
        else:
            self.layer = Bare(spec.kind, spec.shape)

    def forward(self, x: Tensor) -> Tensor:
        optional = self.spec.residual or self.spec.kind in ("scale", "shift")
        if optional and not self.spec.active[self.clock]:
            return x
        if self.spec.kind == "conv1d":
            x = x.contiguous()  # transformers' Conv1D asks for it
        y = self.layer(x)
        if self.spec.again:
            y = y + self.layer(y[: (len(y) + 1) // 2]).sum()
        if self.spec.after == "tanh":
            y = y.tanh()
        elif self.spec.after == "tanh_":
            y.tanh_()
        elif self.spec.after == "add_":
            y += 0.5
        return x + y if self.spec.residual else y


class Forked(nn.Module):
    """Two chains, added."""

    def __init__(self, left: nn.Module, right: nn.Module) -> None:
        super().__init__()
        self.left, self.right = left, right

    def forward(self, x: Tensor) -> Tensor:
        return self.left(x) + self.right(x)


class Convolved(nn.Module):
    """A convolution, perhaps with a norm, its channels moved to the end."""

    def __init__(self, stem: Stem, width: int) -> None:
        super().__init__()
        flat = stem.kind == "image1d"
        kind: Any = nn.Conv1d if flat else nn.Conv2d
        norms: dict[str, Callable[[], nn.Module]] = {
            "none": nn.Identity,
            "batch": lambda: (nn.BatchNorm1d if flat else nn.BatchNorm2d)(width, eps=0.1),
            "group": lambda: nn.GroupNorm(2 if width > 2 else 1, width, eps=0.1),
        }
        self.layer = kind(
            stem.channels,
            width,
            stem.kernel,
            padding=stem.padding,
            padding_mode=stem.padding_mode,
            groups=stem.groups,
            bias=stem.norm == "none",  # what a norm subtracts has rounding noise for a gradient
        )
        self.norm = norms[stem.norm]()

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.layer(x)).movedim(1, -1)


class Model(nn.Module):
    """Stem, tree, head; the head of a model over tokens has as many outputs as there are words."""

    def __init__(self, setup: Setup) -> None:
        super().__init__()
        stem, at = setup.stem, setup.width
        if stem.kind == "tokens":
            self.stem: nn.Module = nn.Embedding(WORDS, at)
        else:
            self.stem = Convolved(stem, at) if stem.kind.startswith("image") else nn.Identity()
        nodes: list[nn.Module] = []
        for node in setup.tree:
            if isinstance(node, Fork):
                nodes.append(Forked(self._chain(node.left, at), self._chain(node.right, at)))
                at = node.left[-1].width
            else:
                nodes.append(Block(node, at))
                at = node.width
        self.tree = nn.Sequential(*nodes)
        self.head = nn.Linear(at, WORDS, bias=False)

    @staticmethod
    def _chain(specs: tuple[Layer, ...], at: int) -> nn.Module:
        blocks: list[nn.Module] = []
        for spec in specs:
            blocks.append(Block(spec, at))
            at = spec.width
        return nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.tree(self.stem(x)))

    def set_clock(self, step: int) -> None:
        """The step that the optional layers are in."""
        for module in self.modules():
            if isinstance(module, Block):
                module.clock = step


def stored(values: Tensor, storage: str) -> Tensor:
    """The same values in memory of another shape."""
    if storage == "transposed" and values.dim() > 1:
        axes = list(range(values.dim()))[::-1]
        return values.permute(axes).contiguous().permute(axes)
    if storage == "strided" and values.dim() > 0:
        wide = torch.zeros(*values.shape[:-1], 2 * values.shape[-1], dtype=values.dtype)
        wide[..., ::2] = values
        return wide[..., ::2]
    if storage == "offset":
        return torch.cat([values.new_zeros(1), values.flatten()])[1:].view(values.shape)
    return values.clone()


def slots(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """Every place that holds a parameter, tied ones several times."""
    return [(module, name) for module in model.modules() for name, p in module._parameters.items() if p is not None]


def build(setup: Setup) -> Model:
    """The model of a setup, in training mode; every call gives the same."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(setup.seed)
        model = Model(setup)
        for p in model.parameters():
            nn.init.normal_(p, std=0.7)
    model.to(setup.dtype).train()
    for i, (module, name) in enumerate(slots(model)):
        values = module._parameters[name].detach()
        module._parameters[name] = nn.Parameter(stored(values, setup.storage[i % len(setup.storage)]))
    for pick in setup.ties:
        tie(model, pick)
    params = list(model.parameters())
    frozen = {pick % len(params) for pick in setup.frozen}
    for i, p in enumerate(params):
        p.requires_grad_(i not in frozen or p is model.head.weight)
    return model


def tie(model: nn.Module, pick: int) -> None:
    """Let one of the pairs of parameters of equal shape, such as embedding and head, be one parameter."""
    places = slots(model)[::-1]
    pairs = [
        (a, b)
        for i, a in enumerate(places)
        for b in places[:i]
        if a[0]._parameters[a[1]].shape == b[0]._parameters[b[1]].shape
    ]
    if pairs:
        (keep, name), (module, other) = pairs[pick % len(pairs)]
        module._parameters[other] = keep._parameters[name]


# --------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------


def batches(setup: Setup, step: int) -> Iterator[Tensor]:
    """The inputs of the micro-batches of a step."""
    generator = torch.Generator().manual_seed(1_000 * setup.seed + step)
    for rows in setup.rows:
        if setup.stem.kind == "tokens":
            x = torch.randint(0, WORDS, (rows, *setup.inner), generator=generator)
            if x.numel() == x.shape[-1]:  # a single row of ascending ids would be taken for a table of positions
                x = x.sort(descending=True).values
        else:
            channels = (setup.stem.channels,) if setup.stem.kind.startswith("image") else ()
            last = () if channels else (setup.width,)
            shape = (rows, *channels, *setup.inner, *last)
            x = torch.randn(shape, generator=generator, dtype=torch.float64).to(setup.dtype)
        yield stored(x, "transposed" if x.dim() > 2 else "strided") if setup.strided_input else x


def loss_of(prediction: Tensor, seed: int) -> Tensor:
    """A smooth distance to a random target, whose slope is at most 1."""
    dtype = torch.float64 if prediction.dtype == torch.float64 else torch.float32
    target = torch.randn(prediction.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    distance = (prediction.to(dtype) - target.to(dtype)).square().add(1).sqrt()
    return distance.sum() / max(1, distance.numel())


def backward(setup: Setup, model: Model, step: int) -> None:
    """The gradients of one step, clipped."""
    model.set_clock(step)
    for i, x in enumerate(batches(setup, step)):
        loss_of(model(x), seed=10 * step + i).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)


def param_groups(setup: Setup, model: Model) -> list[dict[str, Any]]:
    """The parameters, perhaps with the frozen ones, in the setup's groups, those that are not empty."""
    groups: list[dict[str, Any]] = [{"params": [], **vars(options)} for options in setup.groups]
    for i, p in enumerate(p for p in model.parameters() if p.requires_grad or setup.frozen_in_groups):
        groups[setup.members[i % len(setup.members)] % len(groups)]["params"].append(p)
    return [group for group in groups if group["params"]]


def make_optimizer(setup: Setup, model: Model) -> AdaFisher:
    """The optimizer of a setup."""
    return setup.optimizer(
        model,
        param_groups(setup, model),
        update_interval=setup.update_interval,
        momentum_dtype=setup.momentum_dtype,
    )


class Run:
    """A model of a setup and its optimizer."""

    def __init__(self, setup: Setup, model: Model | None = None) -> None:
        self.setup, self.model = setup, model or build(setup)
        self.optimizer = make_optimizer(setup, self.model)
        self.time = 0

    def backward(self) -> None:
        """The gradients of the next step."""
        (self.model if self.setup.loop == "model" else self.optimizer).zero_grad()
        backward(self.setup, self.model, self.time)

    def update(self) -> None:
        """The step itself, after its backward."""
        self.optimizer.step()
        self.time += 1

    def step(self) -> None:
        """The whole next step."""
        if self.setup.loop != "closure":
            self.backward()
            return self.update()

        def closure() -> float:
            self.backward()
            return 1.5

        assert self.optimizer.step(closure) == 1.5
        self.time += 1

    def train(self, until: int) -> None:
        """All steps before the step `until`."""
        while self.time < until:
            self.step()

    def gradients(self) -> dict[str, Tensor]:
        """Copies of the gradients, of those parameters that have one."""
        return {name: p.grad.clone() for name, p in self.model.named_parameters() if p.grad is not None}

    def options_of(self, param: Tensor) -> dict[str, Any]:
        """The group of a parameter."""
        return next(g for g in self.optimizer.param_groups if any(p is param for p in g["params"]))


def owners(model: nn.Module, param: Tensor) -> int:
    """The number of places that a parameter is used from."""
    return sum(module._parameters[name] is param for module, name in slots(model))


def described(state: dict[str, Tensor]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Keys, shapes and dtypes."""
    return {key: (tuple(value.shape), value.dtype) for key, value in state.items()}


# --------------------------------------------------------------------------------------------------
# Properties
# --------------------------------------------------------------------------------------------------


@PROPERTY
@given(setups())
def test_everything_stays_finite(setup: Setup) -> None:
    """Parameters and state, after every step, with batches without rows among them."""
    run = Run(setup)
    for _ in range(setup.steps):
        run.step()
        for name, p in run.model.named_parameters():
            assert p.isfinite().all(), name
            for key, value in run.optimizer.state.get(p, {}).items():
                assert value.isfinite().all(), (name, key)


@PROPERTY
@given(setups(decays=False))
def test_what_has_a_gradient_moves_along_its_momentum(setup: Setup) -> None:
    """A value moves if a lower bound of its update exceeds the value's rounding.

    The bound is lr * |momentum| / (uses + damping) with a momentum of the test's own, in float64, since no diagonal is
    larger than the number of uses and the damping together.
    """
    run = Run(setup)
    momentum: dict[str, Tensor] = {}
    updates: dict[str, int] = {}
    for _ in range(setup.steps):
        run.backward()
        before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
        run.update()
        for name, p in run.model.named_parameters():
            if p.grad is None:
                continue
            group = run.options_of(p)
            beta, grad = group["beta"], p.grad.double()
            momentum[name] = beta * momentum.get(name, torch.zeros_like(grad)) + (1 - beta) * grad
            updates[name] = updates.get(name, 0) + 1
            corrected = momentum[name] / (1 - beta ** updates[name])
            least = group["lr"] * corrected.abs() / (owners(run.model, p) + group["damping"])
            rounding = torch.finfo(p.dtype).eps * before[name].double().abs() + torch.finfo(p.dtype).tiny
            # Momentum may be kept in bfloat16, whose rounding spoils it where gradients change sign.
            must = (least > 2 * rounding) & (corrected.abs() > 0.1 * grad.abs())
            assert bool((p != before[name])[must].all()), f"{name} did not move"
            ahead = (before[name].double() - p.detach().double()) * corrected
            assert bool((ahead[must] > 0).all()), f"{name} moved against its momentum"


@PROPERTY
@given(setups())
def test_what_is_frozen_stays_bitwise(setup: Setup) -> None:
    """Frozen parameters, in a group with weight decay or in none, and those that no backward reached."""
    run = Run(setup)
    frozen = {name: p.detach().clone() for name, p in run.model.named_parameters() if not p.requires_grad}
    for _ in range(setup.steps):
        before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
        run.step()
        for name, p in run.model.named_parameters():
            assert p.grad is not None or torch.equal(p, before[name]), name
    for name, p in run.model.named_parameters():
        assert name not in frozen or (torch.equal(p, frozen[name]) and p not in run.optimizer.state), name


@pytest.mark.slow
@PROPERTY
@given(setups())
def test_gradients_are_those_of_a_model_without_an_optimizer_and_stay_so(setup: Setup) -> None:
    """Neither the hooks nor the step change a bit of them."""
    run = Run(setup)
    for step in range(setup.steps):
        bare = build(setup)
        bare.load_state_dict(run.model.state_dict())
        backward(setup, bare, step)
        run.backward()
        gradients = run.gradients()
        assert gradients.keys() == {name for name, p in bare.named_parameters() if p.grad is not None}
        for name, p in bare.named_parameters():
            if p.grad is not None:
                assert torch.equal(gradients[name], p.grad), name
        run.update()
        after = run.gradients()
        assert after.keys() == gradients.keys()
        assert all(torch.equal(after[name], gradients[name]) for name in gradients)


@pytest.mark.slow
@settings(PROPERTY, max_examples=2 * EXAMPLES)
@given(setups(dtypes=(torch.float64,), empty=False))
def test_the_slow_twin_agrees(setup: Setup) -> None:
    """In parameters and diagonals, in float64 with the default tolerances. The twin knows one gamma for all groups."""
    gamma = setup.groups[0].ema_decay
    groups = tuple(replace(options, ema_decay=gamma) for options in setup.groups)
    setup = replace(setup, momentum_dtype=None, groups=groups)
    run, twin_model = Run(setup), build(setup)
    twin = ReferenceAdaFisher(
        twin_model,
        param_groups(setup, twin_model),
        lr=0.0,
        beta=0.0,
        damping=1.0,
        weight_decay=0.0,
        ema_decay=gamma,
        update_interval=setup.update_interval,
        decoupled=setup.optimizer is AdaFisherW,
    )
    for step in range(setup.steps):
        run.step()
        twin.zero_grad()
        backward(setup, twin_model, step)
        twin.step()
        for (name, p), q in zip(run.model.named_parameters(), twin_model.parameters(), strict=True):
            assert_close(p, q, msg=lambda text, where=f"{name}, step {step}": f"{where}: {text}")
            slot = twin.slots.get(q)
            # A stand-in taken from one gradient between two refreshes is not kept beyond the step that used it.
            if slot and slot.step and (q.grad is not None or not slot.provisional):
                assert_close(
                    run.optimizer.fisher_diagonal(p),
                    twin.fisher_diagonal(q),
                    msg=lambda text, where=f"diagonal of {name}, step {step}": f"{where}: {text}",
                )


@pytest.mark.slow
@PROPERTY
@given(setups(), st.integers(0, STEPS), st.booleans())
def test_a_resumed_run_continues_bitwise(setup: Setup, save_at: int, deep_copied: bool) -> None:
    """Saved and loaded at any step, into an optimizer with other options on a copy of the model."""
    model = build(setup)
    if deep_copied:
        model = copy.deepcopy(model)  # a copy stores strided parameters densely; so must both runs
    run = Run(setup, model)
    run.train(min(save_at, setup.steps))
    file = io.BytesIO()
    torch.save(run.optimizer.state_dict(), file)
    file.seek(0)
    if deep_copied:
        copied = copy.deepcopy(run.model)
    else:
        copied = build(setup)
        copied.load_state_dict(run.model.state_dict())
    resumed = Run(setup, copied)
    for group in resumed.optimizer.param_groups:
        group.update(lr=9.0, beta=0.1, damping=9.0, weight_decay=0.9, ema_decay=0.1, update_interval=9)
        group.update(momentum_dtype="float16")
    resumed.optimizer.load_state_dict(torch.load(file, weights_only=True))
    resumed.time = run.time
    run.train(STEPS)
    resumed.train(STEPS)
    assert_close(resumed.model.state_dict(), run.model.state_dict(), rtol=0, atol=0)
    ours, theirs = resumed.optimizer.state_dict(), run.optimizer.state_dict()
    assert ours["param_groups"] == theirs["param_groups"]
    assert_close(ours["state"], theirs["state"], rtol=0, atol=0)


@PROPERTY
@given(setups())
def test_the_diagonal_lies_between_the_damping_and_the_number_of_uses_above_it(setup: Setup) -> None:
    """And reaches both ends where a parameter has one use: minmax has a 0 and a 1, or ones alone.

    Not so in a convolution of several groups, whose factors are normalised over all groups together.
    """
    run = Run(setup)
    for _ in range(setup.steps):
        run.step()
        for name, p in run.model.named_parameters():
            if p not in run.optimizer.state or p.grad is None:
                continue
            damping, uses = run.options_of(p)["damping"], owners(run.model, p)
            diagonal = run.optimizer.fisher_diagonal(p)
            assert diagonal.shape == p.shape
            assert diagonal.dtype == (torch.float64 if p.dtype == torch.float64 else torch.float32)
            slack = 1e-6
            assert diagonal.min() >= damping - slack and diagonal.max() <= uses + damping + slack, name
            if uses == 1 and not (setup.stem.groups > 1 and name == "stem.layer.weight"):
                assert abs(diagonal.max() - 1 - damping) <= slack, name
                lowest = diagonal.min().item()
                assert min(abs(lowest - damping), abs(lowest - 1 - damping)) <= slack, name


@pytest.mark.slow
@PROPERTY
@given(setups(), st.sampled_from(["other numbers", "no rows", "no slope"]))
def test_the_keys_of_the_state_do_not_depend_on_the_data(setup: Setup, data: str) -> None:
    """Nor do shapes and dtypes, whatever was seen; and the second step adds none."""
    active = (True,) * STEPS
    setup = replace(setup, tree=tuple(always(node, active) for node in setup.tree))
    other = replace(setup, seed=setup.seed + 1)
    if data == "no rows" and not setup.stem.kind.startswith("image"):
        other = replace(setup, rows=(0,))
    seen = []
    for kind in (setup, other):
        run = Run(kind)
        run.backward()
        if data == "no slope":
            for p in run.model.parameters():
                p.grad = None if p.grad is None else torch.zeros_like(p.grad)
        run.update()
        seen.append({name: described(run.optimizer.state[p]) for name, p in trainable(run.model)})
        run.train(setup.steps)
        seen.append({name: described(run.optimizer.state[p]) for name, p in trainable(run.model)})
    assert seen[0] == seen[1] == seen[2] == seen[3]


def always(node: Layer | Fork, active: tuple[bool, ...]) -> Layer | Fork:
    """The same node with every layer taking part in every step."""
    if isinstance(node, Layer):
        return replace(node, active=active)
    left, right = (tuple(replace(layer, active=active) for layer in chain) for chain in (node.left, node.right))
    return Fork(left, right)


def trainable(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Names and parameters that require grad."""
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]
