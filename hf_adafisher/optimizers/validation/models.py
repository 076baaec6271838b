"""Checks of models and parameters: training modes that hide layers or parameters, dtypes that cannot be trained."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from hf_adafisher.optimizers.sharding import is_sharded
from hf_adafisher.optimizers.validation.environment import modes_to_come
from hf_adafisher.optimizers.validation.training_modes import (
    DATA_PARALLEL,
    DEEPSPEED,
    FSDP1,
    FSDP2,
    TENSOR_PARALLEL,
    Needs,
    TrainingMode,
)

_OTHER_MESH_AXES = frozenset({"tp", "cp", "sp", "pp", "ep"})


def check_model(model: nn.Module, kind: str, needs: Needs) -> None:
    """Check that the model is in no training mode, and about to enter none, that breaks the optimizer's needs.

    Args:
        model: The model.
        kind: The optimizer's name, for the message.
        needs: Its needs.

    Raises:
        ValueError: It is in such a mode; the message holds the reason and the remedy.
    """
    for mode in modes_of(model):
        if mode.refused_by(needs):
            raise ValueError(mode.refusal(kind, needs))


def modes_of(model: nn.Module) -> Iterator[TrainingMode]:
    """Yield the modes that wrap or split the model, and those that accelerate is about to enter."""
    fsdp1 = getattr(sys.modules.get("torch.distributed.fsdp"), "FullyShardedDataParallel", ())
    if any(isinstance(module, nn.DataParallel) for module in model.modules()):
        yield DATA_PARALLEL
    if any(isinstance(module, fsdp1) for module in model.modules()):
        yield FSDP1
    if type(model).__module__.partition(".")[0] == "deepspeed":
        yield DEEPSPEED
    if any(is_sharded(p) for p in model.parameters()):
        yield TENSOR_PARALLEL if _other_parallelism(model) else FSDP2
    yield from modes_to_come()


def check_parameters(params: Iterable[Any], kind: str, needs: Needs) -> None:
    """Check parameters of the model that an optimizer gets.

    FSDP2 replaces parameters, possibly after the optimizer was built.

    Args:
        params: The parameters.
        kind: The optimizer's name, for the message.
        needs: Its needs.

    Raises:
        ValueError: One is not real floating-point, or sharded although the optimizer needs it whole.
    """
    for p in params:
        if not p.is_floating_point():
            raise ValueError(
                f"{kind} trains real floating-point parameters, got one of {p.dtype} and shape {tuple(p.shape)}"
            )
        if FSDP2.refused_by(needs) and is_sharded(p):
            raise ValueError(FSDP2.refusal(kind, needs))


def _other_parallelism(model: nn.Module) -> bool:
    """Whether parameters are DTensors of something else than FSDP2."""
    sharded = [p for p in model.parameters() if is_sharded(p)]
    if any(_OTHER_MESH_AXES & set(p.device_mesh.mesh_dim_names or ()) for p in sharded):  # type: ignore[attr-defined]
        return True
    fsdp2 = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", ())
    return bool(sharded) and not any(isinstance(module, fsdp2) for module in model.modules())
