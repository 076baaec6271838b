"""The slow oracle: the diagonal Kronecker Fisher and the optimizer, in plain loops from the equations.

Nothing here is shared with the package. The factors are sums over batch, position and channel in python
floats (float64). `ReferenceAdaFisher` does not attach tensor hooks to outputs: it adds a *probe*, a tensor of
zeros that requires grad, to the output of every module it watches. Adding zero changes no value, and after
the backward pass the probe's `.grad` is, by the chain rule, the gradient of the loss with respect to that
output: also when the output is a view, is modified in place afterwards, or the module is called often.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

Kind = Literal["linear", "conv1d", "embedding", "layernorm", "rmsnorm"]
NORMS: tuple[Kind, ...] = ("layernorm", "rmsnorm")


# --------------------------------------------------------------------------------------------------
# Factors of one module call, by definition
# --------------------------------------------------------------------------------------------------


def rows(x: Tensor, channel_axes: int = 1) -> Iterator[list[float]]:
    """The channels, which come last in `x`: one list per position of every example."""
    lead = x.shape[: x.dim() - channel_axes]
    for position in itertools.product(*(range(size) for size in lead)):
        yield x.detach()[position].double().flatten().tolist()


def mean_of_squares(vectors: Iterable[list[float]]) -> Tensor:
    """(1/N) sum_n v_nj^2, in float64."""
    totals: list[float] = []
    count = 0
    for vector in vectors:
        totals = totals or [0.0] * len(vector)
        for channel, value in enumerate(vector):
            totals[channel] += value * value
        count += 1
    return torch.tensor([total / count for total in totals], dtype=torch.float64)


def one_hot_rows(tokens: Tensor, vocabulary: int) -> Iterator[list[float]]:
    """What an embedding's input is when the embedding is seen as a matrix: a 1 at the token, 0 elsewhere."""
    for token in tokens.flatten().tolist():
        yield [1.0 if word == token else 0.0 for word in range(vocabulary)]


def normalized_rows(kind: Kind, x: Tensor, eps: float, channel_axes: int) -> Iterator[list[float]]:
    """The rows a norm layer multiplies by its scale."""
    for row in rows(x, channel_axes):
        size = len(row)
        mean = sum(row) / size if kind == "layernorm" else 0.0
        spread = sum((value - mean) ** 2 for value in row) / size
        yield [(value - mean) / (spread + eps) ** 0.5 for value in row]


def input_rows(
    kind: Kind, x: Tensor, *, vocabulary: int = 0, eps: float = 0.0, channel_axes: int = 1
) -> Iterator[list[float]]:
    """The rows x_n of the method for one call of a module."""
    if kind == "embedding":
        return one_hot_rows(x, vocabulary)
    if kind in NORMS:
        return normalized_rows(kind, x, eps, channel_axes)
    return rows(x)


def input_factor_loop(kind: Kind, x: Tensor, *, vocabulary: int = 0, eps: float = 0.0, channel_axes: int = 1) -> Tensor:
    """h_j = (1/N) sum_n x_nj^2.

    `vocabulary`: for embeddings; `eps` and `channel_axes` (the number of axes normalised together) for norms.
    """
    return mean_of_squares(input_rows(kind, x, vocabulary=vocabulary, eps=eps, channel_axes=channel_axes))


def output_grad_factor_loop(kind: Kind, g: Tensor, *, channel_axes: int = 1) -> Tensor:
    """s_i = (1/N) sum_n g_ni^2, whatever the module is."""
    return mean_of_squares(rows(g, channel_axes if kind in NORMS else 1))


# Relative spread up to which a vector counts as constant. The two logits of a binary classifier have
# gradients g and -g, equal in square up to rounding, and that noise must not be stretched to {0, 1}.
CONSTANT = 1e-5


def minmax(v: Tensor) -> Tensor:
    """(v - min) / (max - min); all ones when `v` has length 1 or is constant up to rounding."""
    low, high = v.min(), v.max()
    if v.numel() == 1 or high - low <= CONSTANT * high:
        return torch.ones_like(v)
    return (v - low) / (high - low)


def outer(left: Tensor, right: Tensor) -> Tensor:
    """left_i * right_j."""
    return left[:, None] * right[None, :]


def gradient_factors(grad: Tensor) -> list[Tensor]:
    """One factor per axis: the mean of grad^2 over all other axes; a single 1 for an axis of length 1."""
    squared = grad.detach().double() ** 2
    factors = []
    for axis, size in enumerate(squared.shape):
        means = [squared.select(axis, index).mean() for index in range(size)]
        factors.append(torch.stack(means) if size > 1 else torch.ones(1, dtype=torch.float64))
    return factors


