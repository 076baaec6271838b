"""Small models with one awkward thing each, and a loss for each of them.

`CASES` holds frozen records. `build()` gives a seeded model in training mode, `loss(model, generator)`
draws a batch in the model's own precision and returns the training loss, so tests may call `.double()` first.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from transformers.pytorch_utils import Conv1D

Loss = Callable[[nn.Module, torch.Generator], Tensor]


@dataclass(frozen=True)
class Case:
    """One awkward model."""

    name: str
    make: Callable[[], nn.Module]
    loss: Loss
    no_gradient: tuple[str, ...] = ()
    """Trainable parameters that never receive a gradient."""

    def build(self, seed: int = 0) -> nn.Module:
        """A new model in training mode; the same seed gives the same weights."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.make().train()


# --- batches and losses -----------------------------------------------------------------------

WORDS = 11
PAD = 0


def draw(model: nn.Module, generator: torch.Generator, *shape: int) -> Tensor:
    """Normal numbers in the model's precision."""
    dtype = next(model.parameters()).dtype
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def regression(*shape: int) -> Loss:
    """Mean squared error of `model(x)` to random targets, for inputs of that shape."""

    def loss(model: nn.Module, generator: torch.Generator) -> Tensor:
        prediction = model(draw(model, generator, *shape))
        return F.mse_loss(prediction, draw(model, generator, *prediction.shape))

    return loss


def two_classes(model: nn.Module, generator: torch.Generator) -> Tensor:
    """Cross-entropy of two logits, whose gradients g and -g are equal in square up to rounding."""
    labels = torch.tensor([0, 1, 1, 0, 1])
    return F.cross_entropy(model(draw(model, generator, 5, 4)), labels)


def next_token(batch: int = 3, length: int = 5) -> Loss:
    """Cross-entropy of the next token; token `PAD` is drawn like every other one."""

    def loss(model: nn.Module, generator: torch.Generator) -> Tensor:
        tokens = torch.randint(0, WORDS, (batch, length + 1), generator=generator)
        logits = model(tokens[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

    return loss


# --- models -----------------------------------------------------------------------------------


def mlp(*widths: int, bias: bool = True) -> nn.Sequential:
    """Linear layers with tanh between."""
    layers: list[nn.Module] = []
    for narrow, wide in itertools.pairwise(widths):
        layers += [nn.Linear(narrow, wide, bias=bias), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def frozen_mlp(*frozen: str) -> nn.Sequential:
    """A four-layer MLP with the named parameters frozen."""
    model = mlp(4, 5, 6, 5, 3)
    names = dict(model.named_parameters())
    for name in frozen:
        names[name].requires_grad_(False)
    return model


class TinyLanguageModel(nn.Module):
    """Embedding, norm, mixing layer, head; the head may be the embedding itself."""

    def __init__(self, *, tied: bool, padding: int | None = None) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, 6, padding_idx=padding)
        self.norm = nn.LayerNorm(6)
        self.mix = nn.Linear(6, 6)
        self.head = nn.Linear(6, WORDS, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.norm(self.embedding(tokens))
        return self.head(hidden + torch.tanh(self.mix(hidden)))


class BareParameter(nn.Module):
    """A bare vector as long as the layer after it is wide, a bare matrix, and a bare scalar."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.randn(5))
        self.table = nn.Parameter(torch.randn(4, 5))
        self.gain = nn.Parameter(torch.ones(()))
        self.layer = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * self.layer(x + self.shift + self.table)


class Adapted(nn.Module):
    """A frozen layer with a trainable low-rank bypass (LoRA)."""

    def __init__(self, fan_in: int, fan_out: int, rank: int = 2) -> None:
        super().__init__()
        self.base = nn.Linear(fan_in, fan_out).requires_grad_(False)
        self.down = nn.Linear(fan_in, rank, bias=False)
        self.up = nn.Linear(rank, fan_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


class UsedTwice(nn.Module):
    """One layer called twice in a forward, on different numbers of rows."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(5, 5)
        self.head = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        once = torch.tanh(self.shared(x))
        return self.head(once + self.shared(once[:2]).mean(0))


class UsedLate(nn.Module):
    """A layer that joins at the third forward."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 5)
        self.late = nn.Linear(5, 5)
        self.head = nn.Linear(5, 2)
        self.forwards = 0

    def forward(self, x: Tensor) -> Tensor:
        self.forwards += 1
        hidden = torch.tanh(self.first(x))
        if self.forwards > 2:
            hidden = torch.tanh(self.late(hidden))
        return self.head(hidden)


class KeywordCall(nn.Module):
    """Layers called with a keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 5)
        self.norm = nn.LayerNorm(5)
        self.last = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(input=torch.tanh(self.norm(input=self.first(input=x))))


class ScaledLinear(nn.Linear):
    """A subclass of Linear with its own name and forward."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input)


class Attention(nn.Module):
    """torch's attention: `in_proj_weight` is a bare parameter, `out_proj` a Linear that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        mixed, _ = self.attention(x, x, x, need_weights=False)
        return self.head(x + mixed)


class Experts(nn.Module):
    """Experts fused into one 3-D parameter, and a router that applies its own weight."""

    def __init__(self, width: int = 4, hidden: int = 5) -> None:
        super().__init__()
        self.router = nn.Parameter(torch.randn(3, width))
        self.up = nn.Parameter(torch.randn(3, width, hidden) / 2)
        self.down = nn.Parameter(torch.randn(3, hidden, width) / 2)
        self.head = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        gates = F.linear(x, self.router).softmax(-1)
        hidden = torch.einsum("bi,eio->beo", x, self.up).tanh()
        return self.head(x + torch.einsum("be,beo,eoi->bi", gates, hidden, self.down))


class Skips(nn.Module):
    """A layer, in the middle, that the forward never uses."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 5)
        self.skipped = nn.Linear(5, 5)
        self.head = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.first(x)))


class Buffers(nn.Module):
    """Buffers of every type beside the parameters."""

    offset: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("offset", torch.randn(4))
        self.register_buffer("mask", torch.ones(4, dtype=torch.bool))
        self.register_buffer("seen", torch.tensor(0), persistent=False)
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x + self.offset)


class Transposed(nn.Module):
    """The transposed Linear of transformers, with an in-place addition to its output."""

    def __init__(self) -> None:
        super().__init__()
        self.first = Conv1D(6, 4)
        self.last = Conv1D(2, 6)
        nn.init.normal_(self.first.weight)
        nn.init.normal_(self.last.weight)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        hidden += 0.5
        return self.last(torch.tanh(hidden))


class LinearOverExamples(nn.Module):
    """Four axes in, and an output with one channel."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 5)
        self.last = nn.Linear(5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x))).squeeze(-1)


