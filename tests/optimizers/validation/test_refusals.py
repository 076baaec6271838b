"""Refusals when an optimizer is built: ways to run a model that hide its layers, and keywords that it does not have."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import accelerate.state
import pytest
import torch
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from hf_adafisher import (
    AdaFisher,
    AdaFisherTrainer,
    AdaFisherTrainingArguments,
    AdaFisherW,
    OptimizerFactory,
    SpectralAdaFisher,
    create_optimizer,
)
from hf_adafisher.optimizers.baselines.kfac import KFAC
from tests.cases import mlp
from tests.model_zoo import family

CPU: dict[str, Any] = {"use_cpu": True, "report_to": "none"}
INSTEAD = r"use DistributedDataParallel \(torchrun, one process a GPU\) or FSDP2"


def test_data_parallel_is_refused() -> None:
    with pytest.raises(ValueError, match=rf"AdaFisherW does not support nn\.DataParallel.*{INSTEAD}"):
        AdaFisherW(nn.DataParallel(mlp(3, 2)))


def test_a_replica_of_data_parallel_is_refused_before_any_work() -> None:
    """Trainer wraps the model after the optimizer was built: the first forward of a replica says it."""
    model = nn.Linear(3, 2)
    AdaFisherW(model)
    optimizer = AdaFisherW(model)
    replica: Any = model._replicate_for_data_parallel()
    replica.weight, replica.bias = model.weight * 1, model.bias * 1
    with pytest.raises(RuntimeError, match=r"nn\.DataParallel runs copies.*torchrun.*CUDA_VISIBLE_DEVICES"):
        replica(torch.randn(2, 3))
    optimizer.close()


def test_fsdp1_is_refused(process_group: None) -> None:
    wrapped = FullyShardedDataParallel(mlp(3, 2), device_id=torch.device("cpu"))
    with pytest.raises(ValueError, match=rf"does not support FSDP1 \(it gives.*{INSTEAD}"):
        AdaFisherW(wrapped)


def test_tensor_parallel_is_refused(process_group: None) -> None:
    model = mlp(4, 2, 2)
    parallelize_module(model, init_device_mesh("cpu", (1,), mesh_dim_names=("tp",)), {"0": ColwiseParallel()})
    with pytest.raises(ValueError, match=rf"does not support tensor, context or sequence parallelism.*{INSTEAD}"):
        AdaFisherW(model)
    nameless = mlp(4, 2, 2)
    parallelize_module(nameless, init_device_mesh("cpu", (1,)), {"0": ColwiseParallel()})
    with pytest.raises(ValueError, match="does not support tensor, context or sequence parallelism"):
        AdaFisherW(nameless)


def test_fsdp2_is_not_mistaken_for_tensor_parallel(process_group: None) -> None:
    from torch.distributed.fsdp import fully_shard

    AdaFisherW(fully_shard(mlp(4, 2, 2), mesh=init_device_mesh("cpu", (1,)))).close()


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"distributed_type": DistributedType.DEEPSPEED}, r"does not support DeepSpeed \(it gives"),
        ({"distributed_type": DistributedType.MEGATRON_LM}, r"does not support Megatron-LM \(it gives"),
        (
            {"distributed_type": DistributedType.FSDP, "fsdp_plugin": SimpleNamespace(fsdp_version=1)},
            r"does not support FSDP1 .*set fsdp_version to 2",
        ),
        ({"parallelism_config": SimpleNamespace(tp_enabled=True)}, "does not support tensor, context or sequence"),
        ({"parallelism_config": SimpleNamespace(cp_enabled=True)}, "does not support tensor, context or sequence"),
        ({"parallelism_config": SimpleNamespace(sp_enabled=True)}, "does not support tensor, context or sequence"),
    ],
)
@pytest.mark.parametrize("make", ["class", "name", "factory", "root", "spectral"])
def test_what_accelerate_is_about_to_do_is_refused(
    state: dict[str, Any], message: str, make: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its wrapping comes after the optimizer is built, so its state is asked."""
    fake = {"distributed_type": DistributedType.NO, **state}
    monkeypatch.setattr(accelerate.state.AcceleratorState, "_shared_state", fake)
    builders = {
        "class": lambda: AdaFisherW(mlp(3, 2)),
        "name": lambda: create_optimizer("adafisherw", mlp(3, 2), lr=0.1, step_size="paper"),
        "factory": lambda: OptimizerFactory()(mlp(3, 2), lr=0.1, step_size="paper"),
        "root": lambda: create_optimizer("adafisherw", mlp(3, 2), lr=0.1),
        "spectral": lambda: create_optimizer("spectral-adafisher", mlp(3, 2), lr=0.1),
    }
    if make in ("root", "spectral") and "tensor, context" in message:
        builders[make]()  # what a process sees of a layer does not matter
    else:
        with pytest.raises(ValueError, match=message):
            builders[make]()
    create_optimizer("adamw", mlp(3, 2), lr=0.1)  # the others do not care


