"""One test for each defect of the authors' released code that this package must not have, by its D-number.

- D1 D2: parameters that are never stepped; D3: in-place consumers; D4: embeddings and tied heads; D5: bare parameters;
  D6 D7: frozen parameters; D8: adapters, skipped layers, subclasses, functional use; D9 D10: groups, and no model;
  D11 D12 D13: states and their options; D14: documented calls; D17: modules used twice; D18: bfloat16;
  D19 D20: broken, empty, evaluated and abandoned batches; D21: layers first used late; D22: keyword calls;
  D23 D24: norms without parameters, and the factors of convolutions; D25: the average; D26: hooks.
- D15 D16 and, under the Trainer, D18 D19 D20 are in tests/training/test_modes.py, D19 with a loss scaler in
  tests/training/test_loss_scaling.py, D27 in tests/distributed/test_ddp.py.
"""

from __future__ import annotations

import copy
import doctest
import pickle
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close
from transformers import ResNetConfig, ResNetForImageClassification

import hf_adafisher.optimizers.adafisher as adafisher_module
import hf_adafisher.optimizers.factory.create as factory_module
import hf_adafisher.optimizers.spectral as spectral_module
from hf_adafisher import AdaFisher, AdaFisherW, create_optimizer
from hf_adafisher.fisher.recorder import FactorRecorder
from tests.cases import CASES, Case, mlp, regression
from tests.model_zoo import family
from tests.reference import minmax
from tests.training_helper import hook_count, of_family, train

BY_NAME = {case.name: case for case in CASES}


def unmoved(model: nn.Module, before: dict[str, torch.Tensor]) -> list[str]:
    return [name for name, p in model.named_parameters() if torch.equal(p, before[name])]


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_moves_exactly(case: Case, frozen: set[str]) -> None:
    model = case.build()
    before = snapshot(model)
    train(model, case, AdaFisherW(model, lr=1e-2, update_interval=2), steps=5)
    assert set(unmoved(model, before)) == frozen


@pytest.mark.parametrize("name", ["gpt2", "vit"])
def test_d1_d2_all_of_gpt2_and_vit_is_trained(name: str) -> None:
    record = family(name)
    model = record.build()
    before = snapshot(model)
    optimizer = AdaFisherW(model, lr=1e-2, update_interval=2)
    train(model, of_family(record), optimizer, steps=4)
    assert unmoved(model, before) == []
    rules = {row.name: row.rule for row in optimizer.coverage()}
    if name == "gpt2":  # D1: Conv1D is covered by its own rule
        assert rules["transformer.h.0.attn.c_attn.weight"] == "Conv1D"
        assert "gradient factors" not in rules.values()
    else:  # D2: class token and position table do not eat the head's turn
        assert (rules["classifier.weight"], rules["vit.layernorm.weight"]) == ("Linear", "LayerNorm")
        assert rules["vit.embeddings.cls_token"] == "gradient factors"


def test_d4_untied_head_and_embedding_have_their_own_diagonals_and_a_tied_one_has_both() -> None:
    untied, tied = BY_NAME["untied"].build(), BY_NAME["tied"].build()
    with torch.no_grad():
        untied.head.weight.copy_(untied.embedding.weight)
        for (_, p), (_, q) in zip(
            sorted(dict(untied.named_parameters()).items()),
            sorted({**dict(tied.named_parameters()), "head.weight": tied.head.weight}.items()),
            strict=True,
        ):
            p.copy_(q)
    damping = 1e-3
    diagonals = {}
    for name, model in (("untied", untied), ("tied", tied)):
        optimizer = AdaFisherW(model, lr=0.0, damping=damping)
        train(model, BY_NAME[name], optimizer, steps=1)
        diagonals[name] = {key: optimizer.fisher_diagonal(p) - damping for key, p in model.named_parameters()}
    both = diagonals["untied"]["embedding.weight"] + diagonals["untied"]["head.weight"]
    assert_close(diagonals["tied"]["embedding.weight"], both)
    assert diagonals["untied"]["head.weight"].max() > 0.1 and diagonals["untied"]["embedding.weight"].max() > 0.1


def test_d5_a_bare_parameter_gets_its_own_fallback_not_a_neighbours_fisher() -> None:
    case = BY_NAME["bare_parameter"]
    model = case.build()
    optimizer = AdaFisherW(model, lr=0.0, damping=1e-3)
    train(model, case, optimizer, steps=1)
    square = model.shift.grad.square()
    expected = (square - square.min()) / (square.max() - square.min()) + 1e-3
    assert_close(optimizer.fisher_diagonal(model.shift), expected)


