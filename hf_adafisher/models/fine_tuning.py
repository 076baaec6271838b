"""Fine-tuning: frozen backbones and layer-wise learning rate decay."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import PreTrainedModel

from hf_adafisher.models.vision import head_parameter_names


def freeze_backbone(model: PreTrainedModel) -> list[str]:
    """Freeze all parameters outside the classifier, and the running statistics of BatchNorm layers.

    Frozen BatchNorm layers use their running statistics during training too, so that the features stay those of the
    pretrained model.

    Returns:
        Names of the parameters that remain trainable.

    Raises:
        ValueError: The model has no parameter outside its backbone.
    """
    head = set(head_parameter_names(model))
    if not head:
        raise ValueError(f"{type(model).__name__} has no classifier besides its backbone: nothing would be trained")
    for name, param in model.named_parameters():
        param.requires_grad_(name in head)
    for module in model.modules():
        params = list(module.parameters(recurse=False))
        if isinstance(module, _BatchNorm) and not any(param.requires_grad for param in params):
            module.register_forward_pre_hook(_use_running_statistics)
    return [name for name, param in model.named_parameters() if param.requires_grad]


def _use_running_statistics(module: nn.Module, _: tuple[Any, ...]) -> None:
    module.eval()  # Trainer sets the whole model to training mode before every step


def layer_depths(model: PreTrainedModel) -> tuple[dict[str, int], int]:
    """Depth of every parameter, and of the head.

    Parameters before the first block (patch embedding, positions, stem) have depth 0. The backbone's blocks have depths
    1 to L, counted over all stages. Parameters after them (last norm, classifier) have depth L + 1. Layers between two
    blocks, such as downsampling, have the depth of the previous block of their stage, else of the next one.

    Returns:
        Depths by parameter name, and L + 1.

    Raises:
        ValueError: No list of blocks is found in the model.
    """
    blocks = _blocks(model)
    if not blocks:
        raise ValueError(f"no list of blocks is found in {type(model).__name__}: layer_decay cannot be used with it")
    head, after = set(head_parameter_names(model)), len(blocks) + 1
    depths, reached = {}, 0  # parameters come in the order in which a model's parts are made
    for name, _ in model.named_parameters():
        in_block = next((depth for depth, (block, _) in enumerate(blocks, 1) if name.startswith(block + ".")), None)
        stage = next((stage for _, stage in blocks if name.startswith(stage + ".")), None)
        if in_block is not None:
            depths[name] = reached = in_block
        elif name in head:
            depths[name] = after
        elif stage is not None:
            depths[name] = reached if reached and blocks[reached - 1][1] == stage else reached + 1
        else:
            depths[name] = after if reached else 0
    return depths, after


def layer_decay_scales(model: PreTrainedModel, decay: float) -> dict[str, float]:
    """Learning rate factors of layer-wise decay: ``decay ** (depth of the head - depth of the parameter)``.

    Args:
        model: An image classifier.
        decay: Value in (0, 1]; 1 scales nothing. Fine-tuned vision transformers often use 0.65 to 0.9.

    Returns:
        Factors by name, for the trainable parameters.

    Raises:
        ValueError: ``decay`` is outside (0, 1], or the model has no list of blocks.
    """
    if not 0.0 < decay <= 1.0:
        raise ValueError(f"layer_decay is {decay}; it must be in (0, 1], where 1 scales nothing")
    depths, head = layer_depths(model)
    return {name: decay ** (head - depths[name]) for name, param in model.named_parameters() if param.requires_grad}


def scale_groups(
    groups: list[dict[str, Any]], model: nn.Module, scales: Mapping[str, float], learning_rate: float
) -> list[dict[str, Any]]:
    """Split parameter groups so that every parameter has the learning rate ``learning_rate`` times its scale.

    Args:
        groups: Parameter groups of a torch optimizer; their other options are kept.
        model: Model whose parameter names ``scales`` uses.
        scales: Factors by parameter name; see ``layer_decay_scales``. Default of a missing one: 1.
        learning_rate: Learning rate at scale 1.

    Returns:
        New groups with all parameters, each with an ``lr``, in an order that depends on the model alone.
    """
    by_id = {id(param): scales.get(name, 1.0) for name, param in model.named_parameters()}
    split: list[dict[str, Any]] = []
    for group in groups:
        parts: dict[float, list[Tensor]] = {}
        for param in group["params"]:
            parts.setdefault(by_id.get(id(param), 1.0), []).append(param)
        for scale in sorted(parts):
            split.append({**group, "params": parts[scale], "lr": learning_rate * scale})
    return split


def _blocks(model: PreTrainedModel) -> list[tuple[str, str]]:
    """Names of the blocks and of their stages, in order.

    Stages are the elements of the largest list of modules outside the classifier. A block is a stage, or an element of
    the stage's own list.
    """
    names = set(head_parameter_names(model))
    head = {id(param) for name, param in model.named_parameters() if name in names}
    largest, stages = 0, []
    for name, module in model.named_modules():
        if _is_list(module) and not any(id(param) in head for param in module.parameters()):
            elements = [(f"{name}.{key}", child) for key, child in module.named_children() if _num_values(child)]
            if len(elements) > 1 and _num_values(module) > largest:
                largest, stages = _num_values(module), elements
    return [(block, key) for key, stage in stages for block in _stage_blocks(key, stage)]


def _stage_blocks(name: str, stage: nn.Module) -> list[str]:
    if _is_list(stage):
        return [f"{name}.{key}" for key, block in stage.named_children() if _num_values(block)]
    for inner, module in stage.named_children():
        if _is_list(module) and inner in ("layers", "blocks") and 2 * _num_values(module) > _num_values(stage):
            return [f"{name}.{inner}.{key}" for key, _ in module.named_children()]
    return [name]


def _is_list(module: nn.Module) -> bool:
    return isinstance(module, (nn.ModuleList, nn.Sequential))


def _num_values(module: nn.Module) -> int:
    return sum(param.numel() for param in module.parameters())
