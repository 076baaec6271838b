"""The slow oracle: the diagonal Kronecker Fisher and the optimizer, in plain loops from the equations.

Nothing here is shared with the package. The factors are sums over batch, position and channel in python
floats (float64). `ReferenceFactored` does not attach tensor hooks to outputs: it adds a *probe*, a tensor of
zeros that requires grad, to the output of every module it watches. Adding zero changes no value, and after
the backward pass the probe's `.grad` is, by the chain rule, the gradient of the loss with respect to that
output: also when the output is a view, is modified in place afterwards, or the module is called often.
"""

from __future__ import annotations

import itertools
import math
import random
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

Kind = Literal["linear", "conv1d", "embedding", "layernorm", "rmsnorm", "conv", "batchnorm", "groupnorm"]
NORMS: tuple[Kind, ...] = ("layernorm", "rmsnorm", "batchnorm", "groupnorm")
CHANNELS_SECOND: tuple[Kind, ...] = ("conv", "batchnorm", "groupnorm")
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
TORCH_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, *BATCH_NORMS)


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


def flat_index(position: Sequence[int], shape: Sequence[int]) -> int:
    """Where the entry at `position` stands in a tensor of that shape, written out row by row."""
    index = 0
    for coordinate, size in zip(position, shape, strict=True):
        index = index * size + coordinate
    return index


@dataclass(frozen=True)
class Window:
    """How a convolution walks over its input: one entry per spatial axis, and how it goes beyond the border."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    mode: str = "zeros"

    @classmethod
    def of(cls, conv: nn.Module) -> Window:
        """That of a torch convolution. "same" puts the odd one of its padding behind."""
        assert isinstance(conv, CONVOLUTIONS)
        pads: list[tuple[int, int]] = []
        for axis, (size, step) in enumerate(zip(conv.kernel_size, conv.dilation, strict=True)):
            if conv.padding == "same":
                total = step * (size - 1)
                pads.append((total // 2, total - total // 2))
            else:
                pad = 0 if conv.padding == "valid" else int(conv.padding[axis])
                pads.append((pad, pad))
        return cls(conv.kernel_size, conv.stride, conv.dilation, tuple(pads), conv.padding_mode)

    @property
    def axes(self) -> int:
        """The number of spatial axes."""
        return len(self.kernel)

    def outputs(self, spatial: Sequence[int]) -> tuple[int, ...]:
        """The number of output positions along each axis."""
        counts = []
        for size, kernel, stride, step, pads in zip(
            spatial, self.kernel, self.stride, self.dilation, self.padding, strict=True
        ):
            counts.append((size + sum(pads) - step * (kernel - 1) - 1) // stride + 1)
        return tuple(counts)

    def source(self, axis: int, output: int, offset: int, size: int) -> int | None:
        """The coordinate that the kernel's entry `offset` reads for an output position; None for a padded zero."""
        at = output * self.stride[axis] + offset * self.dilation[axis] - self.padding[axis][0]
        if 0 <= at < size:
            return at
        if self.mode == "replicate":
            return 0 if at < 0 else size - 1
        if self.mode == "reflect":
            return -at if at < 0 else 2 * (size - 1) - at
        if self.mode == "circular":
            return at % size
        return None


def as_batch(x: Tensor, spatial_axes: int) -> Tensor:
    """A feature map as a batch of one, a batch as it is."""
    return x.reshape(-1, *x.shape[x.dim() - spatial_axes - 1 :])


def patch_rows(x: Tensor, window: Window) -> Iterator[list[float]]:
    """A convolution's input when it is seen as a Linear: (channels, *kernel), flat, for every output position."""
    examples = as_batch(x.detach().double(), window.axes)
    channels, *spatial = examples.shape[1:]
    area = math.prod(spatial)
    sources: list[list[int | None]] = []
    for position in itertools.product(*(range(count) for count in window.outputs(spatial))):
        sources.append([])
        for offsets in itertools.product(*(range(size) for size in window.kernel)):
            ats = [window.source(axis, position[axis], offsets[axis], size) for axis, size in enumerate(spatial)]
            inside = [at for at in ats if at is not None]
            sources[-1].append(flat_index(inside, spatial) if len(inside) == len(ats) else None)
    for example in examples:
        values = example.flatten().tolist()
        for patch in sources:
            yield [0.0 if at is None else values[channel * area + at] for channel in range(channels) for at in patch]


