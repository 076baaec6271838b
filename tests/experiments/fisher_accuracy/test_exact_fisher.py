"""The exact diagonal of the Fisher against loops of autograd, and what is compared with it."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from hf_adafisher import AdaFisherW
from hf_adafisher.experiments.figures.training_run import StepCallback, prepare_papers_run, prepare_run
from hf_adafisher.experiments.fisher_accuracy import evaluation
from hf_adafisher.experiments.fisher_accuracy import exact_fisher as module
from hf_adafisher.experiments.fisher_accuracy.agreement import (
    ESTIMATES,
    HALVES,
    TOGETHER,
    LayerAgreement,
    compare_layers,
    log_pearson,
    log_scale,
    mean_of,
    over_seeds,
    spearman,
)
from hf_adafisher.experiments.fisher_accuracy.estimates import KroneckerFactors, RunObserver, SecondMoments
from hf_adafisher.experiments.fisher_accuracy.evaluation import (
    FisherSettings,
    compare_fisher,
    compare_run,
    in_units_of_a_term,
    prepare_seed,
)
from hf_adafisher.experiments.fisher_accuracy.exact_fisher import exact_fisher
from hf_adafisher.experiments.fisher_accuracy.picture import CONTROL_COLUMNS, LEGEND, agreement_table
from hf_adafisher.optimizers.baselines.kfac import KFAC
from tests.experiments.runs.image_runs import TINY
from tests.scripts import load_command

RUN = ["--use_cpu", "--disable_tqdm", "true", "--warmup_steps", "0", "--per_device_train_batch_size", "16"]
Batch = dict[str, Tensor]


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 4), nn.Linear(4, 3)
        self.frozen = nn.Parameter(torch.ones(4), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh() * self.frozen)


class Cnn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.drop, self.head = nn.Dropout(0.5), nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(self.norm(self.conv(x)).relu().mean((2, 3))))


class Looking(Mlp):
    """Looks at its numbers, which vmap does not let it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if x.sum().item() > -1e9 else -x)


