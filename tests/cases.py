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

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Parameter(torch.randn(3, 4))
        self.up = nn.Parameter(torch.randn(3, 4, 5) / 2)
        self.down = nn.Parameter(torch.randn(3, 5, 4) / 2)
        self.head = nn.Linear(4, 2)

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


def normed(**options: Any) -> nn.Module:
    """A LayerNorm between two layers."""
    return nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5, **options), nn.Linear(5, 2))


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
    Case("one_output", lambda: mlp(4, 5, 1), regression(7, 4)),
    Case("two_classes", lambda: mlp(4, 5, 2), two_classes),
    Case("attention", Attention, regression(2, 4, 6)),
    Case("in_place_relu", in_place, regression(2, 3, 4)),
    Case("transposed_linear", Transposed, regression(2, 3, 4)),
    Case("experts", Experts, regression(7, 4)),
    Case("weight_norm", weight_normed, regression(7, 4)),
    Case("skipped_layer", Skips, regression(7, 4), ("skipped.weight", "skipped.bias")),
    Case("buffers", Buffers, regression(7, 4)),
)