@pytest.mark.parametrize(
    ("name", "frozen"),
    [
        ("first_layer_frozen", {"0.weight", "0.bias"}),
        ("middle_layer_frozen", {"2.weight", "2.bias"}),
        ("last_layer_frozen", {"6.weight", "6.bias"}),
        ("two_layers_frozen", {"0.weight", "0.bias", "4.weight", "4.bias"}),
        ("one_bias_frozen", {"2.bias"}),  # D7
        ("one_weight_frozen", {"0.weight"}),
    ],
)
def test_d6_d7_frozen_parameters_stay_and_all_others_train(name: str, frozen: set[str]) -> None:
    assert_moves_exactly(BY_NAME[name], frozen)


def test_d6_the_head_of_a_linear_probe_is_trained() -> None:
    record = family("vit")
    model = record.build()
    model.vit.requires_grad_(False)
    before = snapshot(model)
    optimizer = AdaFisherW(model, lr=1e-2)
    model(**record.batch()).loss.backward()
    optimizer.step()
    assert set(before) - set(unmoved(model, before)) == {"classifier.weight", "classifier.bias"}


@pytest.mark.parametrize(
    ("name", "frozen"),
    [
        ("adapters", {f"{i}.base.{kind}" for i in (0, 2, 4) for kind in ("weight", "bias")}),
        ("skipped_layer", {"skipped.weight", "skipped.bias"}),
        ("subclass_of_linear", set()),
        ("weight_norm", set()),
        ("attention", set()),
    ],
)
def test_d8_adapters_skipped_layers_subclasses_and_functional_use(name: str, frozen: set[str]) -> None:
    assert_moves_exactly(BY_NAME[name], frozen)


def test_d8_layers_without_a_rule_train_on_gradient_factors() -> None:
    def make() -> nn.Module:
        norm = nn.InstanceNorm1d(4, affine=True)
        return nn.Sequential(nn.ConvTranspose1d(3, 4, 3, bias=False), norm, nn.Tanh(), nn.Flatten(), nn.Linear(28, 2))

    assert_moves_exactly(Case("transposed", make, regression(6, 3, 5)), set())


def test_d9_groups_keep_their_options_and_decay_spares_biases_and_norms() -> None:
    case = BY_NAME["norm"]
    model = case.build()
    optimizer = create_optimizer("adafisherw", model, lr=0.1, weight_decay=0.5)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    before = snapshot(model)
    optimizer.step()
    for name, p in model.named_parameters():
        decayed = p.dim() > 1
        assert_close(p, before[name] * (1 - 0.1 * 0.5) if decayed else before[name])


def test_d9_add_param_group_reaches_the_hooks() -> None:
    case = BY_NAME["mlp"]
    model = case.build()
    optimizer = AdaFisherW(model, model[0].parameters(), lr=0.0)
    optimizer.add_param_group({"params": model[2].parameters(), "damping": 0.25})
    train(model, case, optimizer, steps=1)
    whole = AdaFisherW(model, lr=0.0, damping=0.25)
    train(model, case, whole, steps=1)
    assert_close(optimizer.fisher_diagonal(model[2].weight), whole.fisher_diagonal(model[2].weight))
    with pytest.raises(ValueError, match="in none of its parameter groups"):
        optimizer.fisher_diagonal(model[4].weight)


@pytest.mark.parametrize("first", ["parameters", "groups"])
def test_d10_parameters_in_place_of_the_model_are_refused_with_advice(first: str) -> None:
    model = mlp(3, 2)
    argument: Any = model.parameters() if first == "parameters" else [{"params": list(model.parameters())}]
    with pytest.raises(TypeError, match=r"write AdaFisherW\(model, lr=.*OptimizerFactory"):
        AdaFisherW(argument)


def test_d11_state_is_empty_before_the_first_step_and_accelerate_takes_it() -> None:
    case = BY_NAME["mlp"]
    model = case.build()
    optimizer = AdaFisherW(model)
    assert optimizer.state_dict()["state"] == {}
    model, prepared = Accelerator(cpu=True).prepare(model, optimizer)
    before = snapshot(model)
    train(model, case, prepared, steps=1)
    assert unmoved(model, before) == []


