"""torch.compile: steps that refresh the factors run eagerly, all others compiled; never a silent loss of statistics."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.testing import assert_close
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_adafisher import AdaFisherTrainer, AdaFisherTrainingArguments, AdaFisherW, OptimizerFactory
from hf_adafisher.optimizers.base.hooked import HookedOptimizer
from hf_adafisher.optimizers.baselines.kfac import KFAC
from tests.cases import mlp
from tests.equivalence import assert_same_training
from tests.model_zoo import family
from tests.training_helper import built, make_trainer, of_form, optimizer_of

RECORD = family("gpt2")
OPTIONS: dict[str, Any] = {
    "per_device_train_batch_size": 2,
    "train_sampling_strategy": "sequential",
    "max_steps": 8,
    "train_dataset": RECORD.dataset(16, seq=8),
}
WITHOUT_HOOKS = ["root", "spectral"]
COMPILED = {"torch_compile": True, "torch_compile_backend": "aot_eager"}


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Any:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()
    counters.clear()


class GraphCount(TrainerCallback):
    """How many graphs were compiled after each step, and whether the step was due."""

    def __init__(self) -> None:
        self.graphs: list[int] = []
        self.due: list[bool] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.due.append(kwargs["optimizer"].optimizer.refresh_due)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.graphs.append(counters["stats"]["unique_graphs"])


def train(
    folder: Path, *, model: Any = None, resume: Path | None = None, form: str = "paper", **options: Any
) -> tuple[AdaFisherTrainer, GraphCount]:
    count = GraphCount()
    given = {"model": RECORD.build() if model is None else model, "callbacks": [count], "update_interval": 3}
    chosen = of_form(form, learning_rate=0.02, damping=3e-3, **(OPTIONS | given | options))
    trainer = make_trainer(folder, RECORD, **chosen)
    trainer.train(None if resume is None else str(resume))
    return trainer, count


def test_compiled_training_equals_eager_training(tmp_path: Path) -> None:
    """Statistics on steps 0, 3 and 6; graphs are made at the first other step, and no more of them later."""
    compiled, count = train(tmp_path, **COMPILED)
    assert count.due == [True, False, False, True, False, False, True, False]
    assert count.graphs[0] == 0 < count.graphs[1]
    assert set(count.graphs[1:]) == {count.graphs[1]}
    optimizer = optimizer_of(compiled)
    assert optimizer.param_groups[0]["refreshes"] == 3
    assert {row.rule for row in optimizer.coverage()} == {"Conv1D", "Embedding", "Embedding+Linear", "LayerNorm"}
    eager, _ = train(tmp_path)
    assert_close(compiled.model.state_dict(), eager.model.state_dict(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", WITHOUT_HOOKS)
@pytest.mark.parametrize("trainer", [AdaFisherTrainer, Trainer])
def test_without_hooks_every_step_is_compiled_under_any_trainer(
    form: str, trainer: type[Trainer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is refused and no step runs eagerly; weights are those of the run that is not compiled."""
    monkeypatch.setattr(torch.compiler, "set_stance", lambda *_: pytest.fail("a step was to run eagerly"))
    record, runs = family("llama"), []  # GPT-2's keys have a bias without a gradient: steps of rounding noise
    for compiled in (False, True):
        count = GraphCount()
        chosen: dict[str, Any] = {"model": record.build(), "train_dataset": record.dataset(16, seq=8)}
        chosen |= {"max_steps": 4, "callbacks": [count], **(COMPILED if compiled else {})}
        if trainer is AdaFisherTrainer:
            chosen |= of_form(form, learning_rate=0.02)
        else:
            named = of_form(form, lr=0.02)
            chosen["optimizer_cls_and_kwargs"] = OptimizerFactory, named | {"name": named.pop("optim")}
        run = make_trainer(tmp_path, record, trainer, **(OPTIONS | chosen))
        run.train()
        runs.append(run)
    assert count.due == [True] * 4 and count.graphs[0] > 0 and set(count.graphs) == {count.graphs[0]}
    assert_close(runs[1].model.state_dict(), runs[0].model.state_dict(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", WITHOUT_HOOKS)
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_without_hooks_a_compiled_model_trains_in_a_plain_loop(form: str, backend: str) -> None:
    """Compiled before or after its optimizer is built, and ``eager_if_due`` leaves it compiled."""
    weights = []
    for how in ("not", "before", "after"):
        torch.manual_seed(0)
        model = mlp(4, 6, 3)
        compiled = torch.compile(model, backend=backend) if how == "before" else model
        optimizer = built(form, compiled, lr=0.02)
        compiled = torch.compile(model, backend=backend) if how == "after" else compiled
        for _ in range(5):
            with optimizer.eager_if_due():
                compiled(torch.randn(5, 4)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        weights.append(model.state_dict())
    assert counters["stats"]["unique_graphs"] > 0
    assert_close(weights[1], weights[0])
    assert_close(weights[2], weights[0])


@pytest.mark.slow
def test_a_stock_trainer_that_compiles_is_refused_before_it_trains(tmp_path: Path) -> None:
    factory = (OptimizerFactory, {"name": "adafisherw", "lr": 0.02, "step_size": "paper"})
    trainer = make_trainer(tmp_path, RECORD, Trainer, optimizer_cls_and_kwargs=factory, **OPTIONS, **COMPILED)
    with pytest.raises(ValueError, match="use AdaFisherTrainer, which runs the few steps that record eagerly"):
        trainer.train()
    options = {"optimizer_cls_and_kwargs": (OptimizerFactory, {"name": "adamw", "lr": 0.02}), "max_steps": 1}
    other = make_trainer(tmp_path, RECORD, Trainer, **(OPTIONS | COMPILED | options))
    other.train()  # what records nothing may be compiled


def test_eager_due_steps_under_a_stance_in_a_plain_loop() -> None:
    torch.manual_seed(0)
    model, twin = mlp(4, 6, 3), mlp(4, 6, 3)
    twin.load_state_dict(model.state_dict())
    compiled = torch.compile(model, backend="aot_eager")
    optimizers = AdaFisherW(model, lr=0.02, update_interval=3), AdaFisherW(twin, lr=0.02, update_interval=3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(7):
        x = torch.randn(5, 4, generator=generator)
        with torch.compiler.set_stance("force_eager" if optimizers[0].refresh_due else "default"):
            compiled(x).square().mean().backward()
        twin(x).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert counters["stats"]["unique_graphs"] == 1
    assert_close(*(optimizer.state_dict()["state"] for optimizer in optimizers))
    assert_close(model.state_dict(), twin.state_dict())


def test_a_model_compiled_before_its_optimizer_is_an_error_not_a_silent_fallback() -> None:
    model = mlp(4, 6, 3)
    compiled = torch.compile(model, backend="aot_eager")
    compiled(torch.randn(5, 4)).sum().backward()
    optimizer = AdaFisherW(model)
    compiled(torch.randn(5, 4)).sum().backward()
    with pytest.raises(RuntimeError, match=r"no layer in a compiled Sequential recorded anything.*set_stance"):
        optimizer.step()


def compile_blocks(model: Any) -> Any:
    """Every block by itself, in place."""
    for block in model.transformer.h:
        block.compile(backend="aot_eager")
    return model


def compile_model(model: Any) -> Any:
    """The whole model in place."""
    model.compile(backend="aot_eager")
    return model


def compile_forwards(model: Any) -> Any:
    """The method of each block."""
    for block in model.transformer.h:
        block.forward = torch.compile(block.forward, backend="aot_eager")
    return model


def compile_wrapper(model: Any) -> Any:
    """A wrapper of the model, of which the model knows nothing."""
    return torch.compile(model, backend="aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("how", [compile_blocks, compile_model, compile_forwards])
def test_layers_compiled_in_place_record_also_after_a_resume(how: Callable[[Any], Any], tmp_path: Path) -> None:
    """Resumed in the middle of an interval, what is compiled first are graphs without hooks, which would stay so."""
    eager, _ = train(tmp_path / "eager", save_strategy="steps", save_steps=4)
    compiled, count = train(tmp_path / "compiled", model=how(RECORD.build()))
    assert count.graphs[0] == 0 < count.graphs[1] and set(count.graphs[1:]) == {count.graphs[1]}
    assert_same_training(compiled, eager, rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()
    counters.clear()
    resumed, count = train(tmp_path / "resumed", model=how(RECORD.build(1)), resume=tmp_path / "eager" / "checkpoint-4")
    assert count.due == [False, False, True, False]
    assert 0 < count.graphs[0] == count.graphs[-1]
    assert_same_training(resumed, eager, rtol=1e-4, atol=1e-5)
    assert optimizer_of(resumed).param_groups[0]["refreshes"] == 3


@pytest.mark.slow
def test_regional_compilation_equals_eager_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """accelerate's, from its environment variable: new containers around the same layers."""
    eager, _ = train(tmp_path)
    monkeypatch.setenv("ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION", "1")
    compiled, count = train(tmp_path, **COMPILED)
    assert type(compiled.model_wrapped.transformer.h[0]).__name__ == "OptimizedModule"
    assert count.graphs[0] == 0 < count.graphs[1] and set(count.graphs[1:]) == {count.graphs[1]}
    assert_same_training(compiled, eager, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_compiled_model_given_to_our_trainer_records(tmp_path: Path) -> None:
    trainer, count = train(tmp_path, model=compile_wrapper(RECORD.build()), remove_unused_columns=False)
    optimizer = optimizer_of(trainer)
    assert optimizer.param_groups[0]["refreshes"] == 3
    assert "gradient factors" not in {row.rule for row in optimizer.coverage()}
    assert count.graphs[0] == 0 < count.graphs[1] and set(count.graphs[1:]) == {count.graphs[1]}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kind", "own"), [("adafisherw", AdaFisherW, {"step_size": "paper"}), ("kfac", KFAC, {})]
)
def test_the_factory_may_build_optimizers_for_our_trainer_that_compiles(
    name: str, kind: type, own: dict[str, Any], tmp_path: Path
) -> None:
    options = {"optimizer_cls_and_kwargs": (OptimizerFactory, {"name": name, "lr": 0.02, **own}), "max_steps": 2}
    trainer = make_trainer(tmp_path, RECORD, AdaFisherTrainer, TrainingArguments, **(OPTIONS | COMPILED | options))
    trainer.train()
    optimizer = optimizer_of(trainer)
    assert type(optimizer) is kind and optimizer.param_groups[0]["refreshes"] == 1
    assert counters["stats"]["unique_graphs"] > 0


@pytest.mark.parametrize("trainer", [Trainer, AdaFisherTrainer])
@pytest.mark.parametrize("name", ["adahessian", "sophia"])
def test_second_derivatives_and_compilation_are_refused_by_the_factory(
    name: str, trainer: type[Trainer], tmp_path: Path
) -> None:
    factory = (OptimizerFactory, {"name": name, "lr": 0.02})
    options = {**OPTIONS, **COMPILED, "optimizer_cls_and_kwargs": factory}
    run = make_trainer(tmp_path, RECORD, trainer, TrainingArguments, **options)
    with pytest.raises(ValueError, match=f"{name} needs second derivatives.*unset torch_compile"):
        run.train()


@pytest.mark.parametrize("kind", [AdaFisherW, KFAC])
def test_a_stock_trainer_that_compiles_is_refused_with_an_optimizer_older_than_its_arguments(
    kind: type, tmp_path: Path
) -> None:
    """At the first step, before anything has moved."""
    model = RECORD.build()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = kind(model, lr=0.02)
    given = {"model": model, "optimizers": (optimizer, None)}
    compiling = make_trainer(tmp_path, RECORD, Trainer, **given, **OPTIONS, **COMPILED)
    message = f"{kind.__name__} records its statistics with hooks.*use AdaFisherTrainer"
    with torch.compiler.set_stance("force_eager"), pytest.raises(ValueError, match=message):
        compiling.train()  # eagerly, since hooks take long to compile
    assert_close(dict(model.state_dict()), before, rtol=0, atol=0)


class Block(nn.Module):
    """A layer in a class of its own: torch does not compile its own containers and layers in place."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.layer = nn.Linear(inputs, outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x).tanh()


class Blocks(nn.Module):
    """Two of them, the second compiled in place or not."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Block(4, 6), Block(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x))


def resumed_in_an_interval(model: nn.Module, call: Callable[[torch.Tensor], torch.Tensor]) -> AdaFisherW:
    """An optimizer with a state from elsewhere, three steps before its next refresh; the model is compiled in them."""
    other = Blocks()
    writer = AdaFisherW(other, lr=0.01, damping=0.1, update_interval=4)
    optimizer = AdaFisherW(model, lr=0.01, damping=0.1, update_interval=4)
    other(torch.randn(5, 4)).square().mean().backward()
    writer.step()
    optimizer.load_state_dict(writer.state_dict())
    for _ in range(3):
        call(torch.randn(5, 4)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert optimizer.refresh_due and counters["stats"]["unique_graphs"] > 0
    call(torch.randn(5, 4)).square().mean().backward()
    return optimizer


@pytest.mark.parametrize("part", ["whole", "wrapper", "block"])
def test_stale_statistics_are_an_error_in_a_loop_without_a_stance(part: str) -> None:
    """All blocks were compiled without hooks, or one alone: its averages would stay what they are for good."""
    torch.manual_seed(0)
    model: Any = Blocks()
    call: Any = model
    if part == "wrapper":
        call = torch.compile(model, backend="eager")
    else:
        (model if part == "whole" else model.second).compile(backend="eager")
    optimizer = resumed_in_an_interval(model, call)
    with pytest.raises(RuntimeError, match=r"compiled Blocks? recorded anything.*set_stance"):
        optimizer.step()


def test_what_a_compiled_function_hides_is_an_error() -> None:
    """torch does not tell which models a compiled function calls, but no layer at all has recorded anything."""
    torch.manual_seed(0)
    model = Blocks()
    optimizer = resumed_in_an_interval(model, torch.compile(lambda x: model(x), backend="eager"))
    with pytest.raises(RuntimeError, match=r"compiled Blocks recorded anything.*eager_if_due.*set_stance"):
        optimizer.step()


def test_what_a_compiled_function_hides_of_a_model_is_said(caplog: pytest.LogCaptureFixture) -> None:
    """It calls one block only, and the other records: a warning, and the averages of the first stay."""
    torch.manual_seed(0)
    model = Blocks()
    first = torch.compile(lambda x: model.first(x), backend="eager")
    optimizer = resumed_in_an_interval(model, lambda x: model.second(first(x)))
    before = {p: optimizer.fisher_diagonal(p).clone() for p in model.first.parameters()}
    optimizer.step()
    optimizer.step()
    assert caplog.text.count("recorded nothing") == 1 and "their averages stay as they are" in caplog.text
    for p, diagonal in before.items():
        assert_close(optimizer.fisher_diagonal(p), diagonal, rtol=0, atol=0)


def test_layers_that_are_not_called_beside_a_compiled_model(caplog: pytest.LogCaptureFixture) -> None:
    """The layers record nothing because they are used without being called; ``eager_if_due`` rules compilation out."""
    other = torch.compile(nn.Linear(4, 4), backend="eager")
    other(torch.randn(1, 4))
    assert counters["stats"]["unique_graphs"] == 1

    def loss(model: nn.Sequential) -> torch.Tensor:
        return nn.functional.linear(torch.randn(5, 4), model[0].weight, model[0].bias).sum()

    model = nn.Sequential(nn.Linear(4, 3))
    optimizer = AdaFisherW(model)
    loss(model).backward()
    with pytest.raises(RuntimeError, match="eager_if_due"):
        optimizer.step()
    with optimizer.eager_if_due():
        loss(model).backward()
    optimizer.step()
    assert {row.rule for row in optimizer.coverage()} == {"gradient factors"}
    assert caplog.text.count("recorded nothing") == 1 and "gradient factors are used instead" in caplog.text


def test_update_kernels_are_not_taken_for_a_compiled_model(caplog: pytest.LogCaptureFixture) -> None:
    """Layers that are used without being called are warned of, also where ``compiled=True`` has compiled the update."""
    model = nn.Sequential(nn.Linear(400, 400))
    optimizer = AdaFisherW(model, lr=1e-3, update_interval=2, compiled=True)
    for step in range(4):
        x = torch.randn(2, 400)
        loss = model(x) if step < 2 else nn.functional.linear(x, model[0].weight, model[0].bias)
        loss.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert counters["stats"]["unique_graphs"] > 0 and "torch.compile does not work" not in caplog.text


@pytest.mark.parametrize("kind", [AdaFisherW, KFAC])
def test_eager_if_due_equals_eager_training(kind: type[HookedOptimizer]) -> None:
    torch.manual_seed(0)
    model, twin = mlp(4, 6, 3), mlp(4, 6, 3)
    twin.load_state_dict(model.state_dict())
    compiled = torch.compile(model, backend="aot_eager")
    options: Any = {"lr": 0.02, "update_interval": 3} | ({"inverse_interval": 3} if kind is KFAC else {})
    optimizers = kind(model, **options), kind(twin, **options)
    generator = torch.Generator().manual_seed(0)
    for _ in range(7):
        x = torch.randn(5, 4, generator=generator)
        with optimizers[0].eager_if_due():
            compiled(x).square().mean().backward()
        twin(x).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert counters["stats"]["unique_graphs"] == 1
    assert_close(model.state_dict(), twin.state_dict())


def test_compiling_every_step_away_is_pointed_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    AdaFisherTrainingArguments(str(tmp_path), update_interval=1, use_cpu=True, **COMPILED)
    assert "no effect" not in caplog.text  # by the root nothing is recorded
    AdaFisherTrainingArguments(str(tmp_path), step_size="paper", update_interval=1, use_cpu=True, **COMPILED)
    assert "torch_compile has no effect with update_interval=1" in caplog.text


def test_a_layer_in_eval_mode_is_not_mistaken_for_compilation() -> None:
    """Whether graphs were compiled in this process or not: BatchNorm in eval mode (E19) records nothing, as is said."""
    torch.compile(nn.Linear(2, 2), backend="eager")(torch.randn(1, 2))
    model = nn.BatchNorm1d(4).eval()
    optimizer = AdaFisherW(model)
    model(torch.randn(5, 4)).sum().backward()
    optimizer.step()
    assert {row.rule for row in optimizer.coverage()} == {"gradient factors"}
