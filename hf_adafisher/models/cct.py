"""Compact Convolutional Transformer (Hassani et al. 2021, arXiv 2104.05704): CCT-2/3x2 and its relatives.

It is a transformer for small images. Convolutions make the tokens, and sequence pooling, a learned weighted average of
all tokens, replaces the class token.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import ImageClassifierOutputWithNoAttention

from hf_adafisher.models.losses import image_classification_loss


class CctConfig(PreTrainedConfig):
    """Configuration of a CCT; the defaults give CCT-2/3x2 for 32-pixel images, 0.28 M parameters for 10 classes.

    Attributes:
        image_size: Side of the square images, in pixels.
        num_channels: Channels of an image.
        kernel_size: Side of the tokenizer's kernels, odd.
        num_conv_layers: Tokenizer blocks of convolution, ReLU and 3x3 max pooling with stride 2.
        conv_width: Channels between the tokenizer's layers; the last layer has ``hidden_size`` channels.
        hidden_size: Width of the encoder, a multiple of ``num_attention_heads``.
        num_hidden_layers: Number of encoder layers.
        num_attention_heads: Attention heads per layer.
        mlp_ratio: Width of the MLP's hidden layer, in multiples of ``hidden_size``.
        attention_probs_dropout_prob: Dropout probability of attention weights.
        hidden_dropout_prob: Dropout probability after the position table and inside each MLP.
        drop_path_rate: Stochastic depth rate of the last layer; it rises linearly from 0 at the first layer.
        initializer_range: Standard deviation of new linear weights.
        layer_norm_eps: Epsilon of LayerNorm, added to the variance.

    Raises:
        ValueError: ``hidden_size`` is no multiple of ``num_attention_heads``, or ``kernel_size`` is even.
    """

    model_type = "cct"

    image_size: int = 32
    num_channels: int = 3
    kernel_size: int = 3
    num_conv_layers: int = 2
    conv_width: int = 64
    hidden_size: int = 128
    num_hidden_layers: int = 2
    num_attention_heads: int = 2
    mlp_ratio: float = 1.0
    attention_probs_dropout_prob: float = 0.1
    hidden_dropout_prob: float = 0.0
    drop_path_rate: float = 0.1
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-5

    def __post_init__(self, **kwargs: Any) -> None:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size is {self.hidden_size}, which {self.num_attention_heads} attention heads cannot share "
                "evenly; give a multiple of num_attention_heads"
            )
        if self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size is {self.kernel_size}; it must be odd, so that a convolution keeps the size")
        super().__post_init__(**kwargs)

    @property
    def grid_size(self) -> int:
        """Number of tokens along each side; every pooling layer halves it, rounding up."""
        side = self.image_size
        for _ in range(self.num_conv_layers):
            side = -(-side // 2)
        return side


class CctTokenizer(nn.Module):
    """Convolutional tokenizer."""

    def __init__(self, config: CctConfig) -> None:
        super().__init__()
        widths = [config.num_channels, *[config.conv_width] * (config.num_conv_layers - 1), config.hidden_size]
        self.convolutions = nn.ModuleList(
            nn.Conv2d(before, after, config.kernel_size, padding=config.kernel_size // 2, bias=False)
            for before, after in pairwise(widths)
        )
        self.activation = nn.ReLU()
        self.pooling = nn.MaxPool2d(3, stride=2, padding=1)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Map images (batch, channels, side, side) to tokens (batch, grid_size**2, hidden_size), row by row."""
        hidden = pixel_values
        for convolution in self.convolutions:
            hidden = self.pooling(self.activation(convolution(hidden)))
        return hidden.flatten(2).transpose(1, 2)


class CctAttention(nn.Module):
    """Multi-head self-attention without biases of queries, keys and values; a key's bias cancels in the softmax."""

    def __init__(self, config: CctConfig) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.dropout = config.attention_probs_dropout_prob
        self.query_key_value = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.output = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map tokens (batch, tokens, hidden_size) to the same shape."""
        batch, tokens, width = hidden.shape
        heads = self.query_key_value(hidden).view(batch, tokens, 3, self.num_heads, width // self.num_heads)
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        mixed = nn.functional.scaled_dot_product_attention(query, key, value, dropout_p=dropout)
        return self.output(mixed.transpose(1, 2).reshape(batch, tokens, width))


class CctDropPath(nn.Module):
    """Stochastic depth (Huang et al. 2016, arXiv 1603.09382): drop a branch for random examples during training.

    Args:
        rate: Probability of a drop, in [0, 1). Other examples are scaled by ``1 / (1 - rate)``.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, branch: Tensor) -> Tensor:
        """Drop examples, the first axis of ``branch``."""
        if not self.training or self.rate == 0.0:
            return branch
        keep = branch.new_empty(branch.shape[0], *[1] * (branch.dim() - 1)).bernoulli_(1.0 - self.rate)
        return branch * keep / (1.0 - self.rate)