def combine_axes(vectors: list[Tensor], shape: torch.Size) -> Tensor:
    """The product over axes: out[i, j, ...] = vectors[0][i] * vectors[1][j] * ..."""
    product = torch.ones(shape, dtype=torch.float64)
    for axis, vector in enumerate(vectors):
        product = product * vector.reshape([-1 if other == axis else 1 for other in range(len(shape))])
    return product


# --------------------------------------------------------------------------------------------------
# Which rule a module has
# --------------------------------------------------------------------------------------------------


def kind_of(module: nn.Module) -> Kind | None:
    """The rule of a module, or None."""
    name = type(module).__name__
    if isinstance(module, nn.Linear):
        return "linear"
    if name.endswith("LearnedPositionalEmbedding"):  # OPT, BART: an Embedding that is not called with its tokens
        return None
    if isinstance(module, nn.Embedding):
        return "embedding"
    if isinstance(module, nn.LayerNorm):
        return "layernorm"
    if name == "Conv1D":
        return "conv1d"
    if isinstance(module, nn.RMSNorm) or name.endswith("RMSNorm") or name == "T5LayerNorm":
        return "rmsnorm"
    return None


def norm_eps(module: nn.Module, x: Tensor) -> float:
    """The epsilon under the root of a norm layer, under any of the names in use."""
    for name in ("eps", "variance_epsilon"):
        if hasattr(module, name):
            eps = getattr(module, name)
            return torch.finfo(x.dtype).eps if eps is None else float(eps)
    raise AttributeError(f"{type(module).__name__} has no epsilon")


# --------------------------------------------------------------------------------------------------
# Averages and the optimizer
# --------------------------------------------------------------------------------------------------


class Average:
    """A bias-corrected moving average: value and weight decay together, so the first value counts in full."""

    def __init__(self, decay: float) -> None:
        """Start empty."""
        self.decay = decay
        self.value: Tensor | None = None
        self.weight = 0.0

    def add(self, new: Tensor) -> None:
        """value <- decay value + (1 - decay) new, and the weight alike."""
        old = torch.zeros_like(new) if self.value is None else self.value
        self.value = self.decay * old + (1 - self.decay) * new
        self.weight = self.decay * self.weight + (1 - self.decay)

    def read(self) -> Tensor:
        """The average."""
        assert self.value is not None
        return self.value / self.weight


@dataclass
class Call:
    """One call of a watched module: its input, and the probe that was added to its output."""

    x: Tensor
    probe: Tensor


@dataclass
class Watched:
    """A module with a rule: the calls since the last step, and the averages of its two factors."""

    module: nn.Module
    kind: Kind
    input_factor: Average
    output_grad_factor: Average
    calls: list[Call] = field(default_factory=list)

    def refresh(self) -> None:
        """Means over every position of every call that took part in a backward pass, into the averages."""
        used = [call for call in self.calls if call.probe.grad is not None]
        if not used:
            return
        axes = len(self.module.normalized_shape) if isinstance(self.module, nn.LayerNorm) else 1
        inputs = (row for call in used for row in self._input_rows(call, axes))
        grads = (row for call in used if call.probe.grad is not None for row in rows(call.probe.grad, axes))
        self.input_factor.add(mean_of_squares(inputs))
        self.output_grad_factor.add(mean_of_squares(grads))

    def _input_rows(self, call: Call, axes: int) -> Iterator[list[float]]:
        vocabulary = self.module.num_embeddings if isinstance(self.module, nn.Embedding) else 0
        eps = norm_eps(self.module, call.x) if self.kind in NORMS else 0.0
        return input_rows(self.kind, call.x, vocabulary=vocabulary, eps=eps, channel_axes=axes)

    def product(self, role: str, *, normalized: bool) -> Tensor:
        """This module's term of the Fisher diagonal of its `role` ("weight" or "bias"), flat or a matrix."""
        h, s = self.input_factor.read(), self.output_grad_factor.read()
        shape = minmax if normalized else torch.clone
        if role == "bias":
            return shape(s)
        if self.kind in NORMS:
            return shape(s * h)
        if self.kind == "linear":  # weight [out, in]
            return outer(shape(s), shape(h))
        return outer(shape(h), shape(s))  # Conv1D [in, out]; Embedding [vocabulary, width]


@dataclass
class Slot:
    """What belongs to one parameter."""

    exp_avg: Tensor | None = None
    step: int = 0
    axes: list[Average] = field(default_factory=list)
    provisional: bool = False
    uses: list[tuple[Watched, str]] = field(default_factory=list)


