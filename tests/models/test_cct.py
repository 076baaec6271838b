"""CCT against the paper: size, shapes, and forwards written out slowly."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageClassification

from hf_adafisher.models import CctConfig, CctForImageClassification, CctModel
from hf_adafisher.models.cct import CctAttention, CctDropPath, CctTokenizer, SequencePooling


def small(**options: int | float) -> CctConfig:
    """A narrow one."""
    return CctConfig(
        **{
            "image_size": 12,
            "conv_width": 6,
            "hidden_size": 8,
            "num_labels": 3,
            "attention_probs_dropout_prob": 0.0,
            "drop_path_rate": 0.0,
            **options,
        }
    )


def test_cct_2_3x2_has_the_papers_size() -> None:
    """0.28 M parameters at 32 pixels: counted part by part."""
    model = CctForImageClassification(CctConfig(num_labels=10))
    width = 128
    tokenizer = 3 * 64 * 9 + 64 * width * 9
    attention = width * 3 * width + width * width + width
    layer = attention + 2 * (width * width + width) + 2 * 2 * width
    head = 2 * width + width + (width * 10 + 10)
    expected = tokenizer + 8 * 8 * width + 2 * layer + head
    assert sum(param.numel() for param in model.parameters()) == expected
    assert round(expected / 1e6, 2) == 0.28


@pytest.mark.parametrize(("side", "layers", "grid"), [(32, 2, 8), (32, 1, 16), (28, 2, 7), (30, 2, 8), (13, 3, 2)])
def test_the_tokenizer_halves_the_image_per_layer(side: int, layers: int, grid: int) -> None:
    config = small(image_size=side, num_conv_layers=layers)
    assert config.grid_size == grid
    assert CctTokenizer(config)(torch.randn(2, 3, side, side)).shape == (2, grid * grid, 8)


def test_the_tokenizer_is_convolution_relu_and_max_pooling() -> None:
    """One layer, pixel by pixel."""
    config = small(image_size=5, num_conv_layers=1)
    tokenizer = CctTokenizer(config).double()
    image = torch.randn(1, 3, 5, 5, dtype=torch.float64)
    weight = tokenizer.convolutions[0].weight.detach()

    def pixel(channel: int, i: int, j: int) -> float:
        total = 0.0
        for c in range(3):
            for a in range(3):
                for b in range(3):
                    if 0 <= i + a - 1 < 5 and 0 <= j + b - 1 < 5:
                        total += float(weight[channel, c, a, b] * image[0, c, i + a - 1, j + b - 1])
        return max(total, 0.0)

    expected = torch.empty(9, 8, dtype=torch.float64)
    for row in range(3):
        for column in range(3):
            near = [(i, j) for i in range(2 * row - 1, 2 * row + 2) for j in range(2 * column - 1, 2 * column + 2)]
            near = [(i, j) for i, j in near if 0 <= i < 5 and 0 <= j < 5]
            for channel in range(8):
                expected[3 * row + column, channel] = max(pixel(channel, i, j) for i, j in near)
    torch.testing.assert_close(tokenizer(image)[0], expected)


def slow_pooling(tokens: Tensor, weight: Tensor) -> Tensor:
    """One image: softmax of every token's score, then the weighted sum, in plain loops."""
    scores = [
        sum(float(w) * float(x) for w, x in zip(weight[0].tolist(), token, strict=True)) for token in tokens.tolist()
    ]
    exponentials = [math.exp(score - max(scores)) for score in scores]
    shares = [value / sum(exponentials) for value in exponentials]
    return torch.tensor(
        [sum(s * float(token[k]) for s, token in zip(shares, tokens, strict=True)) for k in range(tokens.shape[1])],
        dtype=torch.float64,
    )


def test_sequence_pooling_is_its_definition() -> None:
    pooling = SequencePooling(5).double()
    tokens = torch.randn(3, 7, 5, dtype=torch.float64)
    expected = torch.stack([slow_pooling(image, pooling.score.weight) for image in tokens])
    torch.testing.assert_close(pooling(tokens), expected)
    nn.init.zeros_(pooling.score.weight)
    torch.testing.assert_close(pooling(tokens), tokens.mean(dim=1))


def test_attention_equals_torchs() -> None:
    config = small()
    attention = CctAttention(config).double()
    twin = nn.MultiheadAttention(8, 2, bias=True, batch_first=True, dtype=torch.float64)
    with torch.no_grad():
        twin.in_proj_weight.copy_(attention.query_key_value.weight)
        twin.in_proj_bias.zero_()
        twin.out_proj.weight.copy_(attention.output.weight)
        twin.out_proj.bias.copy_(attention.output.bias)
    tokens = torch.randn(2, 6, 8, dtype=torch.float64)
    torch.testing.assert_close(attention(tokens), twin(tokens, tokens, tokens, need_weights=False)[0])


