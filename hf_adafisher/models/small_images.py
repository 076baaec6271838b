"""ResNet and Swin for images of 32 to 64 pixels; those of transformers are made for 224.

Both are registered with the auto classes of transformers, so that saved models load once this package is imported.
"""

from __future__ import annotations

from typing import Any, cast

from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    SwinConfig,
    SwinForImageClassification,
)
from transformers.models.resnet.modeling_resnet import ResNetConvLayer
from transformers.models.swin.modeling_swin import SwinAttention


class SmallImageResNetConfig(ResNetConfig):
    """Configuration of a ResNet whose stem is one 3x3 convolution with stride 1, without pooling."""

    model_type = "small_image_resnet"


class SmallImageResNetForImageClassification(ResNetForImageClassification):
    """ResNet as usual for CIFAR: the first stage works at the full resolution of the image.

    The ImageNet stem, a 7x7 convolution with stride 2 and max pooling, would reduce 32x32 pixels to 8x8.
    """

    config_class = SmallImageResNetConfig

    def __init__(self, config: SmallImageResNetConfig) -> None:
        super().__init__(config)
        stem = self.resnet.embedder
        stem.embedder = ResNetConvLayer(
            config.num_channels, config.embedding_size, kernel_size=3, stride=1, activation=config.hidden_act
        )
        stem.pooler = cast(Any, nn.Identity())
        self.post_init()  # initialises the new layer


class SmallImageSwinConfig(SwinConfig):
    """Configuration of a Swin whose windows are never larger than a stage's grid of patches."""

    model_type = "small_image_swin"


class SmallImageSwinForImageClassification(SwinForImageClassification):
    """Swin with each stage's window limited to its grid, as in the authors' code.

    The Swin of transformers limits the window in the forward pass, but not the table of relative positions. So it fails
    if the last stage's grid is smaller than the window.
    """

    config_class = SmallImageSwinConfig

    def __init__(self, config: SmallImageSwinConfig) -> None:
        super().__init__(config)
        for stage, heads in zip(self.swin.encoder.layers, cast(Any, config.num_heads), strict=True):
            for block in cast(Any, stage).blocks:
                side = min(block.input_resolution)
                if side < config.window_size:
                    width = block.layernorm_before.normalized_shape[0]
                    block.attention = SwinAttention(config, width, heads, window_size=side)
        self.post_init()  # initialises the new layers


for _config, _model in (
    (SmallImageResNetConfig, SmallImageResNetForImageClassification),
    (SmallImageSwinConfig, SmallImageSwinForImageClassification),
):
    AutoConfig.register(_config.model_type, _config)
    AutoModelForImageClassification.register(_config, _model)
