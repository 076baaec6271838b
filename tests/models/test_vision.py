"""Image classifiers from scratch and pretrained: sizes, stems, heads, positions, losses, and what is refused."""

from __future__ import annotations

import math
import os
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForImageClassification, PreTrainedModel

from hf_adafisher import AdaFisher, AdaFisherW
from hf_adafisher.models import (
    ARCHITECTURES,
    available_architectures,
    check_image_size,
    create_model,
    head_parameter_names,
    image_classification_loss,
    load_pretrained,
    model_kind,
    scratch_config,
)
from hf_adafisher.models.small_images import SmallImageSwinForImageClassification
from hf_adafisher.models.vision import check_forward, interpolate_positions, resize_positions

NAMES = ["cat", "dog", "bird"]
OF_TIMM = {"densenet121", "mobilenetv3"}
HERE = sorted(set(ARCHITECTURES) - OF_TIMM)
TINY: dict[str, dict[str, Any]] = {
    "resnet18": {"depths": [1, 1], "hidden_sizes": [8, 16], "embedding_size": 8},
    "swin-t": {"embed_dim": 8, "depths": [2, 2], "num_heads": [1, 2]},
    "focalnet-t": {"embed_dim": 8, "depths": [1, 1], "focal_levels": [2, 2], "focal_windows": [3, 3]},
    "vit": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16},
    "convnext": {"depths": [1, 1], "hidden_sizes": [8, 16], "num_stages": 2},
    "mobilenetv2": {"depth_multiplier": 0.1},
    "cct-2-3x2": {"hidden_size": 16, "conv_width": 8},
}
"""Small forms of one network of each kind; ResNet-50 and -101 are made of the same parts."""


def tiny(name: str, image_size: int = 32, names: list[str] = NAMES) -> PreTrainedModel:
    """A small network of the kind."""
    torch.manual_seed(0)
    return create_model(name, names, image_size=image_size, options=TINY[name])


def pictures(count: int = 4, size: int = 32, seed: int = 0) -> Tensor:
    """Noise."""
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.slow
@pytest.mark.parametrize("name", HERE)
def test_adafisher_trains_every_parameter_of_every_network(name: str) -> None:
    """At full size: one step with each kind's own optimizer moves every parameter, and to finite values.

    The step is a long one: ConvNeXt's layers begin with a scale of 1e-6, and float32 has to show that a 1 moved.
    """
    torch.manual_seed(0)
    model = create_model(name, NAMES, image_size=32).train()
    kind = AdaFisher if ARCHITECTURES[name].kind == "convolutional" else AdaFisherW
    before = {key: param.detach().clone() for key, param in model.named_parameters()}
    with kind(model, lr=10.0) as optimizer:
        model(pixel_values=pictures(4), labels=torch.tensor([0, 1, 2, 1])).loss.backward()
        optimizer.step()
        assert {row.name for row in optimizer.coverage()} == set(before)
    assert [key for key, param in model.named_parameters() if torch.equal(param, before[key])] == []
    assert [key for key, param in model.named_parameters() if not param.isfinite().all()] == []


def test_sizes_are_the_published_ones() -> None:
    """Parameters for 1,000 classes at 224 pixels, in millions; on the meta device, nothing is computed."""
    published = {
        "resnet18": 11.69,
        "resnet50": 25.56,
        "resnet101": 44.55,
        "swin-t": 28.29,
        "vit": 5.72,
        "convnext": 28.59,
        "mobilenetv2": 3.50,
    }
    for name, millions in published.items():
        config = scratch_config(name, image_size=224, options={"num_labels": 1000})
        with torch.device("meta"):
            model = AutoModelForImageClassification.from_config(config)
        count = sum(param.numel() for param in model.parameters()) / 1e6
        assert count == pytest.approx(millions, rel=0.005), name


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnet101"])
def test_small_images_get_the_stem_without_pooling(name: str) -> None:
    small = create_model(name, NAMES, image_size=32, options={"depths": [1, 1, 1, 1]}).eval()
    convolution = next(module for module in small.modules() if isinstance(module, nn.Conv2d))
    assert (convolution.kernel_size, convolution.stride, convolution.padding) == ((3, 3), (1, 1), (1, 1))
    assert not any(isinstance(module, nn.MaxPool2d) for module in small.modules())
    with torch.no_grad():
        states = small(pictures(1), output_hidden_states=True).hidden_states
    assert [state.shape[-1] for state in states] == [32, 32, 16, 8, 4]
    large = create_model(name, NAMES, image_size=224, options={"depths": [1, 1, 1, 1]})
    assert type(large) is transformers.ResNetForImageClassification


