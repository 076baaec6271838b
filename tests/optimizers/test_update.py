"""The eager and the compiled update against the formula written out, and against each other."""

from __future__ import annotations

import functools
import gc
import logging
import math
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.testing import assert_close

from hf_adafisher import AdaFisher, AdaFisherTrainingArguments, AdaFisherW, create_optimizer
from hf_adafisher.fisher.diagonals import DiagonalTerm
from hf_adafisher.optimizers import blocks as blocks_module
from hf_adafisher.optimizers import compiled as compiled_module
from hf_adafisher.optimizers.blocks import RootParameter, root_update_in_blocks, split_into_blocks, update_in_blocks
from hf_adafisher.optimizers.compiled import CompiledUpdate
from hf_adafisher.optimizers.update import (
    Block,
    DirectionSize,
    RootCoefficients,
    StepCoefficients,
    damping_terms,
    root_coefficients,
    step_coefficients,
)

OPTIONS: dict[str, Any] = {"lr": 0.05, "beta": 0.9, "damping": 1e-2, "weight_decay": 0.1}
FORMS = pytest.mark.parametrize("decoupled", [True, False], ids=["decoupled", "l2"])


@pytest.fixture(autouse=True)
def fresh_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No kernel of another test, and none left behind; the models here are small, and to be compiled all the same."""
    monkeypatch.setattr(compiled_module, "COMPILED_FROM", 1 << 14)
    torch._dynamo.reset()
    compiled_module._kernel.cache_clear()
    counters.clear()
    yield
    torch._dynamo.reset()
    compiled_module._kernel.cache_clear()
    counters.clear()


class Example:
    """A parameter with its gradients and factors, in one layout of memory."""

    def __init__(
        self, shape: Sequence[int], spreads: Sequence[Sequence[Sequence[int]]], order: Sequence[int] = ()
    ) -> None:
        self.shape, self.order = tuple(shape), order
        self.generator = torch.Generator().manual_seed(0)
        self.terms: list[DiagonalTerm] = [tuple(self.random(shape).abs() for shape in term) for term in spreads]

    def random(self, shape: Sequence[int]) -> Tensor:
        return torch.randn(tuple(shape), generator=self.generator, dtype=torch.float64)

    def tensor(self) -> Tensor:
        """Random numbers of the parameter's shape, whose axes lie in memory in ``order``."""
        if not self.order:
            return self.random(self.shape)
        inverse = [list(self.order).index(i) for i in range(len(self.order))]
        return self.random([self.shape[i] for i in self.order]).permute(inverse)


EXAMPLES = {
    "scalar": Example((), [[()]]),
    "scalar without factors": Example((), [[]]),
    "one": Example((1,), [[]]),
    "empty": Example((0, 3), [[(0, 1), (1, 3)]]),
    "vector": Example((37,), [[(37,)]]),
    "matrix": Example((23, 17), [[(23, 1), (1, 17)]]),
    "square": Example((19, 19), [[(19, 1), (1, 19)]]),
    "transposed": Example((23, 17), [[(23, 1), (1, 17)]], order=(1, 0)),
    "tied": Example((23, 17), [[(23, 1), (1, 17)], [(23, 1), (1, 17)]]),
    "tied to a constant": Example((23, 17), [[(23, 1), (1, 17)], [], [(23, 17)]]),
    "experts": Example((3, 11, 7), [[(3, 1, 1), (1, 11, 1), (1, 1, 7)]]),
    "table": Example((1, 11, 7), [[(1, 11, 1), (1, 1, 7)]]),
    "two of three axes": Example((4, 5, 6), [[(4, 1, 1), (1, 5, 1)], [(4, 1, 1), (1, 1, 6)]]),
    "rows only": Example((11, 7), [[(11, 1)]]),
    "convolution": Example((8, 5, 3, 3), [[(8, 1, 1, 1), (1, 5, 3, 3)]]),
    "channels last": Example((8, 5, 3, 3), [[(8, 1, 1, 1), (1, 5, 3, 3)]], order=(0, 2, 3, 1)),
    "groups": Example((8, 5, 3), [[(2, 4, 1, 1), (2, 1, 5, 3)]]),
    "groups and none": Example((8, 5, 3), [[(2, 4, 1, 1), (2, 1, 5, 3)], [(8, 1, 1), (1, 5, 3)]]),
    "other groups": Example((8, 5, 3), [[(2, 4, 1, 1), (2, 1, 5, 3)], [(4, 2, 1, 1), (4, 1, 5, 3)]]),
}
SHAPES = pytest.mark.parametrize("name", EXAMPLES)


