"""The update by torch's fused kernel against the formula written out; and what it is not for."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from hf_adafisher import AdaFisher, AdaFisherW
from hf_adafisher.fisher.diagonals import DiagonalTerm
from hf_adafisher.optimizers import fused as fused_module
from hf_adafisher.optimizers import update as update_module
from hf_adafisher.optimizers.update import cut, update_parameter
from tests.optimizers.test_update import EXAMPLES, by_definition

OPTIONS: dict[str, Any] = {"lr": 1e-3, "beta": 0.9, "damping": 1e-3, "weight_decay": 0.1, "step": 3, "decoupled": True}
NAMES = ("_fused_adam_", "_fused_adamw_")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
FORMS = pytest.mark.parametrize("decoupled", [True, False], ids=["decoupled", "l2"])


@pytest.fixture(autouse=True)
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The names of torch's functions in the order of their calls, once they have been tried."""
    seen: list[str] = []
    for dtype in fused_module.SCALES:
        assert fused_module.works(dtype, True) and fused_module.works(dtype, False)
    for name in NAMES:
        monkeypatch.setattr(torch, name, listed(name, getattr(torch, name), seen))
    yield seen
    fused_module.works.cache_clear()


def listed(name: str, function: Callable[..., Any], seen: list[str]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        seen.append(name)
        return function(*args, **kwargs)

    return call


def assert_updated(param: Tensor, grad: Tensor, exp_avg: Tensor, terms: Sequence[DiagonalTerm], **changes: Any) -> None:
    """Update, and compare with the definition in float64: each value by what its own operands may be rounded by."""
    options = OPTIONS | changes
    exact = [tensor.double().clone() for tensor in (param, grad, exp_avg)]
    exact_terms = [tuple(factor.double() for factor in term) for term in terms]
    expected, moment = by_definition(*exact, exact_terms, **options)
    before = grad.clone()
    update_parameter(param, grad, exp_avg, terms, **options)
    assert torch.equal(grad, before)
    sizes = [tensor.abs() for tensor in exact]
    _, largest = by_definition(*sizes, exact_terms, **options)  # of m, if nothing cancelled
    # |p| + lr weight_decay |p| + lr |m^| / F, with that m
    signs = {**options, "lr": -options["lr"], "decoupled": True, "beta": 0.0}
    correction = 1 - options["beta"] ** options["step"]
    reach, _ = by_definition(sizes[0], largest / correction, largest, exact_terms, **signs)
    eps = 8 * torch.finfo(param.dtype).eps
    tiny = torch.finfo(param.dtype).tiny
    assert ((param.double() - expected).abs() <= eps * reach + tiny).all()
    assert ((exp_avg.double() - moment).abs() <= eps * largest + tiny).all()


def matrix(
    dtype: torch.dtype, size: float = 1.0, shape: tuple[int, int] = (23, 17)
) -> tuple[list[Tensor], list[DiagonalTerm]]:
    """Tensors with gradients of this size, and factors that reach from 0 to 1."""
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) * scale for scale in (1.0, size, size)]
    left, right = (torch.rand(n, generator=generator, dtype=torch.float64) for n in shape)
    for factor in (left, right):
        factor[:7] = torch.tensor([0.0, 1e-38, 1e-20, 1e-10, 1e-6, 1e-3, 1.0])
    return [tensor.to(dtype) for tensor in tensors], [(left[:, None].to(dtype), right.to(dtype)[None])]


@DTYPES
@FORMS
@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-8, 1.0, 1e3])
@pytest.mark.parametrize("damping", [1e-12, 1e-3, 10.0])
def test_it_follows_the_definition(
    dtype: torch.dtype, decoupled: bool, size: float, damping: float, calls: list[str]
) -> None:
    for changes in (
        {},
        {"weight_decay": 0.0},
        {"beta": 0.0},
        {"beta": 0.999, "step": 1},
        {"step": 10_000},
        {"lr": 0.0},
        {"lr": 1e-12},
        {"lr": 30.0, "weight_decay": 2.0},
    ):
        tensors, terms = matrix(dtype, size)
        calls.clear()
        assert_updated(*tensors, terms, **{"damping": damping, "decoupled": decoupled, **changes})
        l2 = not decoupled and changes.get("weight_decay", 1.0)
        assert calls == ["_fused_adam_" if l2 else "_fused_adamw_"]


@DTYPES
@FORMS
@pytest.mark.parametrize("block", [1 << 18, 40, 3])
@pytest.mark.parametrize("name", EXAMPLES)
def test_every_shape_follows_the_definition(
    name: str, block: int, decoupled: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, calls: list[str]
) -> None:
    monkeypatch.setattr(update_module, "CPU_BLOCK", block)
    example = EXAMPLES[name]
    terms = [tuple(factor.to(dtype) for factor in term) for term in example.terms]
    assert_updated(*(example.tensor().to(dtype) for _ in range(3)), terms, decoupled=decoupled)
    outer = (
        "matrix",
        "square",
        "transposed",
        "tied",
        "table",
        "convolution",
        "channels last",
        "groups",
        "groups and none",
    )
    assert bool(calls) == (name in outer)


@pytest.mark.parametrize("threads", [1, 2])
def test_large_matrices_and_several_threads(threads: int) -> None:
    before = torch.get_num_threads()
    tensors, terms = matrix(torch.float32, shape=(1201, 777))  # several blocks, the last one smaller
    torch.set_num_threads(threads)
    try:
        assert_updated(*tensors, terms)
    finally:
        torch.set_num_threads(before)