def test_the_new_stem_is_initialised_as_the_other_convolutions_are() -> None:
    model = create_model("resnet18", NAMES, image_size=32, options={"depths": [1, 1, 1, 1]})
    weight = model.resnet.embedder.embedder.convolution.weight.detach()
    assert float(weight.std()) == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.1)


def test_swin_windows_are_cut_to_the_grid() -> None:
    model = create_model("swin-t", NAMES, image_size=32, options={"embed_dim": 12, "depths": [2, 2, 2, 2]}).eval()
    assert type(model) is SmallImageSwinForImageClassification
    tables = [p.shape for key, p in model.named_parameters() if key.endswith("relative_position_bias_table")]
    assert tables == [(49, 3), (49, 3), (49, 6), (49, 6), (49, 12), (49, 12), (9, 24), (9, 24)]
    assert model(pictures(2)).logits.shape == (2, 3)
    with torch.no_grad(), pytest.raises(RuntimeError):  # why the class is there
        plain = transformers.SwinForImageClassification(
            transformers.SwinConfig(image_size=32, patch_size=2, window_size=4, embed_dim=12, depths=[1, 1, 1, 1])
        )
        plain(pictures(2))


def test_swin_is_transformers_own_where_windows_fit() -> None:
    model = tiny("swin-t").eval()  # two stages: grids of 16 and 8, windows of 4
    options = {"image_size": 32, "patch_size": 2, "window_size": 4, "num_labels": 3, **TINY["swin-t"]}
    plain = transformers.SwinForImageClassification(transformers.SwinConfig(**options)).eval()
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(plain(pictures()).logits, model(pictures()).logits)


@pytest.mark.parametrize("name", sorted(TINY))
def test_networks_save_and_load(name: str, tmp_path: Path) -> None:
    """As they are after training, class names included, in a new head-keeping load too."""
    model = tiny(name).eval()
    with torch.no_grad():
        for param in model.parameters():
            param.add_(0.05 * torch.randn_like(param))
    model.save_pretrained(tmp_path)
    again = AutoModelForImageClassification.from_pretrained(tmp_path)
    kept, report = load_pretrained(str(tmp_path), NAMES, image_size=32)
    assert report.new == report.resized == report.unused == () and set(report.kept) == set(model.state_dict())
    for other in (again, kept.eval()):
        assert type(other) is type(model)
        torch.testing.assert_close(other(pictures()).logits, model(pictures()).logits, rtol=0, atol=0)
    assert again.config.id2label == {0: "cat", 1: "dog", 2: "bird"} and again.config.label2id["bird"] == 2


@pytest.mark.parametrize("name", sorted(TINY))
def test_only_the_head_is_new_for_other_classes(name: str, tmp_path: Path) -> None:
    model = tiny(name)
    model.save_pretrained(tmp_path)
    loaded, report = load_pretrained(str(tmp_path), [*NAMES, "horse"], image_size=32)
    assert set(report.new) == set(head_parameter_names(loaded)) and len(report.new) == 2
    old, new = model.state_dict(), loaded.state_dict()
    assert set(report.kept) == set(new) - set(report.new)
    assert all(torch.equal(old[key], new[key]) for key in report.kept)
    assert loaded(pictures()).logits.shape == (4, 4)
    assert "new: " in str(report) and report.new[0] in str(report)


def test_a_half_precision_backbone_becomes_float32(tmp_path: Path) -> None:
    model = tiny("vit")
    model.vit.half().save_pretrained(tmp_path)
    loaded, report = load_pretrained(str(tmp_path), NAMES, image_size=32)
    assert {param.dtype for param in loaded.parameters()} == {torch.float32}
    assert set(report.new) == set(head_parameter_names(loaded))
    assert set(report.unused) <= {key for key in report.unused if "pooler" in key}


