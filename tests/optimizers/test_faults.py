"""Faults of the optimizers that gave wrong numbers without a word; each test names the fault that it would see."""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close
from transformers import (
    BertConfig,
    BertForMultipleChoice,
    BertForPreTraining,
    BertModel,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from hf_adafisher import AdaFisher, AdaFisherW, SpectralAdaFisher, create_optimizer
from hf_adafisher.optimizers.base.hooked import HookedOptimizer
from hf_adafisher.optimizers.baselines.kfac import KFAC
from tests.equivalence import Training, assert_same_training
from tests.reference import ReferenceAdaFisher

# --- E18: layers that are active only between refreshes -------------------------------------------------------------


class Tasks(nn.Module):
    """A shared trunk with a head for each task."""

    def __init__(self, tasks: int = 2) -> None:
        super().__init__()
        self.trunk = nn.Linear(4, 5)
        self.heads = nn.ModuleList(nn.Linear(5, 3) for _ in range(tasks))

    def forward(self, x: Tensor, task: int) -> Tensor:
        return self.heads[task](torch.tanh(self.trunk(x)))


def train_in_turn(model: Tasks, optimizer: Any, steps: range, set_to_none: bool = True) -> None:
    for step in steps:
        x = torch.randn(6, 4, generator=torch.Generator().manual_seed(step)).to(model.trunk.weight.dtype)
        for p in model.parameters():
            p.grad = None if set_to_none or p.grad is None else torch.zeros_like(p)
        model(x, step % len(model.heads)).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("cls", [AdaFisher, AdaFisherW, KFAC])
def test_e18_a_layer_that_is_active_only_between_refreshes_has_statistics_from_its_first_step(
    cls: Any, set_to_none: bool
) -> None:
    """E18: with an even interval the second task's head never had any, and ``coverage`` said Linear."""
    torch.manual_seed(0)
    model = Tasks()
    optimizer = cls(model, lr=1e-3, update_interval=10)
    train_in_turn(model, optimizer, range(1), set_to_none)
    assert optimizer._statistics.recorder.armed  # for the other head alone
    assert not model.trunk._forward_hooks and model.heads[1]._forward_hooks
    train_in_turn(model, optimizer, range(1, 2), set_to_none)
    assert not optimizer._statistics.recorder.armed
    state = optimizer.state[model.heads[1].weight]
    assert state["factor_weight"].item() > 0
    assert {row.name: row.rule for row in optimizer.coverage()}["heads.1.weight"] == "Linear"
    assert not any(row.provisional for row in optimizer.coverage())


def test_e18_first_statistics_between_refreshes_equal_those_of_the_twin() -> None:
    """E18: the definition in plain loops, over refreshes that tasks take in turn and over ones that miss them."""
    torch.manual_seed(0)
    model, twin_model = Tasks().double(), Tasks().double()
    twin_model.load_state_dict(model.state_dict())
    options = {"lr": 1e-2, "beta": 0.9, "damping": 0.01, "ema_decay": 0.8, "update_interval": 4, "weight_decay": 0.0}
    optimizer, twin = AdaFisherW(model, **options), ReferenceAdaFisher(twin_model, decoupled=True, **options)  # type: ignore[arg-type]
    train_in_turn(model, optimizer, range(40))
    train_in_turn(twin_model, twin, range(40))
    assert_close(list(model.parameters()), list(twin_model.parameters()))


@pytest.mark.parametrize("tasks", [2, 3])
@pytest.mark.parametrize("interval", [5, 6, 10])
def test_e18_a_shared_trunk_is_sampled_on_every_task(tasks: int, interval: int) -> None:
    """E18: an interval that is a multiple of the number of tasks met the same one for ever."""
    torch.manual_seed(0)
    model = Tasks(tasks)
    optimizer = AdaFisherW(model, lr=1e-3, update_interval=interval)
    sampled: Counter[int] = Counter()
    for step in range(60 * interval):
        if optimizer.refresh_due:
            sampled[step % tasks] += 1
        train_in_turn(model, optimizer, range(step, step + 1))
    assert 55 <= sampled.total() <= 61
    assert min(sampled[task] for task in range(tasks)) >= 60 / tasks / 2


def test_e18_a_model_whose_layers_are_all_used_refreshes_at_multiples_of_the_interval() -> None:
    """E18: the place of a refresh moves only where one has missed a layer."""
    model = nn.Linear(4, 3)
    optimizer = AdaFisherW(model, update_interval=4)
    due = []
    for step in range(13):
        due += [step] * optimizer.refresh_due
        model(torch.randn(5, 4)).square().sum().backward()
        optimizer.step()
    assert due == [0, 4, 8, 12]


def test_e18_resumed_between_a_first_use_and_the_next_refresh() -> None:
    """E18: what was learnt between refreshes, and where the next one is, are in the checkpoint."""
    trainings = []
    for stop in (None, 1, 2, 13):
        torch.manual_seed(0)
        model = Tasks()
        optimizer = AdaFisherW(model, lr=1e-3, update_interval=4)
        if stop is not None:
            train_in_turn(model, optimizer, range(stop))
            state = optimizer.state_dict()
            optimizer.close()
            optimizer = AdaFisherW(model, lr=1e-3, update_interval=4)
            optimizer.load_state_dict(state)
        train_in_turn(model, optimizer, range(stop or 0, 30))
        trainings.append(Training(model, optimizer))
    for other in trainings[1:]:
        assert_same_training(trainings[0], other, bitwise=True)


class Functional(nn.Module):
    """Uses its second layer without calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor, both: bool) -> Tensor:
        hidden = self.first(x)
        return F.linear(hidden, self.second.weight, self.second.bias) if both else hidden


def test_e18_what_is_provisional_is_reported() -> None:
    """E18: factors of the current gradient alone are gradient factors, and ``coverage`` says that they do not last."""
    model = Functional()
    optimizer = AdaFisherW(model, update_interval=10)
    for both in (False, True):
        optimizer.zero_grad()
        model(torch.randn(6, 4), both).square().sum().backward()
        optimizer.step()
    rows = {row.name: (row.rule, row.provisional) for row in optimizer.coverage()}
    assert rows["first.weight"] == ("Linear", False) and rows["second.weight"] == ("gradient factors", True)
    assert optimizer.curvature_summary()["gradient_factor_share"] == pytest.approx(18 / 43)


def test_e18_what_a_newcomer_records_in_a_step_that_is_not_finite_is_not_taken() -> None:
    """E18: it stays a newcomer, and the next step is taken."""
    torch.manual_seed(0)
    model = Tasks()
    optimizer = AdaFisherW(model, lr=0.0, update_interval=10)
    train_in_turn(model, optimizer, range(1))
    model.zero_grad()
    (model(torch.randn(6, 4), 1).sum() * float("inf")).backward()
    for p in model.parameters():
        p.grad = None if p.grad is None else torch.zeros_like(p)
    optimizer.step()
    assert optimizer._statistics.recorder.armed
    assert not optimizer.state[model.heads[1].weight]["factor_weight"]
    train_in_turn(model, optimizer, range(3, 4))
    assert optimizer.state[model.heads[1].weight]["factor_weight"] > 0


@pytest.mark.parametrize("cls", [AdaFisherW, KFAC])
def test_e18_an_idle_step_of_a_fully_recorded_model_asks_nothing(cls: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """E18: newcomers cost nothing where there are none."""
    model = Tasks(1)
    optimizer: HookedOptimizer = cls(model, update_interval=10)
    train_in_turn(model, optimizer, range(1))
    monkeypatch.setattr(optimizer._statistics, "without_statistics", None)
    monkeypatch.setattr(optimizer._statistics.recorder, "flush", None)
    train_in_turn(model, optimizer, range(1, 9))


# --- E20: gradient factors on short axes ------------------------------------------------------------------------------


class Experts(nn.Module):
    """Matrices of several experts in one parameter, as transformers' Mixtral has them."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 10, 12))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("eoi,ebi->ebo", self.weight, x)


def test_e20_experts_are_normalised_one_by_one() -> None:
    """E20: the smallest of the experts' means became 0, and that expert got the full 1 / damping step for ever."""
    torch.manual_seed(0)
    model, x = Experts(), torch.randn(4, 7, 12)
    optimizer = AdaFisherW(model, lr=0.0, damping=1e-3)
    (model(x) * torch.tensor([1.0, 1.1, 1.2, 1.3])[:, None, None]).square().mean().backward()
    optimizer.step()
    diagonal = optimizer.fisher_diagonal(model.weight)
    for expert in range(4):  # as a model with this expert alone
        alone = nn.ParameterList([model.weight[expert].detach().clone()])
        alone[0].grad = model.weight.grad[expert].clone()  # type: ignore[index]
        single = AdaFisherW(alone, lr=0.0, damping=1e-3)
        single.step()
        assert_close(diagonal[expert], single.fisher_diagonal(alone[0]))
    assert float(diagonal.mean((1, 2)).min()) > 0.05


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_e20_kernel_axes_of_a_transposed_convolution_join_the_inputs(axes: int) -> None:
    """E20: two kernel positions with factors 0.95 and 1 became 0 and 1."""
    torch.manual_seed(0)
    kind = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[axes - 1]
    model = nn.Sequential(kind(3, 5, 2)).double()
    optimizer = AdaFisherW(model, lr=0.0, damping=1e-3)
    model(torch.randn(4, 3, *[5] * axes, dtype=torch.float64)).pow(3).mean().backward()
    optimizer.step()
    weight = model[0].weight
    assert weight.grad is not None
    square = weight.grad.square()
    h = square.mean(1, keepdim=True)
    s = square.mean([axis for axis in range(axes + 2) if axis != 1], keepdim=True)
    h, s = ((factor - factor.min()) / (factor.max() - factor.min()) for factor in (h, s))
    assert_close(optimizer.fisher_diagonal(weight), h * s + 1e-3)


@pytest.mark.parametrize("shape", [(4, 20), (20, 4), (1, 4, 20), (2, 3)])
def test_e20_a_table_of_a_few_rows_has_its_squared_gradient(shape: tuple[int, ...]) -> None:
    """E20: one of four register tokens got the full 1 / damping step for ever."""
    torch.manual_seed(0)
    model = nn.ParameterList([torch.zeros(shape)])
    model[0].grad = torch.randn(shape)
    optimizer = AdaFisherW(model, lr=0.0, damping=1e-3)
    optimizer.step()
    square = model[0].grad.square()
    expected = (square - square.min()) / (square.max() - square.min()) + 1e-3
    assert_close(optimizer.fisher_diagonal(model[0]), expected)


def test_e20_a_checkpoint_with_the_earlier_factors_is_refused_with_the_way_out() -> None:
    """E20: state keys of stacks, kernels and short tables have changed."""
    torch.manual_seed(0)
    model = Experts()
    optimizer = AdaFisherW(model)
    model(torch.randn(4, 7, 12)).square().mean().backward()
    optimizer.step()
    state = optimizer.state_dict()
    factors = {key: value for key, value in state["state"][0].items() if not key.startswith("axis")}
    state["state"][0] = factors | {f"axis{i}_factor": torch.ones(n) for i, n in enumerate((4, 10, 12))}
    with pytest.raises(ValueError, match=r"version of hf_adafisher.*start without the optimizer state"):
        AdaFisherW(Experts()).load_state_dict(state)


# --- E23: what a log costs --------------------------------------------------------------------------------------------


class Everything(nn.Module):
    """Every form of a term, each larger than what is simply formed: a product, a sum, groups, a stack, a vector."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.tied = nn.Embedding(700, 40), nn.Linear(40, 700, bias=False)
        self.tied.weight = self.table.weight
        self.grouped, self.plain = nn.Conv2d(64, 128, 3, groups=4), nn.Linear(128, 300)
        self.stack = nn.Parameter(torch.randn(5, 70, 80) / 9)

    def forward(self, tokens: Tensor) -> Tensor:
        scores = self.tied(self.table(tokens)).square().mean()
        image = self.grouped(torch.randn(3, 64, 6, 6, generator=torch.Generator().manual_seed(2)))
        mixed = torch.einsum("eoi,ebi->ebo", self.stack, image.flatten()[:400].reshape(5, 1, 80).tanh())
        return scores + self.plain(image.movedim(1, -1)).square().mean() + mixed.pow(3).square().mean()


@pytest.mark.parametrize("cls", [AdaFisherW, partial(AdaFisherW, step_size="root"), SpectralAdaFisher])
def test_e23_a_summary_is_that_of_the_diagonals_and_forms_none(cls: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """E23: every training log formed the whole diagonal of every parameter, three times as long as the step."""
    torch.manual_seed(0)
    model = Everything()
    optimizer = cls(model, lr=0.0)
    model(torch.randint(0, 700, (9, 50))).backward()
    optimizer.step()
    mean = floor = total = 0.0
    for t in optimizer.trained_parameters():
        damping = optimizer.damping_of(t.group, t.terms)
        diagonal = optimizer.fisher_diagonal(t.param).double()
        mean, total = mean + diagonal.sum().item(), total + diagonal.numel()
        floor += (diagonal < 2 * damping).sum().item()
    largest = []
    from hf_adafisher.optimizers.diagnostics import diagonal_numbers

    plain = diagonal_numbers.diagonal_of
    monkeypatch.setattr(
        diagonal_numbers, "diagonal_of", lambda terms, like, d: largest.append(like.numel()) or plain(terms, like, d)
    )
    summary = optimizer.curvature_summary()
    assert summary["fisher_mean"] == pytest.approx(mean / total, rel=1e-5)
    assert summary["floor_share"] == pytest.approx(floor / total, abs=0.005)
    assert 0 < max(largest) <= 1 << 14


# --- E21: what is a head ----------------------------------------------------------------------------------------------


def llama_classifier() -> nn.Module:
    config = LlamaConfig(
        vocab_size=30, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_labels=3
    )
    return LlamaForSequenceClassification(config)


def with_adapters() -> nn.Module:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(llama_classifier(), LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["score"]))  # type: ignore[arg-type]


def bert_config() -> BertConfig:
    return BertConfig(
        vocab_size=30, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, num_labels=2
    )


class Wrapper(nn.Module):
    """A classifier around a base model, with its configuration, which is defined after the head."""

    def __init__(self) -> None:
        super().__init__()
        self.config = bert_config()
        self.classifier, self.backbone = nn.Linear(8, 4), BertModel(self.config)


class PlainLanguageModel(nn.Module):
    """nanoGPT's layout, not tied: a configuration that is not transformers', and the head last."""

    def __init__(self) -> None:
        super().__init__()
        self.config = {"num_labels": 3}
        self.transformer = nn.ModuleDict({"wte": nn.Embedding(30, 8), "mlp": nn.Linear(8, 8)})
        self.lm_head = nn.Linear(8, 30, bias=False)


@pytest.mark.parametrize(
    ("build", "heads"),
    [
        (llama_classifier, {"score.weight"}),
        (with_adapters, {"base_model.model.score.modules_to_save.default.weight"}),
        (Wrapper, {"classifier.weight"}),
        (PlainLanguageModel, {"lm_head.weight"}),
        (lambda: BertForMultipleChoice(bert_config()), {"classifier.weight"}),
        (lambda: BertModel(bert_config()), set()),
        (
            lambda: BertForPreTraining(bert_config()),
            {"bert.embeddings.word_embeddings.weight", "cls.seq_relationship.weight"},
        ),
        (lambda: nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), {"1.weight"}),
    ],
    ids=["llama", "peft", "wrapper", "nanogpt", "multiple_choice", "base", "pretraining", "plain"],
)
def test_e21_heads_are_told_from_hidden_matrices_logged_once_and_listed(
    build: Any, heads: set[str], caplog: pytest.LogCaptureFixture
) -> None:
    """E21: the head of the first five of these was a hidden matrix."""
    model = build()
    with caplog.at_level("INFO", logger="hf_adafisher"):
        optimizer = SpectralAdaFisher(model)
        optimizer.add_param_group({"params": []})
    by_role: dict[str, set[str]] = {}
    for row in optimizer.coverage():
        by_role.setdefault(row.role, set()).add(row.name)
    assert by_role.get("head", set()) | by_role.get("table and head", set()) == heads
    assert by_role.get("hidden matrix") and all("LayerNorm" not in name for name in by_role["hidden matrix"])
    assert caplog.text.count("SpectralAdaFisher treats as") == 1
    assert all(name in caplog.text for name in heads)
    for name, p in model.named_parameters():
        if p.requires_grad:
            matrices = by_role["hidden matrix"] | by_role.get("input", set())
            assert optimizer._statistics.is_matrix(p, heads=False) == (name in matrices)
    muon = create_optimizer("muon", model)
    under_muon = {id(p) for group in muon.param_groups if group["use_muon"] for p in group["params"]}
    assert under_muon == {id(model.get_parameter(name)) for name in by_role["hidden matrix"]}


# --- E22: a functional tie --------------------------------------------------------------------------------------------


class FunctionalTie(nn.Module):
    """A language model whose head is the embedding's weight, without a module."""

    def __init__(self) -> None:
        super().__init__()
        self.wte, self.mix, self.head_is_tied = nn.Embedding(20, 12), nn.Linear(12, 12), True

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = torch.tanh(self.mix(self.wte(tokens)))
        return F.linear(hidden, self.wte.weight) if self.head_is_tied else hidden


@pytest.mark.parametrize("late", [False, True])
def test_e22_a_functional_tie_gets_gradient_factors_and_one_warning(
    late: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """E22: rows that never were an input had F = damping, and took the largest step."""
    torch.manual_seed(0)
    model = FunctionalTie()
    optimizer = AdaFisherW(model, lr=0.0, update_interval=1, ema_decay=0.5)
    tokens = torch.arange(12).reshape(2, 6)
    for step in range(4):
        model.head_is_tied = not late or step >= 2
        optimizer.zero_grad()
        model(tokens).square().mean().backward()
        optimizer.step()
    assert {row.name: row.rule for row in optimizer.coverage()}["wte.weight"] == "gradient factors"
    assert caplog.text.count("rows that were no input") == 1 and "recorded nothing" not in caplog.text
    grad = model.wte.weight.grad
    assert grad is not None and bool(grad[12:].any())
    rows, columns = grad.square().mean(1), grad.square().mean(0)
    raw = optimizer.fisher_diagonal(model.wte.weight, normalized=False)
    assert_close(raw / raw.mean(), torch.outer(rows, columns) / torch.outer(rows, columns).mean())


@pytest.mark.parametrize("padding", [None, 3])
def test_e22_a_table_that_only_looks_up_keeps_its_rule(padding: int | None) -> None:
    """E22: rows without a gradient say nothing."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(20, 12, padding_idx=padding), nn.Linear(12, 20))
    optimizer = AdaFisherW(model)
    model(torch.tensor([[1, 2, 3, 5], [3, 3, 9, 1]])).square().mean().backward()
    optimizer.step()
    assert {row.rule for row in optimizer.coverage()} == {"Embedding", "Linear"}


# --- E25: values and loops that crashed or made NaN -------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9, "nesterov": True}, {"momentum": 0.9, "dampening": 0.3}])
def test_e25_sgd_takes_a_parameter_whose_first_gradient_comes_late(options: dict[str, Any]) -> None:
    """E25: torch's fused SGD fails where some parameters have a momentum buffer and some have none."""
    runs = []
    for build in (lambda m: create_optimizer("sgd", m, lr=0.1, **options), None):
        torch.manual_seed(0)
        model = Tasks()
        defaults = {"momentum": 0.9} | options
        optimizer = build(model) if build else torch.optim.SGD(model.parameters(), lr=0.1, fused=False, **defaults)
        for step in range(6):
            optimizer.zero_grad()
            x = torch.randn(6, 4, generator=torch.Generator().manual_seed(step))
            model(x, int(step >= 2)).square().mean().backward()
            optimizer.step()
        runs.append(list(model.parameters()))
    assert_close(*runs)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("spectral-adafisher", {"lr": -0.0}),
        ("adafisherw", {"weight_decay": -0.0}),
        ("lamb", {"eps": -0.0}),
        ("adafisherw", {"lr": 10**400}),
        ("adamw", {"eps": 10**400}),
        ("kfac", {"damping": 10**400}),
        ("adafisherw", {"ema_decay": 10**400}),
        ("adafisherw", {"lr": torch.tensor([0.1, 0.2])}),
        ("adafisherw", {"damping": torch.tensor([0.1, 0.2])}),
        ("lamb", {"eps": torch.tensor([0.1, 0.2])}),
        ("adafisherw", {"update_interval": torch.tensor([1, 2])}),
    ],
)
def test_e25_values_that_are_no_numbers_in_range_are_named(name: str, options: dict[str, Any]) -> None:
    """E25: -0.0 made NaN, 10**400 was an OverflowError, a tensor of two values an error without a name."""
    with pytest.raises(ValueError, match=next(iter(options))):
        create_optimizer(name, nn.Linear(3, 2), **options)


def test_e25_a_negative_zero_from_a_schedule_makes_no_step() -> None:
    """E25: the bound on the relative step became -inf."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    optimizer = SpectralAdaFisher(model)
    before = [p.clone() for p in model.parameters()]
    optimizer.param_groups[0]["lr"] = -0.0
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(6, 4)).square().mean().backward()
        optimizer.step()
    assert_close(list(model.parameters()), before, rtol=0, atol=0)


@pytest.mark.parametrize("cls", [AdaFisher, AdaFisherW, SpectralAdaFisher])
def test_e25_one_cycle_runs_without_its_momentum_cycle(cls: Any) -> None:
    """E25: what to pass stands in the docstring, where torch's own error does not say it."""
    model = nn.Linear(4, 3)
    optimizer = cls(model)
    assert "cycle_momentum=False" in cls.__doc__
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=5, cycle_momentum=False)
    rates = []
    for _ in range(4):
        model(torch.randn(5, 4)).square().sum().backward()
        optimizer.step()
        schedule.step()
        rates.append(optimizer.param_groups[0]["lr"])
    assert max(rates) == pytest.approx(0.1, rel=0.2) and rates[-1] < 1e-3
