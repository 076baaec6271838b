"""Faults of the recorder that gave wrong numbers without a word; each test names the fault that it would see again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, jvp, vmap
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint
from transformers import BertConfig, BertForSequenceClassification

from hf_adafisher import AdaFisherW
from hf_adafisher.fisher import FactorRecorder
from tests.cases import mlp
from tests.equivalence import Training, assert_same_training


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(7, 4, generator=generator, requires_grad=True), torch.randint(0, 3, (7,), generator=generator)


def loss_of(model: nn.Module) -> Tensor:
    x, y = batch()
    return F.cross_entropy(model(x), y)


# --- E16: torch.autograd.grad and torch.func.grad are no training ---------------------------------------------------


def saliency(model: nn.Module) -> None:
    x, _ = batch()
    torch.autograd.grad(model(x)[:, 0].sum(), x)


def inner_step(model: nn.Module) -> None:
    """MAML's: gradients with respect to the weights, then to the fast weights made of them."""
    x, y = batch()
    fast = dict(model.named_parameters())
    for _ in range(2):
        loss = F.cross_entropy(functional_call(model, fast, (x,)), y)
        grads = torch.autograd.grad(loss, list(fast.values()))
        fast = {name: p - 0.1 * g for (name, p), g in zip(fast.items(), grads, strict=True)}


def some_weights(model: nn.Module) -> None:
    torch.autograd.grad(loss_of(model), [model.get_parameter("2.weight")])


def backward_to_the_input(model: nn.Module) -> None:
    x, _ = batch()
    model(x).square().sum().backward(inputs=[x])


def functional_gradient(model: nn.Module) -> None:
    x, y = batch()
    params = {name: p.detach() for name, p in model.named_parameters()}
    grad(lambda p: F.cross_entropy(functional_call(model, p, (x.detach(),)), y))(params)


def other_weights(model: nn.Module) -> None:
    """A backward through the modules that accumulates into somebody else's parameters."""
    x, _ = batch()
    copies = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    functional_call(model, copies, (x,)).square().sum().backward()


def batched_jacobian(model: nn.Module) -> None:
    x, _ = batch()
    torch.autograd.functional.jacobian(lambda x: model(x).sum(0), x, vectorize=True)


UNRELATED = [
    saliency,
    inner_step,
    some_weights,
    backward_to_the_input,
    functional_gradient,
    other_weights,
    batched_jacobian,
]


@pytest.mark.parametrize("unrelated", UNRELATED, ids=lambda function: function.__name__)
def test_e16_autograd_grad_that_trains_nothing_does_not_enter_the_factors(
    unrelated: Callable[[nn.Module], None],
) -> None:
    """E16: an unused gradient on a due step changed the step's direction to a cosine of 0.35."""
    trainings = []
    for disturbed in (False, True):
        model = network()
        optimizer = AdaFisherW(model, update_interval=1)
        for _ in range(2):
            optimizer.zero_grad()
            if disturbed:
                unrelated(model)
            loss_of(model).backward()
            optimizer.step()
        trainings.append(Training(model, optimizer))
    assert_same_training(*trainings, bitwise=True)


def recorded(model: nn.Module, run: Callable[[nn.Module], None]) -> dict[str, dict[str, Tensor]]:
    """The means by module name of what ``run`` leaves recorded."""
    recorder = FactorRecorder(model, list(model.parameters()))
    recorder.arm()
    run(model)
    sample = recorder.flush()
    recorder.close()
    return {tracked.name: factors for tracked, factors in sample.factors.items()}


@pytest.mark.parametrize("unrelated", UNRELATED, ids=lambda function: function.__name__)
def test_e16_what_trains_nothing_is_not_even_pending(unrelated: Callable[[nn.Module], None]) -> None:
    """E16: not only forgotten at the next forward."""
    assert not recorded(network(), unrelated)


