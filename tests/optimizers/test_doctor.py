"""`optimizer.diagnose()`: every ailment is made once and named in a sentence, and healthy runs have none."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_adafisher import AdaFisherW, SpectralAdaFisher
from hf_adafisher.optimizers.diagnostics.diagnosis import Diagnosis
from hf_adafisher.optimizers.diagnostics.doctor import AILMENTS
from hf_adafisher.optimizers.update import LEAST_RMS
from tests.model_zoo import Family, family
from tests.training_helper import built, of_family, train

RECORD = family("gpt2")
FORMS = ("paper", "root", "spectral")


def of_run(
    form: str,
    steps: int = 3,
    source: str = "",
    clip: float | None = None,
    skipped: int = 0,
    record: Family = RECORD,
    **options: Any,
) -> Diagnosis:
    """The diagnosis of a small model after a few steps of a loop that clips, or not (0), or does not say so (None)."""
    model, norms = record.build(), []
    model.name_or_path = source
    optimizer = built(form, model, **options)
    for step in range(steps):
        optimizer.zero_grad()
        of_family(record)(model, step).backward()
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), clip or math.inf).item())
        optimizer.step()
    return optimizer.diagnose(grad_norms=norms if clip is not None else (), max_grad_norm=clip, skipped_steps=skipped)


def ailments(diagnosis: Diagnosis) -> list[str]:
    return [finding.ailment for finding in diagnosis.findings]


@pytest.mark.parametrize("form", FORMS)
def test_a_healthy_run_has_no_finding_but_numbers(form: str) -> None:
    diagnosis = of_run(form, clip=1.0)
    assert diagnosis.healthy and diagnosis.steps == 3
    text = str(diagnosis)
    assert "after 3 steps: nothing was found." in text
    for shown in ("gradient norm: median 1.", "share of clipped steps: 1", "step relative to weights: smallest 0.0"):
        assert shown in text
    assert json.loads(json.dumps(diagnosis.as_dict(), allow_nan=False))["findings"] == []


@pytest.mark.parametrize("form", FORMS)
def test_what_a_loop_does_not_pass_on_is_not_known(form: str) -> None:
    diagnosis = of_run(form)
    assert diagnosis.healthy
    assert diagnosis.numbers["gradient_norm"] is None and "gradient norm: not known" in str(diagnosis)


@pytest.mark.parametrize("form", FORMS)
def test_the_steps_are_those_that_the_weights_made(form: str) -> None:
    model = RECORD.build()
    optimizer = built(form, model, lr=0.01)
    train(model, of_family(RECORD), optimizer, 2)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(model, of_family(RECORD), optimizer, 1, start=2)
    made = {}
    for name, p in model.named_parameters():
        if p.dim() > 1:
            norm = max(p.norm().item(), LEAST_RMS * math.sqrt(p.numel()))
            made[name] = (p.detach() - before[name]).norm().item() / norm
    smallest, largest = min(made, key=made.__getitem__), max(made, key=made.__getitem__)
    steps = optimizer.diagnose().numbers["step_relative_to_weights"]
    assert steps["largest"] == pytest.approx(made[largest], rel=1e-3)
    assert steps["smallest"] == pytest.approx(made[smallest], rel=1e-3)
    assert made[steps["largest_in"]] == pytest.approx(made[largest], rel=1e-3)
    assert steps["median"] == pytest.approx(torch.tensor(list(made.values())).quantile(0.5).item(), rel=1e-3)


@pytest.mark.parametrize(
    ("form", "rate", "source", "said"),
    [
        ("root", 5e-5, "", r"0.0125 times the usual 0.004 \(from scratch\)"),
        ("root", 0.004, "gpt2", r"80 times the usual 5e-05 \(for fine-tuning\): these weights are pretrained \(gpt2\)"),
        ("spectral", 2e-5, "", r"0.002 times the usual 0.01 \(from scratch\)"),
        ("spectral", 0.02, "gpt2", r"133 times the usual 0.00015 \(for fine-tuning\)"),
        ("paper", 2e-5, "", r"0.02 times the usual 0.001 \(the damping\)"),
        ("paper", 0.1, "", "100 times the usual 0.001"),
        ("root", 2e-7, "gpt2", r"0.004 times the usual 5e-05 \(for fine-tuning\)"),
    ],
)
def test_a_learning_rate_of_another_order(form: str, rate: float, source: str, said: str) -> None:
    finding = next(one for one in of_run(form, lr=rate, source=source).findings if one.ailment == "learning-rate")
    assert finding.argument == "learning_rate" and "Set learning_rate" in finding.sentence
    with pytest.raises(AssertionError, match=said):
        raise AssertionError(finding.sentence)


@pytest.mark.parametrize(("form", "rate"), [("root", 5e-5), ("root", 0.004), ("spectral", 1.5e-4), ("spectral", 0.02)])
def test_a_model_that_does_not_say_where_its_weights_come_from_may_have_either_rate(form: str, rate: float) -> None:
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
    optimizer = built(form, model, lr=rate)
    model(torch.randn(6, 5)).square().mean().backward()
    optimizer.step()
    assert optimizer.diagnose().healthy


def test_training_on_preferences_takes_rates_far_below_those_of_fine_tuning() -> None:
    assert of_run("root", lr=5e-7, source="gpt2").healthy


def test_the_rate_is_that_of_the_schedule_at_its_full_height() -> None:
    model = RECORD.build()
    optimizer = built("root", model, lr=0.004)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1e-4)
    train(model, of_family(RECORD), optimizer, 1)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(4e-7)
    assert optimizer.diagnose().healthy


def test_usual_rates_of_the_papers_form_go_with_the_damping() -> None:
    """The presets of convolutional networks have 0.3 for both."""
    assert "learning-rate" not in ailments(of_run("paper", lr=0.3, damping=0.3))
    assert "learning-rate" in ailments(of_run("paper", lr=0.001, damping=0.3))


def test_clipping_that_rescales_every_step() -> None:
    (finding,) = of_run("paper", clip=0.125).findings
    assert finding.ailment == "clipping" and finding.argument == "max_grad_norm"
    norms = finding.numbers["grad_norms"]
    assert len(norms) == 3 and min(norms) > 1.0  # those before clipping
    factor = sorted(norms)[1] / 0.125
    assert finding.numbers["factor"] == pytest.approx(factor)
    assert f"Clipping rescales every step by {1 / factor:.3g}: all 3 gradients are longer" in finding.sentence
    assert (
        f"the learning rate is in effect {0.001 / factor:.3g}. If training is slow, raise max_grad_norm"
        in finding.sentence
    )


@pytest.mark.parametrize("form", ["root", "spectral"])
def test_rules_that_do_not_see_the_length_of_gradients_may_be_clipped_in_every_step_or_never(form: str) -> None:
    for clip in (0.125, 0.0):
        diagnosis = of_run(form, clip=clip)
        assert diagnosis.healthy and diagnosis.numbers["gradient_norm"]["median"] > 1.0


def test_gradients_that_are_not_clipped() -> None:
    (finding,) = of_run("paper", clip=0.0).findings
    assert finding.ailment == "unclipped" and finding.argument == "max_grad_norm"
    assert f"their median norm is {finding.numbers['median_norm']:.3g}" in finding.sentence
    assert "Set max_grad_norm=1.0" in finding.sentence


@pytest.mark.parametrize(
    ("norms", "most"), [([0.9, 8.0, 12.0], 1.0), ([1.5, 2.0], 1.0), ([0.9], 0.0), ([math.inf, math.nan], 1.0)]
)
def test_norms_that_are_no_finding(norms: list[float], most: float) -> None:
    """Some steps are not clipped; all are, but little; short gradients; nothing is known."""
    model = RECORD.build()
    optimizer = built("paper", model)
    train(model, of_family(RECORD), optimizer, 1)
    assert optimizer.diagnose(grad_norms=norms, max_grad_norm=most).healthy


def test_damping_that_dominates() -> None:
    diagnosis = of_run("paper", damping=0.9, lr=0.9)
    finding = next(one for one in diagnosis.findings if one.ailment == "damping")
    assert finding.argument == "damping" and "Lower damping, and learning_rate with it" in finding.sentence
    layers = finding.numbers["layers"]
    assert all("transformer.h." in name for name in layers)  # neither the tables nor vectors
    assert diagnosis.numbers["floor_share_of_matrices"] == finding.numbers["floor_share"] > 0.9
    assert f"Damping dominates {len(layers)} of " in finding.sentence


def test_the_share_at_the_floor_is_that_of_the_dense_diagonals() -> None:
    model = RECORD.build()
    optimizer = built("paper", model)
    train(model, of_family(RECORD), optimizer, 1)
    dense = [
        optimizer.fisher_diagonal(p) < 2e-3
        for name, p in model.named_parameters()
        if "transformer.h." in name and p.dim() == 2
    ]
    expected = sum(mask.sum().item() for mask in dense) / sum(mask.numel() for mask in dense)
    assert 0.0 < expected < 1.0
    assert optimizer.diagnose().numbers["floor_share_of_matrices"] == pytest.approx(expected, abs=1e-6)


class Gate(nn.Module):
    """A class that no rule knows."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(width, width) / width)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.matrix


