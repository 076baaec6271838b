"""Errors that name the value, the allowed range and the way out, before any work is lost."""

from __future__ import annotations

import logging
import math
import numbers
import sys
from collections.abc import Iterable, Mapping, Set
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer

from hf_adafisher.optimizers.sharding import is_sharded

if TYPE_CHECKING:
    from hf_adafisher.optimizers.base.hooked import HookedOptimizer

logger = logging.getLogger(__name__)

ADAFISHER_KEYS = frozenset({"damping", "ema_decay", "update_interval"})
"""Options that the saved groups of AdaFisher(W) have and those of other optimizers lack."""

SPECTRAL_KEYS = frozenset({"relative_damping", "ema_decay", "update_interval"})
"""The same of SpectralAdaFisher."""

KFAC_KEYS = frozenset({"damping", "stat_decay", "inverse_interval", "kl_clip"})
"""The same of K-FAC."""


def _number(name: str, value: Any) -> float:
    several = isinstance(value, torch.Tensor) and value.numel() != 1
    if isinstance(value, bool) or several or not isinstance(value, (numbers.Real, torch.Tensor)):
        raise ValueError(f"{name} must be a number, got {value!r}")
    try:
        number = float(value)
    except OverflowError:
        raise ValueError(f"{name} must be finite, got a whole number of more than 300 digits") from None
    if number == 0.0 and math.copysign(1.0, number) < 0.0:
        raise ValueError(f"{name} must not be negative zero, by which a division gives -inf: got -0.0, write 0.0")
    return number