def by_definition(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    terms: Sequence[DiagonalTerm],
    *,
    step: int,
    decoupled: bool,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """The new parameter and moment from Eq. 4 and the update rule, out of place, over whole tensors."""
    lr, beta, decay = options["lr"], options["beta"], options["weight_decay"]
    diagonal = torch.full(param.shape, options["damping"], dtype=torch.float64)
    for term in terms:
        product = torch.ones(max((f.shape for f in term), key=len, default=()), dtype=torch.float64)
        for factor in term:
            product = product * factor
        diagonal = diagonal + (product.reshape(param.shape) if product.numel() == param.numel() else product)
    moment = beta * exp_avg + (1 - beta) * (grad if decoupled else grad + decay * param)
    move = moment / (1 - beta**step) / diagonal
    return param - lr * (move + decay * param if decoupled else move), moment


def coefficients(*, step: int, decoupled: bool, **options: Any) -> StepCoefficients:
    return step_coefficients(options, step, decoupled)


@SHAPES
@FORMS
@pytest.mark.parametrize("block", [1 << 18, 40, 3, 1])
def test_eager_follows_the_definition_in_blocks_of_any_size(
    name: str, decoupled: bool, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks_module, "CPU_BLOCK", block)
    example = EXAMPLES[name]
    param, exp_avg = example.tensor(), example.tensor()
    for step in range(1, 4):
        grad = example.tensor()
        before, moment_before, grad_before = param.clone(), exp_avg.clone(), grad.clone()
        numbers = {**OPTIONS, "step": step, "decoupled": decoupled}
        update_in_blocks([Block(param, grad, exp_avg, example.terms)], coefficients(**numbers))
        expected, moment = by_definition(before, grad, moment_before, example.terms, **numbers)
        assert_close(param, expected)
        assert_close(exp_avg, moment)
        assert torch.equal(grad, grad_before)


@FORMS
@pytest.mark.parametrize("block", [1 << 18, 100, 7])
def test_parameters_of_all_shapes_and_dtypes_are_updated_together(
    decoupled: bool, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As each by itself: small ones share calls, large ones are cut, and dtypes and devices are never mixed."""
    monkeypatch.setattr(blocks_module, "CPU_BLOCK", block)
    numbers = {**OPTIONS, "step": 2, "decoupled": decoupled}
    double, single, half = torch.float64, torch.float32, torch.bfloat16
    parameters, expected = [], []
    for dtype, momentum in ((double, double), (single, single), (half, single), (half, half), (double, double)):
        for example in EXAMPLES.values():
            param, grad, exp_avg = (example.tensor().to(dtype) for _ in range(3))
            exp_avg = exp_avg.to(momentum)
            terms = [tuple(f.to(double if dtype == double else single) for f in term) for term in example.terms]
            parameters.append(Block(param, grad, exp_avg, terms))
            doubles = [tensor.double() for tensor in (param, grad, exp_avg)]
            expected.append(by_definition(*doubles, example.terms, **numbers))
    update_in_blocks(parameters, coefficients(**numbers))
    for block, (param, moment) in zip(parameters, expected, strict=True):
        size = float(param.abs().max()) if param.numel() else 0.0
        for tensor, right in ((block.param, param), (block.exp_avg, moment)):
            accuracy = {double: 1e-9, single: 1e-5, half: 1e-2}[tensor.dtype]
            assert_close(tensor.double(), right, rtol=accuracy, atol=accuracy * max(size, 1.0) / 10)


ROOT_OPTIONS: dict[str, Any] = {"lr": 0.05, "beta": 0.9, "damping": 0.1, "weight_decay": 0.1}
SIZES = pytest.mark.parametrize("rms", [1.0, 0.2, 0.05])


def root_by_definition(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    terms: Sequence[DiagonalTerm],
    rms: float,
    *,
    step: int,
    decoupled: bool,
    nesterov: bool = True,
    max_relative_step: float | None = 0.05,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """The new parameter and moment by the root of the diagonal, out of place, over whole tensors.

    A parameter whose terms hold no factor always moves by this root mean square.
    """
    lr, beta, decay = options["lr"], options["beta"], options["weight_decay"]
    diagonal = torch.zeros(param.shape, dtype=torch.float64)
    for term in terms:
        product = torch.ones(max((f.shape for f in term), key=len, default=()), dtype=torch.float64)
        for factor in term:
            product = product * factor
        diagonal = diagonal + (product.reshape(param.shape) if product.numel() == param.numel() else product)
    grad = grad if decoupled else grad + decay * param
    moment = beta * exp_avg + (1 - beta) * grad
    ahead = beta * moment + (1 - beta) * grad if nesterov else moment
    direction = ahead / (1 - beta**step) / (diagonal + options["damping"] * diagonal.mean()).sqrt()
    length = float(direction.square().mean().sqrt())
    direction = direction * (min(1.0, rms / length) if any(terms) else rms / length)
    if max_relative_step is not None and param.dim() > 1:
        most = max_relative_step * max(float(param.square().mean().sqrt()), 0.02)
        direction = direction * min(1.0, most / (lr * float(direction.square().mean().sqrt())))
    return param - lr * (direction + decay * param if decoupled else direction), moment


def root_parameter(param: Tensor, grad: Tensor, exp_avg: Tensor, terms: Sequence[DiagonalTerm], rms: float) -> Any:
    """What the optimizers make of a parameter."""
    damping = damping_terms(terms, ROOT_OPTIONS["damping"], param.dim())
    size = DirectionSize(rms, exact=not damping, bounded=param.dim() > 1)
    return RootParameter(Block(param, grad, exp_avg, [*terms, *damping]), size, param)


def root_numbers(*, step: int, decoupled: bool, **options: Any) -> RootCoefficients:
    return root_coefficients(ROOT_OPTIONS | options, step, decoupled)


FILLED = pytest.mark.parametrize("name", [name for name, example in EXAMPLES.items() if 0 not in example.shape])


@FILLED
@FORMS
@SIZES
@pytest.mark.parametrize("block", [1 << 18, 40, 3, 1])
def test_root_follows_the_definition_in_blocks_of_any_size(
    name: str, rms: float, decoupled: bool, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The norms are those of the whole, however many blocks it is cut into. Gradients are left as they are."""
    monkeypatch.setattr(blocks_module, "CPU_BLOCK", block)
    example = EXAMPLES[name]
    param, exp_avg = example.tensor(), example.tensor() * 0.0
    for step, options in enumerate(({}, {"nesterov": False}, {"max_relative_step": None}, {"lr": 1e-3}), start=1):
        grad = example.tensor()
        before, moment_before, grad_before = param.clone(), exp_avg.clone(), grad.clone()
        numbers = {"step": step, "decoupled": decoupled, **options}
        root_update_in_blocks([root_parameter(param, grad, exp_avg, example.terms, rms)], root_numbers(**numbers))
        expected, moment = root_by_definition(
            before, grad, moment_before, example.terms, rms, **{**ROOT_OPTIONS, **numbers}
        )
        assert_close(param, expected)
        assert_close(exp_avg, moment)
        assert torch.equal(grad, grad_before)


@FORMS
@pytest.mark.parametrize("block", [1 << 18, 400, 100, 7])
def test_root_of_parameters_of_all_shapes_and_dtypes_together_is_that_of_each(
    decoupled: bool, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Small ones share calls but no norms, large ones are cut, and dtypes are never mixed; and all by definition."""
    numbers = {"step": 2, "decoupled": decoupled}
    double, single, half = torch.float64, torch.float32, torch.bfloat16
    together, alone, expected = [], [], []
    for dtype, momentum in ((double, double), (single, single), (half, single), (half, half), (double, double)):
        for i, example in enumerate(e for e in EXAMPLES.values() if 0 not in e.shape):
            param, grad, exp_avg = (example.tensor().to(dtype) for _ in range(3))
            exp_avg, rms = exp_avg.to(momentum), (1.0, 0.2, 0.05)[i % 3]
            terms = [tuple(f.to(double if dtype == double else single) for f in term) for term in example.terms]
            doubles = [tensor.double() for tensor in (param, grad, exp_avg)]
            expected.append(root_by_definition(*doubles, example.terms, rms, **ROOT_OPTIONS, **numbers))
            alone.append(root_parameter(param.clone(), grad, exp_avg.clone(), terms, rms))
            together.append(root_parameter(param, grad, exp_avg, terms, rms))
    for parameter in alone:
        root_update_in_blocks([parameter], root_numbers(**numbers))
    monkeypatch.setattr(blocks_module, "CPU_BLOCK", block)
    root_update_in_blocks(iter(together), root_numbers(**numbers))
    for ours, single_one, right in zip(together, alone, expected, strict=True):
        for tensor, other, exact in zip(
            (ours.block.param, ours.block.exp_avg),
            (single_one.block.param, single_one.block.exp_avg),
            right,
            strict=True,
        ):
            accuracy = {double: 1e-12, single: 1e-5, half: 1e-2}[tensor.dtype]
            assert_close(tensor, other, rtol=accuracy, atol=accuracy / 10)
            assert_close(tensor.double(), exact, rtol=accuracy, atol=accuracy / 10)


def test_root_of_a_parameter_without_values_is_nothing() -> None:
    """An empty shard: it makes no step, and its square is that of the other shards alone."""
    tensors = [torch.zeros(0, 3) for _ in range(3)]
    empty = root_parameter(*tensors, [(torch.zeros(0, 1), torch.ones(1, 3))], 0.2)
    empty = empty._replace(whole=torch.ones(6, 3))
    (steps,) = root_update_in_blocks([empty], root_numbers(step=1, decoupled=True))
    assert steps.squares.tolist() == [0.0]
    assert root_update_in_blocks([], root_numbers(step=1, decoupled=True)) == []


@pytest.mark.parametrize("limit", [1 << 18, 50])
def test_root_batches_are_no_larger_than_a_block(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """And there are few calls: small parameters share them."""
    monkeypatch.setattr(blocks_module, "CPU_BLOCK", limit)
    calls, own = [], blocks_module.root_directions
    monkeypatch.setattr(blocks_module, "root_directions", lambda b, c: calls.append(b) or own(b, c))
    shapes = [(4, 5)] * 7 + [(9, 12)] + [(3,)] * 30
    parameters = [
        root_parameter(*(torch.randn(shape) for _ in range(3)), [(torch.rand(shape),)], 0.2) for shape in shapes
    ]
    root_update_in_blocks(parameters, root_numbers(step=1, decoupled=True))
    sizes = [sum(block.param.numel() for block in blocks) for blocks in calls]
    assert sum(sizes) == 7 * 20 + 108 + 90 and max(sizes) <= limit
    assert len(calls) == 1 if limit > 1000 else len(calls) <= 10


@pytest.mark.parametrize("momentum", [torch.bfloat16, torch.float32])
def test_root_of_low_precision_is_rounded_once(momentum: torch.dtype) -> None:
    """bfloat16 weights are the float64 result rounded, except where float32 rounding decides a tie."""
    example, numbers = EXAMPLES["matrix"], {"step": 1, "decoupled": True}
    param, grad = (example.tensor().bfloat16() for _ in range(2))
    exp_avg = torch.zeros_like(param, dtype=momentum)
    terms = [tuple(factor.float() for factor in term) for term in example.terms]
    doubles = [tensor.double() for tensor in (param, grad, exp_avg)]
    expected, moment = root_by_definition(*doubles, example.terms, 0.2, **ROOT_OPTIONS, **numbers)
    root_update_in_blocks([root_parameter(param, grad, exp_avg, terms, 0.2)], root_numbers(**numbers))
    assert exp_avg.dtype == momentum
    assert (param != expected.bfloat16()).float().mean() < 0.01
    assert_close(exp_avg, moment.to(momentum))


@SHAPES
@pytest.mark.parametrize("limit", [40, 3, 1])
def test_blocks_cover_a_parameter_once_and_hold_at_most_the_limit(name: str, limit: int) -> None:
    example = EXAMPLES[name]
    tensors = [torch.zeros_like(example.tensor()) for _ in range(3)]
    for block in split_into_blocks(Block(*tensors, example.terms), limit):
        assert 0 < block.param.numel() <= limit
        for tensor in block[:3]:
            tensor += 1
    assert all(bool((tensor == 1).all()) for tensor in tensors)


@pytest.mark.parametrize("kind", [AdaFisher, AdaFisherW])
def test_a_learning_rate_of_zero_moves_nothing(kind: type[AdaFisher]) -> None:
    """Factors of zero included: m / (F / 0) is zero, and no number is lost. Weight decay of AdaFisherW rests too."""
    param, exp_avg = torch.randn(4, 3), torch.zeros(4, 3)
    before, grad = param.clone(), torch.randn(4, 3)
    terms = [(torch.tensor([0.0, 1.0, 0.5, 0.0])[:, None], torch.tensor([[0.0, 0.3, 1.0]]))]
    numbers = {**OPTIONS, "lr": 0.0, "step": 1, "decoupled": bool(kind.decoupled)}
    update_in_blocks([Block(param, grad, exp_avg, terms)], coefficients(**numbers))
    assert torch.equal(param, before) and bool(exp_avg.any())


@pytest.mark.parametrize("momentum", [torch.bfloat16, torch.float32])
def test_low_precision_is_rounded_once(momentum: torch.dtype) -> None:
    """bfloat16 weights are the float64 result rounded, except where float32 rounding decides a tie."""
    example, options = EXAMPLES["matrix"], {**OPTIONS, "step": 1, "decoupled": True}
    param, grad = (example.tensor().bfloat16() for _ in range(2))
    exp_avg = torch.zeros_like(param, dtype=momentum)
    terms = [tuple(factor.float() for factor in term) for term in example.terms]
    expected, moment = by_definition(param.double(), grad.double(), exp_avg.double(), example.terms, **options)
    update_in_blocks([Block(param, grad, exp_avg, terms)], coefficients(**options))
    assert exp_avg.dtype == momentum
    assert (param != expected.bfloat16()).float().mean() < 0.01
    assert_close(exp_avg, moment.to(momentum))


def twice(
    example: Example, dtypes: tuple[torch.dtype, torch.dtype]
) -> tuple[list[DiagonalTerm], tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The terms of an example, and its parameter and first moment in these dtypes, for two updates."""
    factors = torch.float64 if dtypes[0] == torch.float64 else torch.float32
    param, exp_avg = example.tensor().to(dtypes[0]), torch.zeros_like(example.tensor(), dtype=dtypes[1])
    terms = [tuple(f.to(factors) for f in term) for term in example.terms]
    return terms, (param, exp_avg), (param.clone(), exp_avg.clone())


def compare(
    examples: Sequence[str], steps: int, dtypes: tuple[torch.dtype, torch.dtype], monkeypatch: pytest.MonkeyPatch
) -> list[int]:
    """Run both updates side by side with options that change at every step; the graphs there are after each."""
    monkeypatch.setattr(compiled_module, "COMPILED_FROM", 0)
    run, graphs = CompiledUpdate(), []
    pairs = [(EXAMPLES[name], *twice(EXAMPLES[name], dtypes)) for name in examples]
    for step in range(1, steps + 1):
        options = {
            "lr": 0.05 / step,
            "beta": 1.0 - 1.0 / (step + 1),
            "damping": 0.01 * (1 + step % 7),
            "weight_decay": 0.01 * step,
            "step": step,
            "decoupled": step % 2 == 0,
        }
        for example, terms, (p, m), (q, n) in pairs:
            grad = example.tensor().to(dtypes[0])
            numbers, block = coefficients(**options), Block(q, grad, n, terms)
            update_in_blocks([Block(p, grad, m, terms)], numbers)
            if q.numel():  # optimizers leave out parameters without values
                assert run.supports(block)
                run.update_(block, numbers)
                assert run.works
            size = float(p.abs().max()) if p.numel() else 0.0
            tolerance = (
                {"rtol": 1e-5, "atol": 1e-6 * size} if dtypes[0] != torch.bfloat16 else {"rtol": 2e-2, "atol": 2e-2}
            )
            assert_close(q, p, **tolerance, msg=lambda text, e=example, s=step: f"{e.shape}, step {s}: {text}")
            assert_close(n, m, **tolerance)
        graphs.append(counters["stats"]["unique_graphs"])
    return graphs


@pytest.mark.slow
def test_compiled_equals_eager_for_fifty_steps_without_compiling_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every shape, with other numbers at every step; nothing is compiled after the first of each kind of decay."""
    graphs = compare(list(EXAMPLES), 50, (torch.float32, torch.float32), monkeypatch)
    assert graphs[-1] == graphs[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    "dtypes",
    [(torch.float64, torch.float64), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16)],
    ids=["float64", "bfloat16 with float32", "bfloat16"],
)
def test_compiled_equals_eager_in_other_precisions(
    dtypes: tuple[torch.dtype, torch.dtype], monkeypatch: pytest.MonkeyPatch
) -> None:
    compare(["matrix", "vector"], 4, dtypes, monkeypatch)


def compare_root(
    examples: Sequence[str], steps: int, dtypes: tuple[torch.dtype, torch.dtype], monkeypatch: pytest.MonkeyPatch
) -> list[int]:
    """Both updates by the root side by side with options that change at every step; the graphs there are after each."""
    monkeypatch.setattr(compiled_module, "COMPILED_FROM", 0)
    run, graphs = CompiledUpdate(), []
    pairs = [
        (EXAMPLES[name], (1.0, 0.2, 0.05)[i % 3], *twice(EXAMPLES[name], dtypes)) for i, name in enumerate(examples)
    ]
    for step in range(1, steps + 1):
        changing = {"lr": 0.05 / step, "beta": 1.0 - 1.0 / (step + 1), "weight_decay": 0.01 * step}
        for example, rms, terms, (p, m), (q, n) in pairs:
            grad = example.tensor().to(dtypes[0])
            numbers = root_numbers(step=step, decoupled=step % 2 == 0, **changing)
            root_update_in_blocks([root_parameter(p, grad, m, terms, rms)], numbers)
            other = root_parameter(q, grad, n, terms, rms)
            assert run.supports(other.block)
            run.root_update_(other, numbers)
            assert run.works
            close = {"rtol": 2e-2, "atol": 2e-2} if dtypes[0] == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-5}
            assert_close(q, p, **close, msg=lambda text, e=example, s=step: f"{e.shape}, step {s}: {text}")
            assert_close(n, m, **close)
        graphs.append(counters["stats"]["unique_graphs"])
    return graphs


def test_root_compiled_equals_eager_without_compiling_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrices, vectors and single values; nothing is compiled after the first of each kind of decay."""
    names = ["matrix", "vector", "one", "square"]
    graphs = compare_root(names, 6, (torch.float32, torch.float32), monkeypatch)
    assert graphs[-1] == graphs[1]


@pytest.mark.slow
def test_root_compiled_equals_eager_for_every_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [name for name, example in EXAMPLES.items() if 0 not in example.shape]
    graphs = compare_root(names, 20, (torch.float32, torch.float32), monkeypatch)
    assert graphs[-1] == graphs[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    "dtypes",
    [(torch.float64, torch.float64), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16)],
    ids=["float64", "bfloat16 with float32", "bfloat16"],
)
def test_root_compiled_equals_eager_in_other_precisions(
    dtypes: tuple[torch.dtype, torch.dtype], monkeypatch: pytest.MonkeyPatch
) -> None:
    compare_root(["matrix", "vector"], 4, dtypes, monkeypatch)


@pytest.mark.slow
def test_one_kernel_serves_all_sizes_of_a_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrices of many shapes share a graph, and so do convolutions, in steps of more and of fewer parameters."""
    monkeypatch.setattr(compiled_module, "COMPILED_FROM", 0)
    run = CompiledUpdate()
    for shapes in ([(23, 17), (16, 16), (64, 32), (5, 120), (8, 5, 3, 3), (33, 33)], [(20, 31)], [(7, 9, 4, 4)]):
        for shape in shapes:
            left, right = (shape[0], *[1] * (len(shape) - 1)), (1, *shape[1:])
            tensors = [torch.randn(shape), torch.randn(shape), torch.zeros(shape)]
            block = Block(*tensors, [(torch.rand(left), torch.rand(right))])
            run.update_(block, coefficients(step=1, decoupled=True, **OPTIONS))
        assert run.works
    assert counters["stats"]["unique_graphs"] == 2


def train(kind: type[AdaFisher], compiled: bool, steps: int, **options: Any) -> tuple[nn.Module, AdaFisher, list[int]]:
    """A model with large and small parameters and a schedule; the graphs after each step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(130, 140), nn.Tanh(), nn.Linear(140, 150), nn.LayerNorm(150), nn.Linear(150, 3))
    options = {"update_interval": 7} | options if options.get("step_size") != "root" else options
    optimizer = kind(model, lr=1e-3, damping=0.1, compiled=compiled, weight_decay=0.01, **options)
    graphs = []
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 1e-3 / (1 + step)
        x = torch.randn(16, 130, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        graphs.append(counters["stats"]["unique_graphs"])
    return model, optimizer, graphs


@pytest.mark.parametrize("kind", [AdaFisher, AdaFisherW])
def test_a_compiled_optimizer_equals_an_eager_one_for_fifty_steps(kind: type[AdaFisher]) -> None:
    model, optimizer, graphs = train(kind, True, 50)
    assert graphs == [1] * 50
    twin, other, _ = train(kind, False, 50)
    assert_close(model.state_dict(), twin.state_dict(), rtol=1e-5, atol=1e-6)
    assert_close(optimizer.state_dict()["state"], other.state_dict()["state"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", [AdaFisher, AdaFisherW])
def test_root_of_a_compiled_optimizer_equals_an_eager_one(kind: type[AdaFisher]) -> None:
    """Large weights by one kernel for both sizes that are the same; a schedule compiles nothing again."""
    model, optimizer, graphs = train(kind, True, 20, step_size="root")
    assert optimizer._compiled is not None and optimizer._compiled.works
    assert graphs == [graphs[0]] * 20 and graphs[0] == 1
    twin, other, _ = train(kind, False, 20, step_size="root")
    assert_close(model.state_dict(), twin.state_dict(), rtol=1e-4, atol=1e-5)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert_close(optimizer.state[p], other.state[q], rtol=1e-3, atol=1e-5)


def test_root_where_no_compiler_works_it_warns_once_and_is_eager(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(torch, "compile", broken)
    with caplog.at_level(logging.WARNING, "hf_adafisher"):
        model, _, _ = train(AdaFisherW, True, 5, step_size="root")
    assert caplog.text.count("torch.compile does not work here") == 1
    twin, _, _ = train(AdaFisherW, False, 5, step_size="root")
    assert_close(model.state_dict(), twin.state_dict(), rtol=1e-6, atol=1e-8)


def replace_tensors(model: nn.Module, optimizer: AdaFisher, step: int) -> None:
    """What others do to parameters, gradients and states between two steps, one thing at a time."""
    weights = [p for p in model.parameters() if p.dim() > 1]
    for p in weights:
        if step == 2:
            p.data = p.data.clone()
        elif step == 5:
            p.data = p.data.mT.contiguous().mT if p.dim() == 2 else p.data.contiguous(memory_format=torch.channels_last)
        elif step == 3:  # no strides change here, which would hide it
            optimizer.state[p]["exp_avg"] = optimizer.state[p]["exp_avg"].clone()
    if step in (7, 8):  # as DistributedDataParallel: gradients are views of one tensor, not always the same one
        flat = torch.zeros(100 * step + sum(p.numel() for p in weights))
        begin = 100 * step
        for p in weights:
            assert p.grad is not None
            view = flat[begin : begin + p.numel()].view(p.shape)
            begin += p.numel()
            p.grad = view.copy_(p.grad)
    elif step == 9:
        optimizer.load_state_dict(optimizer.state_dict())
    elif step == 10:
        for p in weights:  # other strides than the parameter
            assert p.grad is not None
            p.grad = p.grad.mT.contiguous().mT


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["eager", "compiled"])
def test_tensors_replaced_between_two_refreshes_are_followed(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal to a run with gradients that are tensors of their own."""
    monkeypatch.setattr(compiled_module, "COMPILED_FROM", 0)
    monkeypatch.setattr(blocks_module, "CPU_BLOCK", 20)

    def run(keep: bool) -> tuple[nn.Module, AdaFisher]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 5))
        optimizer = AdaFisherW(model, lr=1e-2, damping=0.1, update_interval=11, compiled=compiled, weight_decay=0.01)
        for step in range(13):
            optimizer.zero_grad()
            x = torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(step))
            model(x).square().mean().backward()
            replace_tensors(model, optimizer, step)
            if not keep:
                for p in model.parameters():
                    p.grad = torch.empty_like(p).copy_(p.grad)  # type: ignore[arg-type]
            optimizer.step()
        return model, optimizer

    (model, optimizer), (twin, other) = run(True), run(False)
    assert_close(model.state_dict(), twin.state_dict(), rtol=0, atol=0)
    assert_close(optimizer.state_dict()["state"], other.state_dict()["state"], rtol=0, atol=0)


@pytest.mark.parametrize("how", ["load_state_dict", "close"])
def test_replaced_momentum_is_not_held(how: str) -> None:
    _, optimizer, _ = train(AdaFisherW, False, 3)
    states = optimizer.state_dict()
    held = [weakref.ref(state["exp_avg"].untyped_storage()) for state in states["state"].values()]
    if how == "load_state_dict":
        optimizer.load_state_dict(states)
    else:
        optimizer.close()
        optimizer.state.clear()
    del states
    gc.collect()
    assert held and not any(storage() is not None for storage in held)


def test_autograd_notices_a_compiled_update() -> None:
    """A graph built before the step must not run backward after it, as with every in-place change."""
    model, optimizer, _ = train(AdaFisherW, True, 1)
    loss = model(torch.randn(4, 130)).square().sum()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("at_once", [False, True], ids=["when called", "at once"])
def test_where_no_compiler_works_it_warns_once_and_is_eager(
    at_once: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def call(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no C++ compiler\nand a long story")

    def broken(*args: Any, **kwargs: Any) -> Any:
        return call() if at_once else call

    monkeypatch.setattr(torch, "compile", broken)
    monkeypatch.setattr(blocks_module, "CPU_BLOCK", 1 << 12)
    sizes, update = [], blocks_module.adafisher_update_
    monkeypatch.setattr(
        blocks_module,
        "adafisher_update_",
        lambda blocks, c: (sizes.append(sum(block.param.numel() for block in blocks)), update(blocks, c)),
    )
    with caplog.at_level(logging.WARNING, "hf_adafisher"):
        model, _, _ = train(AdaFisherW, True, 5)
    assert max(sizes) <= 1 << 12  # in blocks, as without the option
    warnings = [record.getMessage() for record in caplog.records if "torch.compile" in record.getMessage()]
    assert len(warnings) == 1 and "(RuntimeError: no C++ compiler)" in warnings[0]
    twin, _, _ = train(AdaFisherW, False, 5)
    assert_close(model.state_dict(), twin.state_dict(), rtol=0, atol=0)


def test_where_no_compiler_works_it_warns_once_of_parameters_that_do_not_wait_too(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither those before them in the step nor those after them meet the compiler again."""
    ends, tries = [], []

    def broken(*args: Any, **kwargs: Any) -> Any:
        tries.append(args)
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(torch, "compile", broken)
    monkeypatch.setattr(compiled_module, "COMPILED_FROM", 0)
    for compiled in (True, False):
        torch.manual_seed(0)
        model = nn.ModuleList([nn.Conv1d(20, 8, 1, bias=False), TwoGroupings(), TwoGroupings()])
        optimizer = AdaFisherW(model, compiled=compiled)
        with caplog.at_level(logging.WARNING, "hf_adafisher"):
            for _ in range(2):
                optimizer.zero_grad()
                torch.stack([layer(torch.ones(3, 20, 5)) for layer in model]).square().sum().backward()
                optimizer.step()
        ends.append(model.state_dict())
    assert len(tries) == 1 and caplog.text.count("torch.compile does not work here") == 1
    assert_close(*ends, rtol=0, atol=0)


@pytest.mark.parametrize("calls", [0, 4], ids=["first call", "later"])
def test_errors_of_a_step_are_not_taken_for_a_missing_compiler(calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that has run was compiled; and memory may run out in the first call too."""
    error = RuntimeError("device-side assert") if calls else torch.OutOfMemoryError("out of memory")
    left = iter(range(calls))

    def kernel(*args: Any) -> None:
        if next(left, None) is None:
            raise error

    monkeypatch.setattr(compiled_module, "_kernel", functools.cache(lambda kind, rule: kernel))
    with pytest.raises(type(error), match=str(error)):
        train(AdaFisherW, True, 5)


def test_a_kind_that_fails_to_compile_is_updated_once_and_so_are_those_before_and_after_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(compiled_module, "COMPILED_FROM", 0)
    kinds = [EXAMPLES[name] for name in ("matrix", "tied", "matrix")]
    tensors = [[example.tensor(), example.tensor(), torch.zeros(example.shape)] for example in kinds]
    twins = [[tensor.clone() for tensor in three] for three in tensors]
    numbers, run, own = coefficients(**OPTIONS, step=1, decoupled=True), CompiledUpdate(), compiled_module._kernel
    broken = functools.cache(lambda kind, rule: broken_kernel if len(kind) > 7 else own(kind, rule))
    monkeypatch.setattr(compiled_module, "_kernel", broken)
    for example, three in zip(kinds, tensors, strict=True):
        block = Block(*three, example.terms)
        (run.update_ if run.supports(block) else lambda b, c: update_in_blocks([b], c))(block, numbers)
    assert not run.works
    for example, (param, _, exp_avg), (p, g, m) in zip(kinds, tensors, twins, strict=True):
        update_in_blocks([Block(p, g, m, example.terms)], numbers)
        assert_close((param, exp_avg), (p, m), rtol=1e-5, atol=1e-6)


def broken_kernel(*args: Any) -> None:
    raise RuntimeError("no compiler for this kind")


class TwoGroupings(nn.Module):
    """A convolution's weight that is used with two groups and with four: its factors are formed as a whole."""

    def __init__(self) -> None:
        super().__init__()
        self.two, self.four = nn.Conv1d(10, 8, 1, groups=2, bias=False), nn.Conv1d(20, 8, 1, groups=4, bias=False)
        self.four.weight = self.two.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.two(x[:, :10]) + self.four(x)


def test_the_option_is_reached_by_name_and_checked(tmp_path: Any) -> None:
    model = nn.Linear(3, 2)
    optimizer: Any = create_optimizer("adafisherw", model, compiled=True)
    assert optimizer._compiled is not None
    assert create_optimizer("adafisherw", model)._compiled is None  # type: ignore[attr-defined]
    assert "compiled" not in optimizer.state_dict()["param_groups"][0]
    arguments = AdaFisherTrainingArguments(str(tmp_path), optim_args="compiled=true", use_cpu=True)
    assert arguments.optimizer_options()["compiled"] is True
    with pytest.raises(ValueError, match="compiled must be True or False, got 'yes'"):
        AdaFisherW(model, compiled="yes")  # type: ignore[arg-type]


def test_a_step_holds_no_temporary_of_the_size_of_a_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_adafisher.experiments.benchmark.step import peak_extra_bytes

    monkeypatch.setattr(blocks_module, "CPU_BLOCK", 1 << 12)
    model = nn.Linear(300, 400)
    optimizer = AdaFisherW(model, weight_decay=0.1)
    model(torch.randn(4, 300)).sum().backward()
    optimizer.step()
    assert peak_extra_bytes(optimizer.step, "cpu") < 2 * 4 * (1 << 12) < 4 * model.weight.numel() // 10
    held = peak_extra_bytes(lambda: torch.ones(1000).add(1).add(1), "cpu")
    assert math.isclose(held, 8000, rel_tol=0.1)  # two of them at a time


VIEWS = {"aten::to", "aten::item", "aten::empty_like"}
"""Calls that launch nothing unless they copy: tensors have their dtype already, and step counts live on the CPU."""


def _copies(event: Any) -> bool:
    return any(child.name in ("aten::copy_", "aten::_to_copy") for child in event.cpu_children)


def kernels(optimizer: AdaFisher) -> int:
    """Operators that a step calls by itself; on a device each launches one kernel or, of ``foreach``, a few."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        optimizer.step()
    return sum(
        event.name.startswith("aten::") and (event.name not in VIEWS or _copies(event))
        for event in profile.events()
        if event.cpu_parent is not None and event.cpu_parent.name.startswith("Optimizer.step")
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [AdaFisher, AdaFisherW])
def test_a_step_launches_kernels_for_all_parameters_together(
    kind: type[AdaFisher], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a device's block size: none for each vector, and one for each matrix, the product of its two factors."""
    monkeypatch.setattr(blocks_module, "CPU_BLOCK", blocks_module.DEVICE_BLOCK)

    def count(layers: int, bias: bool) -> int:
        model = nn.ModuleList([nn.Linear(7, 5, bias=bias) for _ in range(layers)]).to(dtype)
        optimizer = kind(model, lr=1e-3, weight_decay=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            torch.stack([layer(torch.randn(3, 7, dtype=dtype)) for layer in model]).square().sum().backward()
            launched = kernels(optimizer)
        return launched

    assert 10 < count(10, bias=False) < 30
    assert count(20, bias=False) - count(10, bias=False) == 10
    assert count(20, bias=True) - count(10, bias=True) == 10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [AdaFisher, AdaFisherW])
def test_root_moves_parameters_together(
    kind: type[AdaFisher], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a device's block size: directions, norms and moves of all parameters in one call each."""
    monkeypatch.setattr(blocks_module, "CPU_BLOCK", blocks_module.DEVICE_BLOCK)
    calls: list[int] = []
    for name in ("root_directions", "root_factors", "root_move_"):
        own = getattr(blocks_module, name)
        monkeypatch.setattr(blocks_module, name, lambda *args, own=own: calls.append(len(args[0])) or own(*args))
    model = nn.ModuleList([nn.Linear(7, 5) for _ in range(9)]).to(dtype)
    optimizer = kind(model, weight_decay=0.1, step_size="root")
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    assert calls == [18, 2, 18]  # the factors are of two rows: of squares of directions and of parameters