class Unreached(nn.Module):
    """A gate, and a linear layer whose weight is used without calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 16)
        self.gate = Gate(16)
        self.lent = nn.Linear(16, 8, bias=False)
        self.last = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.gate(self.first(x))) @ self.lent.weight.T)


@pytest.mark.parametrize("step_size", ["paper", "root"])
def test_parameters_on_gradient_factors_and_why(step_size: str) -> None:
    torch.manual_seed(0)
    model = Unreached()
    optimizer = AdaFisherW(model, step_size=step_size)
    model(torch.randn(6, 5)).square().mean().backward()
    optimizer.step()
    diagnosis = optimizer.diagnose()
    if step_size == "root":
        assert diagnosis.healthy
        return
    (finding,) = diagnosis.findings
    assert finding.ailment == "gradient-factors" and finding.argument == "register_layer"
    assert "no layer rule knows their class (Gate)" in finding.sentence
    assert "the layers of lent.weight recorded nothing" in finding.sentence
    assert "call register_layer(Gate, rule) and call these layers as modules" in finding.sentence
    assert finding.numbers["share"] == pytest.approx((256 + 128) / sum(p.numel() for p in model.parameters()))


def test_a_few_parameters_without_a_rule_are_no_finding() -> None:
    """The class token and the positions of a ViT."""
    diagnosis = of_run("paper", steps=1, clip=1.0, record=family("vit"))
    assert 0.0 < diagnosis.numbers["share_on_gradient_factors"] < 0.05
    assert diagnosis.healthy


def spectral_diagnosis(*layers: nn.Module, **options: Any) -> Diagnosis:
    torch.manual_seed(0)
    model = nn.Sequential(*layers)
    optimizer = SpectralAdaFisher(model, **options)
    model(torch.randn(6, 5)).square().mean().backward()
    optimizer.step()
    return optimizer.diagnose()


def test_a_layer_that_was_taken_for_the_head() -> None:
    layers = nn.Linear(5, 16), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 16)
    (finding,) = spectral_diagnosis(*layers).findings
    assert finding.ailment == "head" and finding.argument == "spectral_heads"
    assert "3.weight was taken for the output layer" in finding.sentence
    assert "its 16 outputs fit the input of 1.weight" in finding.sentence
    assert spectral_diagnosis(*layers, spectral_heads=True).healthy
    assert spectral_diagnosis(*layers[:3], nn.Linear(8, 3)).healthy
    text = str(spectral_diagnosis(*layers[:3], nn.Linear(8, 3)))
    assert "taken for: head 3.weight" in text


def test_a_model_that_names_its_head_is_believed() -> None:
    """The head of this GPT-2 has as many outputs as the first layers of its blocks have inputs."""
    record = family("llama")
    model = record.build()
    model.resize_token_embeddings(32)
    optimizer = SpectralAdaFisher(model)
    ids = torch.randint(0, 32, (2, 6))
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    assert optimizer.diagnose().healthy


def test_steps_that_replace_the_weights() -> None:
    diagnosis = of_run("paper", lr=0.02, damping=1e-3)
    finding = next(one for one in diagnosis.findings if one.ailment == "large-steps")
    assert finding.argument == "learning_rate" and "of their weights in one step" in finding.sentence
    assert "or take step_size='root', which bounds each step" in finding.sentence
    assert finding.numbers["largest"] == diagnosis.numbers["step_relative_to_weights"]["largest"] > 0.5
    assert all(value > 0.5 for value in finding.numbers["layers"].values())


@pytest.mark.parametrize(("form", "rate"), [("root", 9e-4), ("spectral", 2.8e-3)])
def test_steps_that_are_usual_from_scratch_spoil_pretrained_weights(form: str, rate: float) -> None:
    assert of_run(form, lr=rate).healthy
    (finding,) = of_run(form, lr=rate, source="gpt2").findings
    assert finding.ailment == "large-steps" and "% of the pretrained weights (gpt2) in one step" in finding.sentence
    assert 0.03 < finding.numbers["largest"] < 0.051 and finding.sentence.endswith("lower learning_rate.")


def test_steps_that_change_nothing() -> None:
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
    optimizer = AdaFisherW(model)
    (model(torch.randn(6, 5)).square().mean() * 1e-6).backward()
    optimizer.step()
    (finding,) = optimizer.diagnose().findings
    assert finding.ailment == "small-steps" and finding.argument == "learning_rate"
    assert "No layer moves by more than" in finding.sentence


def test_steps_that_the_scaler_skipped() -> None:
    (finding,) = of_run("root", steps=3, skipped=4).findings
    assert finding.ailment == "skipped-steps" and finding.argument == "fp16"
    assert "skipped 4 of 7 steps" in finding.sentence and "Set bf16=True" in finding.sentence
    assert of_run("root", steps=3, skipped=1).healthy
    (finding,) = of_run("root", steps=0, skipped=2).findings
    assert "skipped 2 of 2 steps" in finding.sentence


@pytest.mark.parametrize("form", FORMS)
def test_a_run_that_has_diverged(form: str) -> None:
    model = RECORD.build()
    optimizer = built(form, model)
    train(model, of_family(RECORD), optimizer, 1)
    model.transformer.h[0].mlp.c_fc.weight.grad.fill_(math.nan)  # type: ignore[union-attr, index]
    optimizer.step()
    diagnosis = optimizer.diagnose()
    assert ailments(diagnosis) == ["not-finite"]
    assert diagnosis.findings[0].numbers["parameters"] == ["transformer.h.0.mlp.c_fc.weight"]
    json.dumps(diagnosis.as_dict(), allow_nan=False)


@pytest.mark.parametrize("form", FORMS)
def test_before_the_first_step_there_is_nothing_to_diagnose(form: str) -> None:
    with pytest.raises(RuntimeError, match=r"nothing to diagnose before the first step: call diagnose\(\) after"):
        built(form, RECORD.build()).diagnose()


@pytest.mark.parametrize("form", FORMS)
def test_a_diagnosis_changes_nothing(form: str) -> None:
    ends = []
    for asks in (False, True):
        model = RECORD.build()
        optimizer = built(form, model)
        for step in range(3):
            train(model, of_family(RECORD), optimizer, 1, start=step)
            if asks:
                optimizer.diagnose()
        ends.append(model.state_dict())
    for name, value in ends[0].items():
        assert torch.equal(value, ends[1][name])


def test_each_ailment_has_a_test() -> None:
    text = Path(__file__).read_text(encoding="utf-8")
    assert all(f'"{name}"' in text for name in AILMENTS)