def conv_output_loop(conv: nn.Module, x: Tensor) -> Tensor:
    """What a convolution of this geometry and these weights returns: one dot product per position and channel."""
    assert isinstance(conv, CONVOLUTIONS)
    window = Window.of(conv)
    patches = list(patch_rows(x, window))
    columns = []
    for out in range(conv.out_channels):
        kernel = conv.weight[out].detach().double().flatten().tolist()
        start = len(kernel) * (out // (conv.out_channels // conv.groups))
        shift = 0.0 if conv.bias is None else float(conv.bias[out].detach())
        for patch in patches:
            part = patch[start : start + len(kernel)]
            columns.append(shift + sum(value * weight for value, weight in zip(part, kernel, strict=True)))
    spatial = x.shape[x.dim() - window.axes :]
    result = torch.tensor(columns, dtype=torch.float64).reshape(conv.out_channels, -1, *window.outputs(spatial))
    return result.movedim(0, 1).reshape(*x.shape[: x.dim() - window.axes - 1], *result.shape[:1], *result.shape[2:])


def one_hot_rows(tokens: Tensor, vocabulary: int, padding: int | None = None) -> Iterator[list[float]]:
    """What an embedding's input is when the embedding is seen as a matrix: a 1 at the token, 0 elsewhere.

    The padding token, whose row gets no gradient, is a row of zeros: a position, but nobody's input.
    """
    for token in tokens.flatten().tolist():
        yield [1.0 if word == token != padding else 0.0 for word in range(vocabulary)]


def normalized_rows(kind: Kind, x: Tensor, eps: float, channel_axes: int) -> Iterator[list[float]]:
    """The rows a norm layer multiplies by its scale."""
    for row in rows(x, channel_axes):
        yield standardized(row, eps, centred=kind == "layernorm")


def standardized(values: Sequence[float], eps: float, *, centred: bool = True) -> list[float]:
    """Minus the mean, over the root of the biased variance plus eps."""
    mean = sum(values) / len(values) if centred else 0.0
    spread = sum((value - mean) ** 2 for value in values) / len(values)
    return [(value - mean) / (spread + eps) ** 0.5 for value in values]


def batch_normalized_rows(x: Tensor, eps: float) -> Iterator[list[float]]:
    """Every channel over all positions of all examples of this call."""
    channels = [standardized(channel, eps) for channel in zip(*rows(x.movedim(1, -1)), strict=True)]
    for row in zip(*channels, strict=True):
        yield list(row)


def group_normalized_rows(x: Tensor, eps: float, groups: int) -> Iterator[list[float]]:
    """Every group of channels of every example over all of its positions."""
    for example in x.detach().double():
        values = example.flatten().tolist()  # channel by channel
        size = len(values) // groups
        normalized = [value for group in range(groups) for value in standardized(values[group * size :][:size], eps)]
        yield from rows(torch.tensor(normalized, dtype=torch.float64).reshape(example.shape).movedim(0, -1))


def input_rows(
    kind: Kind,
    x: Tensor,
    *,
    vocabulary: int = 0,
    padding: int | None = None,
    eps: float = 0.0,
    channel_axes: int = 1,
    groups: int = 1,
    window: Window | None = None,
) -> Iterator[list[float]]:
    """The rows x_n of the method for one call of a module."""
    if kind == "embedding":
        return one_hot_rows(x, vocabulary, padding)
    if kind == "conv":
        assert window is not None
        return patch_rows(x, window)
    if kind == "batchnorm":
        return batch_normalized_rows(x, eps)
    if kind == "groupnorm":
        return group_normalized_rows(x, eps, groups)
    if kind in NORMS:
        return normalized_rows(kind, x, eps, channel_axes)
    return rows(x)


def grad_rows(kind: Kind, g: Tensor, *, channel_axes: int = 1, window: Window | None = None) -> Iterator[list[float]]:
    """The rows g_n: the channels of the output's gradient at every position."""
    if kind == "conv":
        assert window is not None
        g = as_batch(g, window.axes)
    if kind in CHANNELS_SECOND:
        return rows(g.movedim(1, -1))
    return rows(g, channel_axes if kind in NORMS else 1)


def input_factor_loop(kind: Kind, x: Tensor, **options: Any) -> Tensor:
    """h_j = (1/N) sum_n x_nj^2, flat.

    Options: `vocabulary` and `padding` (the padding token) for embeddings; `eps` for norms, with `channel_axes` (the
    number of axes normalised together) or, for GroupNorm, `groups`; `window` for convolutions.
    """
    return mean_of_squares(input_rows(kind, x, **options))


def output_grad_factor_loop(kind: Kind, g: Tensor, **options: Any) -> Tensor:
    """s_i = (1/N) sum_n g_ni^2, whatever the module is. Options as above: `channel_axes`, `window`."""
    return mean_of_squares(grad_rows(kind, g, **options))


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


SHORT = 8  # the most values of an axis that get no factor of their own


def gradient_axes(shape: torch.Size, transposed: bool) -> tuple[list[int], list[list[int]]]:
    """The axes that number matrices of a stack, and the axes of each factor of such a matrix, rows first."""
    axes = [axis for axis, size in enumerate(shape) if size > 1]
    if transposed:  # (in, out, *kernel)
        factors, stack = [[axis for axis in axes if axis != 1], [axis for axis in axes if axis == 1]], []
    else:
        columns: list[int] = []
        while axes and all(shape[axis] <= SHORT for axis in columns):
            columns.insert(0, axes.pop())
        rows, stack = axes[-1:], axes[:-1]
        factors = [rows + columns] if all(shape[axis] <= SHORT for axis in rows) else [rows, columns]
    return stack, [factor for factor in factors if factor]


def gradient_factors(grad: Tensor, transposed: bool = False) -> list[Tensor]:
    """The means of grad^2 over the axes that a factor does not have, which stay with length 1."""
    squared = grad.detach().double() ** 2
    stack, factors = gradient_axes(grad.shape, transposed)
    means = []
    for axes in factors:
        rest = [axis for axis in range(grad.dim()) if axis not in stack + axes]
        means.append(squared.mean(rest, keepdim=True) if rest else squared)
    return means


def minmax_in_stack(factor: Tensor, stack: list[int]) -> Tensor:
    """`minmax` of each matrix's part of a factor."""
    parts = [range(size) if axis in stack else [slice(None)] for axis, size in enumerate(factor.shape)]
    result = torch.empty_like(factor)
    for index in itertools.product(*parts):
        result[index] = minmax(factor[index])
    return result


def conv_product(s: Tensor, h: Tensor, shape: torch.Size) -> Tensor:
    """F[o, j, *k] = s[o] h[c, *k], with c the input channel that entry j of the output channel o's group reads.

    `h` runs over all input channels: a grouped convolution is a dense one, some of whose weights are not there.
    """
    out_channels, fan_in, *kernel = shape
    h = h.reshape(-1, *kernel)
    groups = h.shape[0] // fan_in
    product = torch.zeros(shape, dtype=torch.float64)
    for out in range(out_channels):
        group = out // (out_channels // groups)
        for entry in range(fan_in):
            product[out, entry] = s[out] * h[group * fan_in + entry]
    return product


def kronecker_gradient_factors(grad: Tensor, groups: int) -> list[Tensor]:
    """The means of grad^2 over what a layer's S and H do not run over: for a weight (out, in / groups, *kernel).

    `s` has a mean for every output channel; `h`, of shape (in, *kernel), the means over the output channels that
    read an input channel.
    """
    squared = grad.detach().double() ** 2
    out_channels, fan_in = squared.shape[:2]
    members = out_channels // groups
    s = [squared[out].mean() for out in range(out_channels)]
    h = []
    for group, entry in itertools.product(range(groups), range(fan_in)):
        readers = [squared[group * members + member, entry] for member in range(members)]
        h.append(sum(readers) / members)
    return [torch.stack(s), torch.stack([torch.as_tensor(mean) for mean in h])]


# --------------------------------------------------------------------------------------------------
# Which rule a module has
# --------------------------------------------------------------------------------------------------


def kind_of(module: nn.Module) -> Kind | None:
    """The rule of a module, or None."""
    name = type(module).__name__
    if isinstance(module, nn.Linear):
        return "linear"
    if name.endswith("PositionalEmbedding"):  # OPT, BART, Whisper: an Embedding that is not called with its tokens
        return None
    if isinstance(module, nn.Embedding):
        return "embedding"
    if isinstance(module, nn.LayerNorm):
        return "layernorm"
    if isinstance(module, nn.GroupNorm):
        return "groupnorm"
    if isinstance(module, BATCH_NORMS):
        return "batchnorm"
    if isinstance(module, CONVOLUTIONS):
        return "conv"
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


def grad_options(kind: Kind, module: nn.Module) -> dict[str, Any]:
    """What `grad_rows` needs to know of a module."""
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        return {"channel_axes": len(module.normalized_shape)}
    return {"window": Window.of(module)} if kind == "conv" else {}


def input_options(kind: Kind, module: nn.Module, x: Tensor) -> dict[str, Any]:
    """What `input_rows` needs to know of a module and its input."""
    options = grad_options(kind, module)
    if isinstance(module, nn.Embedding):
        options["vocabulary"], options["padding"] = module.num_embeddings, module.padding_idx
    if isinstance(module, nn.GroupNorm):
        options["groups"] = module.num_groups
    if kind in NORMS:
        options["eps"] = norm_eps(module, x)
    return options


def norm_output_loop(kind: Kind, norm: nn.Module, x: Tensor) -> Tensor | None:
    """What a norm layer of this class and these parameters returns in training mode; None if it cannot take `x`."""
    weight, bias = norm.weight, getattr(norm, "bias", None)
    assert isinstance(weight, Tensor)
    shape = weight.shape
    second = kind in CHANNELS_SECOND
    if (x.shape[1:2] if second else x.shape[x.dim() - len(shape) :]) != shape:
        return None
    scale = weight.detach().double().flatten().tolist()
    shift = [0.0] * len(scale) if bias is None else bias.detach().double().flatten().tolist()
    out = []
    for row in input_rows(kind, x, **input_options(kind, norm, x)):
        out.append([value * a + b for value, a, b in zip(row, scale, shift, strict=True)])
    result = torch.tensor(out, dtype=torch.float64)
    return result.reshape(x.movedim(1, -1).shape).movedim(-1, 1) if second else result.reshape(x.shape)


def computes_its_class(kind: Kind, module: nn.Module, x: Tensor, output: Tensor) -> bool:
    """Whether a subclass of a convolution or of torch's norms is one in its numbers too.

    ConvNeXt's LayerNorm, which normalises the second axis, is not.
    """
    expected: Tensor | None
    if kind == "conv":
        if type(module) in CONVOLUTIONS:
            return True
        expected = conv_output_loop(module, x)
    elif isinstance(module, TORCH_NORMS) and type(module) not in TORCH_NORMS and module.weight is not None:
        expected = norm_output_loop(kind, module, x)
    else:
        return True
    if expected is None or expected.shape != output.shape:
        return False
    return bool((output - expected).norm() <= 1e-3 * expected.norm())


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
    """A module with a rule: the calls since the last step, and the averages of its two factors.

    `output_grad_sum` averages the sums over positions that `output_grad_factor` averages the means of. `believed` is
    whether its first call computed what its class says.
    """

    module: nn.Module
    kind: Kind
    input_factor: Average
    output_grad_factor: Average
    output_grad_sum: Average
    calls: list[Call] = field(default_factory=list)
    believed: bool | None = None

    def refresh(self) -> None:
        """Means over every position of every call that took part in a backward pass, into the averages."""
        used = [call for call in self.calls if call.probe.grad is not None]
        if not used:
            return
        kind, module = self.kind, self.module
        inputs = [input_rows(kind, call.x, **input_options(kind, module, call.x)) for call in used]
        probes = [call.probe.grad for call in used if call.probe.grad is not None]
        grads = [row for grad in probes for row in grad_rows(kind, grad, **grad_options(kind, module))]
        self.input_factor.add(mean_of_squares(itertools.chain(*inputs)))
        self.output_grad_factor.add(mean_of_squares(grads))
        self.output_grad_sum.add(len(grads) * mean_of_squares(grads))

    def product(self, role: str, *, normalized: bool = False, summed: bool = False) -> Tensor:
        """This module's term of the Fisher diagonal of its `role` ("weight" or "bias"), flat or a matrix.

        Output gradients enter as means over positions, or, `summed`, as sums.
        """
        h, s = self.input_factor.read(), (self.output_grad_sum if summed else self.output_grad_factor).read()
        shape = minmax if normalized else torch.clone
        if role == "bias":
            return shape(s)
        if self.kind in NORMS:
            return shape(s * h)
        if self.kind == "conv":  # weight [out, in / groups, *kernel]
            assert isinstance(self.module.weight, Tensor)
            return conv_product(shape(s), shape(h), self.module.weight.shape)
        if self.kind == "linear":  # weight [out, in]
            return outer(shape(s), shape(h))
        return outer(shape(h), shape(s))  # Conv1D [in, out]; Embedding [vocabulary, width]


@dataclass
class Slot:
    """What belongs to one parameter."""

    exp_avg: Tensor | None = None
    step: int = 0
    from_gradient: list[Average] = field(default_factory=list)
    provisional: bool = False
    uses: list[tuple[Watched, str]] = field(default_factory=list)
    transposed: bool = False

    def gradient_factors(self, grad: Tensor) -> list[Tensor]:
        """Factors from the parameter's own gradient, in the form of its first use.

        Of a parameter that nobody's rule covers one per axis; of a layer's weight S and H; of a bias, a scale or
        a shift the squared gradient itself.
        """
        if not self.uses:
            return gradient_factors(grad, self.transposed)
        watched, role = self.uses[0]
        if role == "bias" or watched.kind in NORMS:
            return [grad.detach().double() ** 2]
        groups = watched.module.groups if watched.kind == "conv" else 1
        assert isinstance(groups, int)
        return kronecker_gradient_factors(grad, groups)

    def normalized(self, factors: list[Tensor], shape: torch.Size) -> list[Tensor]:
        """Each factor on [0, 1], those of a stack one by one."""
        stack = [] if self.uses else gradient_axes(shape, self.transposed)[0]
        return [minmax_in_stack(factor, stack) if stack else minmax(factor) for factor in factors]

    def gradient_product(self, factors: list[Tensor], shape: torch.Size) -> Tensor:
        """What the factors of `gradient_factors` give for each value of the parameter."""
        if not self.uses:
            product = torch.ones(shape, dtype=torch.float64)
            for factor in factors:
                product = product * factor
            return product
        if len(factors) == 1:
            return factors[0]
        return conv_product(*factors, shape)


class ReferenceFactored(ABC):
    """What both optimizers have in common: factors of modules and of gradients, their averages, a first moment.

    `groups` are dicts with "params" and, if wanted, their own values of the `options`.

    A parameter takes its curvature from the modules that own it and were called on a refresh; where there are
    none, from its own gradient, averaged over refreshes alike; before its first refresh (a layer first used
    between two) from its current gradient alone.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: list[dict[str, Any]] | None,
        *,
        ema_decay: float,  # gamma
        update_interval: int,  # T_cov
        **options: Any,
    ) -> None:
        """Watch every module that has a rule."""
        if groups is None:
            groups = [{"params": [p for p in model.parameters() if p.requires_grad]}]
        self.groups = [options | group | {"params": list(group["params"])} for group in groups]
        self.ema_decay, self.update_interval = ema_decay, update_interval
        self.time = self.next_refresh = self.refreshes = 0
        self.slots = {param: Slot() for group in self.groups for param in group["params"]}
        self.watched: list[Watched] = []
        self.handles: list[Any] = []
        for module in model.modules():
            self._watch(module)
            transposed = isinstance(module, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d)
            if transposed and module.weight in self.slots:
                self.slots[module.weight].transposed = True

    @abstractmethod
    def _update(self, param: Tensor, group: dict[str, Any]) -> None:
        """Move one parameter that has a gradient."""

    @abstractmethod
    def fisher_diagonal(self, param: Tensor, *, normalized: bool = True) -> Tensor:
        """In the parameter's shape: as the step takes it, or the raw sum of products."""

    def _watch(self, module: nn.Module) -> None:
        kind = kind_of(module)
        if kind is None:
            return
        watched = Watched(module, kind, *(Average(self.ema_decay) for _ in range(3)))
        roles = [(name, param) for name, param in module._parameters.items() if param in self.slots]
        for role, param in roles:
            assert param is not None
            self.slots[param].uses.append((watched, role))
        if not roles:
            return

        def add_probe(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            if not ((module.training or kind != "batchnorm") and torch.is_grad_enabled() and output.requires_grad):
                return None
            x = args[0] if args else next(iter(kwargs.values()))
            if watched.believed is None:
                watched.believed = computes_its_class(kind, module, x, output.detach())
            if not watched.believed:
                return None
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
        due = self.time >= self.next_refresh
        newcomers = [watched for watched in self.watched if due or self._is_newcomer(watched)]
        known = [param for param in self.slots if self._modules_of(param)]
        for watched in newcomers:
            watched.refresh()
        if due:
            self.next_refresh = (self.time // self.update_interval + 1) * self.update_interval
            if any(self._was_missed(param) for param in known):
                self.next_refresh += random.Random(self.refreshes).randrange(self.update_interval)
            self.refreshes += 1
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
        factors = slot.gradient_factors(param.grad)
        if not slot.from_gradient or slot.provisional:
            slot.from_gradient = [Average(self.ema_decay) for _ in factors]
            slot.provisional = not due
        elif not due:
            return
        for average, factor in zip(slot.from_gradient, factors, strict=True):
            average.add(factor)

    def _is_newcomer(self, watched: Watched) -> bool:
        """Whether one of the module's parameters has no statistics yet, of modules or of gradients."""
        slots = [(p, slot) for p, slot in self.slots.items() if any(user is watched for user, _ in slot.uses)]
        return any(not self._modules_of(p) and (not s.from_gradient or s.provisional) for p, s in slots)

    def _was_missed(self, param: Tensor) -> bool:
        """Whether a parameter that modules gave statistics was not used in this step."""
        called = any(call.probe.grad is not None for watched, _ in self.slots[param].uses for call in watched.calls)
        return not called and (param.grad is None or not param.grad.any())

    def _modules_of(self, param: Tensor) -> list[tuple[Watched, str]]:
        """The uses of a parameter that have statistics."""
        return [(watched, role) for watched, role in self.slots[param].uses if watched.input_factor.value is not None]

    def _take_momentum(self, param: Tensor, group: dict[str, Any], grad: Tensor) -> Tensor:
        """The bias-corrected first moment with this step's gradient in it."""
        slot = self.slots[param]
        if slot.exp_avg is None:
            slot.exp_avg = torch.zeros_like(grad)
        slot.step += 1
        slot.exp_avg = group["beta"] * slot.exp_avg + (1 - group["beta"]) * grad
        return slot.exp_avg / (1 - group["beta"] ** slot.step)

    def _group_of(self, param: Tensor) -> dict[str, Any]:
        for group in self.groups:
            if any(param is member for member in group["params"]):
                return group
        raise KeyError("the parameter is in no group")


class ReferenceAdaFisher(ReferenceFactored):
    """AdaFisher and AdaFisherW, slowly: everything in float64, every quantity as its equation says."""

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
        """Groups may have their own "lr", "beta", "damping" or "weight_decay"."""
        options = {"lr": lr, "beta": beta, "damping": damping, "weight_decay": weight_decay}
        super().__init__(model, groups, ema_decay=ema_decay, update_interval=update_interval, **options)
        self.decoupled = decoupled

    def _update(self, param: Tensor, group: dict[str, Any]) -> None:
        assert param.grad is not None
        theta = param.detach().double()
        decay = group["weight_decay"] * theta
        grad = param.grad.double() if self.decoupled else param.grad.double() + decay
        direction = self._take_momentum(param, group, grad) / self.fisher_diagonal(param)
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
            factors = [average.read() for average in slot.from_gradient]
            factors = slot.normalized(factors, param.shape) if normalized else factors
            terms = [slot.gradient_product(factors, param.shape)]
        total = sum(term.reshape(param.shape) for term in terms)
        assert isinstance(total, Tensor)
        return total + self._group_of(param)["damping"] if normalized else total


MATRIX_RMS, FULL_RMS, SMALL_RMS = 0.2, 1.0, 0.2
"""Root mean squares of updates: that of a polar factor; the largest ones of matrices and tables, and of the rest."""

EPS = 1e-8
"""A damping is its square at least."""

LEAST_RMS = 0.02
"""That of a parameter, at least, where a step is bounded by it."""


def iterated_values(s: Tensor) -> Tensor:
    """What four Newton-Schulz steps make of singular values, in units of the Frobenius norm."""
    s = s / 1.01
    s = 7.7110 * s - 22.1138 * s**3 + 16.2487 * s**5
    s = 4.1772 * s - 3.5156 * s**3 + 0.7581 * s**5
    s = 3.6231 * s - 2.8774 * s**3 + 0.6095 * s**5
    return 2.5061 * s - 1.8478 * s**3 + 0.4383 * s**5


def iterated_polar(matrix: Tensor) -> Tensor:
    """What Newton-Schulz does to a matrix, by its singular values: `U p(s / |s|) V^T`."""
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    if not s.any():
        return torch.zeros_like(matrix)
    return u @ torch.diag(iterated_values(s / s.norm())) @ vt


def root_mean_square(values: Tensor) -> Tensor:
    """Over all entries."""
    return (values**2).mean() ** 0.5


class ReferenceRoot:
    """AdaFisher(W) by the root of the gradient's own moments, and SpectralAdaFisher, slowly, in float64.

    `small` are the parameters whose directions have the smaller size, `matrices` those that move by a polar factor.
    Groups may have their own value of every option.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: list[dict[str, Any]] | None = None,
        *,
        small: Iterable[Tensor],
        matrices: Iterable[Tensor] = (),
        lr: float,
        beta: float,
        damping: float,  # rho
        ema_decay: float,
        weight_decay: float,
        decoupled: bool = True,
        nesterov: bool = True,
        max_relative_step: float | None = 0.05,
    ) -> None:
        """Take the options."""
        options = {
            "lr": lr,
            "beta": beta,
            "damping": damping,
            "ema_decay": ema_decay,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "max_relative_step": max_relative_step,
        }
        if groups is None:
            groups = [{"params": [p for p in model.parameters() if p.requires_grad]}]
        self.groups = [options | group | {"params": list(group["params"])} for group in groups]
        self.small, self.matrices, self.decoupled = set(small), set(matrices), decoupled
        self.slots = {param: Slot() for group in self.groups for param in group["params"]}
        for module in model.modules():
            transposed = isinstance(module, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d)
            if transposed and module.weight in self.slots:
                self.slots[module.weight].transposed = True

    def close(self) -> None:
        """There are no hooks."""

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for param in self.slots:
            param.grad = None

    @torch.no_grad()
    def step(self) -> None:
        """One optimizer step."""
        for group in self.groups:
            for param in group["params"]:
                if param.grad is not None and param.numel():
                    self._update(param, group)

    def _update(self, param: Tensor, group: dict[str, Any]) -> None:
        slot, beta = self.slots[param], group["beta"]
        assert param.grad is not None
        theta, grad = param.detach().double(), param.grad.double()
        factors = gradient_factors(grad, slot.transposed)
        slot.from_gradient = slot.from_gradient or [Average(group["ema_decay"]) for _ in factors]
        for average, factor in zip(slot.from_gradient, factors, strict=True):
            average.decay = group["ema_decay"]
            average.add(factor)
        if not self.decoupled:
            grad = grad + group["weight_decay"] * theta
        slot.exp_avg = (1 - beta) * grad + beta * (torch.zeros_like(grad) if slot.exp_avg is None else slot.exp_avg)
        slot.step += 1
        ahead = beta * slot.exp_avg + (1 - beta) * grad if group["nesterov"] else slot.exp_avg
        momentum = ahead / (1 - beta**slot.step)
        if param in self.matrices:
            direction = self._polar_direction(momentum.reshape(len(momentum), -1), group["damping"]).reshape(
                theta.shape
            )
        else:
            direction = self._root_direction(param, momentum)
        moved = group["lr"] * direction
        if group["max_relative_step"] is not None and param.dim() > 1 and moved.any():
            most = group["max_relative_step"] * max(root_mean_square(theta), LEAST_RMS)
            moved = moved * min(1.0, most / root_mean_square(moved))
        decay = group["lr"] * group["weight_decay"] * theta if self.decoupled else 0.0
        param.copy_(theta - moved - decay)

    def _polar_direction(self, momentum: Tensor, rho: float) -> Tensor:
        """`O = diag(a) polar(diag(a) M diag(b)) diag(b)`, scaled; a and b from the momentum's own lines."""
        if not momentum.any():
            return momentum
        whitenings = []
        for axis in range(2):
            means = (momentum**2).mean(1 - axis)
            whitenings.append(torch.diag((means / means.mean() + rho) ** -0.5))
        a, b = whitenings
        direction = a @ iterated_polar(a @ momentum @ b) @ b
        return MATRIX_RMS * direction / root_mean_square(direction)

    def _root_direction(self, param: Tensor, momentum: Tensor) -> Tensor:
        size = SMALL_RMS if param in self.small else FULL_RMS
        if param.numel() == 1:  # nothing is known of it
            return size * momentum / momentum.abs() if momentum.any() else momentum
        direction = momentum / self.fisher_diagonal(param) ** 0.5
        return direction * min(1.0, size / max(float(root_mean_square(direction)), 1e-300))

    def fisher_diagonal(self, param: Tensor, *, normalized: bool = True) -> Tensor:
        """In the parameter's shape: damped, or raw."""
        slot = self.slots[param]
        factors = [average.read() for average in slot.from_gradient]
        product = slot.gradient_product(factors, param.shape)
        if len(factors) > 1:  # each of them has the mean of grad^2 of its matrix
            stack = gradient_axes(param.shape, slot.transposed)[0]
            mean = factors[1].mean([axis for axis in range(param.dim()) if axis not in stack], keepdim=True)
            product = torch.where(mean > 0, product / mean, torch.zeros_like(product))
        damping = max(float(self._group_of(param)["damping"] * product.mean()), EPS**2)
        return product + damping if normalized else product

    def _group_of(self, param: Tensor) -> dict[str, Any]:
        for group in self.groups:
            if any(param is member for member in group["params"]):
                return group
        raise KeyError("the parameter is in no group")