@pytest.mark.parametrize("step_size", ["paper", "root"])
def test_d12_loading_changes_neither_the_dictionary_nor_what_it_holds(step_size: str) -> None:
    case = BY_NAME["tied"]
    model = case.build()
    options: dict[str, Any] = {"step_size": step_size, "update_interval": 2 if step_size == "paper" else 1}
    optimizer = AdaFisherW(model, **options)
    train(model, case, optimizer, steps=3)
    saved = copy.deepcopy(optimizer.state_dict())
    reference = copy.deepcopy(saved)
    first, second = (AdaFisherW(model, **options) for _ in range(2))
    first.load_state_dict(saved)
    train(model, case, first, steps=4)  # in-place updates must not reach the dictionary
    assert_close(saved["state"], reference["state"], rtol=0, atol=0)
    assert saved["param_groups"] == reference["param_groups"]
    second.load_state_dict(saved)
    assert_close(second.state_dict()["state"], reference["state"], rtol=0, atol=0)


def test_d13_options_come_back_with_the_state() -> None:
    case = BY_NAME["mlp"]
    model = case.build()
    optimizer = AdaFisherW(model, damping=0.5, ema_decay=0.3, update_interval=7, beta=0.6)
    train(model, case, optimizer, steps=3)
    restored = AdaFisherW(model)
    restored.load_state_dict(optimizer.state_dict())
    group = restored.param_groups[0]
    options = {key: group[key] for key in ("damping", "ema_decay", "update_interval", "beta", "steps")}
    assert options == {"damping": 0.5, "ema_decay": 0.3, "update_interval": 7, "beta": 0.6, "steps": 3}


def test_d14_the_examples_in_the_docstrings_run() -> None:
    for module in (adafisher_module, factory_module, spectral_module):
        outcome = doctest.testmod(module, extraglobs={"OptimizerFactory": factory_module.OptimizerFactory})
        assert outcome.attempted > 0 and outcome.failed == 0


def test_d14_a_closure_is_called_with_gradients_and_its_loss_returned() -> None:
    case = BY_NAME["mlp"]
    model, twin = case.build(), case.build()
    optimizer = AdaFisherW(model, lr=0.1)

    def closure() -> float:
        optimizer.zero_grad()
        loss = case.loss(model, torch.Generator().manual_seed(0))
        loss.backward()
        return loss.item()

    returned = optimizer.step(closure)
    assert returned == case.loss(twin, torch.Generator().manual_seed(0)).item()
    train(twin, case, AdaFisherW(twin, lr=0.1), steps=1)
    assert_close(list(model.parameters()), list(twin.parameters()), rtol=0, atol=0)


def test_d17_a_module_used_twice_commits_both_calls_and_averages_once() -> None:
    case = BY_NAME["used_twice"]
    model = case.build()
    optimizer = AdaFisherW(model, update_interval=1, ema_decay=0.8)
    recorder = FactorRecorder(model, model.parameters())
    recorder.arm()
    train(model, case, optimizer, steps=1)
    assert {tracked.name: count for tracked, count in recorder.flush().counts.items()} == {"shared": 7 + 2, "head": 7}
    weight = optimizer.state[model.shared.weight]["factor_weight"]
    assert_close(weight, torch.tensor(1 - 0.8, dtype=weight.dtype))


@pytest.mark.parametrize("mode", ["autocast", "weights"])
def test_d18_statistics_are_float32_in_bfloat16_training(mode: str) -> None:
    case = BY_NAME["tied"]
    model = case.build()
    if mode == "weights":
        model.to(torch.bfloat16)
    optimizer = AdaFisherW(model, lr=1e-2)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mode == "autocast"):
        loss = case.loss(model, torch.Generator().manual_seed(0))
    loss.backward()
    before = snapshot(model)
    optimizer.step()
    assert unmoved(model, before) == []
    restored = AdaFisherW(model)
    restored.load_state_dict(optimizer.state_dict())
    for kind in (optimizer, restored):
        for state in kind.state.values():
            assert {v.dtype for k, v in state.items() if k.endswith("_factor")} == {torch.float32}


