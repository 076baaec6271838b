"""PEFT adapters on frozen bases: only the adapter trains, whatever the base is made of."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close
from transformers import PreTrainedModel

from hf_adafisher import AdaFisher, AdaFisherTrainer, AdaFisherW
from tests.model_zoo import Family, family
from tests.optimizers.test_lockstep import Pair, float64_model, run, told
from tests.training_helper import make_trainer, of_family, optimizer_of

STEPS = 6
Config = Callable[[], LoraConfig]


def lora(**options: Any) -> Config:
    """A rank-4 LoRA; PEFT writes into its configs, so every model gets a new one."""
    return lambda: LoraConfig(**{"r": 4, "lora_alpha": 8, "lora_dropout": 0.0} | options)


@dataclass(frozen=True)
class Adaptation:
    """An adapter on a base of the zoo, and the rule that each kind of its parameters takes."""

    name: str
    base: str
    config: Config
    rules: dict[str, str] = field(default_factory=lambda: {"lora_A": "Linear", "lora_B": "Linear"})
    """By a part of the parameters' names; every part is the name of some parameter."""

    @property
    def record(self) -> Family:
        """The base's family."""
        return family(self.base)

    def build(self, seed: int = 0) -> PeftModel:
        """The adapter with weights of that seed, on a base that is always the same."""
        return adapted(self.record.build(), self.config, seed)

    def rule_of(self, name: str) -> str:
        """The rule of a parameter of the adapter."""
        return next(rule for part, rule in self.rules.items() if part in name)