@pytest.mark.parametrize("kind", ["vit", "dinov2", "deit"])
@pytest.mark.parametrize(("old", "new"), [(32, 48), (32, 16)])
def test_positions_for_another_size_are_those_of_transformers(kind: str, old: int, new: int) -> None:
    """Interpolated once, the model computes what transformers computes when it interpolates at every forward."""
    options = {"patch_size": 4, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_labels": 3}
    torch.manual_seed(0)
    if kind == "dinov2":
        model: Any = transformers.Dinov2ForImageClassification(
            transformers.Dinov2Config(image_size=old, mlp_ratio=2, **options)
        )
    else:
        classes = {"vit": "ViT", "deit": "DeiT"}
        config = getattr(transformers, f"{classes[kind]}Config")(image_size=old, intermediate_size=32, **options)
        model = getattr(transformers, f"{classes[kind]}ForImageClassification")(config)
    model.eval()
    for key, param in model.named_parameters():
        if "position_embeddings" in key:
            nn.init.normal_(param)
    own = {} if kind == "dinov2" else {"interpolate_pos_encoding": True}
    expected = model(pictures(2, new), **own).logits
    resized, names = resize_positions(model, new)
    assert len(names) == 1 and names[0].endswith("position_embeddings") and resized.config.image_size == new
    torch.testing.assert_close(resized(pictures(2, new)).logits, expected)
    check_forward(resized, new)


def test_a_resized_model_is_saved_and_loaded_at_its_new_size(tmp_path: Path) -> None:
    tiny("vit").save_pretrained(tmp_path / "old")
    model, report = load_pretrained(str(tmp_path / "old"), NAMES, image_size=48)
    assert report.resized == ("vit.embeddings.position_embeddings",) and report.new == ()
    model.save_pretrained(tmp_path / "new")
    again, report = load_pretrained(str(tmp_path / "new"), NAMES)
    assert report.resized == () and again.config.image_size == 48
    torch.testing.assert_close(again.eval()(pictures(2, 48)).logits, model.eval()(pictures(2, 48)).logits)
    assert "vit.embeddings.position_embeddings" not in report.new


def cubic(t: float) -> float:
    """The weight of a sample at distance t, by the usual formula with a = -0.75."""
    a, t = -0.75, abs(t)
    if t <= 1:
        return (a + 2) * t**3 - (a + 3) * t**2 + 1
    return a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a if t < 2 else 0.0


def slow_bicubic(grid: Tensor, size: int) -> Tensor:
    """Every output as a sum over 4x4 samples; outside the grid its border goes on."""
    side = len(grid)
    result = torch.zeros(size, size, grid.shape[-1])
    for i in range(size):
        for j in range(size):
            y, x = (i + 0.5) * side / size - 0.5, (j + 0.5) * side / size - 0.5
            for a in range(math.floor(y) - 1, math.floor(y) + 3):
                for b in range(math.floor(x) - 1, math.floor(x) + 3):
                    sample = grid[min(max(a, 0), side - 1), min(max(b, 0), side - 1)]
                    result[i, j] += cubic(y - a) * cubic(x - b) * sample
    return result


@pytest.mark.parametrize("special", [0, 1, 2])
@pytest.mark.parametrize("new", [3, 4, 6])
def test_interpolation_is_bicubic_and_leaves_special_tokens_alone(special: int, new: int) -> None:
    table = torch.randn(1, special + 16, 5)
    found = interpolate_positions(table, special + new * new)
    assert found.shape == (1, special + new * new, 5)
    assert torch.equal(found[:, :special], table[:, :special])
    expected = slow_bicubic(table[0, special:].reshape(4, 4, 5), new)
    torch.testing.assert_close(found[0, special:].reshape(new, new, 5), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(interpolate_positions(table[0], special + new * new), found[0])


def test_lengths_that_are_no_grids() -> None:
    with pytest.raises(ValueError, match=r"a position table of 17 cannot be interpolated to 30"):
        interpolate_positions(torch.randn(17, 4), 30)


def test_sizes_that_a_model_cannot_take(tmp_path: Path) -> None:
    config = transformers.BeitConfig(
        image_size=32, patch_size=8, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        use_relative_position_bias=True,
    )  # fmt: skip
    transformers.BeitForImageClassification(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"beit model of image size 32 cannot be used at 48 pixels: .*bias"):
        load_pretrained(str(tmp_path), NAMES, image_size=48)


@pytest.mark.parametrize(
    ("name", "size", "advice"), [("vit", 30, "28 or 32"), ("convnext", 33, "32 or 34"), ("vit", 3, "image_size 4")]
)
def test_image_sizes_that_are_no_multiple_of_the_patch(name: str, size: int, advice: str) -> None:
    with pytest.raises(ValueError, match=rf"image_size is {size}, not a multiple of the model's patch.*{advice}"):
        create_model(name, NAMES, image_size=size)
    with pytest.raises(ValueError, match=r"image_size is 0"):
        check_image_size(transformers.ResNetConfig(), 0)


def test_sizes_that_only_a_forward_finds_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before a run: one blank image is classified; dropout's mode and the random numbers are left alone."""
    model = tiny("vit").train()
    state = torch.get_rng_state()
    check_forward(model, 32)
    assert model.training and torch.equal(torch.get_rng_state(), state)
    with pytest.raises(ValueError, match=r"vit model does not take images of 48 pixels \(.*another --image_size"):
        check_forward(model, 48)
    assert model.training
    monkeypatch.setattr("hf_adafisher.models.cct.CctConfig.grid_size", 5)
    with pytest.raises(ValueError, match=r"this cct model does not take images of 32 pixels"):
        tiny("cct-2-3x2")


def test_image_sizes_of_pretrained_models(tmp_path: Path) -> None:
    tiny("vit").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"image_size is 34, not a multiple of the model's patch of 4"):
        load_pretrained(str(tmp_path), NAMES, image_size=34)


def test_checkpoints_of_other_tasks_are_refused(tmp_path: Path) -> None:
    config = transformers.GPT2Config(vocab_size=20, n_positions=8, n_embd=8, n_layer=1, n_head=1)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "text")
    with pytest.raises(ValueError, match=r"text' is a checkpoint of the model type 'gpt2', which classifies no images"):
        load_pretrained(str(tmp_path / "text"), NAMES)
    model = tiny("vit")
    model.save_pretrained(tmp_path / "other", state_dict={f"foreign.{k}": v for k, v in model.state_dict().items()})
    with pytest.raises(ValueError, match=r"another task or architecture: \d+ of \d+ parameters of the backbone"):
        load_pretrained(str(tmp_path / "other"), NAMES)
    with pytest.raises(OSError):
        load_pretrained(str(tmp_path / "nothing"), NAMES)


