"""Full Kronecker factors of a model: against plain loops, AdaFisher's own diagonals, and without a trace."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from hf_adafisher import AdaFisherW
from hf_adafisher.experiments.figures.dominance_study import draw_factors, measure_layer, skipped_layers
from hf_adafisher.experiments.figures.full_factors import collect_factors
from hf_adafisher.fisher.diagonals import INPUT, OUTPUT_GRAD
from tests.experiments.figures.factor_networks import Net, Tagger, loss_of, net_and_batch


def in_two(batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    return [{key: value[:5] for key, value in batch.items()}, {key: value[5:] for key, value in batch.items()}]


def slow_moment(rows: list[list[float]]) -> Tensor:
    """``mean r r^T``, entry by entry."""
    size = len(rows[0])
    entries = [[sum(row[i] * row[j] for row in rows) / len(rows) for j in range(size)] for i in range(size)]
    return torch.tensor(entries, dtype=torch.float64)


def slow_factors(net: Net, batch: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """H and S of every layer from its inputs and autograd's gradients, position by position."""
    net = copy.deepcopy(net).eval()
    calls: dict[str, tuple[Tensor, Tensor]] = {}
    for name in ("conv", "tokens", "head"):
        net.get_submodule(name).register_forward_hook(lambda _, x, y, name=name: calls.update({name: (x[0], y)}))
    loss = loss_of(net, batch)
    grads = dict(zip(calls, torch.autograd.grad(loss, [y for _, y in calls.values()]), strict=True))
    x = nn.functional.pad(calls["conv"][0], (1, 1, 1, 1))
    patches = [
        [x[n, c, 2 * p + a, 2 * q + b].item() for c in range(2) for a in range(3) for b in range(3)]
        for n, p, q in np.ndindex(8, 2, 2)
    ]
    rows = {"conv": (patches, [grads["conv"][n, :, p, q].tolist() for n, p, q in np.ndindex(8, 2, 2)])}
    for name in ("tokens", "head"):
        inputs, gradients = calls[name][0], grads[name]
        rows[name] = (inputs.flatten(0, -2).tolist(), gradients.flatten(0, -2).tolist())
    return {name: (slow_moment(inputs), slow_moment(gradients)) for name, (inputs, gradients) in rows.items()}


@pytest.mark.parametrize("split", [False, True])
def test_factors_are_those_of_plain_loops(split: bool) -> None:
    net, batch = net_and_batch()
    found = collect_factors(net, in_two(batch) if split else [batch], loss_of, max_dim=18)
    expected = slow_factors(net, batch)
    assert found.keys() == expected.keys()
    for name, (h, s) in expected.items():
        torch.testing.assert_close(found[name].moments[INPUT], h)
        torch.testing.assert_close(found[name].moments[OUTPUT_GRAD], s)
    assert [found[name].positions for name in ("conv", "tokens", "head")] == [32, 32, 8]


def test_diagonals_are_what_adafisher_records() -> None:
    net, batch = net_and_batch()
    found = collect_factors(net, [batch], loss_of, max_dim=100)
    for module in net.modules():
        module.training = isinstance(module, nn.Conv2d | nn.Linear)  # without dropout and batch statistics
    optimizer = AdaFisherW(net, update_interval=1)
    loss_of(net, batch).backward()
    optimizer.step()
    for name in ("conv", "tokens", "head"):
        state = optimizer.state[net.get_submodule(name).weight]
        for side in (INPUT, OUTPUT_GRAD):
            recorded = state[side].flatten() / state["factor_weight"].item()
            torch.testing.assert_close(found[name].moments[side].diagonal(), recorded)


def test_looking_leaves_no_trace() -> None:
    net, batch = net_and_batch()
    optimizer = AdaFisherW(net, update_interval=1)
    net.train()
    loss_of(net, batch).backward()
    recorder = optimizer._statistics.recorder
    pending = {t.name: pair.output_grad_factor.clone() for t, pair in recorder._pending.items()}
    hooks = {name: dict(module._forward_hooks) for name, module in net.named_modules()}
    kept = {name: value.clone() for name, value in net.state_dict().items()}
    grads = [p.grad.clone() for p in net.parameters() if p.grad is not None]
    random = torch.get_rng_state()
    collect_factors(net, in_two(batch), loss_of, max_dim=100)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, kept[name]) for name, value in net.state_dict().items())
    assert all(torch.equal(p.grad, grad) for p, grad in zip(net.parameters(), grads, strict=True))
    assert all(module.training for module in net.modules())
    assert {name: dict(module._forward_hooks) for name, module in net.named_modules()} == hooks
    after = {t.name: pair.output_grad_factor for t, pair in recorder._pending.items()}
    assert after.keys() == pending.keys() and all(torch.equal(after[name], pending[name]) for name in pending)