@pytest.mark.parametrize("reset", ["optimizer", "model"])
def test_d19_a_skipped_nan_batch_and_an_empty_one_leave_no_trace(reset: str) -> None:
    case = BY_NAME["mlp"]
    model, twin = case.build(), case.build()
    optimizer, reference = (AdaFisherW(m, update_interval=1, lr=0.1) for m in (model, twin))
    train(model, case, optimizer, steps=1)
    train(twin, case, reference, steps=1)
    (model(torch.full((3, 4), float("nan"))).sum()).backward()
    if reset == "optimizer":  # the loop sees the NaN and skips the step
        optimizer.zero_grad()
    else:
        model.zero_grad()
        optimizer.discard_statistics()
    model(torch.zeros(0, 4)).sum().backward()  # a batch without rows counts for nothing
    train(model, case, optimizer, steps=2)
    train(twin, case, reference, steps=2)
    assert_close(list(model.parameters()), list(twin.parameters()), rtol=0, atol=0)


def test_d19_without_a_word_from_the_loop_non_finite_statistics_are_dropped_and_stay_due(
    caplog: pytest.LogCaptureFixture,
) -> None:
    case = BY_NAME["mlp"]
    model = case.build()
    optimizer = AdaFisherW(model, update_interval=10, lr=0.1)
    batches = [torch.randn(3, 4), torch.full((3, 4), float("nan")), torch.randn(3, 4)]
    for x in batches:
        model.zero_grad(set_to_none=False)  # the loop skips the NaN, and the optimizer does not hear of it
        model(x).sum().backward()
    optimizer.step()
    assert optimizer.curvature_summary()["dropped_refreshes"] == 1
    assert "in '0' and 2 more modules" in caplog.text and "stays due" in caplog.text
    assert all(p.isfinite().all() for p in model.parameters())
    assert hook_count(model) == 3
    train(model, case, optimizer, steps=1)
    assert optimizer.curvature_summary()["refreshes"] == 1
    assert hook_count(model) == 0
    assert all(v.isfinite().all() for state in optimizer.state.values() for v in state.values())


def test_d20_forwards_that_do_not_train_do_not_count() -> None:
    case = BY_NAME["mlp"]
    model, twin = case.build(), case.build()
    optimizer, reference = (AdaFisherW(m, update_interval=1, lr=0.1) for m in (model, twin))
    for _ in range(3):
        x = torch.randn(5, 4)
        model.eval()
        torch.autograd.grad(model(x).sum(), model[0].weight)  # evaluation with gradients on
        model.train()
        model(x)  # a forward without a backward
        with torch.no_grad():
            model(x)
        train(model, case, optimizer, steps=1)
        train(twin, case, reference, steps=1)
    assert_close(optimizer.state_dict()["state"], reference.state_dict()["state"], rtol=0, atol=0)


def test_d20_a_backward_after_the_step_does_not_reach_the_next_refresh() -> None:
    states = []
    first, second, late = torch.randn(3, 5, 4)
    start = nn.Linear(4, 3)  # its backward does not need the weights, which the step changes
    for backward_after_the_step in (True, False):
        model = copy.deepcopy(start)
        optimizer = AdaFisherW(model, update_interval=1)
        stale = model(late).sum()
        model(first).sum().backward()
        optimizer.step()
        assert hook_count(model) == 1
        if backward_after_the_step:
            stale.backward()
        model.zero_grad()  # the optimizer does not hear of it
        model(second).square().sum().backward()
        optimizer.step()
        states.append(optimizer.state_dict()["state"])
    assert_close(states[0], states[1], rtol=0, atol=0)


def test_d21_a_layer_first_used_late_is_initialised_then() -> None:
    case = BY_NAME["used_late"]
    model = case.build()
    optimizer = AdaFisherW(model, update_interval=5, lr=1e-2)
    before = snapshot(model)
    train(model, case, optimizer, steps=2)
    assert set(unmoved(model, before)) == {"late.weight", "late.bias"}
    with pytest.raises(RuntimeError, match=r"no curvature of late\.weight"):
        optimizer.fisher_diagonal(model.late.weight)
    train(model, case, optimizer, steps=1)  # between two refreshes: its own statistics, from its first step on
    assert unmoved(model, before) == []
    first = optimizer.fisher_diagonal(model.late.weight)
    assert_close(optimizer.state[model.late.weight]["factor_weight"].item(), 0.2)
    assert {row.rule for row in optimizer.coverage()} == {"Linear"}
    train(model, case, optimizer, steps=2)
    assert_close(optimizer.fisher_diagonal(model.late.weight), first, rtol=0, atol=0)
    train(model, case, optimizer, steps=1)  # the refresh at step 5 is for it too
    assert_close(optimizer.state[model.late.weight]["factor_weight"].item(), 0.36)