def test_names_of_networks() -> None:
    assert available_architectures() == list(ARCHITECTURES)
    with pytest.raises(ValueError, match=r"unknown network 'resnet-50'; did you mean 'resnet50'.*swin-t") as error:
        create_model("resnet-50", NAMES, image_size=32)
    assert all(name in str(error.value) for name in ARCHITECTURES)
    with pytest.raises(ValueError, match=r"at least 2 classes, got \['cat'\]"):
        create_model("vit", ["cat"], image_size=32)


@pytest.mark.parametrize("name", ["densenet121", "mobilenetv3", "timm/efficientnet_b0"])
def test_timm_models_without_timm(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match=r"one of timm's.*pip install timm"):
        create_model(name, NAMES, image_size=64)
    with pytest.raises(ImportError, match=r"pip install timm"):
        load_pretrained("timm/resnet18.a1_in1k", NAMES)
    (tmp_path / "config.json").write_text('{"model_type": "timm_wrapper", "architecture": "resnet18"}')
    with pytest.raises(ImportError, match=r"pip install timm"):
        load_pretrained(str(tmp_path), NAMES)


def test_timm_models_are_asked_for_by_their_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a module in timm's place: the configuration of transformers' wrapper; the wrapper itself needs timm."""
    monkeypatch.setitem(sys.modules, "timm", types.ModuleType("timm"))
    found = {
        name: scratch_config(name, image_size=64, options={"num_labels": 7})
        for name in ("densenet121", "mobilenetv3", "timm/vit_tiny_patch16_224")
    }
    assert [(c.architecture, c.num_labels, model_kind(c)) for c in found.values()] == [
        ("densenet121", 7, "convolutional"),
        ("mobilenetv3_large_100", 7, "convolutional"),
        ("vit_tiny_patch16_224", 7, "transformer"),
    ]


@pytest.mark.parametrize("name", HERE)
@pytest.mark.parametrize("size", [32, 224])
def test_the_kind_is_known_from_the_configuration(name: str, size: int) -> None:
    assert model_kind(scratch_config(name, image_size=size)) == ARCHITECTURES[name].kind


@pytest.mark.parametrize("config", [transformers.Dinov2Config(), transformers.DeiTConfig(), transformers.BeitConfig()])
def test_the_kind_of_other_transformers(config: Any) -> None:
    assert model_kind(config) == "transformer"
    assert model_kind(transformers.EfficientNetConfig()) == model_kind(transformers.RegNetConfig()) == "convolutional"


@pytest.mark.parametrize("name", ["CLIPConfig", "SiglipConfig", "PerceiverConfig"])
def test_models_whose_configuration_is_nested_or_named_otherwise_are_transformers(name: str) -> None:
    assert model_kind(getattr(transformers, name)()) == "transformer"


def test_the_loss_of_class_shares_is_the_mix_of_losses() -> None:
    """Cross-entropy is linear in the labels: shares l and 1 - l give l and 1 - l of the two classes' losses."""
    logits = torch.randn(6, 4, dtype=torch.float64)
    first, second = torch.tensor([0, 1, 2, 3, 0, 1]), torch.tensor([3, 3, 0, 0, 0, 2])
    weights = torch.rand(6, 1, dtype=torch.float64)
    shares = weights * torch.eye(4, dtype=torch.float64)[first] + (1 - weights) * torch.eye(4)[second]
    logs = logits.log_softmax(dim=1)
    expected = -(weights[:, 0] * logs[range(6), first] + (1 - weights[:, 0]) * logs[range(6), second]).mean()
    torch.testing.assert_close(image_classification_loss(shares, logits), expected)
    hard = image_classification_loss(torch.eye(4)[first], logits)
    torch.testing.assert_close(hard, image_classification_loss(first, logits))


