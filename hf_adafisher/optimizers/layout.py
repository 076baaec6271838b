"""One parameter's tensors brought into the form that its update runs over: same axes, memory order, blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from hf_adafisher.fisher.diagonals import DiagonalTerm, diagonal_of


class Tensors(NamedTuple):
    """What one update reads and writes. All have the same axes; factors have length 1 where they are constant."""

    param: Tensor
    grad: Tensor
    exp_avg: Tensor
    terms: tuple[DiagonalTerm, ...]

    def factors(self) -> list[Tensor]:
        """The factors of all terms in a row."""
        return [factor for term in self.terms for factor in term]


class Part(NamedTuple):
    """The same without the gradient, which is a new tensor in every step: where this part lies in it.

    Attributes:
        param: Part of the parameter.
        exp_avg: Part of its first moment.
        terms: Part of its factors.
        outer: The terms, where each is a product of two factors that spans the whole part; else empty.
        size: Of the gradient's part.
        stride: Of the gradient's part.
        offset: Of the gradient's part, from where the gradient begins in its storage.
    """

    param: Tensor
    exp_avg: Tensor
    terms: tuple[DiagonalTerm, ...]
    outer: Sequence[tuple[Tensor, ...]]
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    def of(self, grad: Tensor) -> Tensor:
        """The gradient's part."""
        if self.size == grad.shape and self.stride == grad.stride():
            return grad
        return grad.as_strided(self.size, self.stride, grad.storage_offset() + self.offset)


class Parts:
    """A parameter's tensors in the form of its update, for all steps until one of them is another tensor.

    Finding the form costs more than the kernels of a small parameter; a refresh or a replaced tensor makes it anew. The
    memory of a tensor that was replaced (``model.to``) is held until the parameter's next step.

    Args:
        form: From the tensors to one or several views of all of them.

    Attributes:
        parts: The views, in order.
        factors: The factors of all parts in a row.
        kernel: The compiled update of its one part, once it is known.
        scaled: The terms of each part as the fused update takes them, once they are known; empty where that update is
            not for this parameter.
        lasting: Whether it may be kept for later steps.
    """

    def __init__(
        self,
        param: Tensor,
        grad: Tensor,
        exp_avg: Tensor,
        terms: Sequence[DiagonalTerm],
        form: Callable[[Tensors], Iterable[Tensors]],
    ) -> None:
        begin = grad.storage_offset()
        self.parts = [
            Part(
                t.param,
                t.exp_avg,
                t.terms,
                _outer(t),
                tuple(t.grad.shape),
                t.grad.stride(),
                int(t.grad.storage_offset() - begin),
            )
            for t in form(Tensors(param.detach(), grad.detach(), exp_avg, tuple(terms)))
        ]
        self.factors = [factor for part in self.parts for term in part.terms for factor in term]
        self.kernel: Callable[..., None] | None = None
        self.scaled: Sequence[Sequence[DiagonalTerm]] | None = None
        self._terms = terms
        self._rows = _rows_of(self.parts, grad)
        # Factors of the parameter's own size are not to outlive a step.
        small = all(factor.numel() < max(param.numel(), 2) for factor in self.factors)
        self.lasting = small and type(param) in (Tensor, nn.Parameter) and type(grad) is Tensor
        if self.lasting:
            # Views keep the memory at these addresses alive, so no other tensor can have taken them.
            self._pointers = param.data_ptr(), exp_avg.data_ptr()
            self._layout = param.shape, param.stride(), grad.stride()

    def split(self, grad: Tensor) -> Sequence[Tensor]:
        """The parts of a gradient, in order."""
        parts = self.parts
        if len(parts) == 1:
            return (parts[0].of(grad),)
        if self._rows:  # much cheaper than to make each part by itself
            return grad.split(self._rows)
        return [part.of(grad) for part in parts]

    def fits(self, param: Tensor, grad: Tensor, exp_avg: Tensor, terms: Sequence[DiagonalTerm]) -> bool:
        """Whether a lasting one was made of these tensors, but for the gradient, which has the same strides."""
        return (
            terms is self._terms
            and (param.data_ptr(), exp_avg.data_ptr()) == self._pointers
            and (param.shape, param.stride(), grad.stride()) == self._layout
        )


def _rows_of(parts: Sequence[Part], grad: Tensor) -> int:
    """The length of the parts, where they are what ``grad.split`` makes along its first axis; else 0."""
    rows, begin = (parts[0].size or (0,))[0], 0
    for part in parts:
        last = part is parts[-1]
        whole = part.stride == grad.stride() and part.size[1:] == grad.shape[1:] and part.offset == begin
        if not (rows and whole and (part.size[0] == rows or (last and part.size[0] < rows))):
            return 0
        begin += part.size[0] * part.stride[0]
    return rows


