"""Configurations of image classifiers by name, adapted to the image size."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal

from transformers import (
    ConvNextConfig,
    FocalNetConfig,
    MobileNetV2Config,
    PreTrainedConfig,
    ResNetConfig,
    SwinConfig,
    TimmWrapperConfig,
    ViTConfig,
)

from hf_adafisher.models.cct import CctConfig
from hf_adafisher.models.small_images import SmallImageResNetConfig, SmallImageSwinConfig

SMALL_IMAGE = 64
"""Largest side, in pixels, for which networks take their variant for small images."""
TIMM_PREFIX = "timm/"

Kind = Literal["convolutional", "transformer"]
Options = Mapping[str, Any]


@dataclass(frozen=True)
class Architecture:
    """A network that can be trained from scratch.

    Attributes:
        kind: Family of the network. As in the paper, "convolutional" networks train with AdaFisher (L2), and
            "transformer" networks with AdaFisherW.
        summary: Description in one line.
        make: Function of image side and configuration options that creates a configuration.
    """

    kind: Kind
    summary: str
    make: Callable[[int, Options], PreTrainedConfig]


def _resnet(layer_type: str, depths: list[int]) -> Callable[[int, Options], PreTrainedConfig]:
    widths = [64, 128, 256, 512] if layer_type == "basic" else [256, 512, 1024, 2048]

    def make(image_size: int, options: Options) -> PreTrainedConfig:
        config_class = SmallImageResNetConfig if image_size <= SMALL_IMAGE else ResNetConfig
        return config_class(**{"layer_type": layer_type, "depths": depths, "hidden_sizes": widths, **options})

    return make


def _swin(image_size: int, options: Options) -> PreTrainedConfig:
    if image_size <= SMALL_IMAGE:
        small = {"image_size": image_size, "patch_size": 2, "window_size": 4}
        return SmallImageSwinConfig(**{**small, **options})
    return SwinConfig(**{"image_size": image_size, **options})


def _focalnet(image_size: int, options: Options) -> PreTrainedConfig:
    patch = 2 if image_size <= SMALL_IMAGE else 4
    return FocalNetConfig(**{"image_size": image_size, "patch_size": patch, "depths": [2, 2, 6, 2], **options})


def _vit(image_size: int, options: Options) -> PreTrainedConfig:
    size = {
        "image_size": image_size,
        "patch_size": 4 if image_size <= SMALL_IMAGE else 16,
        "hidden_size": 192,
        "num_hidden_layers": 12,
        "num_attention_heads": 3,
        "intermediate_size": 768,
    }
    return ViTConfig(**{**size, **options})


def _convnext(image_size: int, options: Options) -> PreTrainedConfig:
    return ConvNextConfig(
        **{"image_size": image_size, "patch_size": 2 if image_size <= SMALL_IMAGE else 4, "drop_path_rate": 0.1}
        | dict(options)
    )


def _mobilenetv2(image_size: int, options: Options) -> PreTrainedConfig:
    # With output_stride 8 the later strides become dilations: 32 pixels end as a 4x4 grid instead of one point.
    small = {"output_stride": 8} if image_size <= SMALL_IMAGE else {}
    return MobileNetV2Config(**{"image_size": image_size, **small, **options})


def _cct(image_size: int, options: Options) -> PreTrainedConfig:
    return CctConfig(**{"image_size": image_size, **options})


def _timm(name: str) -> Callable[[int, Options], PreTrainedConfig]:
    def make(image_size: int, options: Options) -> PreTrainedConfig:
        require_timm(TIMM_PREFIX + name)
        return TimmWrapperConfig(**{"architecture": name, **options})

    return make


ARCHITECTURES: dict[str, Architecture] = {
    "resnet18": Architecture("convolutional", "ResNet-18", _resnet("basic", [2, 2, 2, 2])),
    "resnet50": Architecture("convolutional", "ResNet-50", _resnet("bottleneck", [3, 4, 6, 3])),
    "resnet101": Architecture("convolutional", "ResNet-101", _resnet("bottleneck", [3, 4, 23, 3])),
    "swin-t": Architecture("transformer", "Swin-T, patches of 2 and windows of 4 for small images", _swin),
    "focalnet-t": Architecture("transformer", "FocalNet-T, patches of 2 for small images", _focalnet),
    "vit": Architecture("transformer", "ViT-Ti, patches of 4 for small images, else of 16", _vit),
    "convnext": Architecture("convolutional", "ConvNeXt-T, patches of 2 for small images", _convnext),
    "mobilenetv2": Architecture("convolutional", "MobileNetV2, total stride 8 for small images", _mobilenetv2),
    "cct-2-3x2": Architecture("transformer", "CCT-2/3x2 (Hassani et al. 2021), for small images", _cct),
    "densenet121": Architecture("convolutional", "DenseNet-121, from timm", _timm("densenet121")),
    "mobilenetv3": Architecture("convolutional", "MobileNetV3-Large, from timm", _timm("mobilenetv3_large_100")),
}

_TRANSFORMER_WORDS = (
    "vit",
    "swin",
    "deit",
    "beit",
    "dino",
    "focalnet",
    "cct",
    "cait",
    "xcit",
    "former",
    "siglip",
    "clip",
)


def available_architectures() -> list[str]:
    """List the names of networks to train from scratch; ``timm/NAME`` is accepted too."""
    return list(ARCHITECTURES)


def require_timm(name: str) -> None:
    """Check that timm can be imported; it needs a torchvision built for this torch.

    Raises:
        ImportError: It cannot; the message names the model and the packages to install.
    """
    try:
        import_module("timm")
    # A torchvision of another build raises RuntimeError when timm imports it.
    except (ImportError, RuntimeError) as error:
        raise ImportError(
            f"the model {name!r} is one of timm's, which cannot be imported ({error}): "
            "pip install timm, together with the torchvision that belongs to your torch (https://pytorch.org)"
        ) from error


def scratch_config(name: str, *, image_size: int, options: Options | None = None) -> PreTrainedConfig:
    """Create the configuration of a network for an image size.

    Args:
        name: One of ``available_architectures()``, or ``timm/NAME``.
        image_size: Side of the square images, in pixels. Up to 64, the variant for small images is used.
        options: Attributes that replace those of the configuration, such as ``num_labels``, depths and widths.

    Returns:
        The configuration.

    Raises:
        ValueError: The name is unknown, or the image size is not a multiple of the patch size.
        ImportError: The name needs timm, which is not installed.
    """
    if name.startswith(TIMM_PREFIX):
        config = _timm(name.removeprefix(TIMM_PREFIX))(image_size, options or {})
    elif name in ARCHITECTURES:
        config = ARCHITECTURES[name].make(image_size, options or {})
    else:
        near = difflib.get_close_matches(name.lower(), ARCHITECTURES, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise ValueError(
            f"unknown network {name!r}{hint} Known: {', '.join(ARCHITECTURES)}, and timm/NAME where timm is "
            "installed. For pretrained weights use --model_name_or_path"
        )
    check_image_size(config, image_size)
    return config


def check_image_size(config: PreTrainedConfig, image_size: int) -> None:
    """Check that images can be divided into the model's patches.

    Raises:
        ValueError: The image size is not positive or not a multiple of the patch size.
    """
    if image_size < 1:
        raise ValueError(f"image_size is {image_size}; it must be a positive number of pixels")
    patch = getattr(config, "patch_size", None)
    for side in patch if isinstance(patch, (list, tuple)) else [patch]:
        if isinstance(side, int) and side > 0 and image_size % side:
            lower, upper = image_size - image_size % side, image_size - image_size % side + side
            sizes = f"{lower} or {upper}" if lower else f"{upper}"
            raise ValueError(
                f"image_size is {image_size}, not a multiple of the model's patch of {side} pixels: "
                f"use --image_size {sizes}"
            )


def vision_part(config: PreTrainedConfig) -> PreTrainedConfig:
    """Configuration of the vision encoder: a part of it for CLIP and SigLIP, else ``config`` itself."""
    return getattr(config, "vision_config", config)


def image_side(config: PreTrainedConfig) -> int | None:
    """Image side of a configuration in pixels; None if it has none."""
    size = getattr(config, "image_size", None)
    return int(size[0]) if isinstance(size, (list, tuple)) else size


def model_kind(config: PreTrainedConfig) -> Kind:
    """Family of a network: "transformer" if it has attention or focal modulation, else "convolutional".

    Timm models are classified by name, all others by the type and the attention heads of their configuration.
    """
    if config.model_type == "timm_wrapper":
        name = str(getattr(config, "architecture", "")).lower()
        return "transformer" if any(word in name for word in _TRANSFORMER_WORDS) else "convolutional"
    if config.model_type in ("resnet", "small_image_resnet", "convnext", "convnextv2", "mobilenet_v2"):
        return "convolutional"
    heads = ("num_attention_heads", "num_self_attention_heads", "num_heads", "focal_levels")
    attention = any(getattr(vision_part(config), key, None) for key in heads)
    return "transformer" if attention else "convolutional"