def test_the_encoder_equals_torchs_pre_norm_layer() -> None:
    config = small(mlp_ratio=2.0)
    model = CctModel(config).double().eval()
    pixels = torch.randn(2, 3, 12, 12, dtype=torch.float64)
    hidden = model.tokenizer(pixels) + model.position_embeddings
    for layer in model.layers:
        twin = nn.TransformerEncoderLayer(
            8, 2, 16, 0.0, "gelu", batch_first=True, norm_first=True, dtype=torch.float64
        ).eval()
        state = {
            "self_attn.in_proj_weight": layer.attention.query_key_value.weight,
            "self_attn.in_proj_bias": torch.zeros(24, dtype=torch.float64),
            "self_attn.out_proj.weight": layer.attention.output.weight,
            "self_attn.out_proj.bias": layer.attention.output.bias,
            "linear1.weight": layer.intermediate.weight,
            "linear1.bias": layer.intermediate.bias,
            "linear2.weight": layer.output.weight,
            "linear2.bias": layer.output.bias,
            "norm1.weight": layer.norm_before.weight,
            "norm1.bias": layer.norm_before.bias,
            "norm2.weight": layer.norm_after.weight,
            "norm2.bias": layer.norm_after.bias,
        }
        twin.load_state_dict(state)
        hidden = twin(hidden)
    hidden = model.norm(hidden)
    expected = torch.stack([slow_pooling(image, model.pooling.score.weight) for image in hidden.detach()])
    torch.testing.assert_close(model(pixels), expected)


def test_the_order_of_tokens_matters_only_through_positions() -> None:
    model = CctModel(small()).eval()
    tokens = torch.randn(1, 9, 8)
    for layer in model.layers:
        tokens = layer(tokens)
    pooled = model.pooling(tokens)
    torch.testing.assert_close(model.pooling(tokens[:, torch.randperm(9)]), pooled)


def test_stochastic_depth_keeps_the_mean_and_is_off_in_evaluation() -> None:
    drop = CctDropPath(0.25)
    torch.manual_seed(0)
    branch = torch.ones(4000, 3, 2)
    result = drop.train()(branch)
    per_example = result[:, 0, 0]
    assert torch.equal(result, per_example[:, None, None].expand_as(result))
    torch.testing.assert_close(per_example.unique(), torch.tensor([0.0, 4 / 3]))
    assert abs(float(per_example.mean()) - 1) < 0.05
    assert drop.eval()(branch) is branch
    rates = [layer.drop_path.rate for layer in CctModel(small(num_hidden_layers=3, drop_path_rate=0.2)).layers]
    assert rates == pytest.approx([0.0, 0.1, 0.2])


def test_save_and_load_give_the_same_model(tmp_path: Path) -> None:
    """Through the auto classes, and in the middle of the training of an odd configuration."""
    model = CctForImageClassification(small(image_size=14, num_hidden_layers=1, num_channels=1)).eval()
    with torch.no_grad():
        for param in model.parameters():
            param.add_(torch.randn_like(param))
    model.save_pretrained(tmp_path)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), CctConfig)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert type(loaded) is CctForImageClassification
    pixels = torch.randn(3, 1, 14, 14)
    torch.testing.assert_close(loaded(pixels).logits, model(pixels).logits, rtol=0, atol=0)
    assert loaded.config.grid_size == 4 and loaded.config.num_labels == 3


def test_new_weights_are_drawn_and_equal_seeds_give_equal_models() -> None:
    models = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        models.append(CctForImageClassification(CctConfig(num_labels=10)))
    first, same, other = (model.state_dict() for model in models)
    assert all(torch.equal(first[key], same[key]) for key in first)
    assert not torch.equal(first["classifier.weight"], other["classifier.weight"])
    assert float(first["cct.position_embeddings"].std()) == pytest.approx(0.2, rel=0.1)
    assert float(first["cct.layers.0.attention.query_key_value.weight"].std()) == pytest.approx(0.02, rel=0.1)
    kaiming = math.sqrt(2 / (64 * 9))
    assert float(first["cct.tokenizer.convolutions.1.weight"].std()) == pytest.approx(kaiming, rel=0.1)


def test_loss_and_tuple_output() -> None:
    model = CctForImageClassification(small()).eval()
    pixels, labels = torch.randn(4, 3, 12, 12), torch.tensor([0, 1, 2, 1])
    output = model(pixel_values=pixels, labels=labels)
    picked = output.logits.log_softmax(dim=1)[range(4), labels]
    torch.testing.assert_close(output.loss, -picked.mean())
    loss, logits = model(pixel_values=pixels, labels=labels, return_dict=False)
    assert torch.equal(loss, output.loss) and torch.equal(logits, output.logits)
    assert model(pixels).loss is None and len(model(pixels, return_dict=False)) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [({"hidden_size": 9}, r"hidden_size is 9, which 2 attention heads"), ({"kernel_size": 4}, r"kernel_size is 4")],
)
def test_bad_configurations(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**options)


def test_images_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \(3, 16, 16\); this CCT takes \(3, 12, 12\)"):
        CctForImageClassification(small())(torch.randn(1, 3, 16, 16))
