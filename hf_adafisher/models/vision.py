"""Creation of image classifiers: new ones by name, and pretrained ones with a new head and image size."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedConfig, PreTrainedModel

from hf_adafisher.models.configurations import (
    TIMM_PREFIX,
    Options,
    check_image_size,
    image_side,
    require_timm,
    scratch_config,
)
from hf_adafisher.models.losses import use_image_loss

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadReport:
    """Use of a checkpoint's weights in a model.

    Attributes:
        kept: Parameters and buffers loaded without change.
        resized: Position tables interpolated to another number of patches.
        new: Initialised parameters: missing in the checkpoint, or of another shape there.
        unused: Names in the checkpoint that the model does not have.
    """

    kept: tuple[str, ...]
    resized: tuple[str, ...]
    new: tuple[str, ...]
    unused: tuple[str, ...]

    def __str__(self) -> str:
        """Describe the report in one line for the log."""
        parts = [f"kept {len(self.kept)} tensors"]
        for title, names in (("interpolated", self.resized), ("new", self.new), ("unused", self.unused)):
            shown = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
            parts.append(f"{title}: {shown or 'none'}")
        return "; ".join(parts)


def create_model(
    name: str, class_names: Sequence[str], *, image_size: int, options: Options | None = None
) -> PreTrainedModel:
    """Create a classifier with new float32 weights, which depend on torch's seed only.

    Args:
        name: One of ``available_architectures()``, or ``timm/NAME`` if timm is installed.
        class_names: Names of the classes by number, at least 2.
        image_size: Side of the square images, in pixels.
        options: Attributes that replace those of the configuration, such as depths and widths.

    Returns:
        The model, with ``image_classification_loss``.

    Raises:
        ValueError: The name is unknown, there are fewer than 2 classes, or the image size is not a multiple of the
            patch size or not accepted by the network.
        ImportError: The name needs timm, which is not installed.
    """
    config = scratch_config(name, image_size=image_size, options={**(options or {}), **_labels(class_names)})
    model = AutoModelForImageClassification.from_config(config, dtype=torch.float32)
    check_forward(model, image_size)
    return use_image_loss(model)


def load_pretrained(
    name_or_path: str,
    class_names: Sequence[str],
    *,
    image_size: int | None = None,
    hub: Mapping[str, Any] | None = None,
) -> tuple[PreTrainedModel, LoadReport]:
    """Load a pretrained model with a classification head for the given classes, in float32.

    A head of the same shape is kept; any other is replaced by a new one. For another image size than the model's,
    absolute position tables are interpolated (bicubic, as in transformers).

    Args:
        name_or_path: Model id on the Hub, ``timm/NAME`` included, or a folder.
        class_names: Names of the classes by number, at least 2.
        image_size: Side of the square images, in pixels. Default: the model's own.
        hub: Arguments of ``from_pretrained`` for the Hub, such as ``revision`` and ``token``.

    Returns:
        The model, with ``image_classification_loss``, and a report of the loaded weights, which is logged too.

    Raises:
        ValueError: The checkpoint is of another task or modality, there are fewer than 2 classes, or the image size is
            not a multiple of the patch size or not accepted by the model.
        OSError: The model does not exist, or is neither cached nor reachable.
        ImportError: The model needs timm, which is not installed.
    """
    if name_or_path.startswith(TIMM_PREFIX):
        require_timm(name_or_path)
    config = AutoConfig.from_pretrained(name_or_path, **(hub or {}))
    if config.model_type == "timm_wrapper":
        require_timm(name_or_path)
    if type(config) not in AutoModelForImageClassification._model_mapping:
        raise ValueError(
            f"{name_or_path!r} is a checkpoint of the model type {config.model_type!r}, which classifies no images: "
            "give an image model, or a network from scratch with --model"
        )
    if image_size is not None:
        check_image_size(config, image_size)
    model, info = AutoModelForImageClassification.from_pretrained(
        name_or_path,
        dtype=torch.float32,
        ignore_mismatched_sizes=True,  # the old head
        output_loading_info=True,
        **(hub or {}),
        **_labels(class_names),
    )
    new = sorted({*info["missing_keys"], *(key[0] for key in info["mismatched_keys"])})
    _check_backbone_loaded(name_or_path, model, new)
    resized: list[str] = []
    if image_size is not None:
        model, resized = resize_positions(model, image_size)
    touched = {*new, *resized}
    kept = tuple(key for key in model.state_dict() if key not in touched)
    report = LoadReport(kept, tuple(resized), tuple(new), tuple(sorted(info["unexpected_keys"])))
    logger.info("%s: %s", name_or_path, report)
    if image_size is not None:
        check_forward(model, image_size)
    return use_image_loss(model), report


def _labels(class_names: Sequence[str]) -> dict[str, Any]:
    if len(class_names) < 2:
        raise ValueError(f"a classifier needs at least 2 classes, got {list(class_names)}")
    id2label = dict(enumerate(class_names))
    return {"num_labels": len(class_names), "id2label": id2label, "label2id": {v: k for k, v in id2label.items()}}


def _check_backbone_loaded(name: str, model: PreTrainedModel, new: Sequence[str]) -> None:
    backbone = {key for key, _ in model.named_parameters()} - set(head_parameter_names(model))
    missing = backbone & set(new)
    if 2 * len(missing) > len(backbone):
        raise ValueError(
            f"{name!r} is a checkpoint of another task or architecture: {len(missing)} of {len(backbone)} parameters "
            f"of the backbone are not in it (for example {sorted(missing)[0]!r}); give an image model's checkpoint"
        )


def head_parameter_names(model: PreTrainedModel) -> list[str]:
    """Names of the classifier's parameters: all outside the base model, or those of timm's ``get_classifier``."""
    timm_model = getattr(model, "timm_model", None)
    if timm_model is not None:
        head = {id(p) for p in timm_model.get_classifier().parameters()}
    else:
        head = {id(p) for p in model.parameters()} - {id(p) for p in model.base_model.parameters()}
    return [name for name, param in model.named_parameters() if id(param) in head]


def resize_positions(model: PreTrainedModel, image_size: int) -> tuple[PreTrainedModel, list[str]]:
    """Adapt a model to another image size.

    A model without an image size in its configuration, or with this one, is returned unchanged. Otherwise a model of
    the new size gets all weights, with absolute position tables interpolated.

    Args:
        model: The model.
        image_size: Side of the square images, in pixels.

    Returns:
        The model, and the names of the interpolated position tables.

    Raises:
        ValueError: Weights other than absolute position tables depend on the image size.
    """
    old_size = image_side(model.config)
    if old_size in (None, image_size) or model.config.model_type == "timm_wrapper":
        return model, []
    config: PreTrainedConfig = copy.deepcopy(model.config)
    config.image_size = image_size
    with torch.random.fork_rng(devices=[]):  # the seed is for the head, which is already there
        other = type(model)(config)
    state, new_state = model.state_dict(), other.state_dict()
    resized = [key for key, value in state.items() if value.shape != new_state[key].shape]
    for key in resized:
        if "position_embedding" not in key or state[key].dim() not in (2, 3):
            raise ValueError(
                f"a {model.config.model_type} model of image size {old_size} cannot be used at {image_size} pixels: "
                f"its {key!r} depends on the size; use --image_size {old_size}"
            )
        state[key] = interpolate_positions(state[key], new_state[key].shape[-2])
    other.load_state_dict(state)
    return other.train(model.training), resized


def interpolate_positions(table: Tensor, length: int) -> Tensor:
    """Interpolate an absolute position table to another number of positions (bicubic).

    Args:
        table: Position table, shape (..., positions, width). Special tokens come first, then a square grid of patches,
            row by row.
        length: New number of positions, special tokens included.

    Returns:
        Table of shape (..., length, width); rows of special tokens are unchanged.

    Raises:
        ValueError: No number of special tokens makes both grids square.
    """
    positions, width = table.shape[-2:]
    for special in range(positions):
        old, new = round((positions - special) ** 0.5), round(max(length - special, 0) ** 0.5)
        if old * old == positions - special and new and new * new == length - special:
            break
    else:
        raise ValueError(f"a position table of {positions} cannot be interpolated to {length} positions")
    flat = table.reshape(positions, width)
    grid = flat[special:].reshape(1, old, old, width).permute(0, 3, 1, 2)
    grid = nn.functional.interpolate(grid.float(), size=(new, new), mode="bicubic", align_corners=False)
    patches = grid.permute(0, 2, 3, 1).reshape(new * new, width).to(table.dtype)
    return torch.cat([flat[:special], patches]).reshape(*table.shape[:-2], length, width)


def check_forward(model: PreTrainedModel, image_size: int) -> None:
    """Check that a model classifies one blank image of the given size; its mode is restored.

    Raises:
        ValueError: The forward pass fails, or its logits have the wrong shape.
    """
    channels = getattr(model.config, "num_channels", None) or 3
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            logits = model(pixel_values=torch.zeros(1, channels, image_size, image_size, device=model.device)).logits
    except (ValueError, RuntimeError, AssertionError) as error:  # the last from timm
        raise ValueError(
            f"this {model.config.model_type} model does not take images of {image_size} pixels ({error}): "
            "use another --image_size"
        ) from error
    finally:
        model.train(training)
    if logits.shape != (1, model.config.num_labels):
        raise ValueError(f"the model gave logits of shape {tuple(logits.shape)}, not (1, {model.config.num_labels})")
