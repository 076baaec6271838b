"""The recorder: what it counts, what it leaves alone, what it refuses to believe."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint
from transformers import OPTConfig, OPTForCausalLM

from hf_adafisher import AdaFisherW, LayerRule, register_layer
from hf_adafisher.fisher import FactorRecorder, find_rule
from hf_adafisher.fisher.diagonals import INPUT, OUTPUT_GRAD, KroneckerDiagonal
from hf_adafisher.fisher.layers import registry
from tests.cases import CASES, Case, mlp
from tests.model_zoo import FAMILIES, Family
from tests.reference import ReferenceAdaFisher
from tests.training_helper import hook_count


def record(model: nn.Module, loss: Any) -> dict[str, dict[str, Tensor]]:
    """The means of one step, by module name."""
    recorder = FactorRecorder(model, model.parameters())
    recorder.arm()
    loss().backward()
    sample = recorder.flush()
    recorder.close()
    return {tracked.name: factors for tracked, factors in sample.factors.items()}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_hooks_leave_gradients_bitwise_unchanged(case: Case) -> None:
    gradients = []
    for armed in (True, False):
        model = case.build()
        recorder = FactorRecorder(model, model.parameters())
        if armed:
            recorder.arm()
        case.loss(model, torch.Generator().manual_seed(0)).backward()
        assert bool(recorder.flush().factors) == armed or not recorder.tracked
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        recorder.close()
    assert gradients[0].keys() == gradients[1].keys() and gradients[0]
    assert_close(gradients[0], gradients[1], rtol=0, atol=0)


@pytest.mark.parametrize("record_", FAMILIES, ids=lambda family: family.name)
def test_hooks_leave_gradients_of_transformers_bitwise_unchanged(record_: Family) -> None:
    gradients = []
    for armed in (True, False):
        model = record_.build()
        recorder = FactorRecorder(model, model.parameters())
        if armed:
            recorder.arm()
        model(**record_.batch()).loss.backward()
        assert bool(recorder.flush().factors) == armed
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
        recorder.close()
    assert_close(gradients[0], gradients[1], rtol=0, atol=0)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_recomputed_forward_is_counted_once(reentrant: bool) -> None:
    torch.manual_seed(0)
    model, x = mlp(4, 5, 6, 2).double(), torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    plain = record(model, lambda: model(x).square().mean())
    again = record(model, lambda: model[4:](checkpoint(model[:4], x, use_reentrant=reentrant)).square().mean())
    assert plain.keys() == again.keys() == {"0", "2", "4"}
    assert_close(plain, again)


@pytest.mark.parametrize("bias", [True, False])
def test_an_in_place_consumer_does_not_lose_the_gradient(bias: bool) -> None:
    """A Linear with bias on 3-D input returns a view: after relu_ on it a hook on the view would never fire."""
    torch.manual_seed(0)
    layers = nn.Linear(4, 5, bias=bias), nn.Linear(5, 2)
    x = torch.randn(2, 3, 4)

    def loss(inplace: bool) -> Tensor:
        return layers[1](torch.nn.functional.relu(layers[0](x), inplace=inplace)).square().mean()

    model = nn.ModuleList(layers)
    assert_close(record(model, lambda: loss(True)), record(model, lambda: loss(False)))


def test_micro_batches_add_up_to_the_batch() -> None:
    torch.manual_seed(0)
    model, x = mlp(4, 5, 2).double(), torch.randn(6, 4, dtype=torch.float64)
    whole = record(model, lambda: model(x).square().sum())

    def in_parts() -> Tensor:
        model(x[:2]).square().sum().backward()
        return model(x[2:]).square().sum()

    assert_close(record(model, in_parts), whole)


def test_an_armed_recorder_has_one_hook_a_module_and_a_disarmed_one_none() -> None:
    model = mlp(4, 5, 2)
    recorder = FactorRecorder(model, model.parameters())
    for _ in range(2):
        recorder.arm()
    assert [len(m._forward_hooks) for m in (model[0], model[2])] == [1, 1]
    recorder.disarm()
    assert not any(m._forward_hooks for m in model.modules())
    recorder.close()
    with pytest.raises(RuntimeError, match="closed"):
        recorder.arm()


def test_only_due_steps_are_armed() -> None:
    model = mlp(4, 5, 2)
    optimizer = AdaFisherW(model, update_interval=3)
    armed = []
    for _ in range(7):
        armed.append(hook_count(model) > 0)
        model(torch.randn(3, 4)).sum().backward()
        optimizer.step()
    assert armed == [True, False, False, True, False, False, True]


def test_a_position_table_called_with_a_mask_is_not_believed_to_be_a_lookup(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """OPT's position table is an Embedding whose first argument is the attention mask: {0, 1}, not positions."""
    config = OPTConfig(
        vocab_size=50, hidden_size=16, ffn_dim=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=32, word_embed_proj_dim=16, dropout=0.0, pad_token_id=1, bos_token_id=2, eos_token_id=2,
    )  # fmt: skip
    model = OPTForCausalLM(config).train()
    optimizer = AdaFisherW(model, lr=0.0, damping=1e-3)
    tokens = torch.randint(3, 50, (2, 8))
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    table = model.model.decoder.embed_positions
    row = next(row for row in optimizer.coverage() if "embed_positions" in row.name)
    assert row.rule == "gradient factors"
    assert "embed_positions" in caplog.text and "recorded nothing" in caplog.text
    grad = table.weight.grad.double()
    rows, columns = grad.square().mean(1), grad.square().mean(0)
    expected = torch.outer(*((v - v.min()) / (v.max() - v.min()) for v in (rows, columns))) + 1e-3
    assert_close(optimizer.fisher_diagonal(table.weight), expected.float())