def gradient_penalty(model: nn.Module) -> None:
    x, y = batch()
    out = model(x)
    (slope,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    (F.cross_entropy(out, y) + 0.0 * slope.square().sum()).backward()


def checkpointed(reentrant: bool) -> Callable[[nn.Module], None]:
    def run(model: nn.Module) -> None:
        x, y = batch()
        F.cross_entropy(checkpoint(model, x, use_reentrant=reentrant), y).backward()

    return run


def to_the_weights(model: nn.Module) -> None:
    loss_of(model).backward(inputs=list(model.parameters()))


@pytest.mark.parametrize(
    "run",
    [gradient_penalty, checkpointed(True), checkpointed(False), to_the_weights],
    ids=["gradient_penalty", "reentrant", "non_reentrant", "inputs"],
)
def test_e16_every_backward_that_accumulates_is_recorded_once(run: Callable[[nn.Module], None]) -> None:
    """E16, the other side: training through checkpoints, with penalties and with ``inputs=`` counts as it did."""
    plain = recorded(network(), lambda model: loss_of(model).backward())
    assert plain.keys() == {"0", "2"}
    assert_close(recorded(network(), run), plain)


def test_e16_a_backward_to_some_weights_records_their_modules_alone() -> None:
    """E16: ``backward(inputs=...)`` accumulates into what it names, and nothing else was trained."""
    found = recorded(network(), lambda model: loss_of(model).backward(inputs=[model.get_parameter("0.weight")]))
    assert found.keys() == {"0"}


def test_e16_a_trained_bias_beside_a_frozen_weight_is_recorded() -> None:
    """E16: one trained parameter of a module is enough."""
    model = network()
    model[0].weight.requires_grad_(False)
    assert recorded(model, lambda model: loss_of(model).backward()).keys() == {"0", "2"}


def test_e16_tied_weights_are_recorded_for_each_module() -> None:
    """E16: both modules lead to the one node that accumulates."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 6, bias=False))
    model[1].weight = model[0].weight
    tokens = torch.arange(5)
    assert recorded(model, lambda model: model(tokens).square().sum().backward()).keys() == {"0", "1"}
    assert not recorded(model, lambda model: torch.autograd.grad(model(tokens).sum(), model[0].weight) and None)


def test_e16_the_private_question_to_the_engine_may_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """E16: without it every backward counts, as before."""
    monkeypatch.delattr(torch._C, "_will_engine_execute_node")
    assert recorded(network(), lambda model: loss_of(model).backward()).keys() == {"0", "2"}


# --- E17: transforms, tracing and export ------------------------------------------------------------------------------


def per_example_gradients(model: nn.Module) -> Any:
    x, y = batch()
    params = {name: p.detach() for name, p in model.named_parameters()}

    def loss(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, params, (x[None],)), y[None])

    return vmap(grad(loss), in_dims=(None, 0, 0))(params, x.detach(), y)


def jacobian(model: nn.Module) -> Any:
    return jacrev(lambda x: model(x))(batch()[0].detach())


def tangent(model: nn.Module) -> Any:
    x = batch()[0].detach()
    return jvp(lambda x: model(x), (x,), (torch.ones_like(x),))


def batched_call(model: nn.Module) -> Any:
    return vmap(model)(batch()[0])


def exported(model: nn.Module) -> Any:
    x = batch()[0].detach()
    return torch.export.export(model, (x,)).module()(x)


def traced(model: nn.Module) -> Any:
    x = batch()[0].detach()
    return torch.jit.trace(model, (x,))(x)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize(
    "transform",
    [per_example_gradients, jacobian, tangent, batched_call, exported, traced],
    ids=lambda function: function.__name__,
)
def test_e17_hooks_stand_aside_under_transforms_and_tracing(transform: Callable[[nn.Module], Any]) -> None:
    """E17: every tenth step, on which the hooks are on, these crashed or failed their own checks."""
    expected = transform(network())
    model = network()
    optimizer = AdaFisherW(model)
    assert optimizer._statistics.recorder.armed
    assert_close(transform(model), expected)
    assert not optimizer._statistics.recorder._pending
    plain = Training(network(), AdaFisherW(network()))
    plain.optimizer = AdaFisherW(plain.model)
    for training in (plain, Training(model, optimizer)):
        loss_of(training.model).backward()
        training.optimizer.step()
    assert_same_training(plain, Training(model, optimizer), bitwise=True)


# --- E19: training in eval mode ---------------------------------------------------------------------------------------


def bert() -> nn.Module:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=30, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=3,
    )  # fmt: skip
    return BertForSequenceClassification(config)


def test_e19_eval_mode_changes_nothing_where_layers_compute_the_same(caplog: pytest.LogCaptureFixture) -> None:
    """E19: ``from_pretrained`` leaves a model in eval mode, and everything fell to gradient factors."""
    generator = torch.Generator().manual_seed(0)
    tokens, labels = torch.randint(0, 30, (4, 6), generator=generator), torch.tensor([0, 1, 2, 0])
    trainings = []
    for training in (True, False):
        model = bert().train(training)
        optimizer = AdaFisherW(model, lr=1e-3, update_interval=2)
        for _ in range(4):
            optimizer.zero_grad()
            model(input_ids=tokens, labels=labels).loss.backward()
            optimizer.step()
        assert optimizer.curvature_summary()["gradient_factor_share"] == 0.0
        trainings.append(Training(model, optimizer))
    assert_same_training(*trainings, bitwise=True)
    assert "recorded nothing" not in caplog.text


def test_e19_convolutions_hold_in_eval_mode_and_batch_norm_alone_does_not() -> None:
    """E19: a BatchNorm in eval mode normalises by running statistics, which its rule does not know."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.Conv2d(4, 3, 2)).eval()
    optimizer = AdaFisherW(model)
    model(torch.randn(3, 2, 6, 6)).square().mean().backward()
    optimizer.step()
    rules = {row.name: row.rule for row in optimizer.coverage()}
    assert [rules[f"{i}.weight"] for i in range(4)] == ["Conv", "gradient factors", "GroupNorm", "Conv"]


def test_e19_an_evaluation_records_nothing() -> None:
    """E19: neither under ``no_grad``, nor in inference mode, nor with a graph that has no backward."""

    def evaluate(model: nn.Module) -> None:
        model.eval()
        with torch.no_grad():
            model(batch()[0])
        with torch.inference_mode():
            model(batch()[0].detach())
        model(batch()[0])

    assert not recorded(network(), evaluate)


# --- E24: frozen layers -----------------------------------------------------------------------------------------------


def test_e24_frozen_layers_are_not_recorded_until_they_train() -> None:
    """E24: with ``params`` given, a frozen base was recorded at the cost of its training."""
    model = mlp(4, 5, 6, 2)
    for p in model[:4].parameters():
        p.requires_grad_(False)
    seen = []
    recorder = FactorRecorder(model, model.parameters())
    for tracked in recorder.tracked:
        rule_sums = tracked.rule.input_sums

        def counted(module: Any, *args: Any, name: str = tracked.name, sums: Any = rule_sums) -> Any:
            seen.append(name)
            return sums(module, *args)

        tracked.rule = type("Counting", (type(tracked.rule),), {"input_sums": staticmethod(counted)})()
    recorder.arm()
    x = torch.randn(3, 4, requires_grad=True)
    model(x).sum().backward()
    assert seen == ["4"] and [t.name for t in recorder.flush().factors] == ["4"]
    model[2].weight.requires_grad_(True)
    model(x).sum().backward()
    assert seen == ["4", "2", "4"] and [t.name for t in recorder.flush().factors] == ["2", "4"]


def test_e24_an_adapter_with_params_given_records_what_trains() -> None:
    """E24: all parameters given, the base frozen by PEFT."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(network(), LoraConfig(r=2, target_modules=["0", "2"]))
    optimizer = AdaFisherW(model, model.parameters())
    model(batch()[0]).square().mean().backward()
    assert {t.name.rsplit(".", 2)[-2] for t in optimizer._statistics.recorder._pending} == {"lora_A", "lora_B"}
    optimizer.step()


# --- E25: what an exception leaves behind -----------------------------------------------------------------------------


@pytest.mark.parametrize("fails", ["in the backward", "after it"])
def test_e25_a_failed_backward_and_model_zero_grad_leave_no_statistics(fails: str) -> None:
    """E25: without ``optimizer.zero_grad()`` the layers that came before the error counted twice."""
    trainings = []
    for broken in (False, True):
        model = network()
        optimizer = AdaFisherW(model, update_interval=1)
        for _ in range(3):
            if broken:
                hidden = model[1](model[0](torch.randn(7, 4, generator=torch.Generator().manual_seed(5))))
                if fails == "in the backward":
                    hidden.register_hook(lambda grad: 1 / 0)
                try:
                    model[2](hidden).square().sum().backward()
                except ZeroDivisionError:
                    pass
                else:
                    assert fails == "after it"
                model.zero_grad()
            loss_of(model).backward()
            optimizer.step()
            model.zero_grad()
        trainings.append(Training(model, optimizer))
    assert_same_training(*trainings, bitwise=True)


@pytest.mark.parametrize("reentrant", [True, False])
def test_e25_a_layer_recomputed_twice_in_one_backward_keeps_both_calls(reentrant: bool) -> None:
    """E25: a recomputation sees no ``.grad`` yet and must not be taken for a new start."""
    torch.manual_seed(0)
    layer, head = nn.Linear(4, 4).double(), nn.Linear(4, 2).double()
    model, x = nn.ModuleList([layer, head]), torch.randn(5, 4, dtype=torch.float64, requires_grad=True)

    def run(again: bool) -> Callable[[nn.Module], None]:
        def call(h: Tensor) -> Tensor:
            out = checkpoint(layer, h, use_reentrant=reentrant) if again else layer(h)
            assert isinstance(out, Tensor)
            return torch.tanh(out)

        return lambda model: head(call(call(x))).square().sum().backward()

    plain = recorded(model, run(False))
    model.zero_grad()
    assert_close(recorded(model, run(True)), plain)


def test_e25_micro_batches_still_add_up() -> None:
    """E25: gradients that are there keep the statistics that belong to them."""
    x = batch()[0].detach()
    model = network()
    whole = recorded(model, lambda model: model(x).square().sum().backward())
    model.zero_grad()

    def in_parts(model: nn.Module) -> None:
        model(x[:3]).square().sum().backward()
        model(x[3:]).square().sum().backward()

    assert_close(recorded(model, in_parts), whole)
