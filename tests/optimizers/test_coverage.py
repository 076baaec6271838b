"""What `coverage`, `curvature_summary` and `fisher_diagonal` say where nothing is recorded by hooks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from hf_adafisher import AdaFisherW, SpectralAdaFisher

ROLES = {
    "convolution.weight": "input",
    "convolution.bias": "",
    "hidden.weight": "hidden matrix",
    "hidden.bias": "",
    "table": "",
    "gain": "",
    "head.weight": "head",
    "head.bias": "",
}


class Network(nn.Module):
    """A parameter of each kind that the rules by the root tell apart."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv1d(3, 9, 3, padding=1)
        self.hidden = nn.Linear(9, 12)
        self.table = nn.Parameter(torch.randn(5, 12))
        self.gain = nn.Parameter(torch.ones(()))
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.hidden(self.convolution(x).transpose(1, 2)) + self.table)
        return self.head(self.gain * hidden)


def trained(kind: Any, **options: Any) -> tuple[nn.Module, Any, dict[str, Tensor]]:
    """After one step: the model, its optimizer and the gradients of that step."""
    torch.manual_seed(0)
    model = Network().double()
    optimizer = kind(model, lr=0.01, **options)
    model(torch.randn(4, 3, 5, dtype=torch.float64)).square().mean().backward()
    optimizer.step()
    return model, optimizer, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("steps", [0, 1])
def test_matrices_that_move_by_their_polar_factor_have_no_factors(steps: int) -> None:
    optimizer = trained(SpectralAdaFisher)[1]
    if steps == 0:
        optimizer = SpectralAdaFisher(Network())
    rules = {row.name: row.rule for row in optimizer.coverage()}
    spectral = {"convolution.weight", "hidden.weight"}
    assert rules == {name: "momentum's rows and columns" if name in spectral else "gradient factors" for name in ROLES}
    assert {row.name: row.role for row in optimizer.coverage()} == ROLES
    sizes = {row.name: row.numel for row in optimizer.coverage()}
    share = 1 - sum(sizes[name] for name in spectral) / sum(sizes.values())
    assert optimizer.curvature_summary()["gradient_factor_share"] == pytest.approx(share)
    assert optimizer.curvature_summary()["refreshes"] == steps


def test_by_the_root_all_have_gradient_factors() -> None:
    optimizer = trained(AdaFisherW, step_size="root")[1]
    assert {row.rule for row in optimizer.coverage()} == {"gradient factors"}
    assert {row.name: row.role for row in optimizer.coverage()} == ROLES


@pytest.mark.parametrize(
    ("kind", "options", "without"),
    [
        (AdaFisherW, {"step_size": "root", "damping": 0.3}, {"gain"}),
        (SpectralAdaFisher, {"relative_damping": 0.3}, {"gain", "convolution.weight", "hidden.weight"}),
    ],
)
def test_the_summary_is_that_of_the_dense_diagonals(kind: Any, options: dict[str, Any], without: set[str]) -> None:
    """Adafactor's estimate from one gradient, damped in units of its mean; a parameter without factors has none."""
    model, optimizer, grads = trained(kind, **options)
    means, floors, values = 0.0, 0.0, 0
    for name, p in model.named_parameters():
        if name in without:
            with pytest.raises(RuntimeError, match=rf"{name} has no factors.* {kind.__name__} moves it without"):
                optimizer.fisher_diagonal(p)
            continue
        square = grads[name].square()
        if p.dim() == 2 and min(p.shape) > 8:  # of fewer rows or columns all values are kept
            square = torch.outer(square.mean(1), square.mean(0)) / square.mean()
        damped = square + 0.3 * square.mean()
        assert_close(optimizer.fisher_diagonal(p), damped)
        assert_close(optimizer.fisher_diagonal(p, normalized=False), square)
        means += damped.sum().item()
        floors += (square < 0.3 * square.mean()).sum().item()
        values += p.numel()
    summary = optimizer.curvature_summary()
    assert summary["fisher_mean"] == pytest.approx(means / values)
    assert summary["floor_share"] == pytest.approx(floors / values)


def test_before_a_step_it_is_said_that_there_was_none() -> None:
    model = Network()
    for optimizer in (AdaFisherW(model, step_size="root"), SpectralAdaFisher(model)):
        with pytest.raises(RuntimeError, match=r"no curvature of head\.weight is known yet: call step\(\)"):
            optimizer.fisher_diagonal(model.head.weight)
