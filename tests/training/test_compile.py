"""torch.compile: steps that refresh the factors run eagerly, all others compiled; never a silent loss of statistics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.testing import assert_close
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_adafisher import AdaFisherTrainer, AdaFisherTrainingArguments, AdaFisherW, OptimizerFactory
from tests.cases import mlp
from tests.model_zoo import family

RECORD = family("gpt2")
OPTIONS: dict[str, Any] = {
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
    "save_strategy": "no",
    "per_device_train_batch_size": 2,
    "train_sampling_strategy": "sequential",
    "max_steps": 8,
}
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


def train(folder: Path, **options: Any) -> tuple[AdaFisherTrainer, GraphCount]:
    arguments = AdaFisherTrainingArguments(str(folder), **{**OPTIONS, "update_interval": 3, **options})
    count = GraphCount()
    data = RECORD.dataset(16, seq=8)
    trainer = AdaFisherTrainer(RECORD.build(), arguments, train_dataset=data, callbacks=[count])
    trainer.train()
    return trainer, count


def test_compiled_training_equals_eager_training(tmp_path: Path) -> None:
    """Statistics on steps 0, 3 and 6; graphs are made at the first other step, and no more of them later."""
    compiled, count = train(tmp_path, **COMPILED)
    assert count.due == [True, False, False, True, False, False, True, False]
    assert count.graphs[0] == 0 < count.graphs[1]
    assert set(count.graphs[1:]) == {count.graphs[1]}
    optimizer = compiled.optimizer.optimizer
    assert optimizer.param_groups[0]["refreshes"] == 3
    assert {row.rule for row in optimizer.coverage()} == {"Conv1D", "Embedding", "Embedding+Linear", "LayerNorm"}
    eager, _ = train(tmp_path)
    assert_close(compiled.model.state_dict(), eager.model.state_dict(), rtol=1e-5, atol=1e-6)


def test_a_stock_trainer_that_compiles_is_refused_before_it_trains(tmp_path: Path) -> None:
    trainer = Trainer(
        RECORD.build(),
        TrainingArguments(str(tmp_path), **OPTIONS, **COMPILED),
        train_dataset=RECORD.dataset(16, seq=8),
        optimizer_cls_and_kwargs=(OptimizerFactory, {"name": "adafisherw", "lr": 0.02}),
    )
    with pytest.raises(ValueError, match="use AdaFisherTrainer, which runs the few steps that record eagerly"):
        trainer.train()
    other = Trainer(
        RECORD.build(),
        TrainingArguments(str(tmp_path), **{**OPTIONS, "max_steps": 1}, **COMPILED),
        train_dataset=RECORD.dataset(16, seq=8),
        optimizer_cls_and_kwargs=(OptimizerFactory, {"name": "adamw", "lr": 0.02}),
    )
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
    assert_close(optimizers[0].state_dict(), optimizers[1].state_dict())
    assert_close(model.state_dict(), twin.state_dict())


def test_a_model_compiled_before_its_optimizer_is_an_error_not_a_silent_fallback() -> None:
    model = mlp(4, 6, 3)
    compiled = torch.compile(model, backend="aot_eager")
    compiled(torch.randn(5, 4)).sum().backward()
    optimizer = AdaFisherW(model)
    compiled(torch.randn(5, 4)).sum().backward()
    with pytest.raises(RuntimeError, match=r"no layer recorded anything.*set_stance"):
        optimizer.step()


def test_a_compiled_model_given_to_our_trainer_records(tmp_path: Path) -> None:
    model: Any = torch.compile(RECORD.build(), backend="aot_eager")
    arguments = AdaFisherTrainingArguments(str(tmp_path), remove_unused_columns=False, update_interval=3, **OPTIONS)
    trainer = AdaFisherTrainer(model, arguments, train_dataset=RECORD.dataset(16, seq=8))
    trainer.train()
    optimizer = trainer.optimizer.optimizer
    assert optimizer.param_groups[0]["refreshes"] == 3
    assert "gradient factors" not in {row.rule for row in optimizer.coverage()}
    assert counters["stats"]["unique_graphs"] >= 1


def test_compiling_every_step_away_is_pointed_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    AdaFisherTrainingArguments(str(tmp_path), update_interval=1, **{**OPTIONS, **COMPILED})
    assert "torch_compile has no effect with update_interval=1" in caplog.text


def test_a_layer_in_eval_mode_is_not_mistaken_for_compilation() -> None:
    """Whether graphs were compiled in this process or not: an evaluating model records nothing, and is told so."""
    torch.compile(nn.Linear(2, 2), backend="eager")(torch.randn(1, 2))
    model = mlp(4, 3).eval()
    optimizer = AdaFisherW(model)
    model(torch.randn(5, 4)).sum().backward()
    optimizer.step()
    assert {row.rule for row in optimizer.coverage()} == {"gradient factors"}