def weight_normed() -> nn.Module:
    """A Linear whose weight is computed from two other parameters."""
    return nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 5)), nn.Tanh(), nn.Linear(5, 2))


def in_place() -> nn.Module:
    """A rectifier that overwrites the layer's output."""
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 2))


def mlp_normed(*layers: nn.Module, width: int = 5) -> nn.Module:
    """Layers between two linear ones."""
    return nn.Sequential(nn.Linear(4, width), *layers, nn.Tanh(), nn.Linear(width, 2))


def normed(**options: Any) -> nn.Module:
    """A LayerNorm between two layers."""
    return nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5, **options), nn.Linear(5, 2))


# --- convolutions, and norms whose channels come second ---------------------------------------


class Head(nn.Module):
    """The mean over all positions, into a linear layer: `spatial_axes` axes behind the channels."""

    def __init__(self, channels: int, spatial_axes: int = 2) -> None:
        super().__init__()
        self.spatial_axes = spatial_axes
        self.linear = nn.Linear(channels, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.flatten(-self.spatial_axes).mean(-1) if self.spatial_axes else x)


def convnet(*layers: nn.Module, channels: int = 4, spatial_axes: int = 2) -> nn.Sequential:
    """The layers, a smooth curve (so that the positions do not merely add up), and a head."""
    return nn.Sequential(*layers, nn.Tanh(), Head(channels, spatial_axes))


def plain_convnet() -> nn.Sequential:
    """Convolution, BatchNorm, rectifier, twice."""
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1, bias=False),
        nn.BatchNorm2d(3),
        nn.ReLU(),
        nn.Conv2d(3, 4, 3, padding=1, stride=2, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        Head(4),
    )


class ResidualInPlace(nn.Module):
    """A BatchNorm's output that is added to in place and overwritten by a rectifier, as in ResNets."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.inner, self.norm = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.rectify = nn.ReLU(inplace=True)
        self.head = Head(4)

    def forward(self, x: Tensor) -> Tensor:
        residual = self.rectify(self.stem_norm(self.stem(x)))
        hidden = self.norm(self.inner(residual))
        hidden += residual
        return self.head(self.rectify(hidden))


class FunctionalConv(nn.Module):
    """Convolutions, one of them grouped, whose weights are used without calling them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.grouped = nn.Conv2d(2, 4, (2, 3)), nn.Conv2d(4, 6, 2, groups=2)
        self.head = Head(6)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(F.conv2d(x, self.first.weight, self.first.bias))
        return self.head(torch.tanh(F.conv2d(hidden, self.grouped.weight, self.grouped.bias, groups=2)))