def _outer(tensors: Tensors) -> Sequence[tuple[Tensor, ...]]:
    shape, terms = tensors.param.shape, tensors.terms
    pairs = terms and all(len(term) == 2 for term in terms)
    spanned = pairs and all(torch.broadcast_shapes(left.shape, right.shape) == shape for left, right in terms)
    return terms if spanned else ()


def aligned(param: Tensor, grad: Tensor, exp_avg: Tensor, terms: Sequence[DiagonalTerm]) -> Tensors:
    """Views of the same memory with as many axes as the factors have, the outermost in memory first.

    Grouped convolutions have one axis more (see ``fisher.diagonals.DiagonalTerm``). Where two uses group a weight in
    different ways the diagonal is formed as a whole.
    """
    axes = param.dim()
    tensors = Tensors(param, grad, exp_avg, tuple(terms))
    if any(factor.dim() != axes for factor in tensors.factors()):
        tensors = _with_group_axis(tensors)
    if not tensors.param.is_contiguous():
        strides = tensors.param.stride()
        tensors = _each(tensors, "permute", sorted(range(len(strides)), key=lambda i: -strides[i]))
    return tensors


def _each(tensors: Tensors, method: str, *args: object) -> Tensors:
    """The same view of every tensor."""
    param, grad, exp_avg = (getattr(t, method)(*args) for t in tensors[:3])
    return Tensors(param, grad, exp_avg, tuple(tuple(getattr(f, method)(*args) for f in t) for t in tensors.terms))


def _with_group_axis(tensors: Tensors) -> Tensors:
    param, grad, exp_avg, terms = tensors
    groups = {factor.shape[0] for factor in tensors.factors() if factor.dim() > param.dim()}
    if len(groups) > 1:
        return Tensors(param, grad, exp_avg, ((diagonal_of(terms, param, 0.0),),))
    if not groups:  # fewer axes than the parameter
        return Tensors(
            param, grad, exp_avg, tuple(tuple(f[(None,) * (param.dim() - f.dim())] for f in t) for t in terms)
        )
    sizes, axes = (groups.pop(), -1), param.dim()

    def split(factor: Tensor) -> Tensor:
        if factor.dim() > axes:
            return factor
        return factor[None] if factor.shape[0] == 1 else factor.unflatten(0, sizes)

    split_terms = tuple(tuple(split(factor) for factor in term) for term in terms)
    param, grad, exp_avg = (tensor.unflatten(0, sizes) for tensor in tensors[:3])
    return Tensors(param, grad, exp_avg, split_terms)


def blocks(tensors: Tensors, limit: int) -> Iterator[Tensors]:
    """Cut the tensors along their first axes into parts of at most ``limit`` values; all parts are views."""
    param = tensors.param
    if param.numel() <= limit:
        yield tensors
        return
    axis = next(i for i, size in enumerate(param.shape) if size > 1)
    rows = max(1, limit * param.shape[axis] // param.numel())
    parts = [tensor.split(rows, axis) for tensor in tensors[:3]]
    count = len(parts[0])
    terms = [[f.split(rows, axis) if f.shape[axis] > 1 else (f,) * count for f in term] for term in tensors.terms]
    for i in range(count):
        part = Tensors(parts[0][i], parts[1][i], parts[2][i], tuple(tuple(f[i] for f in term) for term in terms))
        if part.param.numel() <= limit:
            yield part
        else:
            yield from blocks(part, limit)


def merged(tensors: Tensors) -> Tensors:
    """The same with as few axes as possible: those of length 1 dropped, neighbours joined that no factor tells apart.

    A convolution then looks like a Linear, so that they share one compiled kernel.
    """
    shape = tensors.param.shape
    if len(shape) == 2 and 1 not in shape:
        return tensors
    kept = [i for i, size in enumerate(shape) if size != 1]
    tensors = _by_shape(tensors, lambda t: tuple(t.shape[i] for i in kept))
    if not kept or not all(tensor.is_contiguous() for tensor in tensors[:3]):
        return tensors
    varies = [tuple(f.shape[i] > 1 for f in tensors.factors()) for i in range(len(kept))]
    starts = [i for i in range(len(kept)) if i == 0 or varies[i] != varies[i - 1]]
    runs = list(zip(starts, [*starts[1:], len(kept)], strict=True))
    return _by_shape(tensors, lambda t: tuple(t.shape[a:b].numel() for a, b in runs))


def _by_shape(tensors: Tensors, shape_of: Callable[[Tensor], tuple[int, ...]]) -> Tensors:
    param, grad, exp_avg = (_reshaped(tensor, shape_of(tensor)) for tensor in tensors[:3])
    terms = tuple(tuple(_reshaped(factor, shape_of(factor)) for factor in term) for term in tensors.terms)
    return Tensors(param, grad, exp_avg, terms)


def _reshaped(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    return tensor if tensor.shape == shape else tensor.reshape(shape)
