"""The optimizers that come from libraries: their groups, their steps, what they refuse, what they keep."""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import math
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import accelerate.state
import pytest
import pytorch_optimizer
import torch
import transformers
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D
from transformers.trainer_utils import set_seed

import hf_adafisher.optimizers.factory.create as factory
from hf_adafisher import available_optimizers, create_optimizer, optimizer_state_bytes
from hf_adafisher.optimizers.baselines.library_fixes import Muon
from hf_adafisher.optimizers.factory.catalog import optimizer_record
from hf_adafisher.optimizers.factory.param_groups import hidden_matrices
from hf_adafisher.optimizers.factory.records import RECORDS
from tests.cases import mlp
from tests.model_zoo import family
from tests.training_helper import of_family, train

ROOT = Path(__file__).parents[3]
NAMES = available_optimizers()
GPT2_BATCH = of_family(family("gpt2"), seed=0)
FROM_LIBRARIES = [name for name in NAMES if optimizer_record(name).library.startswith(("pytorch-opt", "schedulefree"))]


def names_in(model: nn.Module, groups: list[dict[str, Any]]) -> set[str]:
    ids = {id(p) for group in groups for p in group["params"]}
    return {name for name, p in model.named_parameters() if id(p) in ids}


# --- the extra ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FROM_LIBRARIES)
def test_without_its_library_the_message_holds_the_command(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("pytorch_optimizer", "schedulefree"):
        monkeypatch.setitem(sys.modules, module, None)
    for module in [key for key in sys.modules if key.startswith("hf_adafisher.optimizers.baselines.")]:
        monkeypatch.delitem(sys.modules, module)  # whatever an earlier test has imported
    with pytest.raises(ImportError, match=rf'{name}.*not installed: pip install "hf_adafisher\[baselines\]"'):
        create_optimizer(name, mlp(3, 2))
    assert name in available_optimizers()


@pytest.mark.subprocess
def test_the_libraries_are_imported_when_they_are_asked_for() -> None:
    code = "import sys, hf_adafisher as h; h.available_optimizers(); print([m in sys.modules for m in sys.argv[1:]])"
    modules = ("pytorch_optimizer", "schedulefree", "transformers")
    done = subprocess.run(
        [sys.executable, "-c", code, *modules], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.strip() == "[False, False, False]"


def test_records_name_the_versions_that_everything_was_tested_with() -> None:
    pinned = dict(re.findall(r"^([\w.-]+)==([\w.]+)", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE))
    pinned = {name.replace("_", "-").lower(): version for name, version in pinned.items()}
    for name in NAMES:
        library, _, version = optimizer_record(name).library.rpartition(" ")
        assert library == "this" or pinned[library] == version


# --- options --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_every_option_of_the_list_can_be_given(name: str) -> None:
    record = optimizer_record(name)
    parameters = inspect.signature(record.cls.__init__).parameters
    assert not {"kwargs", "self", "params", "model", "lr", "weight_decay"} & set(record.options())
    for option in record.options():
        value = record.defaults[option].value if option in record.defaults else parameters[option].default
        create_optimizer(name, mlp(3, 2), lr=0.1, **{option: value})
    with pytest.raises(ValueError, match=rf"{name} has no option 'no_such_option'.*its options: lr, weight_decay, "):
        create_optimizer(name, mlp(3, 2), no_such_option=1)


def test_options_and_defaults_reach_the_groups() -> None:
    model = family("gpt2").build()
    for name, options in (
        ("lamb", {"betas": (0.8, 0.9), "eps": 1e-3}),
        ("lars", {"momentum": 0.5, "trust_coefficient": 0.1}),
        ("muon", {"momentum": 0.5, "ns_steps": 3}),
        ("shampoo", {"matrix_eps": 0.5, "max_side": 64}),
        ("soap", {"precondition_frequency": 7}),
        ("adahessian", {"hessian_power": 0.5}),
        ("schedule_free_adamw", {"warmup_steps": 4}),
    ):
        first = create_optimizer(name, model, **options).param_groups[0]
        assert {key: first[key] for key in options} == options
        assert first["lr"] == optimizer_record(name).learning_rate.value
    assert create_optimizer("lamb", model).param_groups[0]["adam_debias"] is True
    assert create_optimizer("lamb", model).param_groups[0]["weight_decouple"] is False
    assert create_optimizer("adahessian", model).param_groups[0]["eps"] == 1e-4
    with pytest.raises(ValueError, match="muon has no option 'adamw_wd'"):
        create_optimizer("muon", model, adamw_wd=0.1)
    with pytest.raises(ValueError, match="lamb has no option 'max_grad_norm'"):
        create_optimizer("lamb", model, max_grad_norm=0.5)


# --- groups ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_every_trainable_parameter_is_in_one_group_with_its_decay(name: str) -> None:
    model = family("gpt2").build()
    model.transformer.wpe.weight.requires_grad_(False)
    groups = create_optimizer(name, model, lr=0.1, weight_decay=0.3).param_groups
    params = [p for group in groups for p in group["params"]]
    assert sorted(map(id, params)) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    for group in groups:
        for p in group["params"]:
            assert (group["weight_decay"] > 0) == (p.dim() > 1)
            if name != "muon":
                assert group["weight_decay"] in (0.3, 0.0)


@pytest.mark.parametrize(
    ("model_name", "hidden"),
    [
        ("gpt2", r"transformer\.h\.\d\.(attn|mlp)\.c_\w+\.weight"),  # not the head, which is tied to the embedding
        ("llama", r"model\.layers\.\d\.(self_attn|mlp)\.\w+\.weight"),  # not the head, which is not tied
        ("bert", r"bert\.(encoder\.layer\.\d\..*dense|.*query|.*key|.*value|pooler\.dense)\.weight"),
        ("vit", r"vit\.layers\.\d\.(attention|mlp)\.\w+\.weight"),  # not the patches, not the classifier
        ("resnet", r"resnet\.encoder\..*convolution\.weight"),  # not the first convolution
        ("mobilenet_v2", r"mobilenet_v2\.(?!conv_stem\.first_conv).*(?<!conv_3x3)\.convolution\.weight"),
        ("electra", r"(electra\.(encoder.*(dense|query|key|value)|embeddings_project)|classifier\.dense)\.weight"),
        ("mixtral", r"model\.layers\.\d\.self_attn\.\w+\.weight"),  # fused experts are one three-dimensional weight
    ],
)
def test_hidden_matrices_go_to_muon_and_nothing_else(model_name: str, hidden: str) -> None:
    model = family(model_name).build()
    optimizer = create_optimizer("muon", model, lr=0.5, adamw_lr=0.25)
    under_muon = [group for group in optimizer.param_groups if group["use_muon"]]
    expected = {name for name, p in model.named_parameters() if re.fullmatch(hidden, name) and p.dim() > 1}
    assert expected and names_in(model, under_muon) == expected
    assert all(group["lr"] == 0.25 for group in optimizer.param_groups if not group["use_muon"])
    if model_name != "gpt2":  # which has Conv1D layers
        assert [group["lr"] for group in under_muon] == [0.5] * len(under_muon)


def test_the_last_matrix_is_the_head_of_a_model_that_does_not_name_one() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    assert [id(matrix.weight) for matrix in hidden_matrices(model)] == [id(model[0].weight), id(model[2].weight)]


class Stacked(nn.Module):
    """Layers of uneven sides between two others, as transformers' Conv1D or as Linear."""

    def __init__(self, layer: type[nn.Module]) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.wide, self.narrow = (layer(24, 8), layer(8, 24)) if layer is Conv1D else (layer(8, 24), layer(24, 8))
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.narrow(self.wide(self.first(x).tanh()).tanh()).tanh())


@pytest.mark.parametrize("options", [{}, {"use_adjusted_lr": True}, {"foreach": False}, {"weight_decouple": False}])
def test_muon_treats_conv1d_as_the_linear_layer_that_it_is(options: dict[str, Any]) -> None:
    set_seed(0)
    transposed, linear = Stacked(Conv1D), Stacked(nn.Linear)
    turned = ("wide.weight", "narrow.weight")
    state = {k: (v.t() if k in turned else v).clone() for k, v in transposed.state_dict().items()}
    linear.load_state_dict(state)
    decayed = ["wide.weight", "narrow.weight", "head.weight"]
    for model in (transposed, linear):
        optimizer = create_optimizer("muon", model, lr=0.05, weight_decay=0.5, decay_names=decayed, **options)
        generator = torch.Generator().manual_seed(1)
        for _ in range(5):
            optimizer.zero_grad()
            model(torch.randn(16, 6, generator=generator)).square().mean().backward()
            optimizer.step()
    assert not torch.equal(linear.wide.weight, state["wide.weight"])
    for name, weight in linear.state_dict().items():
        twin = transposed.state_dict()[name]
        assert_close(twin.t() if name in turned else twin, weight, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("shape", [(6, 10), (10, 6), (4, 3, 2, 2)])
def test_muon_iterates_in_the_updates_own_dtype_on_a_cpu(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(2)
    param = nn.Parameter(torch.zeros(shape))
    optimizer = Muon([{"params": [param], "use_muon": True}], lr=1.0, momentum=0.9)
    param.grad = torch.randn(shape, generator=generator)
    x = param.grad.flatten(1).double()
    if tall := x.shape[0] > x.shape[1]:
        x = x.T
    x = x / x.norm()
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    expected = -(x.T if tall else x) * max(1.0, shape[0] / math.prod(shape[1:])) ** 0.5
    optimizer.step()
    assert_close(param.detach().flatten(1).double(), expected, rtol=1e-4, atol=1e-5)  # bfloat16 is off by 1e-2


def test_shampoo_keeps_embeddings_and_long_sides_out_of_its_matrices() -> None:
    model = family("gpt2").build()
    optimizer = create_optimizer("shampoo", model, max_side=95)
    full = names_in(model, [group for group in optimizer.param_groups if group["use_shampoo"]])
    rest = names_in(model, [group for group in optimizer.param_groups if not group["use_shampoo"]])
    # c_attn is (32, 96), c_fc (32, 128); the embedding, tied to the head, (99, 32); positions (32, 32).
    long = {f"transformer.h.{i}.{name}" for i in (0, 1) for name in ("attn.c_attn.weight", "attn.c_attn.bias")}
    long |= {f"transformer.h.{i}.mlp.{name}" for i in (0, 1) for name in ("c_fc.weight", "c_fc.bias", "c_proj.weight")}
    assert rest == long | {"transformer.wte.weight", "transformer.wpe.weight"}
    assert full and full | rest == {name for name, _ in model.named_parameters()}
    train(model, GPT2_BATCH, optimizer, 1)
    assert max(max(t.shape, default=0) for s in optimizer.state.values() for k, t in s.items() if "cond" in k) <= 95


@pytest.mark.parametrize("model_name", ["gpt2", "llama"])
def test_soap_has_no_matrix_along_the_vocabulary(model_name: str) -> None:
    """Neither for the embedding nor for the head, tied (GPT-2) or not (Llama)."""
    model = family(model_name).build()
    optimizer = create_optimizer("soap", model)
    train(model, GPT2_BATCH, optimizer, 2)
    sides = {name: [len(m) for m in optimizer.state[p]["GG"]] for name, p in model.named_parameters()}
    tables = [name for name in sides if name.endswith(("wte.weight", "embed_tokens.weight", "lm_head.weight"))]
    assert len(tables) == (1 if model_name == "gpt2" else 2)
    assert all(sides[name] == [0, 32] for name in tables)
    hidden = [name for name, p in model.named_parameters() if p.dim() == 2 and name not in tables]
    assert all(sides[name] == list(dict(model.named_parameters())[name].shape) for name in hidden)


def test_lars_has_one_learning_rate_for_matrices_and_one_for_vectors() -> None:
    model = family("resnet").build()
    groups = create_optimizer("lars", model, lr=2.0, vector_lr=0.5).param_groups
    assert {(p.dim() > 1, group["lr"]) for group in groups for p in group["params"]} == {(True, 2.0), (False, 0.5)}


# --- steps ----------------------------------------------------------------------------------


def test_shampoo_is_the_librarys_and_torchs_adamw_side_by_side() -> None:
    ours, theirs = family("gpt2").build(), family("gpt2").build()
    both = create_optimizer("shampoo", ours, lr=0.02, adamw_lr=0.003, weight_decay=0.1)
    tables = {"transformer.wte.weight", "transformer.wpe.weight"}
    named = dict(theirs.named_parameters())
    parts = (
        pytorch_optimizer.Shampoo(
            [
                {"params": [p for n, p in named.items() if n not in tables and p.dim() > 1], "weight_decay": 0.1},
                {"params": [p for n, p in named.items() if p.dim() == 1]},
            ],
            lr=0.02,
        ),
        torch.optim.AdamW([named[name] for name in sorted(tables)], lr=0.003, weight_decay=0.1, fused=True),
    )
    for _ in range(4):
        for model, optimizers in ((ours, (both,)), (theirs, parts)):
            model.zero_grad()
            model(**family("gpt2").batch()).loss.backward()
            for optimizer in optimizers:
                optimizer.step()
    assert_close(ours.state_dict(), theirs.state_dict(), rtol=0, atol=0)


def test_shampoo_takes_a_closure_new_groups_and_no_unsafe_interval() -> None:
    model = mlp(3, 2)
    optimizer = create_optimizer("shampoo", model, lr=0.1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(torch.ones(4, 3)).square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) > 0
    new = nn.Parameter(torch.ones(2, 2))
    optimizer.add_param_group({"params": [new], "use_shampoo": True})
    assert optimizer.param_groups[-1]["lr"] == 0.1
    with pytest.raises(ValueError, match="use_shampoo"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    with pytest.raises(ValueError, match=r"preconditioning_compute_steps=5 needs matrix_eps >= 0.0001, got 1e-06"):
        create_optimizer("shampoo", model, preconditioning_compute_steps=5)
    create_optimizer("shampoo", model, preconditioning_compute_steps=5, matrix_eps=1e-4)


class Bowl(nn.Module):
    """A loss with a diagonal Hessian: random signs then give it exactly."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.x = nn.Parameter(torch.randn(3, 4, generator=generator, dtype=torch.float64))
        self.y = nn.Parameter(torch.randn(5, generator=generator, dtype=torch.float64))
        self.curvature = {
            "x": torch.rand(3, 4, generator=generator, dtype=torch.float64) + 0.1,
            "y": torch.rand(5, generator=generator, dtype=torch.float64) + 0.1,
        }

    def forward(self) -> Tensor:
        return sum((0.5 * self.curvature[n] * p.square() + p).sum() for n, p in self.named_parameters())  # type: ignore[return-value]

    def start(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.named_parameters()}


def bowl_loss(model: nn.Module, step: int) -> Tensor:
    return model()


@pytest.mark.parametrize("size", [1.0, 100.0])
def test_lamb_makes_the_papers_steps(size: float) -> None:
    """Algorithm 2, without bias correction: the ratio takes any factor of the moment out again."""
    model = Bowl()
    for p in model.parameters():
        p.data.mul_(size)
    expected = model.start()
    train(model, bowl_loss, create_optimizer("lamb", model, lr=0.05, weight_decay=0.2, decay_names=["x"]), 4)
    for name, w in expected.items():
        m, v = torch.zeros_like(w), torch.zeros_like(w)
        for _ in range(4):
            grad = model.curvature[name] * w + 1.0
            m, v = 0.9 * m + 0.1 * grad, 0.999 * v + 0.001 * grad**2
            update = m / (v.sqrt() + 1e-6) + (0.2 * w if name == "x" else 0.0)
            w = w - 0.05 * w.norm() / (update.norm() + 1e-6) * update
        assert_close(getattr(model, name).detach(), w)


def test_lars_makes_the_papers_steps_on_matrices_and_sgds_on_vectors() -> None:
    model = Bowl()
    expected = model.start()
    options = {"lr": 2.0, "vector_lr": 0.05, "weight_decay": 0.1, "trust_coefficient": 0.02, "decay_names": ["x"]}
    train(model, bowl_loss, create_optimizer("lars", model, **options), 4)
    for name, w in expected.items():
        buffer = torch.zeros_like(w)
        for _ in range(4):
            grad = model.curvature[name] * w + 1.0
            if name == "x":
                grad = 0.02 * w.norm() / (grad.norm() + 0.1 * w.norm()) * (grad + 0.1 * w)
            buffer = 0.9 * buffer + grad
            w = w - (2.0 if name == "x" else 0.05) * buffer
        assert_close(getattr(model, name).detach(), w)


@pytest.mark.parametrize("period", [1, 2, 3])
def test_adahessian_makes_the_papers_steps(period: int) -> None:
    """The curvature is the same everywhere here, so how often it is estimated makes no difference."""
    model = Bowl()
    expected = model.start()
    options = {"weight_decay": 0.2, "decay_names": ["x"], "eps": 0.01, "update_period": period}
    train(model, bowl_loss, create_optimizer("adahessian", model, lr=0.1, **options), 5)
    for name, w in expected.items():
        m, v = torch.zeros_like(w), torch.zeros_like(w)
        for t in range(1, 6):
            grad, h = model.curvature[name] * w + 1.0, model.curvature[name]
            m, v = 0.9 * m + 0.1 * grad, 0.999 * v + 0.001 * h**2
            step = m / (1 - 0.9**t) / ((v / (1 - 0.999**t)).sqrt() + 0.01)
            w = w - 0.1 * (step + (0.2 * w if name == "x" else 0.0))
        assert_close(getattr(model, name).detach(), w)


def test_adahessian_averages_the_latest_estimate_between_two() -> None:
    """A curvature that changes at every step is seen at every second: the average holds those, each twice."""
    p = nn.Parameter(torch.ones(3, dtype=torch.float64))
    module = nn.ParameterList([p])
    optimizer = create_optimizer("adahessian", module, lr=0.0, update_period=2)
    seen = torch.zeros(3, dtype=torch.float64)
    for step in range(5):
        optimizer.zero_grad()
        curvature = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64) + step
        (0.5 * curvature * p.square()).sum().backward(create_graph=optimizer.needs_graph)
        optimizer.step()
        if step % 2 == 0:
            latest = curvature
        seen = 0.999 * seen + 0.001 * latest**2
    assert_close(optimizer.state[p]["exp_hessian_diag_sq"], seen)


@pytest.mark.parametrize("name", ["adahessian", "sophia"])
def test_a_parameter_first_used_between_two_estimates_waits_for_one(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    first, late = nn.Linear(3, 1), nn.Linear(3, 1)
    model = nn.ModuleList([first, late])
    optimizer = create_optimizer(name, model, update_period=2)
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    start = late.weight.detach().clone()
    for step in range(3):
        optimizer.zero_grad()
        out = first(x) if step == 0 else first(x) + late(x)
        (out - 1).square().mean().backward(create_graph=optimizer.needs_graph)
        optimizer.step()
        assert late.weight.grad is None or step > 0
        if step == 1:
            assert_close(late.weight.detach(), start, rtol=0, atol=0)
            assert late.weight.grad is not None and "wait for the next estimate" in caplog.text
    moved = (late.weight.detach() - start).abs().max()
    assert 0 < moved < 5


def test_gradients_without_a_graph_are_named(caplog: pytest.LogCaptureFixture) -> None:
    """Reentrant checkpointing of a leaf hides its layer from the second derivative without an error."""
    inner, outer = nn.Linear(3, 3), nn.Linear(3, 1)
    model = nn.ModuleList([inner, outer])
    optimizer = create_optimizer("adahessian", model)
    x = torch.randn(4, 3, requires_grad=True)
    outer(checkpoint(inner, x, use_reentrant=True)).square().mean().backward(create_graph=True)
    optimizer.step()
    assert "shape (3, 3), (3,) have gradients without a graph" in caplog.text
    model = nn.ModuleList([nn.Linear(3, 3), inner, outer])
    optimizer = create_optimizer("adahessian", model)
    outer(checkpoint(inner, model[0](x), use_reentrant=True)).square().mean().backward(create_graph=True)
    with pytest.raises(RuntimeError, match="reentrant activation checkpointing has no second derivatives"):
        optimizer.step()


def test_sophia_makes_the_papers_steps() -> None:
    model = Bowl()
    expected = model.start()
    options = {"update_period": 2, "hessian_distribution": "rademacher", "p": 0.5}
    optimizer = create_optimizer("sophia", model, lr=0.1, weight_decay=0.2, decay_names=["x"], **options)
    train(model, bowl_loss, optimizer, 5)
    for name, w in expected.items():
        m, h = torch.zeros_like(w), torch.zeros_like(w)
        for t in range(5):
            grad = model.curvature[name] * w + 1.0
            m = 0.96 * m + 0.04 * grad
            h = 0.99 * h + 0.01 * model.curvature[name] if t % 2 == 0 else h
            w = w * (1 - (0.02 if name == "x" else 0.0)) - 0.1 * (m / h.clamp(min=1e-12)).clamp(-0.5, 0.5)
        assert_close(getattr(model, name).detach(), w)


# --- second derivatives ---------------------------------------------------------------------


@pytest.mark.parametrize(("name", "samples"), [("adahessian", 1), ("adahessian", 3), ("sophia", 2)])
def test_the_estimate_is_the_hessian_times_random_vectors(name: str, samples: int) -> None:
    """Against the whole Hessian by torch.func, with the same random vectors; clipping leaves it alone."""
    model = mlp(3, 4, 2).double()
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    named = dict(model.named_parameters())

    def loss(weights: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, weights, (x,)).square().mean()

    blocks = torch.func.hessian(loss)({key: p.detach() for key, p in named.items()})
    optimizer = create_optimizer(name, model, num_samples=samples, decay_names=list(named))
    model(x).square().mean().backward(create_graph=True)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    torch.manual_seed(7)
    optimizer.step()
    torch.manual_seed(7)
    expected = {key: torch.zeros_like(p) for key, p in named.items()}
    for _ in range(samples):
        draw = torch.randn_like if name == "sophia" else lambda p: torch.randint_like(p, 0, 2) * 2 - 1
        z = {key: draw(p.detach()) for key, p in named.items()}
        for key in named:
            product = sum(torch.tensordot(blocks[key][other], z[other], dims=z[other].dim()) for other in named)
            expected[key] += product * z[key] / samples
    for key, p in named.items():
        assert_close(optimizer.state[p]["hessian"], expected[key])


@pytest.mark.parametrize("name", ["adahessian", "sophia"])
def test_a_backward_without_graph_is_refused_with_what_to_write(name: str) -> None:
    model = mlp(3, 2)
    optimizer = create_optimizer(name, model)
    model(torch.ones(1, 3)).square().sum().backward()
    with pytest.raises(RuntimeError, match=r"needs second derivatives.*loss.backward\(create_graph=True\)"):
        optimizer.step()


@pytest.mark.parametrize("name", ["adahessian", "sophia"])
def test_only_steps_that_estimate_need_a_graph_and_none_keeps_it(name: str) -> None:
    class Kept:
        alive = 0

        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor
            Kept.alive += 1

        def __del__(self) -> None:
            Kept.alive -= 1

    model = mlp(3, 4, 2)
    optimizer = create_optimizer(name, model, update_period=3)
    needed = []
    for _ in range(7):
        needed.append(optimizer.needs_graph)
        with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
            model(torch.ones(2, 3)).square().sum().backward(create_graph=optimizer.needs_graph)
        assert (Kept.alive > 0) == needed[-1]
        optimizer.step()
        assert Kept.alive == 0 and all(p.grad is not None and not p.grad.requires_grad for p in model.parameters())
        optimizer.zero_grad()
    assert needed == [True, False, False, True, False, False, True]


def test_parameters_without_curvature_are_told_from_those_without_a_graph() -> None:
    """A gradient that depends on no parameter has no graph: its Hessian is zero."""
    model = nn.ParameterDict({"line": nn.Parameter(torch.ones(2)), "bowl": nn.Parameter(torch.ones(2))})
    optimizer = create_optimizer("sophia", model, decay_names=[])
    (model["line"].sum() + model["bowl"].pow(4).sum()).backward(create_graph=True)
    assert not model["line"].grad.requires_grad
    optimizer.step()
    assert optimizer.state[model["line"]]["hessian"].abs().max() == 0
    assert optimizer.state[model["bowl"]]["hessian"].min() > 0
    assert model["line"].max() < 1  # moves all the same


def test_a_gradient_whose_graph_leads_elsewhere_has_no_curvature() -> None:
    """Here to the input, which requires a gradient too: the second derivative by the weight is zero, not an error."""
    model = nn.Linear(3, 1, bias=False)
    optimizer = create_optimizer("sophia", model)
    model(torch.ones(2, 3, requires_grad=True)).sum().backward(create_graph=True)
    assert model.weight.grad is not None and model.weight.grad.requires_grad
    optimizer.step()
    assert optimizer.state[model.weight]["hessian"].abs().max() == 0


@pytest.mark.parametrize("name", ["adahessian", "sophia"])
def test_a_stock_trainers_factory_refuses_a_model_that_will_be_compiled(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = {"dynamo_plugin": SimpleNamespace(backend="INDUCTOR")}
    monkeypatch.setattr(accelerate.state.AcceleratorState, "_shared_state", fake)
    with pytest.raises(ValueError, match=f"{name} needs second derivatives, which compiled graphs do not have: unset"):
        factory.OptimizerFactory()(mlp(3, 2), name=name, lr=0.1)
    factory.OptimizerFactory()(mlp(3, 2), name="lion", lr=0.1)


@pytest.mark.parametrize("name", ["adahessian", "sophia"])
def test_it_resumes_between_two_estimates(name: str) -> None:
    """The latest estimate is part of the state, and so is the step that the next is made at."""
    model, bowls = Bowl(), []
    optimizer = create_optimizer(name, model, lr=0.1, update_period=3)
    train(model, bowl_loss, optimizer, 2)
    other = Bowl()
    other.load_state_dict(model.state_dict())
    resumed = create_optimizer(name, other, lr=0.1, update_period=3)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for bowl, its in ((model, optimizer), (other, resumed)):
        torch.manual_seed(0)
        train(bowl, bowl_loss, its, 4)
        bowls.append(bowl.start())
    assert_close(bowls[0], bowls[1], rtol=0, atol=0)


def test_attention_without_second_derivatives_is_named() -> None:
    class Fused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.project = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.project(x)
            return nn.functional.scaled_dot_product_attention(y, y, y).square().mean()

    model = Fused()
    optimizer = create_optimizer("adahessian", model)
    model(torch.randn(1, 2, 3, 4)).backward(create_graph=True)
    with pytest.raises(RuntimeError, match=r"no second derivative .*attn_implementation='eager'.*sdpa_kernel"):
        optimizer.step()


def test_transformers_attention_is_switched_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    for model_name in ("gpt2", "clip"):
        caplog.clear()
        model = family(model_name).build()
        assert model.config._attn_implementation == "sdpa"
        create_optimizer("sophia", model)
        create_optimizer("adahessian", model)
        configs = [m.config for m in model.modules() if hasattr(m, "config")]
        assert {config._attn_implementation for config in configs} == {"eager"}
        assert caplog.text.count("switched from sdpa to eager") == 1 and "sophia needs second" in caplog.text
    create_optimizer("adamw", family("gpt2").build())
    assert caplog.text.count("switched") == 1


def test_models_without_second_derivatives_are_refused() -> None:
    for model in (torch.compile(mlp(3, 2)), mlp(3, 2)):
        if not hasattr(model, "_orig_mod"):
            model.compile()
        with pytest.raises(ValueError, match=r"use the model without torch\.compile"):
            create_optimizer("adahessian", model)
    model = family("gpt2").build()
    for options, refused in (({"use_reentrant": True}, True), (None, False), ({"preserve_rng_state": True}, True)):
        model.activation_checkpointing_enable(options)
        if refused:
            with pytest.raises(ValueError, match=r"reentrant activation checkpointing.*set use_reentrant to False"):
                create_optimizer("sophia", model)
        else:
            train(model, GPT2_BATCH, create_optimizer("sophia", model), 2)


# --- state ----------------------------------------------------------------------------------


OWN_TESTS = ("adafisher", "adafisherw", "spectral-adafisher", "kfac")
"""Whose state has vectors that depend on the layers."""


def bytes_of(name: str, p: Tensor, group: dict[str, Any]) -> int:
    """The state of one float32 parameter, written down from the papers, with the libraries' counters."""
    n, matrix = p.numel(), p.dim() > 1
    if name == "adafactor":
        return 4 * (n // p.shape[-1] + n // p.shape[-2] if matrix else n) + 4
    if name == "muon":
        return 4 * n if group["use_muon"] else 8 * n
    if name == "shampoo":
        return 4 * n + 8 * sum(side**2 for side in p.shape) if group["use_shampoo"] else 8 * n + 4
    if name == "soap":
        limit = group["max_precondition_dim"]
        return 8 * n + 8 * sum(side**2 for side in p.shape if matrix and side <= limit)
    sizes = {"sgd": 4, "lars": 4, "lion": 4, "adam": 8, "adamw": 8, "lamb": 8, "schedule_free_adamw": 8}
    counters = {"adam": 4, "adamw": 4, "lamb": 12}
    return {**sizes, "adahessian": 12, "sophia": 12}[name] * n + counters.get(name, 0)


@pytest.mark.parametrize("model_name", ["gpt2", "vit"])
@pytest.mark.parametrize("name", [n for n in NAMES if n not in OWN_TESTS])
def test_the_state_is_as_large_as_the_record_says(name: str, model_name: str) -> None:
    model, record = family(model_name).build(), optimizer_record(name)
    optimizer = create_optimizer(name, model)
    train(model, of_family(family(model_name), seed=0), optimizer, 2)
    groups = optimizer.param_groups
    assert optimizer_state_bytes(optimizer) == sum(
        bytes_of(name, p, group) for group in groups for p in group["params"]
    )
    if record.bytes_per_parameter is not None:
        per_parameter = optimizer_state_bytes(optimizer) / sum(p.numel() for p in model.parameters())
        assert_close(per_parameter, record.bytes_per_parameter, rtol=0.01, atol=0.0)


@pytest.mark.parametrize("name", [n for n in NAMES if optimizer_record(n).bytes_per_parameter is None and n != "muon"])
def test_the_records_formula_is_that_of_a_matrix(name: str) -> None:
    """Of an MLP's hidden matrix, without counters of up to 20 bytes."""
    model = nn.Sequential(nn.Linear(40, 60, bias=False), nn.Tanh(), nn.Linear(60, 30, bias=False))
    optimizer = create_optimizer(name, model, decay_names=["0.weight"])
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(64, 40)).square().mean().backward()
        optimizer.step()
    formula = re.split(r"[;,]", optimizer_record(name).memory)[0]
    formula = (
        formula.replace("^", "**").replace(" (", " * (").replace("r c", "r * c").replace("+ *", "+").replace("/ *", "/")
    )
    per_parameter = eval(formula, {"r": 60, "c": 40})
    counted = optimizer_state_bytes(SimpleNamespace(state={"of the matrix": optimizer.state[model[0].weight]}))
    assert 0 <= counted - per_parameter * 2400 <= 20


def test_records_with_one_size_say_it_in_both_forms() -> None:
    for name in NAMES:
        record = optimizer_record(name)
        if record.bytes_per_parameter is not None:
            assert record.memory == f"{record.bytes_per_parameter:g}"


# --- models ---------------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", ["matrices", "vectors"])
@pytest.mark.parametrize("name", NAMES)
def test_frozen_parameters_and_empty_groups(name: str, frozen: str) -> None:
    model = family("gpt2").build()
    for p in model.parameters():
        p.requires_grad_((p.dim() > 1) != (frozen == "matrices"))
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    train(model, GPT2_BATCH, create_optimizer(name, model, lr=0.1, weight_decay=0.01), 3)
    for key, p in model.named_parameters():
        assert torch.equal(p, before[key]) != p.requires_grad


@pytest.mark.parametrize("name", FROM_LIBRARIES)
def test_weights_in_bfloat16(name: str) -> None:
    model = family("resnet").build().to(torch.bfloat16)
    # Next to a factor in bfloat16 the default of 1e-6 is nothing: on some CPUs its inverse root overflows.
    options = {"matrix_eps": 1e-4} if name == "shampoo" else {}
    losses = train(model, of_family(family("resnet"), seed=0), create_optimizer(name, model, **options), 12)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", NAMES)
def test_sharded_parameters_are_refused_or_known(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainer shards the model after it has built the optimizer, so accelerate is asked."""
    fake = {"distributed_type": DistributedType.FSDP, "fsdp_plugin": SimpleNamespace(fsdp_version=2)}
    monkeypatch.setattr(accelerate.state.AcceleratorState, "_shared_state", fake)
    create = functools.partial(create_optimizer, name, mlp(3, 2), lr=0.1)
    if "FSDP2" in optimizer_record(name).refuses:
        with pytest.raises(ValueError, match=f"(?i){name} does not support FSDP2"):
            create()
    else:
        assert not create().defaults.get("fused") or name != "sgd"  # its fused kernel knows no shards


@pytest.mark.parametrize(
    ("kind", "mode"), [(DistributedType.DEEPSPEED, "DeepSpeed"), (DistributedType.FSDP, "FSDP1"), (None, "FSDP2")]
)
def test_a_stock_trainers_factory_refuses_what_takes_parameters_apart(
    kind: DistributedType | None, mode: str, monkeypatch: pytest.MonkeyPatch, process_group: None
) -> None:
    monkeypatch.setattr(accelerate.state.AcceleratorState, "_shared_state", {"distributed_type": kind})
    model = mlp(3, 2)
    if kind is None:
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    with pytest.raises(ValueError, match=f"lamb does not support {mode}"):
        factory.OptimizerFactory()(model, name="lamb", lr=0.1)
    factory.OptimizerFactory()(model, name="lion", lr=0.1)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_a_large_vocabulary_costs_no_matrix_of_its_size(name: str, tied: bool) -> None:
    """Shampoo's and K-FAC's limits are lowered to one that a test can afford to see broken."""
    limits = {"shampoo": {"max_side": 1000}, "kfac": {"max_factor_dim": 1000}}
    sizes = {"vocab_size": 1500, "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 16}
    model = GPT2LMHeadModel(GPT2Config(**sizes, tie_word_embeddings=tied, bos_token_id=1, eos_token_id=2))
    optimizer = create_optimizer(name, model, lr=0.01, **limits.get(name, {}))
    train(model, GPT2_BATCH, optimizer, 2)
    assert optimizer_state_bytes(optimizer) < 20 * sum(p.numel() for p in model.parameters())


# --- option values --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("lars", {"vector_lr": -1.0}, "vector_lr must be a finite number >= 0, got -1.0"),
        ("muon", {"lr": math.nan}, "lr must be a finite number >= 0, got nan"),
        ("muon", {"adamw_lr": math.nan}, "adamw_lr must be a finite number"),
        ("soap", {"weight_decay": -0.1}, "weight_decay must be a finite number >= 0, got -0.1"),
        ("schedule_free_adamw", {"lr": -1.0}, "lr must be a finite number"),
        ("schedule_free_adamw", {"warmup_steps": -3}, "warmup_steps must be a whole number >= 0, got -3"),
        ("adahessian", {"hessian_distribution": "foo"}, "must be one of 'gaussian', 'rademacher', got 'foo'"),
        ("adahessian", {"num_samples": 0}, "num_samples must be a whole number >= 1, got 0"),
        ("sophia", {"update_period": 0}, "update_period must be a whole number >= 1, got 0"),
        ("shampoo", {"max_side": 2.5}, "max_side must be a whole number >= 1, got 2.5"),
        ("shampoo", {"max_side": "a"}, "max_side must be a whole number"),
        ("soap", {"precondition_frequency": 2.5}, "precondition_frequency must be a whole number"),
        ("lion", {"betas": 0.9}, r"betas must be 2 numbers in \[0, 1\), as \(0.9, 0.99\), got 0.9"),
        ("schedule_free_adamw", {"betas": (2.0, 0.9)}, r"betas must be 2 numbers in \[0, 1\), .*got \(2.0, 0.9\)"),
        ("schedule_free_adamw", {"eps": -1.0}, "eps must be a finite number >= 0, got -1.0"),
        ("soap", {"shampoo_beta": 1.5}, r"shampoo_beta must be a number in \[0, 1\), got 1.5"),
        ("soap", {"shampoo_beta": "x"}, "shampoo_beta must be a number in"),
        ("sgd", {"momentum": 1.5}, r"momentum must be a number in \[0, 1\), got 1.5"),
        ("lars", {"trust_coefficient": math.inf}, "trust_coefficient must be a number, got inf"),
        ("lion", {"foreach": "no"}, "foreach must be True or False, got 'no'"),
        ("muon", {"ns_reset_steps": (0.5,)}, r"ns_reset_steps must be whole numbers, as \(2,\)"),
        ("muon", {"ns_coeffs": 1.5}, "ns_coeffs must be a word, as 'original', got 1.5"),
        ("adafactor", {"eps": (1e-30,)}, r"eps must be 2 numbers, as \(None, 0.001\)"),
        ("muon", {"momentum": "0.9"}, r"muon: option momentum must be a number in \[0, 1\), got '0.9'"),
        ("sgd", {"nesterov": "no"}, "nesterov must be True or False, got 'no'"),
    ],
)
def test_values_that_a_library_would_let_pass_are_named(name: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        create_optimizer(name, mlp(3, 2), **options)


def test_unusual_values_that_are_right_are_let_through() -> None:
    for name, options in (
        ("muon", {"ns_reset_steps": (1, 3), "ns_coeffs": ((3.4, -4.7, 2.0),) * 5}),
        ("adafactor", {"eps": (1e-30, 1e-3), "lr": torch.tensor(0.1)}),
        ("lion", {"betas": [0.9, 0.99], "foreach": None}),
        ("lars", {"vector_lr": 0, "momentum": 0}),
        ("schedule_free_adamw", {"warmup_steps": 0, "r": -1}),
    ):
        group = create_optimizer(name, mlp(3, 2), **options).param_groups[0]
        assert all(group[key] == value for key, value in options.items() if key in group and key != "lr")


def test_lars_says_which_vectors_it_does_not_decay(caplog: pytest.LogCaptureFixture) -> None:
    model = mlp(3, 2)
    create_optimizer("lars", model, weight_decay=0.1)
    create_optimizer("lars", model, weight_decay=0.0, decay_names=["0.weight", "0.bias"])
    assert not caplog.records
    create_optimizer("lars", model, weight_decay=0.1, decay_names=["0.weight", "0.bias"])
    assert "no weight decay for vectors: 0.bias are not decayed" in caplog.text


def test_lars_moves_a_matrix_of_zeros_by_lr_times_its_gradient() -> None:
    model = Bowl()
    model.x.data.zero_()
    train(model, bowl_loss, create_optimizer("lars", model, lr=0.5, weight_decay=0.1, decay_names=["x"]), 1)
    assert_close(model.x.detach(), torch.full_like(model.x, -0.5))  # the gradient there is 1


def test_shampoo_passes_its_options_on_to_both_parts() -> None:
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 3))
    options = {
        "momentum": 0.7,
        "matrix_eps": 0.2,
        "preconditioning_compute_steps": 3,
        "weight_decouple": True,
        "fixed_decay": True,
        "maximize": True,
        "adamw_lr": 0.02,
        "adamw_betas": (0.7, 0.8),
        "adamw_eps": 1e-3,
    }
    optimizer = create_optimizer("shampoo", model, lr=0.3, **options)
    full = next(group for group in optimizer.param_groups if group["use_shampoo"])
    rest = next(group for group in optimizer.param_groups if not group["use_shampoo"])
    for key in ("momentum", "matrix_eps", "weight_decouple", "fixed_decay"):
        assert full[key] == options[key]
    assert (rest["lr"], rest["betas"], rest["eps"], rest["maximize"]) == (0.02, (0.7, 0.8), 1e-3, True)
    assert (optimizer._optimizers[True].maximize, optimizer._optimizers[True].preconditioning_compute_steps) == (
        True,
        3,
    )


# --- which weights are what -----------------------------------------------------------------


def test_soap_keeps_the_width_of_the_widest_table() -> None:
    """BERT's table of two segments must not make a cap of 2 for the tokens."""
    model = nn.ModuleList([nn.Embedding(50, 8), nn.Embedding(2, 8), nn.Linear(8, 8)])
    groups = create_optimizer("soap", model).param_groups
    assert {group["max_precondition_dim"] for group in groups} == {10000, 8}


def test_bags_of_embeddings_are_tables_too() -> None:
    model = nn.Sequential(nn.EmbeddingBag(9, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    matrices = [matrix.weight for matrix in hidden_matrices(model)]
    assert matrices == [model[1].weight]
    bags = [p for g in create_optimizer("shampoo", model).param_groups if not g["use_shampoo"] for p in g["params"]]
    assert bags == [model[0].weight]


def test_every_head_of_a_classifier_is_left_out_and_nothing_else() -> None:
    """DeiT with a teacher has two; a transposed one counts its outputs along the other axis."""
    config = transformers.DeiTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=20, image_size=8, patch_size=4
    )
    config.num_labels = 5
    model = transformers.DeiTForImageClassificationWithTeacher(config)
    hidden = {id(matrix.weight) for matrix in hidden_matrices(model)}
    linear = {name: id(m.weight) for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert {name for name, key in linear.items() if key not in hidden} == {"cls_classifier", "distillation_classifier"}
    model.cls_classifier = Conv1D(5, 16)
    assert id(model.cls_classifier.weight) not in {id(matrix.weight) for matrix in hidden_matrices(model)}


def test_a_head_inside_a_wrapper_is_a_head() -> None:
    class WithValue(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.value = family("llama").build(), nn.Linear(32, 1)

    wrapper = WithValue()
    hidden = {id(matrix.weight) for matrix in hidden_matrices(wrapper)}
    assert id(wrapper.model.lm_head.weight) not in hidden
    widths = {g["max_precondition_dim"] for g in create_optimizer("soap", wrapper).param_groups}
    assert widths == {10000, 32}


def test_a_model_without_a_head_has_no_weight_taken_for_one() -> None:
    model = family("gpt2").build().transformer
    hidden = {id(matrix.weight) for matrix in hidden_matrices(model)}
    assert id(model.h[-1].mlp.c_proj.weight) in hidden


# --- checkpoints ----------------------------------------------------------------------------


def test_changed_options_are_named_when_a_checkpoint_replaces_them(caplog: pytest.LogCaptureFixture) -> None:
    model = mlp(3, 2)
    saved = create_optimizer("lion", model, betas=(0.5, 0.6), weight_decay=0.1).state_dict()
    create_optimizer("lion", model, betas=(0.5, 0.6), weight_decay=0.1).load_state_dict(saved)
    assert not caplog.records
    create_optimizer("lion", model, weight_decay=0.3).load_state_dict(saved)
    assert "betas: (0.9, 0.99) -> (0.5, 0.6)" in caplog.text and "weight_decay: 0.3 -> 0.1" in caplog.text


@pytest.mark.parametrize("writer", [name for name in NAMES if name != "lion"])
def test_every_checkpoint_names_its_writer(writer: str) -> None:
    """Also of a model for which Shampoo has as many groups as Lion, some of them AdamW's."""
    for model in (nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 3, bias=False)), mlp(3, 4, 2), nn.LayerNorm(4)):
        saved = create_optimizer(writer, model).state_dict()
        with pytest.raises(ValueError, match=f"not written by lion .*they are {writer}'s"):
            create_optimizer("lion", model).load_state_dict(saved)


def test_other_groups_than_the_checkpoints_get_advice() -> None:
    model = family("gpt2").build()
    saved = create_optimizer("shampoo", model, max_side=1).state_dict()
    with pytest.raises(ValueError, match=r"written with other options .* or by another optimizer"):
        create_optimizer("shampoo", model).load_state_dict(saved)


def test_what_is_not_resumable_refuses_to_be_resumed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RECORDS, "lion", dataclasses.replace(optimizer_record("lion"), resumable=False))
    optimizer = create_optimizer("lion", mlp(3, 2))
    with pytest.raises(ValueError, match="lion cannot go on from a checkpoint"):
        optimizer.load_state_dict(optimizer.state_dict())