class SharedConv(nn.Module):
    """One convolution over two maps of different sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Conv2d(2, 2, 3, padding=1)
        self.head = Head(2)

    def forward(self, x: Tensor) -> Tensor:
        once = torch.tanh(self.shared(x))
        return self.head(once + self.shared(once[..., ::2, 1:3]).mean((-1, -2), keepdim=True))


class TiedConv(nn.Module):
    """One weight in two convolutions of different dilation (a pyramid over one kernel)."""

    def __init__(self) -> None:
        super().__init__()
        self.near = nn.Conv2d(2, 4, 3, padding=1)
        self.far = nn.Conv2d(2, 4, 3, padding=2, dilation=2)
        self.far.weight = self.near.weight
        self.head = Head(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.near(x)) * torch.tanh(self.far(x)))


class ChannelsLast(nn.Module):
    """Maps whose channels come last in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = plain_convnet().to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x.to(memory_format=torch.channels_last))


class KeepsStatistics(nn.Module):
    """A BatchNorm that stays in eval mode while the rest trains (fine-tuning with fixed statistics)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3), Head(3)

    def train(self, mode: bool = True) -> KeepsStatistics:
        super().train(mode)
        self.norm.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.norm(self.conv(x))))


class StandardizedConv(nn.Conv2d):
    """A convolution that standardises its weight on every call (BiT)."""

    def forward(self, input: Tensor) -> Tensor:
        mean, spread = self.weight.mean((1, 2, 3), keepdim=True), self.weight.std((1, 2, 3), keepdim=True)
        weight = (self.weight - mean) / (spread + 1e-5)
        return F.conv2d(input, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class RenamedConv(nn.Conv2d):
    """A subclass that is still a convolution."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 1.0


