"""Training modes that accelerate is about to enter, read from its state; this package does not import it for that."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import Any

from hf_adafisher.optimizers.validation.training_modes import (
    DEEPSPEED,
    FSDP1,
    FSDP2,
    MEGATRON,
    TENSOR_PARALLEL,
    TrainingMode,
)

_ENGINES = {"DEEPSPEED": DEEPSPEED, "MEGATRON_LM": MEGATRON}


def accelerate_state() -> Mapping[str, Any]:
    """Return accelerate's knowledge of the run, empty where it is not in use.

    It is read where it is kept: ``AcceleratorState()`` would set the kind of distribution back to that before FSDP.
    """
    module = sys.modules.get("accelerate.state")
    return {} if module is None else module.AcceleratorState._shared_state


def unwrapped(optimizer: Any) -> Any:
    """Return the optimizer in accelerate's wrapper; any other as it is."""
    return getattr(optimizer, "optimizer", optimizer)


def modes_to_come() -> Iterator[TrainingMode]:
    """Yield the modes that accelerate enters once the optimizer is there."""
    state = accelerate_state()
    kind = str(getattr(state.get("distributed_type"), "value", None))
    if kind in _ENGINES:
        yield _ENGINES[kind]
    elif kind == "FSDP":
        yield FSDP1 if getattr(state.get("fsdp_plugin"), "fsdp_version", 1) == 1 else FSDP2
    mesh = state.get("parallelism_config")
    if mesh is not None and any(getattr(mesh, f"{axis}_enabled", False) for axis in ("tp", "cp", "sp")):
        yield TENSOR_PARALLEL
