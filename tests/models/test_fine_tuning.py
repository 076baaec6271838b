"""Fine-tuning vision models: what a frozen backbone leaves, and learning rates by depth."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_adafisher import AdaFisherW
from hf_adafisher.models import (
    freeze_backbone,
    head_parameter_names,
    layer_decay_scales,
    layer_depths,
    scale_groups,
)
from hf_adafisher.optimizers.factory.param_groups import decay_groups
from tests.models.test_vision import TINY, pictures, tiny
from tests.training_helper import train

EACH = pytest.mark.parametrize("name", sorted(TINY))
LABELS = torch.tensor([0, 1, 2, 1])


def loss_of_pictures(model: nn.Module, step: int) -> Tensor:
    model.train()
    return model(pixel_values=pictures(seed=step), labels=LABELS).loss


@EACH
def test_only_the_head_is_trained(name: str) -> None:
    """Neither weights nor running statistics of the backbone change, and its features are those of evaluation."""
    model = tiny(name)
    for _ in range(2):  # running statistics that differ from those of a batch
        model(pictures(seed=7))
    trained = freeze_backbone(model)
    assert trained == head_parameter_names(model) and len(trained) == 2
    before = copy.deepcopy(model.state_dict())
    with AdaFisherW(model, lr=0.01) as optimizer:
        train(model, loss_of_pictures, optimizer, steps=2)
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == set(trained)
    if any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        logits = model.train()(pictures()).logits
        torch.testing.assert_close(logits, model.eval()(pictures()).logits)


def test_a_model_without_a_head_cannot_be_frozen() -> None:
    vit = tiny("vit").vit
    with pytest.raises(ValueError, match=r"has no classifier besides its backbone"):
        freeze_backbone(vit)


@EACH
def test_depths_rise_along_the_model(name: str) -> None:
    model = tiny(name)
    depths, head = layer_depths(model)
    assert set(depths) == {key for key, _ in model.named_parameters()}
    assert set(depths.values()) == set(range(head + 1))
    assert all(depths[key] == head for key in head_parameter_names(model))
    in_blocks = [depth for depth in depths.values() if 0 < depth < head]
    assert in_blocks == sorted(in_blocks)


def expected_depth(kind: str, name: str) -> int:
    """By hand, from the names."""
    parts = name.split(".")
    if kind == "vit":
        return int(parts[2]) + 1 if parts[1] == "layers" else 0 if parts[1] == "embeddings" else 3
    if kind == "cct":
        return (
            int(parts[2]) + 1 if parts[1] == "layers" else 3 if parts[1] in ("norm", "pooling", "weight", "bias") else 0
        )
    if kind == "resnet":
        if "stages" in parts:
            stage, block = int(parts[3]), int(parts[5])
            return [0, 2][stage] + block + 1
        return 0 if parts[1] == "embedder" else 6
    stage, rest = int(parts[3]), parts[4]  # swin: two stages of two blocks; the first one ends with a downsampling
    return 2 * stage + (int(parts[5]) + 1 if rest == "blocks" else 2)


@pytest.mark.parametrize("kind", ["vit", "cct", "resnet", "swin"])
def test_depths_by_hand(kind: str) -> None:
    if kind == "resnet":
        config = transformers.ResNetConfig(
            depths=[2, 3], hidden_sizes=[8, 16], embedding_size=8, layer_type="basic", num_labels=3
        )
        model: PreTrainedModel = transformers.ResNetForImageClassification(config)
    else:
        model = tiny({"vit": "vit", "cct": "cct-2-3x2", "swin": "swin-t"}[kind])
    depths, head = layer_depths(model)
    names = [name for name in depths if kind != "swin" or ".layers." in name]
    assert len(names) > 20
    assert {name: depths[name] for name in names} == {name: expected_depth(kind, name) for name in names}
    assert head == {"vit": 3, "cct": 3, "resnet": 6, "swin": 5}[kind]


def test_what_stands_between_stages_belongs_to_its_stage() -> None:
    depths, _ = layer_depths(tiny("convnext"))  # two stages of one block, the second begins with a downsampling
    assert {depth for name, depth in depths.items() if "stages.1.downsampling" in name} == {2}
    depths, _ = layer_depths(tiny("swin-t"))  # the first stage ends with one
    assert {depth for name, depth in depths.items() if "layers.0.downsample" in name} == {2}


@EACH
def test_scales_fall_from_the_head_down(name: str) -> None:
    model = tiny(name)
    depths, head = layer_depths(model)
    scales = layer_decay_scales(model, 0.5)
    assert {key: scales[key] for key in scales} == {key: 0.5 ** (head - depths[key]) for key in depths}
    assert max(scales.values()) == 1.0 and min(scales.values()) == 0.5**head
    assert set(layer_decay_scales(model, 1.0).values()) == {1.0}


def test_frozen_parameters_have_no_scale() -> None:
    model = tiny("vit")
    trained = freeze_backbone(model)
    assert layer_decay_scales(model, 0.5) == dict.fromkeys(trained, 1.0)


@pytest.mark.parametrize("decay", [0.0, 1.1, -0.5, float("nan")])
def test_bad_decays(decay: float) -> None:
    with pytest.raises(ValueError, match=r"layer_decay is .* must be in \(0, 1\]"):
        layer_decay_scales(tiny("vit"), decay)


def test_a_model_without_blocks() -> None:
    class Flat(PreTrainedModel):
        config_class = transformers.ViTConfig

        def __init__(self) -> None:
            super().__init__(transformers.ViTConfig())
            self.layer = nn.Linear(3, 2)

    with pytest.raises(ValueError, match=r"no list of blocks is found in Flat"):
        layer_depths(Flat())


def test_groups_are_split_and_nothing_is_lost() -> None:
    model = tiny("vit")
    scales = layer_decay_scales(model, 0.7)
    groups = scale_groups(decay_groups(model, 0.05), model, scales, 0.2)
    names = {id(param): name for name, param in model.named_parameters()}
    found = [(names[id(p)], group["lr"], group["weight_decay"]) for group in groups for p in group["params"]]
    assert sorted(name for name, _, _ in found) == sorted(names.values())
    for name, rate, decay in found:
        assert rate == pytest.approx(0.2 * scales[name])
        assert decay == (0.0 if name.endswith("bias") or "norm" in name else 0.05)
    again = scale_groups(decay_groups(model, 0.05), model, scales, 0.2)
    assert [[names[id(p)] for p in g["params"]] for g in again] == [[names[id(p)] for p in g["params"]] for g in groups]


@pytest.mark.parametrize("optimizer_class", [torch.optim.SGD, AdaFisherW])
def test_each_parameter_moves_by_its_share(optimizer_class: Any) -> None:
    """One step from the same point: scaled groups move every parameter by its scale of the unscaled step."""
    moves = []
    for decay in (1.0, 0.5):
        model = tiny("vit").double()
        before = {key: param.detach().clone() for key, param in model.named_parameters()}
        scales = layer_decay_scales(model, decay)
        groups = scale_groups(decay_groups(model, 0.0), model, scales, 0.01)
        optimizer = AdaFisherW(model, groups) if optimizer_class is AdaFisherW else optimizer_class(groups)
        model.train()
        model(pixel_values=pictures().double(), labels=LABELS).loss.backward()
        optimizer.step()
        moves.append({key: param.detach() - before[key] for key, param in model.named_parameters()})
    for key, scale in scales.items():
        torch.testing.assert_close(moves[1][key], scale * moves[0][key], msg=lambda text, key=key: f"{key}: {text}")