class CctLayer(nn.Module):
    """Pre-norm encoder layer: attention and an MLP, each with a residual connection."""

    def __init__(self, config: CctConfig, drop_path: float) -> None:
        super().__init__()
        inner = int(config.hidden_size * config.mlp_ratio)
        self.norm_before = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = CctAttention(config)
        self.norm_after = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.intermediate = nn.Linear(config.hidden_size, inner)
        self.activation = nn.GELU()
        self.output = nn.Linear(inner, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.drop_path = CctDropPath(drop_path)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map tokens (batch, tokens, hidden_size) to the same shape."""
        hidden = hidden + self.drop_path(self.attention(self.norm_before(hidden)))
        inner = self.dropout(self.activation(self.intermediate(self.norm_after(hidden))))
        return hidden + self.drop_path(self.dropout(self.output(inner)))


class SequencePooling(nn.Module):
    """Average of all tokens, weighted by a softmax over a learned score per token.

    The score has no bias: the softmax would cancel it, and its gradient would always be zero.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.score = nn.Linear(width, 1, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens (batch, tokens, width) to vectors (batch, width)."""
        weights = self.score(tokens).softmax(dim=1)
        return (weights.transpose(1, 2) @ tokens).squeeze(1)


class CctPreTrainedModel(PreTrainedModel):
    """Base class of the CCT models: configuration and weight initialisation."""

    config: CctConfig
    config_class = CctConfig
    base_model_prefix = "cct"
    main_input_name = "pixel_values"
    input_modalities = ["image"]  # noqa: RUF012
    _no_split_modules = ["CctLayer"]  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            init.trunc_normal_(module.weight, std=self.config.initializer_range)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Conv2d):
            init.kaiming_normal_(module.weight)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, CctModel):
            init.trunc_normal_(module.position_embeddings, std=0.2)


class CctModel(CctPreTrainedModel):
    """CCT encoder without a classifier."""

    def __init__(self, config: CctConfig) -> None:
        super().__init__(config)
        self.tokenizer = CctTokenizer(config)
        self.position_embeddings = nn.Parameter(torch.zeros(1, config.grid_size**2, config.hidden_size))
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        rates = torch.linspace(0.0, config.drop_path_rate, config.num_hidden_layers, device="cpu").tolist()
        self.layers = nn.ModuleList(CctLayer(config, rate) for rate in rates)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.pooling = SequencePooling(config.hidden_size)
        self.post_init()

    def forward(self, pixel_values: Tensor, **kwargs: Any) -> Tensor:
        """Map images (batch, channels, side, side) to vectors (batch, hidden_size).

        Raises:
            ValueError: The shape of the images is not that of the configuration.
        """
        expected = (self.config.num_channels, self.config.image_size, self.config.image_size)
        if tuple(pixel_values.shape[1:]) != expected:
            raise ValueError(
                f"images have the shape {tuple(pixel_values.shape[1:])}; this CCT takes {expected} "
                "(channels, height, width): set image_size and num_channels"
            )
        hidden = self.dropout(self.tokenizer(pixel_values) + self.position_embeddings)
        for layer in self.layers:
            hidden = layer(hidden)
        return self.pooling(self.norm(hidden))


class CctForImageClassification(CctPreTrainedModel):
    """CCT with a linear classifier."""

    def __init__(self, config: CctConfig) -> None:
        super().__init__(config)
        self.num_labels = int(config.num_labels or 2)
        self.cct = CctModel(config)
        self.classifier = nn.Linear(config.hidden_size, self.num_labels)
        self.loss_function = image_classification_loss
        self.post_init()

    def forward(
        self, pixel_values: Tensor, labels: Tensor | None = None, return_dict: bool | None = None, **kwargs: Any
    ) -> ImageClassifierOutputWithNoAttention | tuple[Tensor, ...]:
        """Compute logits, and the loss if there are labels.

        Args:
            pixel_values: Images, shape (batch, channels, side, side).
            labels: Class numbers, shape (batch,), or class probabilities, shape (batch, num_labels).
            return_dict: False returns a tuple. Default: the output class of transformers.
            **kwargs: Arguments for the loss function.

        Returns:
            The loss, if there are labels, and logits of shape (batch, num_labels).
        """
        logits = self.classifier(self.cct(pixel_values))
        loss = None if labels is None else self.loss_function(labels, logits, self.config, **kwargs)
        if return_dict is False:
            return (logits,) if loss is None else (loss, logits)
        return ImageClassifierOutputWithNoAttention(loss=loss, logits=logits)


AutoConfig.register(CctConfig.model_type, CctConfig, exist_ok=True)
AutoModelForImageClassification.register(CctConfig, CctForImageClassification, exist_ok=True)