@DTYPES
@pytest.mark.parametrize("damping", [1e-37, 1e-30, 1e-13])
def test_the_smallest_dampings_are_left_to_the_general_update(
    dtype: torch.dtype, damping: float, calls: list[str]
) -> None:
    tensors, terms = matrix(dtype)
    assert_updated(*tensors, terms, damping=damping, lr=1e-9)
    assert not calls


@DTYPES
def test_tensors_that_lie_otherwise_in_memory(dtype: torch.dtype, calls: list[str]) -> None:
    """A gradient is brought into order; a parameter or a moment with gaps is left to the general update."""
    for index, fused in ((0, False), (1, True), (2, False)):
        for change in (lambda t: t.mT.contiguous().mT, lambda t: torch.stack([t, t + 1], -1)[..., 0]):
            tensors, terms = matrix(dtype)
            tensors[index] = change(tensors[index])
            calls.clear()
            assert_updated(*tensors, terms)
            assert bool(calls) == fused


@pytest.mark.parametrize("index", [0, 1, 2])
def test_other_dtypes_are_left_to_the_general_update(index: int, calls: list[str]) -> None:
    for dtype in (torch.float64, torch.bfloat16):
        tensors, terms = matrix(torch.float32)
        tensors[index] = tensors[index].to(dtype)
        update_parameter(*tensors, terms, **OPTIONS)
    tensors, terms = matrix(torch.float32)
    update_parameter(*tensors, [(terms[0][0].double(), terms[0][1])], **OPTIONS)
    assert not calls


def raises(*args: Any, **kwargs: Any) -> None:
    raise RuntimeError("unknown arguments")


def without_decay(params: Any, grads: Any, *args: Any, **kwargs: Any) -> None:
    torch.ops.aten._fused_adamw_(params, grads, *args, **{**kwargs, "weight_decay": 0.0})


def with_another_root(params: Any, grads: Any, exp_avgs: Any, squares: Any, *args: Any, **kwargs: Any) -> None:
    torch._foreach_mul_(squares, 2.0)
    torch.ops.aten._fused_adamw_(params, grads, exp_avgs, squares, *args, **kwargs)


def writing_into_the_gradient(params: Any, grads: Any, *args: Any, **kwargs: Any) -> None:
    torch.ops.aten._fused_adamw_(params, grads, *args, **kwargs)
    torch._foreach_add_(grads, 1.0)


@DTYPES
@FORMS
@pytest.mark.parametrize("other", [None, raises, without_decay, with_another_root, writing_into_the_gradient])
def test_where_torchs_function_has_changed_the_general_update_is_made(
    other: Callable[..., None] | None, decoupled: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    fused_module.works.cache_clear()
    for name in NAMES:
        if other is None:
            monkeypatch.delattr(torch, name)
        else:
            monkeypatch.setattr(torch, name, other)
    for _ in range(2):
        tensors, terms = matrix(dtype)
        assert_updated(*tensors, terms, decoupled=decoupled)
    assert not fused_module.works(dtype, not decoupled)


@pytest.mark.parametrize("options", [{}, {"decoupled": False, "weight_decay": torch.tensor(0.1)}])
def test_it_is_tried_once_and_draws_no_random_numbers(options: dict[str, Any], calls: list[str]) -> None:
    fused_module.works.cache_clear()
    before = torch.get_rng_state()
    tensors, terms = matrix(torch.float32)
    for step in range(1, 4):
        update_parameter(*tensors, terms, **{**OPTIONS, **options, "step": step})
    assert len(calls) == 4
    assert torch.equal(torch.get_rng_state(), before)


def test_parts_share_what_is_made_of_a_shared_factor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a row is longer than a block: the squares must never be as many as the parameter's values."""
    for block in (40, 3):
        monkeypatch.setattr(update_module, "CPU_BLOCK", block)
        tensors, terms = matrix(torch.float32)
        parts = cut(*tensors, terms)
        assert fused_module.takes(parts, 1e-3, 0.0) and parts.scaled
        made = {id(factor): factor.numel() for part in parts.scaled for term in part for factor in term}
        assert len(parts.parts) > 10 and sum(made.values()) == sum(factor.numel() for factor in terms[0])


@pytest.mark.parametrize("kind", [AdaFisher, AdaFisherW])
def test_an_optimizer_steps_as_without_it(
    kind: type[AdaFisher], monkeypatch: pytest.MonkeyPatch, calls: list[str]
) -> None:
    """Over refreshes and a change of the options, with a tied weight."""

    def run() -> dict[str, Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(30, 8), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 30)).double()
        model[3].weight = model[0].weight
        optimizer = kind(model, lr=1e-2, damping=0.1, update_interval=3, weight_decay=0.1)
        for step in range(10):
            ids = torch.randint(30, (16,), generator=torch.Generator().manual_seed(step))
            optimizer.param_groups[0]["lr"] = 1e-2 / (1 + step)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(ids), ids).backward()
            optimizer.step()
        return model.state_dict()

    fused = run()
    assert len(calls) == 20
    monkeypatch.setattr(fused_module, "LEAST_DAMPING", math.inf)
    assert_close(fused, run(), rtol=1e-10, atol=1e-12)
    assert len(calls) == 20


def test_autograd_notices_it(calls: list[str]) -> None:
    """A graph built before the step must not run backward after it, as with every in-place change."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer = AdaFisherW(model)
    model(torch.randn(4, 3)).square().sum().backward()
    optimizer.step()
    versions = [optimizer.state[p]["exp_avg"]._version for p in model.parameters()]
    optimizer.step()
    assert all(optimizer.state[p]["exp_avg"]._version > v for p, v in zip(model.parameters(), versions, strict=True))
    loss = model(torch.randn(4, 3)).square().sum()
    optimizer.step()
    assert len(calls) == 6
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