class ScaledHalf(nn.Linear):
    """A Linear by class that computes something else."""

    def forward(self, input: Tensor) -> Tensor:
        return torch.relu(super().forward(input)) * input.mean()


class MeanNorm(nn.Module):
    """Looks like an RMSNorm (one vector, an epsilon) but subtracts the mean, as Cohere's norm does."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = 1e-6

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.layer_norm(x, self.weight.shape, self.weight, eps=self.eps)


@pytest.mark.parametrize("layer", [ScaledHalf(4, 4), MeanNorm(4)], ids=lambda layer: type(layer).__name__)
def test_a_layer_that_computes_something_else_than_its_class_gets_gradient_factors(layer: nn.Module) -> None:
    assert find_rule(layer) is not None
    model = nn.Sequential(nn.Linear(4, 4), layer)
    optimizer = AdaFisherW(model)
    (model(torch.randn(5, 4)) + 2).square().sum().backward()
    optimizer.step()
    rules = {row.name: row.rule for row in optimizer.coverage()}
    assert rules["0.weight"] == "Linear" and rules["1.weight"] == "gradient factors"


class Doubling(nn.Module):
    """A layer that no built-in rule knows: y = 2 x W."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x @ self.table


class DoublingRule(LayerRule):
    name = "Doubling"

    def diagonals(self, module: nn.Module) -> dict[str, Any]:
        return {"table": KroneckerDiagonal((INPUT, OUTPUT_GRAD))}

    def factor_shapes(self, module: nn.Module) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (4,), (3,)

    def input_sums(self, module: nn.Module, inputs: Any, output: Tensor) -> tuple[Tensor, int]:
        return (2 * inputs[0]).square().sum(0), inputs[0].shape[0]

    def output_grad_sums(self, module: nn.Module, grad: Tensor) -> Tensor:
        return grad.square().sum(0)


def test_register_layer_brings_a_users_layer_under_its_own_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_RULES", dict(registry._RULES))
    register_layer(Doubling, DoublingRule())
    model = Doubling()
    optimizer = AdaFisherW(model)
    model(torch.randn(1, 4)).square().sum().backward()
    optimizer.step()
    assert optimizer.coverage()[0].rule == "Doubling"
    assert_close(optimizer.fisher_diagonal(model.table, normalized=False), model.table.grad.square())