def test_the_loss_of_micro_batches_adds_up() -> None:
    """With Trainer's count of label values, for both kinds of labels."""
    logits, labels = torch.randn(8, 4), torch.arange(8) % 4
    for target in (labels, torch.eye(4)[labels] * 0.9 + 0.025):
        count = target.ne(-100).sum()
        parts = [image_classification_loss(target[k : k + 2], logits[k : k + 2], None, count) for k in (0, 2, 4, 6)]
        torch.testing.assert_close(torch.stack(parts).sum(), image_classification_loss(target, logits))


@pytest.mark.parametrize("name", sorted(TINY))
def test_every_network_learns_from_class_shares(name: str) -> None:
    """Not from independent yes-no labels, which is what transformers makes of them."""
    model = tiny(name).eval()
    shares = torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.2, 0.8], [1.0, 0.0, 0.0], [0.1, 0.2, 0.7]])
    output = model(pixel_values=pictures(), labels=shares)
    torch.testing.assert_close(output.loss, -(shares * output.logits.log_softmax(dim=1)).sum(dim=1).mean())


@pytest.mark.skipif("HF_ADAFISHER_DATA" not in os.environ, reason="HF_ADAFISHER_DATA is not set")
def test_a_real_pretrained_vit() -> None:
    path = str(Path(os.environ["HF_ADAFISHER_DATA"]) / "models" / "vit-small-14")
    model, report = load_pretrained(path, [f"class {k}" for k in range(10)], image_size=112)
    assert set(report.new) == {"classifier.weight", "classifier.bias"} and len(report.kept) == 222
    assert report.resized == ("dinov2.embeddings.position_embeddings",)
    plain = transformers.Dinov2Model.from_pretrained(path, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = plain(pictures(1, 112)).last_hidden_state
        found = model.eval().dinov2(pictures(1, 112)).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