def test_d22_keyword_calls_are_recorded() -> None:
    case = BY_NAME["keyword_call"]
    model = case.build()
    optimizer = AdaFisherW(model, lr=1e-2)
    train(model, case, optimizer, steps=1)
    assert {row.rule for row in optimizer.coverage()} == {"Linear", "LayerNorm"}


def test_d25_the_average_of_constant_statistics_is_that_constant_at_every_refresh() -> None:
    model = nn.Linear(3, 2)
    optimizer = AdaFisherW(model, lr=0.0, damping=1e-3, update_interval=1, ema_decay=0.8)
    x = torch.tensor([[1.0, 2.0, 3.0]])
    for _ in range(5):
        optimizer.zero_grad()
        (model(x) * torch.tensor([1.0, 3.0])).sum().backward()
        optimizer.step()
        raw = optimizer.fisher_diagonal(model.weight, normalized=False)
        assert_close(raw, torch.outer(torch.tensor([1.0, 9.0]), torch.tensor([1.0, 4.0, 9.0])))
        diagonal = optimizer.fisher_diagonal(model.weight)  # the curvature spans [damping, 1 + damping]
        assert_close(diagonal.aminmax(), torch.return_types.aminmax((torch.tensor(1e-3), torch.tensor(1.001))))


def test_d25_why_the_damping_alone_decides() -> None:
    """The arithmetic of docs/method.md: that average, of factors within [0, 1] and started at 1."""
    gamma, damping = 0.8, 1e-3
    low, high = 1.0, 1.0
    highest, lowest = [], []
    for _ in range(20):  # refreshes of zeros, and of ones
        low, high = 0.1 * gamma * low, 0.1 * gamma * high + 0.01 * gamma
        lowest.append(damping + low**2)
        highest.append(damping + high**2)
        assert (high < 0.0087) == (len(highest) >= 5)
    assert (round(lowest[0], 4), round(highest[0], 4)) == (0.0074, 0.0087)
    for first, second in (lowest[:2], highest[:2]):
        assert round(first / second, 1) == 7.1
    assert high == pytest.approx(0.008 / 0.92) and highest[-1] < damping + 0.0087**2 < 0.001076
    assert round(1 - damping / highest[-1], 3) == 0.070
    assert round(1 - 0.003 / (0.003 + high**2), 3) == 0.025


def test_d26_hooks_go_with_the_optimizer_and_copies_of_the_model_have_none() -> None:
    case = BY_NAME["norm"]
    model = case.build()
    clean = len(pickle.dumps(model))
    optimizer = AdaFisherW(model, lr=0.1)
    assert hook_count(model) == 3
    copied, loaded = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    for twin in (copied, loaded):  # armed hooks become inert and do not bring the optimizer along
        train(twin, case, torch.optim.SGD(twin.parameters(), lr=0.1), steps=1)
    alone = case.build()
    reference = AdaFisherW(alone, lr=0.1)
    for root, its in ((model, optimizer), (alone, reference)):
        case.loss(root, torch.Generator().manual_seed(1)).backward()  # zeroed gradients would take statistics along
        its.step()
    assert_close(optimizer.state_dict()["state"], reference.state_dict()["state"], rtol=0, atol=0)
    optimizer.close()
    assert hook_count(model) == 0 and len(pickle.dumps(model)) == clean
    with pytest.raises(RuntimeError, match="was closed"):
        optimizer.step()
    with AdaFisher(model):
        assert hook_count(model) == 3
    assert hook_count(model) == 0
    second = AdaFisherW(model)
    del second  # a dropped optimizer takes its hooks along
    assert hook_count(model) == 0


def test_d26_two_optimizers_on_one_model_do_not_disturb_each_other() -> None:
    case = BY_NAME["mlp"]
    model, twin = case.build(), case.build()
    first = AdaFisherW(model, lr=0.1, update_interval=1)
    other = AdaFisherW(model, lr=0.1, update_interval=1)
    reference = AdaFisherW(twin, lr=0.1, update_interval=1)
    train(model, case, first, steps=3)
    train(twin, case, reference, steps=3)
    assert_close(first.state_dict()["state"], reference.state_dict()["state"], rtol=0, atol=0)
    other.close()