class Causal(nn.Module):
    """Each token sees those before it; the head is tied to the embedding."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.embedding, self.mix = nn.Embedding(vocabulary, 3), nn.Linear(3, 3)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.mix(self.embedding(input_ids).cumsum(1)).tanh() @ self.embedding.weight.t()


def classifier(kind: str) -> tuple[nn.Module, list[Batch]]:
    torch.manual_seed(1)
    model, shape, classes = (Cnn(), (1, 4, 4), 4) if kind == "cnn" else (Mlp(), (5,), 3)
    batches = [{"x": torch.randn(n, *shape).double(), "labels": torch.randint(classes, (n,))} for n in (4, 3)]
    model.double()(batches[0]["x"])  # running statistics that differ from their start
    return model, batches


def language(vocabulary: int = 7, tokens: int = 5) -> tuple[nn.Module, list[Batch]]:
    torch.manual_seed(2)
    batches = [{"input_ids": torch.randint(vocabulary, (n, tokens))} for n in (3, 2)]
    for batch in batches:
        batch["labels"] = batch["input_ids"].clone()
        batch["labels"][:, 0] = -100
    batches[1]["labels"][0, 3:] = -100
    return Causal(vocabulary).double(), batches


def squares(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(loss, list(named.values()), retain_graph=True)
    return {name: grad**2 for name, grad in zip(named, grads, strict=True)}


def by_definition(model: nn.Module, batches: list[Batch], kind: str, only: int | None = None) -> dict[str, Tensor]:
    """The mean over examples (of one half, or all), each with a forward of its own, and over labels."""
    model = model.eval()
    total: dict[str, Tensor] = {}
    number = count = 0
    for batch in batches:
        for i in range(len(batch["labels"])):
            number += 1
            if only is not None and (number - 1) % 2 != only:
                continue
            logits, label = model(batch["x"][i : i + 1]), batch["labels"][i : i + 1]
            choices = range(logits.shape[1]) if kind == "true" else [int(label)]
            for choice in choices:
                weight = logits.softmax(1)[0, choice].item() if kind == "true" else 1.0
                for name, square in squares(model, F.cross_entropy(logits, torch.tensor([choice]))).items():
                    total[name] = total.get(name, 0.0) + weight * square
            count += 1
    return {name: value / count for name, value in total.items()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("network", ["mlp", "cnn"])
@pytest.mark.parametrize("kind", ["empirical", "true"])
@pytest.mark.parametrize("chunk", [None, 2])
def test_exact_diagonal_is_that_of_the_definition(network: str, kind: str, chunk: int | None) -> None:
    model, batches = classifier(network)
    batches.reverse()  # the second one begins with an odd number of examples before it
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = exact_fisher(model, batches, kind, chunk=chunk)
    assert model.training and all(p.grad is None for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert (found.examples, found.terms, found.looped) == (7, 7, False)
    assert_same(found.diagonals, by_definition(model, batches, kind))
    for half in range(2):
        assert_same(found.halves[half], by_definition(model, batches, kind, half))


def test_true_fisher_of_a_linear_model_has_a_closed_form() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 3)).double(), torch.randn(9, 4).double()
    found = exact_fisher(model, [{"input": x, "labels": torch.zeros(9, dtype=torch.long)}], "true")
    p = model(x).softmax(1).detach()
    torch.testing.assert_close(found.diagonals["0.weight"], torch.einsum("nc,nj->cj", p - p**2, x**2) / 9)
    torch.testing.assert_close(found.diagonals["0.bias"], (p - p**2).mean(0))


def test_sequences_are_examples_and_tokens_the_unit() -> None:
    model, batches = language()
    found = exact_fisher(model, batches)
    total: dict[str, Tensor] = {}
    for batch in batches:
        for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
            logits = model(ids[None])[0]
            loss = sum(F.cross_entropy(logits[t], labels[t + 1]) for t in range(4) if labels[t + 1] >= 0)
            for name, square in squares(model, loss).items():
                total[name] = total.get(name, 0.0) + square
    assert (found.examples, found.terms) == (5, 4 * 4 + 2)
    assert_same(found.diagonals, {name: value / 18 for name, value in total.items()})


def test_drawn_labels_give_the_mean_over_tokens_of_their_true_fishers() -> None:
    model, batches = language(vocabulary=3, tokens=4)
    many = [{key: value.repeat(200, 1) for key, value in batch.items()} for batch in batches]
    found = exact_fisher(model, many, "true", draws=2, seed=3)
    terms = found.terms / 200
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for batch in batches:
        for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
            logits = model(ids[None])[0]
            for t, y in itertools.product(range(3), range(3)):
                if labels[t + 1] >= 0:
                    share = logits[t].softmax(0)[y].item()
                    for name, square in squares(model, -logits[t].log_softmax(0)[y]).items():
                        total[name] += share * square
    for name, value in total.items():
        torch.testing.assert_close(found.diagonals[name], value / terms, rtol=0.15, atol=0.02 * value.max().item())
    again = exact_fisher(model, batches, "true", draws=2, seed=3)
    assert_same(again.diagonals, exact_fisher(model, batches, "true", draws=2, seed=3).diagonals)


def test_drawn_labels_of_many_classes_agree_with_the_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = classifier("mlp")
    summed = exact_fisher(model, batches, "true")
    monkeypatch.setattr(module, "FEW_CLASSES", 2)
    many = [{key: value.repeat(200, *[1] * (value.dim() - 1)) for key, value in batch.items()} for batch in batches]
    drawn = exact_fisher(model, many, "true", draws=2)
    for name, value in summed.diagonals.items():
        torch.testing.assert_close(drawn.diagonals[name], value, rtol=0.2, atol=0.02 * value.max().item())


def test_models_that_vmap_cannot_run_are_looped_over_with_one_message(caplog: pytest.LogCaptureFixture) -> None:
    model, batches = classifier("mlp")
    looking = Looking().double()
    looking.load_state_dict(model.state_dict())
    for kind in ("empirical", "true"):
        caplog.clear()
        found = exact_fisher(looking, batches, kind)
        assert found.looped and len(caplog.records) == 1
        assert "cannot run Looking" in caplog.text and "one by one" in caplog.text
        assert_same(found.diagonals, exact_fisher(model, batches, kind).diagonals)


def test_gpt2_is_done_at_once_and_as_one_by_one() -> None:
    torch.manual_seed(0)
    sizes = {"n_layer": 1, "n_embd": 8, "n_head": 2, "vocab_size": 11, "n_positions": 6}
    model = GPT2LMHeadModel(GPT2Config(**sizes, pad_token_id=None, bos_token_id=0, eos_token_id=0)).double()
    ids = torch.randint(11, (4, 6))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    found = exact_fisher(model, [batch])
    assert not found.looped
    total: dict[str, Tensor] = {}
    for row in ids:
        output = model.eval()(input_ids=row[None], labels=row[None])
        for name, square in squares(model, 5 * output.loss).items():
            total[name] = total.get(name, 0.0) + square
    assert_same(found.diagonals, {name: value / 20 for name, value in total.items()})


def test_one_position_is_what_adafisher_has_exactly() -> None:
    model, batches = classifier("mlp")
    batch = {key: value[:1] for key, value in batches[0].items()}
    exact = exact_fisher(model, [batch])
    with AdaFisherW(model, lr=0.0) as optimizer:
        F.cross_entropy(model(batch["x"]), batch["labels"]).backward()
        optimizer.step()
        for name in ("first.weight", "first.bias", "second.weight", "second.bias"):
            raw = optimizer.fisher_diagonal(model.get_parameter(name), normalized=False)
            torch.testing.assert_close(raw, exact.diagonals[name])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "full"}, "kind is 'full'; it must be one of empirical, true"),
        ({"draws": 0}, "draws is 0; it must be at least 1"),
        ({"chunk": 0}, "chunk is 0"),
        ({"batches": []}, "no examples"),
        ({"batches": [{"x": torch.ones(2, 5), "labels": torch.ones(2, 3)}]}, "must be class numbers"),
    ],
)
def test_bad_arguments(changes: dict[str, Any], message: str) -> None:
    model, batches = classifier("mlp")
    with pytest.raises(ValueError, match=message):
        exact_fisher(model, **{"batches": batches, **changes})


def slow_ranks(values: list[float]) -> list[float]:
    return [sum(v < x for v in values) + (sum(v == x for v in values) + 1) / 2 for x in values]


def slow_correlation(one: list[float], other: list[float]) -> float:
    means = sum(one) / len(one), sum(other) / len(other)
    products = sum((a - means[0]) * (b - means[1]) for a, b in zip(one, other, strict=True))
    return products / math.sqrt(sum((a - means[0]) ** 2 for a in one) * sum((b - means[1]) ** 2 for b in other))


def test_rank_correlation_is_that_of_the_definition_with_ties() -> None:
    generator = torch.Generator().manual_seed(0)
    one = torch.randint(6, (40,), generator=generator).float()  # many ties
    other = one + torch.randn(40, generator=generator) * 2
    assert slow_ranks([3.0, 1.0, 3.0, 2.0]) == [3.5, 1.0, 3.5, 2.0]
    expected = slow_correlation(slow_ranks(one.tolist()), slow_ranks(other.tolist()))
    assert spearman(one, other) == pytest.approx(expected) and 0.3 < expected < 0.95
    assert spearman(one.reshape(4, 10), other.exp().reshape(4, 10)) == pytest.approx(expected)
    assert spearman(other, -other) == pytest.approx(-1.0)
    assert math.isnan(spearman(one, torch.full((40,), 0.1)))


def test_correlation_of_logarithms_and_scale() -> None:
    one = torch.tensor([0.0, 1.0, 10.0, 100.0, 5.0])
    other = torch.tensor([3.0, 2.0, 4.0, 9.0, 0.0])
    expected = slow_correlation([0.0, 1.0, 2.0], [math.log(2), math.log(4), math.log(9)])
    assert log_pearson(one, other) == pytest.approx(expected)
    assert log_pearson(one, 7 * one**2) == pytest.approx(1.0)
    assert log_scale(1000 * one, one) == pytest.approx(3.0)
    assert math.isnan(log_scale(one, torch.zeros(5)))
    for few in (torch.zeros(5), torch.eye(5)[0]):  # none and one of the values are above zero
        assert math.isnan(log_pearson(few, few))


def train_beside(model: nn.Module, batches: list[Batch], optimizer: Any, after: Any) -> None:
    """Steps of a mean loss; ``after(step, terms)``."""
    for step, batch in enumerate(batches, 1):
        optimizer.zero_grad()
        F.cross_entropy(model(batch["x"]), batch["labels"]).backward()
        optimizer.step()
        after(step, len(batch["labels"]))


@pytest.mark.parametrize("network", ["mlp", "cnn"])
def test_factors_are_those_of_kfac_and_their_diagonals_adafishers(network: str) -> None:
    model, batches = classifier(network)
    model.train()
    layers = {"mlp": ("first", "second"), "cnn": ("conv", "head")}[network]
    factors = KroneckerFactors(model, 0.7)
    factors.arm(True)
    with AdaFisherW(model, lr=0.0, ema_decay=0.7, update_interval=1) as optimizer:
        batches[1] = {key: value.repeat(2, *[1] * (value.dim() - 1))[:4] for key, value in batches[1].items()}
        torch.manual_seed(5)  # dropout
        train_beside(model, batches, optimizer, lambda step, terms: factors.refresh(terms))
        products = factors.products()
        for name in layers:
            weight = model.get_submodule(name).weight
            positions = 16 if name == "conv" else 1
            # AdaFisher's gradients are those of the mean of 4 terms, and its means are over all positions.
            expected = optimizer.fisher_diagonal(weight, normalized=False) * positions * 4**2
            torch.testing.assert_close(products[id(weight)], expected)
            plain = expected / (positions * 16)
            raw = {"product": {id(weight): plain, 0: expected}, "second_moment": {1: expected}}
            scaled = in_units_of_a_term({**raw, "second_moment_window": {2: plain}}, products, 4, 1.0)
            torch.testing.assert_close(scaled["product"], {id(weight): expected, 0: expected * 16})
            torch.testing.assert_close(scaled["product_unscaled"], {id(weight): plain * 16, 0: expected * 16})
            torch.testing.assert_close(scaled["second_moment"], {1: expected * 4})
            torch.testing.assert_close(scaled["second_moment_window"], {2: plain * 4})
            counted = in_units_of_a_term(raw, {}, 4, 1 / 4)  # S is that of each term's own loss
            torch.testing.assert_close(counted["product"], raw["product"])
            torch.testing.assert_close(counted["product_unscaled"], raw["product"])
    factors.recorder.close()
    options = {"momentum": 0.0, "damping": 0.03, "stat_decay": 0.7, "kl_clip": None}
    with KFAC(model, lr=0.0, update_interval=1, inverse_interval=1, **options) as kfac:
        kfac.gradient_scale, kfac.loss_terms = 1 / 4, 4.0
        torch.manual_seed(5)
        train_beside(model, batches, kfac, lambda step, terms: None)
        diagonals = factors.diagonals(0.03)
        for name in layers:
            layer = model.get_submodule(name)
            rows, columns = (kfac.state[layer.weight][key] for key in ("row_inverse", "column_inverse"))
            inverse = torch.kron(rows, columns).diagonal().reshape(len(rows), len(columns))
            torch.testing.assert_close(diagonals[id(layer.weight)].reshape(len(rows), -1), 1 / inverse[:, :-1])
            torch.testing.assert_close(diagonals[id(layer.bias)], 1 / inverse[:, -1])


def test_second_moments_are_adams() -> None:
    model, batches = classifier("mlp")
    moments, adam = SecondMoments(0.9), torch.optim.Adam(model.parameters(), lr=0.01, betas=(0.5, 0.9))
    train_beside(model, batches, adam, lambda step, terms: moments.update(model))
    for p in [p for p in model.parameters() if p.requires_grad]:
        torch.testing.assert_close(moments.moments()[id(p)], adam.state[p]["exp_avg_sq"] / (1 - 0.9**2))


def test_an_estimate_that_is_exact_has_correlation_one() -> None:
    model, batches = classifier("mlp")
    exact = exact_fisher(model, batches)
    layers = {"first": model.get_parameter("first.weight"), "second": model.get_parameter("second.weight")}
    truth = {name: exact.diagonals[f"{name}.weight"] for name in layers}
    estimates: dict[str, dict[int, Tensor]] = {
        "fisher": {id(p): truth[name] for name, p in layers.items()},
        "product": {id(p): truth[name] * (100 if name == "first" else 1) for name, p in layers.items()},
        "second_moment": {id(p): 1 / truth[name] for name, p in layers.items()},
        "kfac": {id(layers["second"]): truth["second"]},
        "exact_window": {id(p): 1 / truth[name] for name, p in layers.items()},
        "kfac_weaker": {id(layers["second"]): truth["second"]},
    }
    rows = {row.layer: row for row in compare_layers(model, exact, estimates)}
    assert list(rows) == ["first", "second", TOGETHER]
    first = rows["first"].measures
    assert first["fisher"] == pytest.approx({"spearman": 1.0, "log_pearson": 1.0, "log_scale": 0.0}, abs=1e-9)
    assert first["product"]["log_scale"] == pytest.approx(2.0)
    assert first["second_moment"]["spearman"] == pytest.approx(-1.0) and "kfac" not in first
    for name in ("exact_window", "fisher_against_window", "product_against_window"):
        assert first[name]["spearman"] == pytest.approx(-1.0)
    expected = spearman(*(half["first.weight"] for half in exact.halves))
    assert first[HALVES]["spearman"] == pytest.approx(expected)
    assert rows[TOGETHER].values == 12  # the first layer has no K-FAC
    assert rows[TOGETHER].measures["kfac_weaker"]["spearman"] == pytest.approx(1.0)
    estimates["kfac"][id(layers["first"])] = truth["first"]
    rows = {row.layer: row for row in compare_layers(model, exact, estimates)}
    assert rows[TOGETHER].values == 32
    assert rows[TOGETHER].measures["fisher"]["spearman"] == pytest.approx(1.0)
    assert rows[TOGETHER].measures["product"]["spearman"] < 0.99
    assert "kfac_weaker" not in rows[TOGETHER].measures  # only one of these layers has it


def row(name: str, values: int, number: float, *names: str) -> LayerAgreement:
    measures = {"spearman": number, "log_pearson": number / 2, "log_scale": 10 * number}
    return LayerAgreement(name, values, {key: dict(measures) for key in names or (*ESTIMATES, HALVES)})


def test_means_are_weighted_by_size() -> None:
    rows = [row("a", 30, 0.5), row("b", 10, 0.9), row("norm", 99, 0.0, "fisher", HALVES), row(TOGETHER, 40, 0.1)]
    mean = mean_of(rows)
    assert mean["kfac"]["spearman"] == pytest.approx(0.6)
    assert mean["fisher"]["scale_spread"] == pytest.approx(2.0)
    rows[1].measures["kfac"]["spearman"] = math.nan
    assert mean_of(rows)["kfac"]["spearman"] == pytest.approx(0.5)
    seeds = over_seeds([mean, mean_of([row("a", 30, 0.8)])])
    assert seeds["kfac"]["spearman"] == pytest.approx({"mean": 0.7, "sd": 0.2 / math.sqrt(2), "seeds": 2})
    assert over_seeds([mean])["kfac"]["spearman"] == {"mean": pytest.approx(0.6), "sd": None, "seeds": 1}


def settings(folder: Path, **changes: Any) -> FisherSettings:
    values = {"task": "digits", "steps": 4, "examples": 12, "further": [*RUN, *TINY], **changes}
    return FisherSettings(output=folder / "figure.png", **values)


def test_comparison_does_not_change_the_training(tmp_path: Path) -> None:
    chosen = settings(tmp_path, steps=12)
    compared = prepare_seed(chosen, 3)
    layers, exact = compare_run(chosen, compared)
    further = [*chosen.further, "--seed", "3"]
    plain = prepare_papers_run("digits", 12, chosen.output, None, further)
    plain.new_trainer([]).train()
    for name, p in plain.model.named_parameters():
        assert torch.equal(p, compared.model.get_parameter(name)), name
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in compared.model.modules())
    assert exact.examples == 12 and not exact.looped
    names = [row.layer for row in layers]
    assert names[-1] == TOGETHER and "cct.layers.0.intermediate" in names and "cct.norm" in names
    assert all("kfac" in row.measures for row in layers if "norm" not in row.layer)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_terms_of_a_step_are_counted(tmp_path: Path, command: list[str], accumulation: int) -> None:
    """Those that Trainer divides the loss of a text by, and the images of all micro-batches."""
    further = [*command[: command.index("--max_steps")], "--gradient_accumulation_steps", str(accumulation)]
    run = prepare_run("clm", 2, tmp_path / "a.png", None, [*further, "--step_size", "paper", "--update_interval", "1"])
    observer, counted = RunObserver(run.model, 0.9, 0.9, 64), []

    def look(step: int, model: nn.Module, optimizer: Any) -> None:
        counted.append((observer.terms, 1 / optimizer.gradient_scale))
        observer.after_step(step, model, optimizer)

    run.new_trainer([StepCallback(None, look)]).train()
    observer.close()
    assert observer.last_terms * observer.last_scale == pytest.approx(1.0)
    assert counted == [(4 * accumulation * 15, pytest.approx(4 * accumulation * 15))] * 2
    model, batches = classifier("mlp")
    observer = RunObserver(model, 0.9, 0.9, 64)
    model.train()
    for batch in batches:
        model(batch["x"])
    model.eval()(batches[0]["x"])
    assert observer.terms == 7
    observer.close()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": "adam"}, "the optimizer is 'adam'; it must be adafisher or adafisherw"),
        ({"kind": "exact"}, "--kind is 'exact'; it must be one of empirical, true"),
        ({"steps": 0}, "--steps is 0; it must be at least 1"),
        ({"examples": 1}, "--examples is 1; it must be at least 2"),
        ({"kfac_damping": 0.0}, "--kfac_damping is 0.0"),
        ({"seeds": (1, 1)}, r"--seeds are \[1, 1\]; give different"),
        ({"further": ["--seed", "3"]}, "--seed is not free here"),
    ],
)
def test_bad_input_is_named_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str
) -> None:
    def train(*_: Any) -> None:
        raise AssertionError("training began")

    monkeypatch.setattr(evaluation, "compare_run", train)
    with pytest.raises(ValueError, match=message):
        compare_fisher(settings(tmp_path, **changes))


def test_script_on_text(tmp_path: Path, command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "pictures" / "fisher.svg"
    flags = [*command[: command.index("--max_steps")], "--task", "clm", "--steps", "3", "--examples", "6"]
    flags += ["--seeds", "0", "1", "--kind", "true", "--output", str(output)]
    assert load_command("figures").fisher_accuracy(flags) == 0
    assert {file.suffix for file in output.parent.glob("fisher.*")} == {".json", ".svg"}
    found = json.loads(output.with_suffix(".json").read_text())
    assert (found["kind"], found["examples"], found["terms"], found["seeds"]) == ("true", 6, 90, [0, 1])
    assert found["one_by_one"] is False
    layers = {row["layer"]: row for row in found["layers"]}
    assert "transformer.wte" in layers and "lm_head" not in layers  # tied
    for index, name in enumerate(layers):
        each = [entry["layers"][index]["measures"]["fisher"]["spearman"] for entry in found["by_seed"]]
        assert layers[name]["measures"]["fisher"]["spearman"]["mean"] == pytest.approx(sum(each) / 2)
    means = [entry["mean"]["fisher"]["spearman"] for entry in found["by_seed"]]
    assert found["mean"]["fisher"]["spearman"]["mean"] == pytest.approx(sum(means) / 2)
    table = agreement_table(found, "spearman")
    assert f"{sum(means) / 2:.2f} ± {abs(means[0] - means[1]) / math.sqrt(2):.2f}" == table.rows[-1][2]
    printed = capsys.readouterr().out
    assert table.markdown() in printed and agreement_table(found, "spearman", CONTROL_COLUMNS).markdown() in printed
    assert LEGEND.format(damping=0.01) in printed


def test_a_seed_among_the_optimizers_settings_is_refused(tmp_path: Path) -> None:
    """It would be that of every seed."""
    chosen = settings(tmp_path, optimizer="adafisher:seed=3")
    with pytest.raises(ValueError, match="seed=3 is among the optimizer's settings: use --seeds"):
        compare_fisher(chosen)
