"""Full Kronecker factors against plain loops and AdaFisher's own diagonals, and their diagonal dominance."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from hf_adafisher import AdaFisherW
from hf_adafisher.experiments.figures.factors.full_factors import (
    collect_factors,
    energy_share,
    gershgorin_disks,
    independent_share,
    mean_correlation,
    measure_dominance,
    spectrum_of,
    with_noise,
)
from hf_adafisher.experiments.figures.factors.study import draw_factors, measure_layer, skipped_layers
from hf_adafisher.fisher.diagonals import INPUT, OUTPUT_GRAD
from tests.experiments.figures.factor_networks import Net, Tagger, loss_of, net_and_batch


def random_moment(seed: int, dimension: int = 6, positions: int = 40) -> Tensor:
    rows = torch.randn(positions, dimension, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    rows = rows @ torch.randn(dimension, dimension, generator=torch.Generator().manual_seed(seed + 1), dtype=rows.dtype)
    product = rows.t() @ rows / positions
    return (product + product.t()) / 2  # a product is symmetric only up to rounding


def test_disks_are_row_sums_without_the_diagonal() -> None:
    matrix = random_moment(0)
    centres, radii = gershgorin_disks(matrix)
    for i, row in enumerate(matrix.tolist()):
        assert centres[i].item() == row[i]
        assert radii[i].item() == pytest.approx(sum(abs(value) for j, value in enumerate(row) if j != i), rel=1e-12)


@given(st.integers(1, 8), st.integers(0, 2**31), st.sampled_from([1e-9, 1.0, 1e6]))
@settings(max_examples=40, deadline=None)
def test_every_eigenvalue_lies_in_the_union_of_the_disks(dimension: int, seed: int, size: float) -> None:
    """Gershgorin's theorem, for any symmetric matrix."""
    draws = torch.randn(dimension, dimension, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * size
    matrix = draws + draws.t()
    centres, radii = gershgorin_disks(matrix)
    for eigenvalue in np.linalg.eigvalsh(matrix.numpy()):
        assert ((eigenvalue - centres).abs() <= radii + 1e-12 * size * dimension).any()


def test_a_diagonal_matrix_is_all_diagonal() -> None:
    values = torch.tensor([3.0, 0.5, 2.0], dtype=torch.float64)
    found = measure_dominance(values.diag(), positions=10)
    assert (found.energy_share, found.dominant_rows, found.radius_ratio, found.zero_rows) == (1.0, 1.0, 0.0, 0)
    assert not gershgorin_disks(values.diag())[1].any()


@pytest.mark.parametrize("dimension", [1, 2, 7])
def test_equal_entries_have_one_in_d_on_the_diagonal(dimension: int) -> None:
    found = measure_dominance(torch.full((dimension, dimension), 0.3), positions=5)
    assert found.energy_share == pytest.approx(1 / dimension)
    assert found.radius_ratio == pytest.approx(dimension - 1)
    assert found.dominant_rows == (1.0 if dimension == 1 else 0.0)


def test_energy_share_is_a_ratio_of_squares() -> None:
    matrix = random_moment(3)
    on_it = sum(matrix[i, i].item() ** 2 for i in range(6))
    assert energy_share(matrix) == pytest.approx(on_it / sum(value**2 for value in matrix.flatten().tolist()))
    assert energy_share(matrix) == pytest.approx(energy_share(1e-7 * matrix))


def test_factors_that_are_diagonal_by_nature_are_like_the_whole_matrix() -> None:
    values = torch.tensor([0.5, 0.0, 0.25, 0.25])
    vector, matrix = measure_dominance(values, 8), measure_dominance(values.diag(), 8)
    assert vector.independent_share == 1.0 and matrix.independent_share < 1.0
    assert (vector.energy_share, vector.dominant_rows, vector.radius_ratio) == (1.0, 1.0, 0.0)
    assert vector.zero_rows == matrix.zero_rows == 1
    assert (matrix.energy_share, matrix.dominant_rows, matrix.radius_ratio) == (1.0, 1.0, 0.0)


def test_rows_of_zeros_take_no_part() -> None:
    live = torch.tensor([[2.0, 1.0, 0.5], [1.0, 1.0, 3.0], [0.5, 3.0, 9.0]])
    padded = torch.zeros(5, 5)
    padded[:3, :3] = live
    found, alone = measure_dominance(padded, 4), measure_dominance(live, 4)
    assert (found.dimension, found.zero_rows) == (5, 2)
    assert (found.dominant_rows, found.radius_ratio) == (alone.dominant_rows, alone.radius_ratio)
    assert found.dominant_rows == pytest.approx(2 / 3)
    assert found.radius_ratio == pytest.approx((1.5 / 2 + 4 / 1 + 3.5 / 9) / 3)


def test_correlations_are_numpys_and_free_of_scale() -> None:
    """Of rows that are centred, numpy's coefficients of correlation are the same."""
    rows = torch.randn(50, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64) @ random_moment(4, 5)
    rows -= rows.mean(0)
    moment = rows.t() @ rows / 50
    off = np.corrcoef(rows.numpy().T)[~np.eye(5, dtype=bool)]
    assert mean_correlation(moment) == pytest.approx(float(np.sqrt((off**2).mean())))
    scale = torch.tensor([1e-5, 1.0, 1e4, 3.0, 0.1], dtype=torch.float64)
    assert mean_correlation(scale[:, None] * moment * scale) == pytest.approx(mean_correlation(moment))
    assert mean_correlation(torch.nn.functional.pad(moment, (0, 1, 0, 1))) == pytest.approx(mean_correlation(moment))
    assert mean_correlation(torch.ones(3, 3)) == pytest.approx(1.0)
    assert mean_correlation(torch.tensor([2.0, 1.0])) == mean_correlation(torch.tensor([2.0, 1.0]).diag()) == 0.0
    assert math.isnan(mean_correlation(torch.ones(1, 1)))


def test_a_dead_layer_has_no_share() -> None:
    for moment in (torch.zeros(3, 3), torch.zeros(3)):
        found = measure_dominance(moment, 4)
        assert math.isnan(found.energy_share) and math.isnan(found.independent_share) and found.zero_rows == 3


def test_independent_coordinates_are_what_random_signs_leave() -> None:
    sizes, positions = torch.tensor([0.5, 1.0, 2.0, 1.5], dtype=torch.float64), 20
    signs = torch.randint(0, 2, (4000, positions, 4), generator=torch.Generator().manual_seed(0)) * 2 - 1
    rows = signs * sizes
    moments = rows.transpose(1, 2) @ rows / positions
    diagonal = moments[0].diagonal()
    torch.testing.assert_close(diagonal, sizes**2)
    total = moments.square().sum((1, 2)).mean()
    assert independent_share(diagonal, positions) == pytest.approx((diagonal.square().sum() / total).item(), rel=0.01)
    assert independent_share(diagonal, 10**9) == pytest.approx(1.0)


def test_noise_keeps_the_diagonal_and_the_symmetry() -> None:
    matrix = random_moment(5, dimension=150, positions=300)
    noisy, sigma = with_noise(matrix, 0.02)
    assert torch.equal(noisy.diagonal(), matrix.diagonal())
    assert torch.equal(noisy, noisy.t())
    assert sigma == pytest.approx(0.02 * matrix.diagonal().mean().item())
    added = (noisy - matrix)[torch.triu(torch.ones_like(matrix), 1).bool()]
    assert added.std().item() == pytest.approx(sigma, rel=0.03)
    assert abs(added.mean().item()) < 0.05 * sigma
    assert torch.equal(with_noise(matrix, 0.02)[0], noisy)
    torch.testing.assert_close(with_noise(1e-6 * matrix, 0.02)[0], 1e-6 * noisy)
    assert torch.equal(with_noise(matrix, 0.0)[0], matrix)


def test_spectra_are_numpys() -> None:
    matrix = random_moment(7, dimension=30, positions=20)
    spectrum = spectrum_of(matrix, 0.01)
    assert spectrum.noisy is not None
    noisy = with_noise(matrix, 0.01)[0]
    for found, of in ((spectrum.eigenvalues, matrix), (spectrum.noisy, noisy)):
        np.testing.assert_allclose(found, np.linalg.eigvalsh(of.numpy())[::-1], atol=1e-10)
    assert spectrum.diagonal.tolist() == sorted(matrix.diagonal().tolist(), reverse=True)
    moved = (spectrum.noisy - spectrum.eigenvalues).abs()
    assert 0.0 < moved.max().item() <= np.linalg.norm((noisy - matrix).numpy(), 2) * (1 + 1e-9)  # Weyl
    mean = np.trace(matrix.numpy()) / 30
    kept = int((np.linalg.eigvalsh(matrix.numpy()) > mean).sum())
    assert spectrum.kaiser == pytest.approx(mean)
    assert spectrum.above(spectrum.eigenvalues) == kept > 1
    assert spectrum.leading_shift == pytest.approx((moved[:kept] / spectrum.eigenvalues[:kept]).max().item())
    assert spectrum_of(matrix, 0.0).leading_shift == 0.0


def test_kaisers_line_is_one_for_a_correlation_matrix() -> None:
    matrix = random_moment(9)
    scale = matrix.diagonal().rsqrt()
    assert spectrum_of(scale[:, None] * matrix * scale, 0.0).kaiser == pytest.approx(1.0)


def test_a_factor_that_is_diagonal_by_nature_gets_no_noise() -> None:
    spectrum = spectrum_of(torch.tensor([0.25, 0.5, 0.0]), 0.5)
    assert spectrum.eigenvalues.tolist() == spectrum.diagonal.tolist() == [0.5, 0.25, 0.0]
    assert spectrum.noisy is None and spectrum.leading_shift == 0.0


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
    """Between backward and step: model, gradients, hooks and random numbers stay, and the step is that without it."""
    stepped = []
    for looking in (False, True):
        net, batch = net_and_batch()
        optimizer = AdaFisherW(net, update_interval=1)
        net.train()
        loss_of(net, batch).backward()
        hooks = {name: dict(module._forward_hooks) for name, module in net.named_modules()}
        kept = {name: value.clone() for name, value in net.state_dict().items()}
        grads = [p.grad.clone() for p in net.parameters() if p.grad is not None]
        random = torch.get_rng_state()
        if looking:
            collect_factors(net, in_two(batch), loss_of, max_dim=100)
        assert torch.equal(torch.get_rng_state(), random)
        assert all(torch.equal(value, kept[name]) for name, value in net.state_dict().items())
        assert all(torch.equal(p.grad, grad) for p, grad in zip(net.parameters(), grads, strict=True))
        assert all(module.training for module in net.modules())
        assert {name: dict(module._forward_hooks) for name, module in net.named_modules()} == hooks
        optimizer.step()
        stepped.append((net.state_dict(), optimizer.state_dict()["state"]))
    torch.testing.assert_close(*stepped, rtol=0, atol=0)


def test_an_embeddings_inputs_are_token_frequencies() -> None:
    torch.manual_seed(1)
    tagger = Tagger()
    batch = {"x": torch.tensor([[0, 1, 1, 6, 2], [2, 1, 0, 0, 4]]), "labels": torch.tensor([0, 1])}
    found = collect_factors(tagger, [batch], loss_of, max_dim=3)
    words = found["words"]
    torch.testing.assert_close(words.moments[INPUT], torch.tensor([3.0, 3, 2, 0, 1, 0, 1]) / 10)
    assert words.moments[OUTPUT_GRAD].shape == (3, 3) and words.layer.by_nature == {INPUT} and not words.layer.too_long
    assert not words.broadcast and found["positions"].broadcast
    row = measure_layer(found["positions"])
    assert row.note == "S of gradients summed over a batch, H diagonal by nature"
    assert row.dominance[INPUT].energy_share == 1.0 and row.dimensions == {INPUT: 5, OUTPUT_GRAD: 3}
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
    assert conv.layer.too_long == {INPUT} and conv.dominance().keys() == {OUTPUT_GRAD}
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