def dtype_option(group: Mapping[str, Any], option: str, default: torch.dtype | None = None) -> torch.dtype | None:
    """The dtype that an option of a group names, ``default`` where it is None or absent.

    Raises:
        ValueError: It names no floating-point dtype, or one of 8 bits, in which torch does not calculate.
    """
    name = group.get(option)
    if name is None:
        return default
    dtype = name if isinstance(name, torch.dtype) else getattr(torch, str(name).removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point or dtype.itemsize == 1:
        raise ValueError(
            f"{option} must be None ({_DTYPE_OPTIONS[option]}) or a floating-point dtype of 16 bits or more, such as "
            f"'float32', got {name!r}"
        )
    return dtype


def plain_dtypes(group: dict[str, Any]) -> None:
    """Write a group's dtypes as words, which every kind of checkpoint can hold."""
    for option in _DTYPE_OPTIONS.keys() & group.keys():
        if group[option] is not None:
            group[option] = str(dtype_option(group, option)).removeprefix("torch.")


_DTYPE_OPTIONS = {"momentum_dtype": "that of the parameter", "polar_dtype": "bfloat16, on a CPU that of the statistics"}
"""Options that name a dtype, and what None means."""

_WHOLE_MODELS = "use DistributedDataParallel (torchrun, one process a GPU)"
_DATA_PARALLEL = f"{_WHOLE_MODELS} or FSDP2 (fully_shard)"
_OTHER_MESH_AXES = frozenset({"tp", "cp", "sp", "pp", "ep"})


def check_model(model: nn.Module, kind: str, shards: bool = True) -> None:
    """Check that the model's layers see whole batches of their process and that its parameters are whole or FSDP2's.

    Args:
        model: The model.
        kind: The optimizer's name, for the message.
        shards: Whether the optimizer works with FSDP2.

    Raises:
        ValueError: It is wrapped or split in a way that hides them; the message says what to use instead.
    """
    fsdp1 = getattr(sys.modules.get("torch.distributed.fsdp"), "FullyShardedDataParallel", ())
    reason = None
    if any(isinstance(module, nn.DataParallel) for module in model.modules()):
        reason = "nn.DataParallel (it runs copies of the model in threads, whose statistics would be mixed up)"
    elif any(isinstance(module, fsdp1) for module in model.modules()):
        reason = "FSDP1 (it gives the optimizer flat shards instead of parameters)"
    elif type(model).__module__.partition(".")[0] == "deepspeed":
        reason = "DeepSpeed (it gives the optimizer flat shards instead of parameters)"
    elif _other_parallelism(model):
        reason = "tensor, context or pipeline parallelism (a process then sees a part of a layer or of the model)"
    else:
        reason = _refused_by_accelerate()
    if (
        reason is None
        and not shards
        and (shards_to_come() == "FSDP2" or any(is_sharded(p) for p in model.parameters()))
    ):
        reason = SHARDED
    if reason is not None:
        raise ValueError(f"{kind} does not support {reason}: {_DATA_PARALLEL if shards else _WHOLE_MODELS}")


SHARDED = "FSDP2 (its statistics need the whole of a layer's gradient in one process)"


def refuse_shards(params: Iterable[Any], kind: str) -> None:
    """Raises ValueError where FSDP2 has sharded one of the parameters since the optimizer was built."""
    if any(is_sharded(p) for p in params):
        raise ValueError(f"{kind} does not support {SHARDED}: {_WHOLE_MODELS}")


def shards_to_come() -> str | None:
    """What accelerate is about to take the parameters apart with: Deepspeed, Megatron-Lm, FSDP1, FSDP2 or None."""
    state = accelerate_state()
    kind = str(getattr(state.get("distributed_type"), "value", None))
    if kind == "FSDP":
        return "FSDP1" if getattr(state.get("fsdp_plugin"), "fsdp_version", 1) == 1 else "FSDP2"
    return {"DEEPSPEED": "Deepspeed", "MEGATRON_LM": "Megatron-Lm"}.get(kind)


def _other_parallelism(model: nn.Module) -> bool:
    """Whether parameters are DTensors of something else than FSDP2."""
    sharded = [p for p in model.parameters() if is_sharded(p)]
    if any(_OTHER_MESH_AXES & set(p.device_mesh.mesh_dim_names or ()) for p in sharded):  # type: ignore[attr-defined]
        return True
    fsdp2 = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", ())
    return bool(sharded) and not any(isinstance(module, fsdp2) for module in model.modules())


def accelerate_state() -> Mapping[str, Any]:
    """What accelerate knows of the run, empty where it is not in use; this package does not import it for that.

    It is read where it is kept: ``AcceleratorState()`` would set the kind of distribution back to that before FSDP.
    """
    module = sys.modules.get("accelerate.state")
    return {} if module is None else module.AcceleratorState._shared_state


def unwrapped(optimizer: Any) -> Any:
    """The optimizer in accelerate's wrapper; any other as it is."""
    return getattr(optimizer, "optimizer", optimizer)


def _refused_by_accelerate() -> str | None:
    """What accelerate is about to do to the model that AdaFisher does not support."""
    kind = shards_to_come()
    if kind not in (None, "FSDP2"):
        remedy = "; set fsdp_version to 2" if kind == "FSDP1" else ""
        return f"{kind} (it gives the optimizer flat shards instead of parameters{remedy})"
    mesh = accelerate_state().get("parallelism_config")
    if mesh is not None and any(getattr(mesh, f"{axis}_enabled", False) for axis in ("tp", "cp", "sp")):
        return "tensor, context or sequence parallelism (a process then sees a part of a layer or of the sequence)"
    return None


def check_size(name: str, value: Any, *, positive: bool = False, why: str = "") -> None:
    """Raises ValueError unless ``value`` is finite and >= 0 (``positive``: > 0); ``why`` is appended to the message."""
    number = _number(name, value)
    if not (math.isfinite(number) and number >= 0.0) or (positive and number == 0.0):
        raise ValueError(f"{name} must be finite and {'>' if positive else '>='} 0, got {number}{why}")


def check_decay(name: str, value: Any) -> None:
    """Raises ValueError unless ``value`` lies in [0, 1)."""
    number = _number(name, value)
    if not 0.0 <= number < 1.0:
        raise ValueError(f"{name} must lie in [0, 1), got {number}")


def check_count(name: str, value: Any, unit: str) -> None:
    """Raises ValueError unless ``value`` is a whole number >= 1 of ``unit``."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
        raise ValueError(f"{name} must be a whole number of {unit} >= 1, got {value!r}")


def check_flag(name: str, value: Any) -> None:
    """Raises ValueError unless ``value`` is True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {value!r}")


def check_shared(name: str, group: Mapping[str, Any], first: Mapping[str, Any]) -> None:
    """Raises ValueError where a group's option differs from the first group's and the hooks need one for all."""
    if group[name] != first[name]:
        raise ValueError(
            f"{name} must be the same in all parameter groups, since the hooks serve them all at once: "
            f"got {group[name]} beside {first[name]}"
        )


def check_real(params: Iterable[Any], kind: str) -> None:
    """Raises ValueError for a parameter that is not real floating-point."""
    for p in params:
        if not p.is_floating_point():
            raise ValueError(
                f"{kind} trains real floating-point parameters, got one of {p.dtype} and shape {tuple(p.shape)}"
            )


def check_factor_options(group: Mapping[str, Any], first: Mapping[str, Any], kind: str) -> None:
    """Check the options that all optimizers with factors share, in one parameter group.

    Args:
        group: The group.
        first: The optimizer's first group, whose ``update_interval`` all others share.
        kind: The optimizer's name, for the messages.

    Raises:
        ValueError: An option is outside its range, or a parameter is complex.
    """
    check_size("lr", group["lr"])
    check_size("weight_decay", group["weight_decay"])
    for name in ("beta", "ema_decay"):
        check_decay(name, group[name])
    dtype_option(group, "momentum_dtype")
    check_count("update_interval", group["update_interval"], "steps")
    check_shared("update_interval", group, first)
    check_real(group["params"], kind)


def check_options(group: Mapping[str, Any], first: Mapping[str, Any], kind: str) -> None:
    """``check_factor_options``, and those of AdaFisher(W)."""
    check_size("damping", group["damping"], positive=True, why=f": it is the smallest value that {kind} divides by")
    check_factor_options(group, first, kind)


def check_spectral_options(group: Mapping[str, Any], first: Mapping[str, Any], kind: str) -> None:
    """``check_factor_options``, and those of SpectralAdaFisher."""
    check_size(
        "relative_damping",
        group["relative_damping"],
        positive=True,
        why=": it is what a row or a column without any gradient is divided by, in units of the average",
    )
    for name in ("input_exponent", "output_exponent"):
        value = _number(name, group[name])
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"{name} must lie in [0, 1], got {value}: 0.5 is the rule's, 0 leaves the factor out")
    for name in ("spectral_heads", "nesterov"):
        check_flag(name, group[name])
    if group["max_relative_step"] is not None:
        why = ": it is the largest step of a parameter with more than one axis in units of its norm, None for no bound"
        check_size("max_relative_step", group["max_relative_step"], positive=True, why=why)
    dtype_option(group, "polar_dtype")
    check_factor_options(group, first, kind)


