"""Optimizers by name."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer

from hf_adafisher import (
    AdaFisherTrainer,
    AdaFisherTrainingArguments,
    AdaFisherW,
    OptimizerFactory,
    SpectralAdaFisher,
    available_optimizers,
    create_optimizer,
    optimizer_state_bytes,
)
from hf_adafisher.optimizers.factory.catalog import canonical_name
from hf_adafisher.optimizers.factory.create import optimizer_record
from hf_adafisher.optimizers.factory.param_groups import decay_groups
from tests.cases import mlp
from tests.model_zoo import FAMILIES, Family, family

NAMES = pytest.mark.parametrize("name", available_optimizers())


def step(model: torch.nn.Module, optimizer: Any, record: Family) -> float:
    if hasattr(optimizer, "train"):  # schedule-free
        optimizer.train()
    optimizer.zero_grad()
    loss = model(**record.batch()).loss
    loss.backward(create_graph=getattr(optimizer, "needs_graph", False))
    optimizer.step()
    return loss.item()


def test_the_names() -> None:
    assert available_optimizers() == [
        *("adafisher", "adafisherw", "spectral-adafisher", "sgd", "adam", "adamw", "adahessian", "kfac", "shampoo"),
        *("lamb", "lars", "muon", "soap", "lion", "adafactor", "schedule_free_adamw", "sophia"),
    ]


@pytest.mark.parametrize(
    ("name", "step_size"),
    [*((name, "") for name in available_optimizers()), ("adafisher", "paper"), ("adafisherw", "paper")],
)
def test_every_name_trains_moves_every_parameter_and_resumes(name: str, step_size: str) -> None:
    record = family("gpt2")
    model = record.build()
    own = name in ("sgd", "adam", "adamw", "adafisher", "adafisherw")
    options: dict[str, Any] = {"lr": 1e-2 if own else None, "weight_decay": 0.01}
    if name.startswith("adafisher") and step_size == "paper":
        options |= {"step_size": "paper", "update_interval": 3, "damping": 1e-2}
    optimizer = create_optimizer(name, model, **options)
    before = [p.detach().clone() for p in model.parameters()]
    losses = [step(model, optimizer, record) for _ in range(10)]
    assert losses[-1] < losses[0]
    assert not any(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))

    resumed = record.build(seed=1)
    resumed.load_state_dict(model.state_dict())
    restored = create_optimizer(name, resumed, **options)
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # torch's own optimizers share tensors
    runs = []
    for pair in ((model, optimizer), (resumed, restored)):
        torch.manual_seed(0)  # of Hutchinson's random vectors
        runs.append([step(*pair, record) for _ in range(4)])
    assert runs[0] == runs[1]


@pytest.mark.parametrize("record", FAMILIES, ids=lambda record: record.name)
def test_groups_are_trainers(record: Family, tmp_path: Any) -> None:
    """Compared with the groups that Trainer itself builds."""
    from transformers import TrainingArguments

    model = record.build()
    next(model.parameters()).requires_grad_(False)
    arguments = TrainingArguments(str(tmp_path), weight_decay=0.3, use_cpu=True, report_to="none")
    expected = Trainer(model, arguments).create_optimizer().param_groups
    groups = decay_groups(model, 0.3)
    assert [g["weight_decay"] for g in groups] == [g["weight_decay"] for g in expected] == [0.3, 0.0]
    assert [[id(p) for p in g["params"]] for g in groups] == [[id(p) for p in g["params"]] for g in expected]


def test_defaults_and_options_reach_the_optimizer() -> None:
    model = mlp(3, 2)
    assert create_optimizer("sgd", model).defaults["momentum"] == 0.9
    assert create_optimizer("sgd", model, momentum=0.5).defaults["momentum"] == 0.5
    assert create_optimizer("adamw", model).defaults["lr"] == 5e-5
    assert create_optimizer("adamw", model).defaults["fused"]
    assert not create_optimizer("adamw", model, fused=False).defaults["fused"]
    optimizer = create_optimizer("adafisherw", model, lr=0.5, damping=0.25)
    assert isinstance(optimizer, AdaFisherW)
    assert (optimizer.defaults["lr"], optimizer.defaults["damping"]) == (0.5, 0.25)
    by_hand = create_optimizer("adamw", model, weight_decay=0.2, decay_names=["0.bias"])
    assert [p.shape for p in by_hand.param_groups[0]["params"]] == [(2,)]


@NAMES
def test_create_optimizer_and_trainer_build_the_same_optimizer(name: str, tmp_path: Path) -> None:
    arguments = AdaFisherTrainingArguments(
        str(tmp_path), optim=name, lr_scheduler_type="constant", use_cpu=True, report_to="none"
    )
    record, model = family("gpt2"), family("gpt2").build()
    by_trainer, by_name = AdaFisherTrainer(record.build(), arguments).create_optimizer(), create_optimizer(name, model)
    by_factory = OptimizerFactory()(record.build(), name=name)

    def options(optimizer: Any) -> list[dict[str, Any]]:
        hidden = ("params", "initial_lr")
        return [{key: value for key, value in g.items() if key not in hidden} for g in optimizer.param_groups]

    assert type(by_trainer) is type(by_name) and options(by_trainer) == options(by_name) == options(by_factory)
    assert [len(g["params"]) for g in by_trainer.param_groups] == [len(g["params"]) for g in by_name.param_groups]


def test_defaults_of_adafisher_by_name_are_not_the_papers() -> None:
    keys = ("step_size", "lr", "damping", "ema_decay", "update_interval")
    for name in ("adafisher", "adafisherw"):
        group = create_optimizer(name, mlp(3, 2)).param_groups[0]
        assert [group[key] for key in keys] == ["root", 0.004, 0.1, 0.95, 1]
        group = create_optimizer(name, mlp(3, 2), damping=0.5).param_groups[0]
        assert [group[key] for key in keys] == ["root", 0.004, 0.5, 0.95, 1]
        group = create_optimizer(name, mlp(3, 2), step_size="paper", damping=0.5).param_groups[0]
        assert [group[key] for key in keys] == ["paper", 1e-3, 0.5, 0.8, 100]
    group = AdaFisherW(mlp(3, 2)).param_groups[0]
    assert [group[key] for key in keys] == ["paper", 1e-3, 1e-3, 0.8, 100]
    assert AdaFisherW(mlp(3, 2), step_size="root").param_groups[0]["lr"] == 4e-3
    assert create_optimizer("sgd", mlp(3, 2)).param_groups[0]["lr"] == 5e-5


@NAMES
def test_hyphens_and_underscores_are_the_same(name: str) -> None:
    for spelling in (name.replace("-", "_"), name.replace("_", "-")):
        assert optimizer_record(spelling).name == canonical_name(spelling) == name
    assert canonical_name("adamw_torch") == "adamw_torch"  # another optimizer of Trainer's


def test_optimizers_are_built_by_either_spelling() -> None:
    for build in (create_optimizer, lambda name, model: OptimizerFactory()(model, name=name, lr=0.1)):
        assert type(build("spectral_adafisher", mlp(3, 4, 2))) is SpectralAdaFisher
        assert type(build("schedule-free-adamw", mlp(3, 2))) is optimizer_record("schedule_free_adamw").cls


def test_unknown_names_and_options_name_the_known_ones_and_the_nearest() -> None:
    model = mlp(3, 2)
    with pytest.raises(
        ValueError, match=r"unknown optimizer 'adafihserw', did you mean 'adafisherw'\?; available: .*adamw"
    ):
        create_optimizer("adafihserw", model)
    with pytest.raises(
        ValueError, match=r"adafisherw has no option 'dampin', did you mean 'damping'\?.*update_interval"
    ):
        create_optimizer("adafisherw", model, dampin=1.0)
    with pytest.raises(ValueError, match="no trainable parameter"):
        create_optimizer("adamw", mlp(3, 2).requires_grad_(False))
    with pytest.raises(ValueError, match="lr is an argument of its own"):
        optimizer_record("adafisherw").check_names(["lr"])
    with pytest.raises(ValueError, match="damping must be"):
        OptimizerFactory()(model, name="adafisherw", lr=0.1, damping=-1.0)


@NAMES
def test_a_checkpoint_of_another_kind_is_refused(name: str) -> None:
    model = mlp(3, 2)
    optimizer = create_optimizer(name, model)
    for other in available_optimizers():
        saved = create_optimizer(other, model).state_dict()
        if other == name:
            optimizer.load_state_dict(saved)
        else:
            with pytest.raises(ValueError, match="resume with"):
                optimizer.load_state_dict(saved)


def test_a_checkpoint_of_an_unknown_kind_is_refused_and_a_known_one_named() -> None:
    model = mlp(3, 2)
    with pytest.raises(ValueError, match=r"not written by lion \(its options are .*they are lamb's\): resume with"):
        create_optimizer("lion", model).load_state_dict(create_optimizer("lamb", model).state_dict())
    for unknown in (torch.optim.RMSprop, torch.optim.Adagrad, torch.optim.NAdam, torch.optim.ASGD):
        saved = unknown(model.parameters(), lr=0.1).state_dict()
        for name in available_optimizers():
            with pytest.raises(ValueError, match="resume with"):
                create_optimizer(name, model).load_state_dict(saved)


def test_an_older_torchs_adamw_checkpoint_is_accepted() -> None:
    """Which does not say whether its decay is decoupled."""
    model = mlp(3, 2)
    saved = create_optimizer("adamw", model).state_dict()
    for group in saved["param_groups"]:
        del group["decoupled_weight_decay"]
    create_optimizer("adamw", model).load_state_dict(saved)


def test_state_bytes_count_every_tensor() -> None:
    model = torch.nn.Linear(3, 2)
    for name, expected in (("sgd", 8 * 4), ("adamw", 2 * 8 * 4 + 2 * 4)):
        optimizer = create_optimizer(name, model)
        model(torch.randn(4, 3)).sum().backward()
        optimizer.step()
        assert optimizer_state_bytes(optimizer) == expected
    # exp_avg; factors (3 + 2) of the weight and 2 of the bias; of each a step (4), an average's weight (8), and with
    # hooks a mark (4). Of the 2 x 3 values of so small a matrix the root's factor is all of them.
    for step_size, expected in (("paper", (8 + 5 + 2) * 4 + 2 * 16), ("root", (8 + 6 + 2) * 4 + 2 * 12)):
        optimizer = create_optimizer("adafisherw", model, step_size=step_size)
        optimizer.step()
        assert optimizer_state_bytes(optimizer) == expected