def test_fsdp2_under_accelerate_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = {"distributed_type": DistributedType.FSDP, "fsdp_plugin": SimpleNamespace(fsdp_version=2)}
    monkeypatch.setattr(accelerate.state.AcceleratorState, "_shared_state", fake)
    AdaFisherW(mlp(3, 2)).close()


def test_arguments_refuse_deepspeed_and_fsdp1_and_accept_fsdp2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = AdaFisherTrainingArguments(str(tmp_path), **CPU)
    arguments.deepspeed = {"zero_optimization": {"stage": 2}}
    with pytest.raises(ValueError, match=r"does not support deepspeed.*Use fsdp \(FSDP2\) or torchrun"):
        arguments.set_optimizer("adafisherw")
    arguments.set_optimizer("adamw_torch")
    with pytest.raises(ValueError, match=r"does not support FSDP1.*Set fsdp_config\['version'\] to 2"):
        AdaFisherTrainingArguments(str(tmp_path), fsdp=True, fsdp_config={"version": 1}, **CPU)
    for name in [name for name in os.environ if name.startswith(("FSDP_", "ACCELERATE_USE_FSDP"))]:
        monkeypatch.delenv(name)
    assert AdaFisherTrainingArguments(str(tmp_path), fsdp=True, **CPU).optim == "adafisherw"
    for name in [name for name in os.environ if name.startswith(("FSDP_", "ACCELERATE_USE_FSDP"))]:
        monkeypatch.delenv(name)


def test_our_trainer_refuses_several_gpus_in_one_process(tmp_path: Path) -> None:
    arguments = AdaFisherTrainingArguments(str(tmp_path), step_size="paper", **CPU)
    trainer = AdaFisherTrainer(family("gpt2").build(), arguments)
    arguments._n_gpu = 2
    with pytest.raises(ValueError, match=r"does not support DataParallel \(2 GPUs in one process\).*torchrun"):
        trainer.create_optimizer()
    for optim in ("adafisherw", "spectral-adafisher"):  # without hooks
        arguments = AdaFisherTrainingArguments(str(tmp_path), optim=optim, **CPU)
        trainer = AdaFisherTrainer(family("gpt2").build(), arguments)
        arguments._n_gpu = 2
        trainer.create_optimizer()


MODEL = nn.Linear(3, 2)


@pytest.mark.parametrize(
    ("cls", "given", "advice"),
    [
        (AdaFisherW, {"betas": (0.9, 0.999)}, "write beta=betas[0]; its options are model, params, lr, beta, "),
        (AdaFisher, {"betas": (0.9, 0.999)}, "write beta=betas[0]; "),
        (SpectralAdaFisher, {"betas": (0.9, 0.999)}, "write beta=betas[0]; "),
        (KFAC, {"betas": (0.9, 0.999)}, "write momentum=betas[0]; "),
        (AdaFisherW, {"eps": 1e-8}, "write damping=...; "),
        (SpectralAdaFisher, {"eps": 1e-8}, "write relative_damping=...; "),
        (AdaFisherW, {"learning_rate": 1e-3}, "write lr=...; "),
        (AdaFisherW, {"lr": 0.1, "dampin": 0.1}, "write damping=...; "),
        (AdaFisherW, {"zzz": 0.1}, "its options are model, params, lr"),
    ],
)
def test_the_error_names_the_class_and_the_right_option(cls: type[Any], given: dict[str, Any], advice: str) -> None:
    wrong = [*given][-1]
    with pytest.raises(TypeError) as error:
        cls(MODEL, **given)
    assert str(error.value).startswith(f"{cls.__name__} has no option {wrong!r}") and advice in str(error.value)


def test_constructors_of_subclasses_have_their_own_keywords() -> None:
    class Mine(AdaFisherW):
        def __init__(self, model: nn.Module, extra: int = 0, **options: Any) -> None:
            super().__init__(model, **options)
            self.extra = extra

    class Exact(AdaFisherW):
        def __init__(self, model: nn.Module, *, rate: float) -> None:
            super().__init__(model, lr=rate)

    assert Mine(MODEL, extra=3, lr=0.1).extra == 3 and Exact(MODEL, rate=0.1).param_groups[0]["lr"] == 0.1
    with pytest.raises(TypeError, match="Exact has no option 'ratte': write rate="):
        Exact(MODEL, ratte=0.1)  # type: ignore[call-arg]