class ActivatedBatchNorm(nn.BatchNorm2d):
    """Has its rectifier inside (as timm's)."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).relu()


class ActivatedGroupNorm(nn.GroupNorm):
    """Has its rectifier inside (as timm's)."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).relu()


class ChannelsFirstLayerNorm(nn.LayerNorm):
    """Normalises the second axis, where its class normalises the last (ConvNeXt)."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.movedim(1, -1)).movedim(-1, 1)


CONVOLUTIONS: tuple[Case, ...] = (
    Case("conv", lambda: convnet(nn.Conv2d(2, 4, (3, 2))), regression(2, 2, 4, 4)),
    Case("conv_batch_norm", plain_convnet, regression(3, 2, 4, 4)),
    Case("conv_grouped", lambda: convnet(nn.Conv2d(4, 6, (2, 3), groups=2), channels=6), regression(2, 4, 4, 4)),
    Case(
        "conv_depthwise",
        lambda: convnet(nn.Conv2d(3, 6, 3, groups=3, padding=1, bias=False), nn.Conv2d(6, 4, 1)),
        regression(2, 3, 4, 4),
    ),
    Case(
        "conv_strided_dilated",
        lambda: convnet(nn.Conv2d(2, 4, (3, 2), stride=(2, 3), dilation=(1, 2), padding=(2, 1))),
        regression(2, 2, 6, 5),
    ),
    Case(
        "conv_same_even",
        lambda: convnet(nn.Conv2d(2, 4, (2, 4), padding="same", dilation=(3, 1))),
        regression(2, 2, 4, 5),
    ),
    Case("conv_valid", lambda: convnet(nn.Conv2d(2, 4, 2, padding="valid")), regression(2, 2, 4, 4)),
    Case(
        "conv_reflect",
        lambda: convnet(nn.Conv2d(2, 4, 3, padding=(2, 1), padding_mode="reflect")),
        regression(2, 2, 4, 3),
    ),
    Case(
        "conv_replicate",
        lambda: convnet(nn.Conv2d(2, 4, 3, padding=(3, 1), padding_mode="replicate", stride=2)),
        regression(2, 2, 3, 4),
    ),
    Case(
        "conv_circular_same_even",
        lambda: convnet(nn.Conv2d(2, 4, (2, 4), padding="same", padding_mode="circular")),
        regression(2, 2, 3, 4),
    ),
    Case("conv_1d", lambda: convnet(nn.Conv1d(3, 4, 3, stride=2, padding=1), spatial_axes=1), regression(2, 3, 6)),
    Case(
        "conv_1d_reflect",
        lambda: convnet(nn.Conv1d(4, 4, 3, padding=2, groups=2, padding_mode="reflect"), spatial_axes=1),
        regression(2, 4, 5),
    ),
    Case(
        "conv_3d",
        lambda: convnet(
            nn.Conv3d(2, 4, (2, 1, 2), padding=(1, 0, 1), groups=2, bias=False), nn.BatchNorm3d(4), spatial_axes=3
        ),
        regression(2, 2, 2, 3, 2),
    ),
    Case(
        "conv_unbatched",
        lambda: convnet(nn.Conv2d(2, 3, 2, padding=1), nn.Conv2d(3, 4, 2, padding_mode="circular", padding=1)),
        regression(2, 3, 4),
    ),
    Case(
        "conv_unbatched_in_place",  # the output is a view of a batch of one
        lambda: convnet(nn.Conv2d(2, 3, 2), nn.ReLU(inplace=True), nn.Conv2d(3, 4, 2), nn.ReLU(inplace=True)),
        regression(2, 4, 4),
    ),
    Case(
        "conv_1d_in_place",
        lambda: convnet(nn.Conv1d(3, 4, 2), nn.ReLU(inplace=True), nn.Conv1d(4, 4, 2), spatial_axes=1),
        regression(2, 3, 5),
    ),
    Case(
        "conv_1d_unbatched_in_place",
        lambda: convnet(nn.Conv1d(3, 4, 2), nn.ReLU(inplace=True), nn.Conv1d(4, 4, 2), spatial_axes=1),
        regression(3, 5),
    ),
    Case(
        "conv_one_position",
        lambda: convnet(nn.Conv2d(4, 6, (3, 2), groups=2), channels=6),
        regression(1, 4, 3, 2),
    ),
    Case("conv_one_channel", lambda: convnet(nn.Conv2d(1, 1, 3), channels=1), regression(3, 1, 4, 4)),
    Case("conv_residual_in_place", ResidualInPlace, regression(2, 2, 4, 4)),
    Case("conv_functional", FunctionalConv, regression(2, 2, 4, 4)),
    Case("conv_shared", SharedConv, regression(2, 2, 4, 4)),
    Case("conv_tied", TiedConv, regression(2, 2, 4, 4)),
    Case("conv_channels_last", ChannelsLast, regression(3, 2, 4, 4)),
    Case("conv_standardized", lambda: convnet(StandardizedConv(4, 4, 2, groups=2)), regression(2, 4, 4, 3)),
    Case("conv_subclass", lambda: convnet(RenamedConv(2, 4, 2)), regression(2, 2, 4, 3)),
    Case(
        "conv_weight_norm",
        lambda: convnet(parametrizations.weight_norm(nn.Conv1d(4, 4, 4, padding=2, groups=2), dim=2), spatial_axes=1),
        regression(2, 4, 5),
    ),
    Case(
        "conv_transposed_and_instance_norm",  # no rule for either
        lambda: convnet(nn.ConvTranspose2d(2, 4, 2, bias=False), nn.InstanceNorm2d(4, affine=True)),
        regression(2, 2, 3, 3),
    ),
    Case("batch_norm_vectors", lambda: mlp_normed(nn.BatchNorm1d(5)), regression(7, 4)),
    Case(
        "batch_norm_without_statistics",
        lambda: mlp_normed(nn.BatchNorm1d(5, track_running_stats=False, eps=0.1)),
        regression(7, 4),
    ),
    Case(
        "batch_norm_sequences",
        lambda: convnet(nn.Conv1d(3, 4, 2, bias=False), nn.BatchNorm1d(4, momentum=None), spatial_axes=1),
        regression(2, 3, 5),
    ),
    Case("batch_norm_in_place", lambda: mlp_normed(nn.BatchNorm1d(5), nn.ReLU(inplace=True)), regression(7, 4)),
    Case("batch_norm_in_eval_mode", KeepsStatistics, regression(2, 2, 4, 4)),
    Case(
        "group_norm",
        lambda: convnet(nn.Conv2d(2, 4, 2), nn.GroupNorm(2, 4, eps=0.1), nn.ReLU(inplace=True)),
        regression(2, 2, 4, 4),
    ),
    Case("group_norm_vectors", lambda: mlp_normed(nn.GroupNorm(2, 6), width=6), regression(5, 4)),
    Case(
        "norms_in_name_only",
        lambda: convnet(nn.Conv2d(2, 4, 2), ActivatedBatchNorm(4), ChannelsFirstLayerNorm(4), ActivatedGroupNorm(1, 4)),
        regression(2, 2, 5, 5),
    ),
    Case(
        "conv_norms_without_parameters",
        lambda: convnet(nn.Conv2d(2, 4, 2), nn.GroupNorm(2, 4, affine=False), nn.BatchNorm2d(4, affine=False)),
        regression(2, 2, 4, 4),
    ),
)


CASES: tuple[Case, ...] = (
    Case("mlp", lambda: mlp(4, 6, 5, 3), regression(7, 4)),
    Case("mlp_without_bias", lambda: mlp(4, 6, 5, 3, bias=False), regression(7, 4)),
    Case("one_example", lambda: mlp(4, 6, 3), regression(1, 4)),
    Case("no_batch_axis", lambda: mlp(4, 6, 3), regression(4)),
    Case("four_axes_one_output", LinearOverExamples, regression(2, 3, 2, 4)),
    Case("tied", lambda: TinyLanguageModel(tied=True), next_token()),
    Case("untied", lambda: TinyLanguageModel(tied=False), next_token()),
    Case("padding_idx", lambda: TinyLanguageModel(tied=False, padding=PAD), next_token()),
    Case("padding_idx_tied", lambda: TinyLanguageModel(tied=True, padding=PAD), next_token()),
    Case("first_layer_frozen", lambda: frozen_mlp("0.weight", "0.bias"), regression(7, 4)),
    Case("middle_layer_frozen", lambda: frozen_mlp("2.weight", "2.bias"), regression(7, 4)),
    Case("last_layer_frozen", lambda: frozen_mlp("6.weight", "6.bias"), regression(7, 4)),
    Case(
        "two_layers_frozen",
        lambda: frozen_mlp("0.weight", "0.bias", "4.weight", "4.bias"),
        regression(7, 4),
    ),
    Case("one_bias_frozen", lambda: frozen_mlp("2.bias"), regression(7, 4)),
    Case("one_weight_frozen", lambda: frozen_mlp("0.weight"), regression(7, 4)),
    Case("bare_parameter", BareParameter, regression(7, 4, 5)),
    Case(
        "adapters",
        lambda: nn.Sequential(Adapted(4, 5), nn.Tanh(), Adapted(5, 5), nn.Tanh(), Adapted(5, 3)),
        regression(7, 4),
    ),
    Case("used_twice", UsedTwice, regression(7, 5)),
    Case("used_late", UsedLate, regression(7, 4)),
    Case("keyword_call", KeywordCall, regression(7, 4)),
    Case(
        "subclass_of_linear",
        lambda: nn.Sequential(ScaledLinear(4, 5), nn.Tanh(), ScaledLinear(5, 2)),
        regression(7, 4),
    ),
    Case("norm", normed, regression(3, 4, 4)),
    Case("norm_without_parameters", lambda: normed(elementwise_affine=False), regression(3, 4, 4)),
    Case("norm_without_bias", lambda: normed(bias=False), regression(3, 4, 4)),
    Case(
        "norm_over_two_axes",
        lambda: nn.Sequential(nn.Linear(4, 5), nn.LayerNorm((3, 5)), nn.Linear(5, 2)),
        regression(6, 3, 4),
    ),
    Case(
        "rms_norm",
        lambda: nn.Sequential(nn.Linear(4, 5), nn.RMSNorm(5), nn.Linear(5, 2)),
        regression(3, 4, 4),
    ),
    Case(
        "rms_norm_over_two_axes",
        lambda: nn.Sequential(nn.Linear(4, 5), nn.RMSNorm((3, 5)), nn.Linear(5, 2)),
        regression(6, 3, 4),
    ),
    Case("one_output", lambda: mlp(4, 5, 1), regression(7, 4)),
    Case("two_classes", lambda: mlp(4, 5, 2), two_classes),
    Case("attention", Attention, regression(2, 4, 6)),
    Case("in_place_relu", in_place, regression(2, 3, 4)),
    Case("transposed_linear", Transposed, regression(2, 3, 4)),
    Case("experts", Experts, regression(7, 4)),
    Case("weight_norm", weight_normed, regression(7, 4)),
    Case("skipped_layer", Skips, regression(7, 4), ("skipped.weight", "skipped.bias")),
    Case("buffers", Buffers, regression(7, 4)),
    *CONVOLUTIONS,
)