def test_an_embeddings_inputs_are_token_frequencies() -> None:
    torch.manual_seed(1)
    tagger = Tagger()
    batch = {"x": torch.tensor([[0, 1, 1, 6, 2], [2, 1, 0, 0, 4]]), "labels": torch.tensor([0, 1])}
    found = collect_factors(tagger, [batch], loss_of, max_dim=3)
    words = found["words"]
    torch.testing.assert_close(words.moments[INPUT], torch.tensor([3.0, 3, 2, 0, 1, 0, 1]) / 10)
    assert words.moments[OUTPUT_GRAD].shape == (3, 3) and words.layer.by_nature == {INPUT} and not words.layer.cut
    assert not words.broadcast and found["positions"].broadcast
    row = measure_layer(found["positions"])
    assert row.note == "S of gradients summed over a batch, H diagonal by nature"
    assert row.measures[INPUT].energy_share == 1.0 and row.dimensions == {INPUT: 5, OUTPUT_GRAD: 3}
    skipped = skipped_layers(tagger, found)
    assert skipped.keys() == {"unused", "grouped"} and "grouped" in skipped["grouped"]


def test_a_language_model_with_a_tied_head() -> None:
    """Embedding and head share a weight but are two layers with factors of their own."""
    torch.manual_seed(2)
    config = GPT2Config(vocab_size=23, n_positions=6, n_layer=1, n_embd=8, n_head=2, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config)
    ids = torch.randint(0, 23, (3, 6))
    batch = {"input_ids": ids, "labels": ids}
    found = collect_factors(model, [batch], lambda model, batch: model(**batch).loss, max_dim=22)
    assert model.lm_head.weight is model.transformer.wte.weight
    torch.testing.assert_close(
        found["transformer.wte"].moments[INPUT], torch.bincount(ids.flatten(), minlength=23) / 18
    )
    notes = {name: measure_layer(factors).note for name, factors in found.items()}
    assert notes["lm_head"] == "S too long" and notes["transformer.wte"] == "H diagonal by nature"
    assert notes["transformer.wpe"].startswith("S of gradients summed over a batch")
    assert notes["transformer.h.0.mlp.c_proj"] == "H too long" and notes["transformer.h.0.attn.c_proj"] == ""
    logits = model.eval()(input_ids=ids).logits.detach()
    gradients = torch.softmax(logits, -1) - torch.nn.functional.one_hot(ids.roll(-1, 1), 23)
    gradients[:, -1] = 0.0  # nothing follows the last token
    torch.testing.assert_close(found["lm_head"].moments[OUTPUT_GRAD], (gradients / 15).square().mean((0, 1)))


def test_only_one_layer_on_request() -> None:
    net, batch = net_and_batch()
    alone = collect_factors(net, [batch], loss_of, max_dim=100, only="tokens")
    assert alone.keys() == {"tokens"}
    torch.testing.assert_close(alone["tokens"].moments[INPUT], slow_factors(net, batch)["tokens"][0])


def test_factors_that_are_too_long_keep_their_diagonal_alone() -> None:
    net, batch = net_and_batch()
    conv = collect_factors(net, [batch], loss_of, max_dim=17)["conv"]
    assert conv.layer.cut == {INPUT} and conv.measured().keys() == {OUTPUT_GRAD}
    torch.testing.assert_close(conv.moments[INPUT].flatten(), slow_factors(net, batch)["conv"][0].diagonal())
    assert measure_layer(conv).note == "H too long"
    assert [factor.side for factor in draw_factors(1, conv, 0.1)] == [OUTPUT_GRAD]


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_training_that_has_diverged_is_named(broken: float) -> None:
    net, batch = net_and_batch()
    with torch.no_grad():
        net.head.weight.fill_(broken)
    with pytest.raises(ValueError, match="the loss is nan: the training has diverged"):
        collect_factors(net, [batch], loss_of, max_dim=100)


def test_gradients_that_are_not_finite_are_named() -> None:
    net, batch = net_and_batch()

    def steep(model: nn.Module, batch: dict[str, Any]) -> Tensor:
        return (model(batch["x"]) * 0.0).abs().sqrt().sum()  # 0 with an infinite slope

    with pytest.raises(ValueError, match="factors of layer 'conv' are not finite"):
        collect_factors(net, [batch], steep, max_dim=100)