def test_d3_a_hugging_face_resnet_whose_residuals_are_added_in_place_is_trained() -> None:
    config = ResNetConfig(
        embedding_size=4, hidden_sizes=[4, 6], depths=[1, 2], layer_type="basic", num_labels=3, num_channels=3
    )
    torch.manual_seed(0)
    model = ResNetForImageClassification(config).train()
    x, labels = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 0])
    before = snapshot(model)
    optimizer = AdaFisherW(model, lr=1e-2, damping=0.1, update_interval=2)
    losses = train(model, lambda model, step: model(pixel_values=x, labels=labels).loss, optimizer, steps=12)
    assert unmoved(model, before) == []
    assert losses[-1] < 0.5 * losses[0]
    rules = {row.rule for row in optimizer.coverage()}
    assert rules == {"Conv", "BatchNorm", "Linear"}


@pytest.mark.parametrize(
    ("norm", "shape"),
    [
        (nn.Identity(), (3, 2, 6, 6)),
        (nn.Identity(), (2, 6, 6)),  # an unbatched convolution returns a view
        (nn.BatchNorm2d(4), (3, 2, 6, 6)),
        (nn.GroupNorm(2, 4), (3, 2, 6, 6)),
    ],
    ids=str,
)
def test_d3_an_in_place_rectifier_after_a_convolution_or_its_norm_changes_nothing(
    norm: nn.Module, shape: tuple[int, ...]
) -> None:
    models = []
    for inplace in (True, False):
        torch.manual_seed(0)
        first = [nn.Conv2d(2, 4, 3), copy.deepcopy(norm), nn.ReLU(inplace=inplace)]
        second = [nn.Conv2d(4, 4, 2), copy.deepcopy(norm), nn.ReLU(inplace=inplace)]
        models.append(nn.Sequential(*first, *second, nn.Flatten(-3), nn.Linear(36, 2)))
    case = Case("in_place", lambda: models[0], regression(*shape))
    optimizers = [AdaFisherW(model, lr=1e-2, damping=0.1, update_interval=1) for model in models]
    for model, optimizer in zip(models, optimizers, strict=True):
        train(model, case, optimizer, steps=3)
        assert "gradient factors" not in {row.rule for row in optimizer.coverage()}
    assert_close(list(models[0].parameters()), list(models[1].parameters()), rtol=0, atol=0)
    assert_close(*(o.state_dict()["state"] for o in optimizers), rtol=0, atol=0)


@pytest.mark.parametrize(
    "norm",
    [nn.LayerNorm(4, elementwise_affine=False), nn.BatchNorm1d(4, affine=False), nn.GroupNorm(2, 4, affine=False)],
    ids=str,
)
def test_d23_a_norm_without_parameters_is_ignored(norm: nn.Module) -> None:
    model = nn.Sequential(nn.Linear(3, 4), copy.deepcopy(norm), nn.Linear(4, 2))
    optimizer = AdaFisherW(model, lr=1e-2)
    before = snapshot(model)
    train(model, Case("norm", lambda: model, regression(5, 3)), optimizer, steps=2)
    # The batch's mean takes the bias in front of a BatchNorm away again: its gradient is rounding noise.
    assert set(unmoved(model, before)) <= ({"0.bias"} if isinstance(norm, nn.BatchNorm1d) else set())
    assert {row.name: row.rule for row in optimizer.coverage()} == dict.fromkeys(before, "Linear")