class ReferenceAdaFisher:
    """AdaFisher and AdaFisherW, slowly: everything in float64, every quantity as its equation says.

    `groups` are dicts with "params" and, if wanted, their own "lr", "beta", "damping" or "weight_decay".

    A parameter takes its curvature from the modules that own it and were called on a refresh; where there are
    none, from its own gradient, averaged over refreshes alike; before its first refresh (a layer first used
    between two) from its current gradient alone.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: list[dict[str, Any]] | None = None,
        *,
        lr: float,  # alpha
        beta: float,
        damping: float,  # lambda
        ema_decay: float,  # gamma
        update_interval: int,  # T_cov
        weight_decay: float,  # kappa
        decoupled: bool,
    ) -> None:
        """Watch every module that has a rule."""
        defaults = {"lr": lr, "beta": beta, "damping": damping, "weight_decay": weight_decay}
        if groups is None:
            groups = [{"params": [p for p in model.parameters() if p.requires_grad]}]
        self.groups = [defaults | group | {"params": list(group["params"])} for group in groups]
        self.ema_decay, self.update_interval, self.decoupled = ema_decay, update_interval, decoupled
        self.time = 0
        self.slots = {param: Slot() for group in self.groups for param in group["params"]}
        self.watched: list[Watched] = []
        self.handles: list[Any] = []
        for module in model.modules():
            self._watch(module)

    def _watch(self, module: nn.Module) -> None:
        kind = kind_of(module)
        if kind is None:
            return
        watched = Watched(module, kind, Average(self.ema_decay), Average(self.ema_decay))
        roles = [(name, param) for name, param in module._parameters.items() if param in self.slots]
        for role, param in roles:
            assert param is not None
            self.slots[param].uses.append((watched, role))
        if not roles:
            return

        def add_probe(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            if not (module.training and torch.is_grad_enabled() and output.requires_grad):
                return None
            x = args[0] if args else next(iter(kwargs.values()))
            probe = torch.zeros_like(output, requires_grad=True)
            watched.calls.append(Call(x.detach().clone(), probe))
            return output + probe

        self.watched.append(watched)
        self.handles.append(module.register_forward_hook(add_probe, with_kwargs=True))

    def close(self) -> None:
        """Stop watching."""
        for handle in self.handles:
            handle.remove()

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for param in self.slots:
            param.grad = None

    @torch.no_grad()
    def step(self) -> None:
        """One optimizer step."""
        due = self.time % self.update_interval == 0
        if due:
            for watched in self.watched:
                watched.refresh()
        for watched in self.watched:
            watched.calls.clear()
        for group in self.groups:
            for param in group["params"]:
                if param.grad is not None:
                    self._refresh_gradient_factors(param, due)
                    self._update(param, group)
        self.time += 1

    def _refresh_gradient_factors(self, param: Tensor, due: bool) -> None:
        slot = self.slots[param]
        if self._modules_of(param):
            return
        assert param.grad is not None
        if not slot.axes or slot.provisional:
            slot.axes = [Average(self.ema_decay) for _ in param.shape]
            slot.provisional = not due
        elif not due:
            return
        for average, factor in zip(slot.axes, gradient_factors(param.grad), strict=True):
            average.add(factor)

    def _modules_of(self, param: Tensor) -> list[tuple[Watched, str]]:
        """The uses of a parameter that have statistics."""
        return [(watched, role) for watched, role in self.slots[param].uses if watched.input_factor.value is not None]

    def _update(self, param: Tensor, group: dict[str, Any]) -> None:
        slot = self.slots[param]
        assert param.grad is not None
        theta = param.detach().double()
        grad = param.grad.double()
        decay = group["weight_decay"] * theta
        if not self.decoupled:
            grad = grad + decay
        if slot.exp_avg is None:
            slot.exp_avg = torch.zeros_like(theta)
        slot.step += 1
        slot.exp_avg = group["beta"] * slot.exp_avg + (1 - group["beta"]) * grad
        momentum = slot.exp_avg / (1 - group["beta"] ** slot.step)
        direction = momentum / self.fisher_diagonal(param)
        if self.decoupled:
            direction = direction + decay
        param.copy_(theta - group["lr"] * direction)

    def fisher_diagonal(self, param: Tensor, *, normalized: bool = True) -> Tensor:
        """In the parameter's shape: normalised and damped, or the raw sum of products."""
        slot = self.slots[param]
        modules = self._modules_of(param)
        if modules:
            terms = [watched.product(role, normalized=normalized) for watched, role in modules]
        else:
            vectors = [average.read() for average in slot.axes]
            terms = [combine_axes([minmax(v) for v in vectors] if normalized else vectors, param.shape)]
        total = sum(term.reshape(param.shape) for term in terms)
        assert isinstance(total, Tensor)
        return total + self._damping(param) if normalized else total

    def _damping(self, param: Tensor) -> float:
        for group in self.groups:
            if any(param is member for member in group["params"]):
                return group["damping"]
        raise KeyError("the parameter is in no group")
