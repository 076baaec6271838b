"""Two small networks with every kind of layer that figures of factors look at."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Net(nn.Module):
    """A convolution with stride and padding, a Linear over positions, one over examples; norm and dropout between."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(3)
        self.dropout = nn.Dropout(0.5)
        self.tokens = nn.Linear(3, 5)
        self.head = nn.Linear(5, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.dropout(self.norm(self.conv(x)).relu())
        return self.head(self.tokens(x.flatten(2).transpose(1, 2)).tanh().mean(1))


def loss_of(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    return nn.functional.cross_entropy(model(batch["x"]), batch["labels"])


def net_and_batch() -> tuple[Net, dict[str, Tensor]]:
    torch.manual_seed(0)
    net = Net().double()
    batch = {"x": torch.randn(8, 2, 4, 4, dtype=torch.float64), "labels": torch.randint(0, 4, (8,))}
    net(batch["x"])  # running statistics of their own
    return net, batch


class Tagger(nn.Module):
    """Tokens and positions; GPT-2's way to look positions up, once for the whole batch."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(7, 3)
        self.positions = nn.Embedding(5, 3)
        self.unused = nn.Linear(3, 3)
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        self.grouped = nn.Conv1d(4, 4, 1, groups=2)
        self.norm = nn.LayerNorm(3)
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.frozen(self.words(x) + self.positions(torch.arange(5)[None])).tanh())).mean(1)
