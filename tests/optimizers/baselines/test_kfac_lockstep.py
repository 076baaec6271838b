"""K-FAC and its slow twin, step by step, from the same weights and over the same batches, in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from hf_adafisher.optimizers.baselines.kfac import KFAC
from tests.cases import CASES, Case, frozen_mlp, mlp, regression
from tests.model_zoo import family
from tests.optimizers.baselines.reference_kfac import ReferenceKFAC
from tests.training_helper import StepLoss, of_case

OPTIONS: dict[str, Any] = {
    "lr": 0.05,
    "momentum": 0.8,
    "damping": 0.1,
    "stat_decay": 0.7,
    "update_interval": 2,
    "inverse_interval": 4,
    "weight_decay": 0.03,
    "kl_clip": 1e-2,
}
Groups = Callable[[nn.Module], list[dict[str, Any]]]


def two_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Matrices decay; vectors do not, and have their own step."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trainable if p.dim() > 1]},
        {"params": [p for p in trainable if p.dim() <= 1], "weight_decay": 0.0, "lr": 0.02, "momentum": 0.6},
    ]


class Pair:
    """A model under the package's K-FAC, and a copy of it under the twin."""

    def __init__(self, model: nn.Module, groups_of: Groups = two_groups, **options: Any) -> None:
        self.model, self.twin_model = model, copy.deepcopy(model)
        self.optimizer = KFAC(self.model, groups_of(self.model), **(OPTIONS | options))
        self.twin = ReferenceKFAC(self.twin_model, groups_of(self.twin_model), **(OPTIONS | options))

    def run(self, loss: StepLoss, steps: int) -> set[float]:
        """Step and compare all parameters and the KL factor; returns the KL factors seen."""
        factors = set()
        for step in range(steps):
            for model, optimizer in ((self.model, self.optimizer), (self.twin_model, self.twin)):
                optimizer.zero_grad()
                loss(model, step).backward()
                optimizer.step()
            twins = self.twin_model.parameters()
            for (name, p), twin in zip(self.model.named_parameters(), twins, strict=True):
                assert_close(p, twin, msg=lambda text, name=name, step=step: f"{name}, step {step}: {text}")
            assert self.optimizer.curvature_summary()["kl_factor"] == pytest.approx(self.twin.nu)
            factors.add(self.twin.nu)
        return factors


@pytest.mark.parametrize("kl_clip", [None, 1e-2, 1e-5])
def test_mlp(kl_clip: float | None) -> None:
    """Thirty steps: fifteen refreshes, eight inversions; the clipping is felt, or not, as asked."""
    factors = Pair(mlp(5, 7, 6, 3).double(), kl_clip=kl_clip).run(of_case(regression(9, 5)), steps=30)
    assert min(factors) < 1.0 if kl_clip == 1e-5 else 1.0 in factors


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_cases(case: Case) -> None:
    """Every awkward model: shared, tied, late, frozen, skipped, in-place, subclassed and grouped layers."""
    Pair(case.build().double()).run(of_case(case.loss), steps=5)


@pytest.mark.parametrize("max_factor_dim", [4, 5, 6])
@pytest.mark.parametrize("name", ["tied", "untied", "conv", "mlp"])
def test_long_sides_are_diagonal(name: str, max_factor_dim: int) -> None:
    case = next(case for case in CASES if case.name == name)
    Pair(case.build().double(), max_factor_dim=max_factor_dim).run(of_case(case.loss), steps=5)


def test_gpt2() -> None:
    """Conv1D, a table of positions, and a head that is the embedding."""
    record, small = family("gpt2"), {"vocab_size": 20, "n_embd": 8, "n_head": 2, "n_positions": 8, "n_layer": 1}
    config = record.build().config
    torch.manual_seed(0)
    model = type(record.build())(type(config)(**{**config.to_dict(), **small})).double().train()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(5 if p.dim() > 1 else 1)

    def loss(model: nn.Module, step: int) -> Tensor:
        tokens = torch.randint(0, 20, (3, 6), generator=torch.Generator().manual_seed(step))
        return model(input_ids=tokens, labels=tokens).loss

    Pair(model).run(loss, steps=6)


@pytest.mark.parametrize("frozen", ["2.weight", "2.bias"])
def test_a_member_of_a_block_without_a_gradient_counts_as_zero(frozen: str) -> None:
    """It was given to the optimizer, but frozen: the rest of its block is still preconditioned by the whole of it."""
    pair = Pair(frozen_mlp(frozen).double(), lambda model: [{"params": list(model.parameters())}])
    pair.run(of_case(regression(9, 4)), steps=6)
    assert torch.equal(dict(pair.model.named_parameters())[frozen], dict(pair.twin_model.named_parameters())[frozen])


def test_the_scale_and_the_number_of_terms_of_the_loss() -> None:
    """The loss of 9 x 3 terms is multiplied by 50 too; both sides are told."""
    pair = Pair(mlp(5, 7, 3).double())
    pair.optimizer.gradient_scale = pair.twin.gradient_scale = 50 / 27
    pair.optimizer.loss_terms = pair.twin.loss_terms = 27.0
    pair.run(lambda model, step: 50 * of_case(regression(9, 5))(model, step), steps=6)


def test_a_schedule_and_micro_batches() -> None:
    """Learning rates and dampings change between steps; a step has three backward passes of different sizes."""
    pair = Pair(mlp(5, 7, 3).double())

    def loss(model: nn.Module, step: int) -> Tensor:
        for group in (*pair.optimizer.param_groups, *pair.twin.groups):
            group["lr"], group["damping"] = 0.05 / (1 + step), 0.1 / (1 + step)
        parts = [regression(rows, 5)(model, torch.Generator().manual_seed(10 * step + rows)) for rows in (2, 7, 4)]
        for part in parts[:-1]:
            part.backward()
        return parts[-1]

    pair.run(loss, steps=9)