@pytest.mark.parametrize(
    ("options", "border"),
    [
        ({"padding": "same"}, (1, 1, 1, 2)),
        ({"padding": "same", "dilation": (1, 3)}, (3, 3, 1, 2)),
        ({"dilation": (2, 1), "stride": 2}, (0, 0, 0, 0)),
        ({"padding": (2, 1), "padding_mode": "reflect"}, (1, 1, 2, 2)),
        ({"padding": (2, 1), "padding_mode": "replicate", "dilation": 2}, (1, 1, 2, 2)),
        ({"padding": "same", "padding_mode": "circular"}, (1, 1, 1, 2)),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_d23_the_patches_know_string_padding_dilation_and_padding_mode(
    options: dict[str, Any], border: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(2, 3, (4, 3), **options).double()
    x = torch.randn(2, 2, 9, 8, dtype=torch.float64)
    optimizer = AdaFisherW(conv, lr=0.0, damping=0.25)
    output = conv(x)
    output.retain_grad()
    output.pow(3).sum().backward()
    optimizer.step()
    mode = options.get("padding_mode", "zeros")
    padded = F.pad(x, border, mode="constant" if mode == "zeros" else mode)
    patches = F.unfold(padded, (4, 3), dilation=options.get("dilation", 1), stride=options.get("stride", 1))
    assert patches.shape[2] == output[0, 0].numel() and output.grad is not None
    h, s = patches.square().mean((0, 2)).reshape(2, 4, 3), output.grad.square().mean((0, 2, 3))
    raw = optimizer.fisher_diagonal(conv.weight, normalized=False)
    assert_close(raw, torch.einsum("o,cij->ocij", s, h))
    normalized = torch.einsum("o,cij->ocij", minmax(s), minmax(h)) + 0.25
    assert_close(optimizer.fisher_diagonal(conv.weight), normalized)


def test_d24_a_convolutions_factor_is_the_mean_over_positions_and_no_less() -> None:
    conv = nn.Conv2d(2, 3, 3).double()
    x = torch.full((2, 2, 9, 9), 2.0, dtype=torch.float64)
    optimizer = AdaFisherW(conv, lr=0.0)
    (3 * conv(x)).sum().backward()
    optimizer.step()
    # 49 positions whose inputs are all 2 and whose gradients are all 3; not (2 * 3)^2 divided by 18 channels
    raw = optimizer.fisher_diagonal(conv.weight, normalized=False)
    assert_close(raw, torch.full_like(raw, (2.0 * 3.0) ** 2))
    raw = optimizer.fisher_diagonal(conv.bias, normalized=False)
    assert_close(raw, torch.full_like(raw, 3.0**2))


@pytest.mark.parametrize("kind", ["LayerNorm", "Conv1d", "BatchNorm1d", "GroupNorm"])
def test_d24_factors_do_not_grow_with_the_sequence(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    short, noise = torch.randn(2, 2, 6, 5, generator=generator, dtype=torch.float64)
    module: Any = {
        "LayerNorm": lambda: nn.LayerNorm(6),
        "Conv1d": lambda: nn.Conv1d(6, 6, 1),
        "BatchNorm1d": lambda: nn.BatchNorm1d(6),
        "GroupNorm": lambda: nn.GroupNorm(2, 6),
    }[kind]
    diagonals = []
    for repeats in (1, 10):
        layer = module().double()
        if kind == "Conv1d":
            nn.init.eye_(layer.weight[..., 0])
        x, weights = short.repeat(1, 1, repeats), noise.repeat(1, 1, repeats)
        if kind == "LayerNorm":
            x, weights = x.transpose(1, 2), weights.transpose(1, 2)
        optimizer = AdaFisherW(layer, lr=0.0)
        (layer(x) * weights).sum().backward()
        optimizer.step()
        diagonals.append([optimizer.fisher_diagonal(p, normalized=False) for p in layer.parameters()])
        values = optimizer.fisher_diagonal(layer.bias)
        assert len(values.unique()) == 6  # a curve over the channels, not {0, 1}
    assert_close(diagonals[0], diagonals[1])


@pytest.mark.parametrize(
    ("layer", "shape"),
    [(nn.Linear(4, 1), (5, 4)), (nn.Conv2d(4, 1, 2), (2, 4, 3, 3)), (nn.Conv1d(4, 1, 2), (4, 3))],
    ids=str,
)
def test_d24_the_one_output_of_a_layer_weighs_one_not_nothing(layer: Any, shape: tuple[int, ...]) -> None:
    layer, damping = copy.deepcopy(layer).double(), 0.25
    torch.manual_seed(0)
    x = torch.randn(*shape, dtype=torch.float64)
    optimizer = AdaFisherW(layer, lr=0.0, damping=damping)
    output = layer(x)
    output.pow(3).sum().backward()
    optimizer.step()
    diagonal = optimizer.fisher_diagonal(layer.weight)
    assert_close(diagonal.aminmax(), torch.return_types.aminmax((diagonal.new_tensor(0.25), diagonal.new_tensor(1.25))))
    raw = optimizer.fisher_diagonal(layer.weight, normalized=False)
    assert_close(diagonal, minmax(raw) + damping)  # with S = 1 it is the input factor's own curve
    assert_close(optimizer.fisher_diagonal(layer.bias), diagonal.new_tensor([1 + damping]))