MAGNITUDES = {"lora_A": "Linear", "lora_B": "Linear", "lora_magnitude_vector": "gradient factors"}
BERT_LAYERS = ["value", "intermediate.dense"]  # a query's gradient is too small to move a float32 value
ADAPTATIONS = (
    Adaptation("lora_llama", "llama", lora(target_modules="all-linear")),
    Adaptation(
        "lora_gpt2",
        "gpt2",
        lora(target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, modules_to_save=["c_proj"]),
        {"lora_": "Linear", "c_proj.modules_to_save": "Conv1D"},
    ),
    Adaptation("lora_all_linear_gpt2", "gpt2", lora(target_modules="all-linear", fan_in_fan_out=True)),
    Adaptation("dora_llama", "llama", lora(target_modules="all-linear", use_dora=True), MAGNITUDES),
    Adaptation("dora_gpt2", "gpt2", lora(target_modules=["c_attn"], fan_in_fan_out=True, use_dora=True), MAGNITUDES),
    Adaptation(
        "modules_to_save",
        "llama",
        lora(target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head", "embed_tokens", "norm"]),
        {
            "lora_": "Linear",
            "lm_head.modules_to_save": "Linear",
            "embed_tokens.modules_to_save": "Embedding",
            "norm.modules_to_save": "RMSNorm",
        },
    ),
    Adaptation(  # looked up by F.embedding, so no layer is called
        "lora_embedding",
        "llama",
        lora(target_modules=["embed_tokens", "q_proj"]),
        {"lora_embedding_A": "gradient factors", "lora_embedding_B": "gradient factors", "lora_": "Linear"},
    ),
    Adaptation(
        "tied_modules_to_save",
        "gemma3",
        lora(target_modules=["v_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True),
        {"lora_": "Linear", "embed_tokens.modules_to_save": "Embedding+Linear"},
    ),
    Adaptation(
        "biases",
        "bert",
        lora(target_modules=BERT_LAYERS, bias="lora_only", task_type="SEQ_CLS"),
        {"lora_": "Linear", "base_layer.bias": "Linear", "classifier.modules_to_save": "Linear"},
    ),
    Adaptation("convolutions", "resnet", lora(target_modules=["convolution"]), {"lora_A": "Conv", "lora_B": "Conv"}),
)
both_forms = pytest.mark.parametrize("step_size", ["paper", "root"])
each_adaptation = pytest.mark.parametrize("case", ADAPTATIONS, ids=lambda case: case.name)


def adapted(base: nn.Module, config: Config, seed: int = 0) -> PeftModel:
    """The base with an adapter, in training mode; leaves the global generator alone."""
    assert isinstance(base, PreTrainedModel)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = get_peft_model(base, config())
    assert isinstance(model, PeftModel)
    return model.train()


def trainer_of(model: nn.Module, record: Family, folder: Path, **options: Any) -> AdaFisherTrainer:
    """A trainer; with the paper's form there is a refresh at every other step."""
    defaults: dict[str, Any] = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "step_size": "paper",
        "learning_rate": 0.01,
        "lr_scheduler_type": "constant",
        "train_dataset": record.dataset(4 * STEPS),
    }
    options = defaults | options
    if options["step_size"] == "paper":
        options = {"damping": 3e-3, "ema_decay": 0.95, "update_interval": 2, **options}
    return make_trainer(folder, record, model=model, **options)


def adafisher_of(trainer: AdaFisherTrainer) -> AdaFisher:
    """The optimizer inside accelerate's wrapper."""
    optimizer = optimizer_of(trainer)
    assert isinstance(optimizer, AdaFisher)
    return optimizer


def values_of(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters, and of the buffers in which quantised layers keep their weights.

    Not of BatchNorm's running statistics, which follow the batches whatever is frozen.
    """
    buffers = {name: value for name, value in model.named_buffers() if not name.endswith(("_mean", "_var", "_tracked"))}
    return {name: value.detach().clone() for name, value in (*model.named_parameters(), *buffers.items())}


def moved(before: dict[str, Tensor], model: nn.Module) -> set[str]:
    """The names of what is not bitwise as it was."""
    after = values_of(model)
    assert after.keys() == before.keys()
    return {name for name, value in after.items() if not torch.equal(before[name], value)}


def trainable(model: nn.Module) -> set[str]:
    """The names of the parameters that require grad."""
    return {name for name, param in model.named_parameters() if param.requires_grad}


def hooked(model: nn.Module) -> set[str]:
    """The names of the modules with a forward hook of an AdaFisher optimizer."""
    return {
        name
        for name, module in model.named_modules()
        if any(type(hook).__module__.startswith("hf_adafisher") for hook in module._forward_hooks.values())
    }


@both_forms
@each_adaptation
def test_only_the_adapter_moves_and_all_of_it(case: Adaptation, step_size: str, tmp_path: Path) -> None:
    """Bitwise, to finite values; every value is accounted for, by the rule of the adapter's layers."""
    model = case.build()
    before, adapter = values_of(model), trainable(model)
    trainer = trainer_of(model, case.record, tmp_path, step_size=step_size)
    trainer.train()
    assert moved(before, model) == adapter
    assert all(model.get_parameter(name).isfinite().all() for name in adapter)

    optimizer = adafisher_of(trainer)
    rows = optimizer.coverage()
    rules = {name: case.rule_of(name) if step_size == "paper" else "gradient factors" for name in adapter}
    assert {row.name: row.rule for row in rows} == rules
    assert all(any(part in name for name in adapter) for part in case.rules)
    assert sum(row.share for row in rows) == pytest.approx(1.0)
    assert sum(row.numel for row in rows) == sum(model.get_parameter(name).numel() for name in adapter)
    assert {id(param) for param in optimizer.state} == {id(model.get_parameter(name)) for name in adapter}
    # The next step is due, so the paper's hooks are on: for layers of the adapter alone.
    owners = {module for row in rows if row.rule != "gradient factors" for module in row.modules}
    assert hooked(model) == owners


@both_forms
@pytest.mark.parametrize("optim", ["adafisher", "adafisherw"])
def test_the_half_of_a_lora_without_a_gradient_waits(optim: str, step_size: str, tmp_path: Path) -> None:
    """While B is zero, A's gradient and its factors are zero, and zero over F is zero, not NaN."""
    case = ADAPTATIONS[0]
    model = case.build()
    before = values_of(model)
    options = {"optim": optim, "step_size": step_size, "weight_decay": 0.0}
    trainer_of(model, case.record, tmp_path, max_steps=1, **options).train()
    assert moved(before, model) == {name for name in trainable(model) if "lora_B" in name}
    model = case.build()
    trainer_of(model, case.record, tmp_path, max_steps=2, **options).train()
    assert moved(before, model) == trainable(model)


@each_adaptation
def test_lockstep_with_the_slow_twin(case: Adaptation) -> None:
    """Factors, diagonals and parameters of the adapter are those of the equations, in float64."""
    model = adapted(float64_model(case.record), case.config).double()
    run(Pair(model, AdaFisherW), of_family(case.record, n=3, seq=8), steps=4, check_every=1)


@both_forms
@each_adaptation
def test_resume_equals_the_uninterrupted_run_bitwise(case: Adaptation, step_size: str, tmp_path: Path) -> None:
    """From a checkpoint that holds the adapter alone, in the middle of an update interval, into other weights."""
    options: dict[str, Any] = {"max_steps": 5, "save_strategy": "steps", "save_steps": 3, "weight_decay": 0.01}
    options["step_size"] = step_size
    whole = case.build()
    first = trainer_of(whole, case.record, tmp_path / "a", **options)
    first.train()
    checkpoint = tmp_path / "a" / "checkpoint-3"
    assert (checkpoint / "adapter_model.safetensors").is_file() and not (checkpoint / "model.safetensors").exists()
    resumed = case.build(seed=1)
    second = trainer_of(resumed, case.record, tmp_path / "b", **options)
    second.train(resume_from_checkpoint=str(checkpoint))
    assert second.state.global_step == 5
    assert moved(values_of(whole), resumed) == set()
    states = [adafisher_of(trainer).state_dict() for trainer in (first, second)]
    assert_close(states[1]["state"], states[0]["state"], rtol=0, atol=0)
    assert states[1]["param_groups"] == states[0]["param_groups"]


# --------------------------------------------------------------------------------------------------
# Quantised bases
# --------------------------------------------------------------------------------------------------


class Quantized(nn.Linear):
    """A Linear that keeps 8-bit weights and a scale a row, and dequantises in every forward."""

    scale: Tensor

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=layer.bias is not None)
        self.bias = layer.bias
        weight = layer.weight.detach()
        scale = weight.abs().amax(1, keepdim=True) / 127
        self.register_buffer("scale", scale)
        self.store((weight / scale).round().to(torch.int8))

    def store(self, quantized: Tensor) -> None:
        """Keep the 8-bit weights."""
        self.weight = nn.Parameter(quantized, requires_grad=False)

    def stored(self) -> Tensor:
        """The 8-bit weights, in the shape of a weight."""
        return self.weight

    def dequantized(self) -> Tensor:
        """What the layer multiplies by."""
        return self.stored().to(self.scale.dtype) * self.scale

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.dequantized(), self.bias)


class QuantizedInBuffer(Quantized):
    """The same, with the weights in a buffer."""

    def store(self, quantized: Tensor) -> None:
        del self.weight
        self.register_buffer("weight", quantized)


class QuantizedAndPacked(Quantized):
    """The same, with a weight of unsigned bytes in one column, as 4-bit weights are packed."""

    def store(self, quantized: Tensor) -> None:
        self.weight = nn.Parameter(quantized.reshape(-1, 1).view(torch.uint8), requires_grad=False)

    def stored(self) -> Tensor:
        return self.weight.view(torch.int8).reshape(self.out_features, self.in_features)


QUANTIZED = pytest.mark.parametrize("kind", [Quantized, QuantizedInBuffer, QuantizedAndPacked])


def replace_linear(base: nn.Module, make: Callable[[nn.Linear], nn.Linear]) -> nn.Module:
    """The base with another layer for every Linear but the head, as bitsandbytes' integration does."""
    for name, module in list(base.named_modules()):
        if isinstance(module, nn.Linear) and name.rsplit(".", 1)[-1] not in ("lm_head", "classifier"):
            base.set_submodule(name, make(module))
    return base


def dequantized(layer: nn.Linear) -> nn.Linear:
    """A plain layer with exactly the weights that a quantised one of it computes with."""
    plain = copy.deepcopy(layer)
    plain.weight = nn.Parameter(Quantized(layer).dequantized(), requires_grad=False)
    return plain


@both_forms
@QUANTIZED
def test_a_quantized_base(kind: type[Quantized], step_size: str, tmp_path: Path) -> None:
    """The adapter trains exactly as on a base of the dequantised weights, and the base stays as it is, unwatched."""
    record, config = family("llama"), lora(target_modules="all-linear")
    models = {}
    for name, make in {"quantized": kind, "plain": dequantized}.items():
        models[name] = model = adapted(replace_linear(record.build(), make), config)
        before, adapter = values_of(model), trainable(model)
        assert all("lora_" in part for part in adapter)
        trainer = trainer_of(model, record, tmp_path / name, step_size=step_size)
        trainer.train()
        assert moved(before, model) == adapter
        rows = adafisher_of(trainer).coverage()
        by_hooks = step_size == "paper"
        rule = "Linear" if by_hooks else "gradient factors"
        assert {row.name: row.rule for row in rows} == dict.fromkeys(adapter, rule)
        assert hooked(model) == {module for row in rows for module in row.modules if by_hooks}
    layers = [module for module in models["quantized"].modules() if type(module) is kind]
    assert len(layers) == 14 and not any(layer.stored().is_floating_point() for layer in layers)
    plain = dict(models["plain"].named_parameters())
    for name, param in models["quantized"].named_parameters():
        if param.requires_grad:
            assert_close(param, plain[name], rtol=0, atol=0)


@QUANTIZED
def test_trainable_biases_of_a_quantized_base_take_gradient_factors(kind: type[Quantized], tmp_path: Path) -> None:
    """Such a layer is a Linear by class, but its stored weight is not what it multiplies by."""
    record = family("bert")
    config = lora(target_modules=BERT_LAYERS, bias="lora_only", task_type="SEQ_CLS")
    model = adapted(replace_linear(record.build(), kind), config)
    before, adapter = values_of(model), trainable(model)
    trainer = trainer_of(model, record, tmp_path)
    trainer.train()
    assert moved(before, model) == adapter
    rules = {row.name: row.rule for row in adafisher_of(trainer).coverage()}
    assert {name for name, rule in rules.items() if rule == "gradient factors"} == {
        name for name in adapter if name.endswith("base_layer.bias")
    }
    assert sum("base_layer.bias" in name for name in rules) == 4
    assert rules.keys() == adapter


# --------------------------------------------------------------------------------------------------
# Low precision
# --------------------------------------------------------------------------------------------------


def in_bfloat16() -> PeftModel:
    """Float32 adapters on a frozen base of bfloat16."""
    model = adapted(family("llama").build().to(torch.bfloat16), lora(target_modules="all-linear"))
    assert {param.dtype for param in model.parameters() if param.requires_grad} == {torch.float32}
    assert {param.dtype for param in model.parameters() if not param.requires_grad} == {torch.bfloat16}
    return model


def test_a_bfloat16_base_under_autocast(tmp_path: Path) -> None:
    """The base stays bitwise, in bfloat16; the adapter and its state are float32."""
    model = in_bfloat16()
    before, adapter = values_of(model), trainable(model)
    trainer = trainer_of(model, family("llama"), tmp_path, bf16=True, logging_steps=1)
    trainer.train()
    assert moved(before, model) == adapter
    assert {param.dtype for param in model.parameters() if not param.requires_grad} == {torch.bfloat16}
    optimizer = adafisher_of(trainer)
    assert {row.rule for row in optimizer.coverage()} == {"Linear"}
    for state in optimizer.state.values():
        assert {key: value.dtype for key, value in state.items() if value.dim()} == {
            "exp_avg": torch.float32,
            "input_factor": torch.float32,
            "output_grad_factor": torch.float32,
        }
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == STEPS and all(map(math.isfinite, losses))


def test_factors_under_autocast_are_those_of_the_tensors_that_flowed() -> None:
    """Mean squares of every adapter layer's input and output gradient, squared and summed in float64."""
    model = in_bfloat16()
    optimizer = AdaFisherW(model, lr=0.01, update_interval=1, ema_decay=0.0)
    seen: dict[str, dict[str, Tensor]] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            seen[name] = {"x": args[0].detach().double().flatten(0, -2).square().mean(0)}

            def catch(grad: Tensor) -> None:
                seen[name]["g"] = grad.double().flatten(0, -2).square().mean(0)

            output.register_hook(catch)

        return hook

    for row in optimizer.coverage():
        model.get_submodule(row.modules[0]).register_forward_hook(watch(row.name))
    for step in range(2):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            model(**family("llama").batch(seed=step)).loss.backward()
        optimizer.step()
    assert len(seen) == 28
    for name, sums in seen.items():
        raw = optimizer.fisher_diagonal(model.get_parameter(name), normalized=False)
        assert raw.dtype == torch.float32 and raw.any()
        assert_close(raw, torch.outer(sums["g"], sums["x"]).float(), rtol=1e-5, atol=0, msg=told(name))