def test_register_layer_refuses_what_is_not_a_layer_or_a_rule() -> None:
    wrong: Any = "Linear"
    with pytest.raises(TypeError, match=r"subclass of torch\.nn\.Module"):
        register_layer(wrong, DoublingRule())
    wrong = DoublingRule
    with pytest.raises(TypeError, match="instance of LayerRule"):
        register_layer(Doubling, wrong)


class Alternating(nn.Module):
    """Uses its first layer by calling it in odd forwards, and functionally in even ones (or the other way round)."""

    def __init__(self, call_first: bool) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(4, 3), nn.Linear(3, 2)
        self.call_next = call_first

    def forward(self, x: Tensor) -> Tensor:
        called, self.call_next = self.call_next, not self.call_next
        layer = self.layer
        hidden = layer(x) if called else torch.nn.functional.linear(x, layer.weight, layer.bias)
        return self.head(torch.tanh(hidden))


@pytest.mark.parametrize("call_first", [True, False])
def test_gradient_factors_are_never_averaged_with_a_modules_statistics(
    call_first: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """The two differ in scale: mixed, the diagonal would depend on the scale of the loss."""
    diagonals = []
    for scale in (1.0, 1e-3):
        torch.manual_seed(0)
        model = Alternating(call_first).double()
        optimizer = AdaFisherW(model, lr=0.0, update_interval=1)
        rules = []
        for _ in range(4):
            optimizer.zero_grad()
            (scale * model(torch.randn(64, 4, dtype=torch.float64)).square().sum()).backward()
            optimizer.step()
            rules.append(optimizer.coverage()[0].rule)
        diagonals.append(optimizer.fisher_diagonal(model.layer.weight))
        weight = optimizer.state[model.layer.weight]["factor_weight"]  # two statistics of the module, nothing else
        assert_close(weight, torch.tensor(1 - 0.8**2, dtype=weight.dtype))
        assert rules[1:] == ["Linear"] * 3 and rules[0] == ("Linear" if call_first else "gradient factors")
    assert_close(diagonals[0], diagonals[1])
    assert caplog.text.count("recorded nothing") == (0 if call_first else 2)


class ScaledEmbedding(nn.Embedding):
    """A subclass whose forward is its own, as Gemma's."""

    def forward(self, input: Tensor) -> Tensor:
        return 3 * super().forward(input)


def test_a_broken_or_empty_first_batch_does_not_switch_a_rule_off() -> None:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    model = nn.Sequential(ScaledEmbedding(7, 4), LlamaRMSNorm(4), nn.Linear(4, 2))
    optimizer = AdaFisherW(model)
    model(torch.zeros(0, 3, dtype=torch.long)).sum().backward()
    with torch.no_grad():
        model[0].weight[0] = float("nan")
    model(torch.zeros(2, 3, dtype=torch.long)).sum().backward()
    with torch.no_grad():
        model[0].weight[0] = 1.0
    optimizer.zero_grad()  # the loop skips the broken batch
    model(torch.arange(6).reshape(2, 3)).square().sum().backward()
    optimizer.step()
    assert [row.rule for row in optimizer.coverage()] == ["Embedding", "RMSNorm", "Linear", "Linear"]


class Positions(nn.Module):
    """Tokens plus positions, which are looked up once and added to every example, as in GPT-2."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(7, 4), nn.Embedding(9, 4)
        self.head = nn.Linear(4, 7)

    def forward(self, ids: Tensor) -> Tensor:
        positions = torch.arange(ids.shape[1]).unsqueeze(0)
        return self.head(torch.tanh(self.tokens(ids) + self.positions(positions)))


@pytest.mark.parametrize("splits", [[6], [2, 4], [1, 1, 1, 1, 1, 1]], ids=str)
def test_a_table_of_positions_does_not_depend_on_how_the_batch_is_split(splits: list[int]) -> None:
    """Its gradient is summed over the examples of a backward: the square of the sum over all of them counts."""
    torch.manual_seed(0)
    model = Positions().double()
    ids = torch.randint(0, 7, (6, 5), generator=torch.Generator().manual_seed(1))
    optimizer = AdaFisherW(model, lr=0.0)
    for part in ids.split(splits):
        (torch.nn.functional.cross_entropy(model(part).flatten(0, 1), part.flatten()) * len(part) / 6).backward()
    optimizer.step()
    grad = model.positions.weight.grad
    assert grad is not None and not grad[5:].any()
    frequency = torch.tensor([1 / 5] * 5 + [0.0] * 4, dtype=torch.float64)
    expected = torch.outer(frequency, grad.square().sum(0) / 5)
    assert_close(optimizer.fisher_diagonal(model.positions.weight, normalized=False), expected)
    assert {row.rule for row in optimizer.coverage()} == {"Embedding", "Linear"}


def test_tokens_that_happen_to_be_consecutive_are_counted_as_tokens() -> None:
    """A row of distinct tokens has the same squares either way; a short one is never taken for positions."""
    model = Positions().double()
    optimizer = AdaFisherW(model, lr=0.0)
    seen: list[Tensor] = []
    model.tokens.register_forward_hook(lambda module, args, output: output.register_hook(seen.append) and None)
    model(torch.tensor([[2, 3, 4, 5]])).square().sum().backward()
    optimizer.step()
    expected = torch.outer(torch.tensor([0, 0, 1, 1, 1, 1, 0]) / 4.0, seen[0][0].square().mean(0))
    assert_close(optimizer.fisher_diagonal(model.tokens.weight, normalized=False), expected, check_dtype=False)
    rule = find_rule(model.tokens)
    assert rule is not None and not rule.broadcasts_over_batch([torch.tensor([[3, 4, 5]])])
    assert not rule.broadcasts_over_batch([torch.tensor([[3, 4, 5, 7]])])
    assert not rule.broadcasts_over_batch([torch.tensor([[3, 4, 5, 6], [3, 4, 5, 6]])])
    assert rule.broadcasts_over_batch([torch.tensor([3, 4, 5, 6])])


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_broken_gradient_of_a_position_table_is_dropped_and_stays_due(broken: float) -> None:
    """What was recorded is finite, but the table takes its gradient's rows, as they are when `step` sees them."""
    torch.manual_seed(0)
    model = Positions()
    optimizer = AdaFisherW(model, update_interval=2)
    ids = torch.randint(0, 7, (6, 5), generator=torch.Generator().manual_seed(1))
    model(ids).square().mean().backward()
    assert model.positions.weight.grad is not None
    model.positions.weight.grad[1, 2] = broken
    optimizer.step()
    assert optimizer.param_groups[0]["dropped_refreshes"] == 1 and optimizer.refresh_due
    for state in optimizer.state.values():
        assert all(not value.any() for key, value in state.items() if key.startswith(("input", "output", "factor")))


class TiedPositions(Positions):
    """The table of positions is a layer's weight too, whose gradient is in the table's."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(4, 9, bias=False)
        self.mix.weight = self.positions.weight

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.tokens(ids) + self.positions(torch.arange(ids.shape[1]).unsqueeze(0))
        return self.head(torch.tanh(hidden)) + self.mix(hidden)[..., :7]


@pytest.mark.parametrize("build", [Positions, TiedPositions], ids=lambda build: build.__name__)
def test_a_tied_table_of_positions_keeps_its_uses_apart(build: type[Positions]) -> None:
    """The rows of a tied table's gradient are those of both uses, and tell neither's output gradients."""
    torch.manual_seed(0)
    model = build().double()
    slow = ReferenceAdaFisher(
        model, lr=0.0, beta=0.9, damping=0.1, ema_decay=0.8, update_interval=1, weight_decay=0.0, decoupled=True
    )
    optimizer = AdaFisherW(model, lr=0.0, damping=0.1)
    ids = torch.randint(0, 7, (6, 5), generator=torch.Generator().manual_seed(1))
    torch.nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten()).backward()
    optimizer.step()
    slow.step()
    slow.close()
    for p in model.parameters():
        for normalized in (True, False):
            found = optimizer.fisher_diagonal(p, normalized=normalized)
            assert_close(found, slow.fisher_diagonal(p, normalized=normalized))


class ColumnsFirst(nn.Linear):
    """Computes ``W x^T`` and returns the transpose: a view whose base has the same values in another order."""

    def forward(self, input: Tensor) -> Tensor:
        return (self.weight @ input.t() + self.bias[:, None]).t()


class RowsOfColumns(nn.Linear):
    """The other way round: the output is contiguous, and a view of a base that is not."""

    def forward(self, input: Tensor) -> Tensor:
        columns = torch.empty_strided((len(self.weight), len(input)), (1, len(self.weight)), dtype=input.dtype)
        base = columns.copy_(super().forward(input).t())
        return base.t()


@pytest.mark.parametrize("layer", [ColumnsFirst, RowsOfColumns], ids=lambda layer: layer.__name__)
def test_the_gradient_of_a_base_in_another_order_is_not_taken_for_the_outputs(layer: type[nn.Linear]) -> None:
    torch.manual_seed(0)
    plain, viewed, x = nn.Linear(4, 3).double(), layer(4, 3).double(), torch.randn(5, 4, dtype=torch.float64)
    viewed.load_state_dict(plain.state_dict())
    output = viewed(x)
    base = output._base
    assert base is not None and base.requires_grad and base.is_contiguous() != output.is_contiguous()
    noise = torch.randn(5, 3, dtype=torch.float64)
    expected = record(plain, lambda: (plain(x) * noise).sum())
    assert_close(record(viewed, lambda: (viewed(x) * noise).sum()), expected)


@pytest.mark.parametrize("axes", [2, 3])
@pytest.mark.parametrize("hook", ["replaces", "changes_in_place"])
@pytest.mark.parametrize("first", [True, False])
def test_other_hooks_that_change_the_output_do_not_change_what_the_layer_computed(
    first: bool, hook: str, axes: int
) -> None:
    """The layer returns W x; a hook makes x / 2 of it, before or after the optimizer is built. S is that of W x."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    def change(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output / 2 if hook == "replaces" else output.div_(2)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), LlamaRMSNorm(4))
    x = torch.randn(*(5, 3)[: axes - 1], 4)
    expected = record(model, lambda: (model[2](torch.tanh(model[0](x) / 2)) / 2).pow(3).sum())
    assert expected.keys() == {"0", "2"}
    recorder = FactorRecorder(model, model.parameters())
    if not first:
        recorder.arm()
    handles = [model[i].register_forward_hook(change) for i in (0, 2)]
    recorder.arm()
    model(x).pow(3).sum().backward()
    assert_close({t.name: factors for t, factors in recorder.flush().factors.items()}, expected)
    assert {t.name: t.matches_rule for t in recorder.tracked} == {"0": True, "2": True}
    for handle in handles:
        handle.remove()


def test_a_second_backward_through_one_graph_counts_its_positions_again() -> None:
    """As it adds its gradients again; the mean is over both."""
    torch.manual_seed(0)
    model, x = mlp(4, 5, 2).double(), torch.randn(6, 4, dtype=torch.float64)

    def twice(again: bool) -> Tensor:
        first = model(x)
        second = first if again else model(x)
        first.square().sum().backward(retain_graph=True)
        return 3 * second.square().sum()

    assert_close(record(model, lambda: twice(True)), record(model, lambda: twice(False)))


def test_an_output_that_is_a_permuted_view_is_not_mistaken_for_its_base() -> None:
    """A channels-first norm permutes: with as many rows as channels only the order of the values tells them apart."""

    class ChannelsFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.rand(4, dtype=torch.float64)), 1e-6

        def forward(self, x: Tensor) -> Tensor:
            return torch.nn.functional.rms_norm(x.permute(0, 2, 1), (4,), self.weight, self.eps).permute(0, 2, 1)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), ChannelsFirst()).double()
    optimizer = AdaFisherW(model, lr=0.0)
    x = torch.randn(3, 4, 4, dtype=torch.float64)
    (model(x) * torch.randn(4, dtype=torch.float64)).pow(2).sum().backward()
    optimizer.step()
    rules = {row.name: row.rule for row in optimizer.coverage()}
    assert rules == {"0.weight": "Linear", "0.bias": "Linear", "1.weight": "gradient factors"}