def check_kind(kind: str, keys: Set[str], decoupled: bool | None, groups: Iterable[Mapping[str, Any]]) -> None:
    """Check that saved parameter groups were written by this kind of optimizer; torch loads any without a word.

    Args:
        kind: The optimizer's name, for the message.
        keys: Options that its groups have and those of other kinds lack.
        decoupled: Its ``decoupled_weight_decay``, by which Adam differs from AdamW; None where it has no such option.
        groups: ``state_dict["param_groups"]``.

    Raises:
        ValueError: They were not.
    """
    for group in groups:
        saved = group.get("decoupled_weight_decay", decoupled)
        if not group.keys() >= keys or saved != decoupled:
            raise foreign_checkpoint(kind, group)


def foreign_checkpoint(kind: str, options: Mapping[str, Any], writers: str = "") -> ValueError:
    """The error about a checkpoint with these options, which are not those of ``kind``."""
    hidden = ("params", "param_names", "initial_lr")
    shown = ", ".join(f"{key}={value}" for key, value in sorted(options.items()) if key not in hidden)
    looks = f"; they are {writers}'s" if writers else ""
    return ValueError(
        f"this checkpoint was not written by {kind} (its options are {shown}{looks}): resume with the optimizer that "
        "wrote it, or start without the optimizer state"
    )


def warn_changed_options(optimizer: Optimizer, state_dict: Mapping[str, Any], names: Iterable[str]) -> None:
    """Say which of these options a checkpoint is about to change from what the optimizer was built with."""
    names = list(names)
    changed = {
        f"{name}: {group[name]} -> {saved[name]}"
        for group, saved in zip(optimizer.param_groups, state_dict["param_groups"], strict=False)
        for name in names
        if name in group and name in saved and group[name] != saved[name]
    }
    if changed:
        logger.warning(
            "The checkpoint's options replace those given to the optimizer (%s). To change them, set them in "
            "optimizer.param_groups after loading.",
            ", ".join(sorted(changed)),
        )


def check_checkpoint(optimizer: HookedOptimizer, state_dict: Mapping[str, Any]) -> None:
    """Check that a saved state belongs to this kind of optimizer and to this model.

    Raises:
        ValueError: It does not; the message says what it looks like instead.
    """
    groups = state_dict["param_groups"]
    check_kind(type(optimizer).__name__, optimizer.checkpoint_keys, optimizer.decoupled, groups)
    saved_ids = [i for group in groups for i in group["params"]]
    params = optimizer._params()
    if len(saved_ids) != len(params):
        return  # torch's own message says which groups differ
    for saved_id, p in zip(saved_ids, params, strict=True):
        saved = state_dict["state"].get(saved_id)
        if saved:
            expected = optimizer.state_shapes(p)
            found = {key: tuple(value.shape) for key, value in saved.items()}
            if found != expected:
                raise ValueError(
                    f"the saved state of {optimizer._statistics.name_of(p)} does not fit the model: saved {found}, "
                    f"needed {expected}; "
                    "resume with the model, and the version of hf_adafisher, that the checkpoint was written with, or "
                    "start without the optimizer state"
                )
