"""Which optimizer an image classification run takes, and how it fine-tunes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification

from hf_adafisher import AdaFisher, AdaFisherW
from hf_adafisher.experiments.runs.image import ImageRun
from hf_adafisher.experiments.runs.image_arguments import parse_image_arguments
from hf_adafisher.optimizers.factory.create import available_optimizers, optimizer_record
from tests.data.images.image_samples import class_folders
from tests.experiments.runs.image_runs import TINY, TINY_RESNET, prepared, run
from tests.scripts import read_results

FEW = ["--max_train_samples", "48", "--max_eval_samples", "20"]
TINY_VIT = ["--model", "vit", "--image_size", "8", "--model_options"]
TINY_VIT += ["hidden_size=16,num_hidden_layers=2,num_attention_heads=2,intermediate_size=16"]


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A CCT, a ResNet and a ViT that know the ten digits a little."""
    root = tmp_path_factory.mktemp("digits")
    for name, flags in (("cct", TINY), ("resnet", TINY_RESNET), ("vit", TINY_VIT)):
        few = [*FEW, "--max_steps", 3, "--eval_strategy", "no", "--save_strategy", "no"]
        assert run(*flags, *few, "--output_dir", root / name) == 0
    return {name: root / name for name in ("cct", "resnet", "vit")}


@pytest.fixture(scope="module")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of three classes."""
    return class_folders(tmp_path_factory.mktemp("data") / "colours", {"blue": 6, "green": 6, "red": 6})


@pytest.mark.parametrize(
    ("model", "asked", "expected"),
    [
        ("resnet", None, "adafisher"),
        ("cct", None, "adafisherw"),
        ("vit", None, "adafisherw"),
        ("resnet", "adafisherw", "adafisherw"),
        ("cct", "adafisher", "adafisher"),
        ("resnet", "sgd", "sgd"),
        ("cct", "adamw_torch", "adamw_torch"),
    ],
)
def test_the_optimizer_follows_from_the_kind_of_network(
    model: str, asked: str | None, expected: str, digits: dict[str, Path], tmp_path: Path, caplog: Any
) -> None:
    """From scratch and pretrained alike, unless one is asked for; a line says which and why."""
    scratch = {"cct": TINY, "resnet": TINY_RESNET, "vit": TINY_VIT}[model]
    for flags in (scratch, ["--model_name_or_path", str(digits[model])]):
        caplog.clear()
        with caplog.at_level("INFO"):
            made = prepared(*flags, *FEW, *([] if asked is None else ["--optim", asked]), "--output_dir", tmp_path)
        assert made.training_args.optim == expected
        assert made.training_args.to_dict()["optim"] == expected
        reason = "a convolutional network" if model == "resnet" else "a transformer"
        said = f"optimizer: {expected}, since {made.network} is {reason} (--optim overrides)"
        assert (said in caplog.text) == (asked is None)
        optimizer = made.new_trainer([]).create_optimizer()
        if asked is None:
            assert type(optimizer) is (AdaFisher if model == "resnet" else AdaFisherW)
        else:
            assert ("AdaFisher" in type(optimizer).__name__) == asked.startswith("adafisher")


def test_the_learning_rate_follows_from_the_optimizer(digits: dict[str, Path], tmp_path: Path) -> None:
    rates = {name: optimizer_record(name).learning_rate.value for name in available_optimizers()}
    for name, rate in rates.items():
        assert parse_image_arguments(["--optim", name, "--output_dir", str(tmp_path)])[2].learning_rate == rate
    assert parse_image_arguments(["--output_dir", str(tmp_path)])[2].learning_rate == 0.004
    assert parse_image_arguments(["--learning_rate", "0.5", "--output_dir", str(tmp_path)])[2].learning_rate == 0.5
    pretrained = ["--model_name_or_path", digits["cct"], *FEW, "--output_dir", tmp_path]
    for flags, rate in (
        ([], 5e-5),
        (["--optim", "adafisher"], 5e-5),
        (["--optim", "spectral-adafisher"], 1.5e-4),
        (["--optim", "adafisherw", "--step_size", "paper"], 1e-3),
        (["--optim", "adamw"], 5e-5),
        (["--learning_rate", "0.02"], 0.02),
        (["--optim", "lion"], rates["lion"]),
    ):
        assert prepared(*pretrained, *flags).training_args.learning_rate == rate


def test_a_checkpoint_of_the_other_kind_of_adafisher_is_refused(
    digits: dict[str, Path], tmp_path: Path, caplog: Any
) -> None:
    """The optimizer is known when checkpoints are checked."""
    command = [*TINY, *FEW, "--max_steps", 2, "--save_steps", 1, "--output_dir", tmp_path]
    assert run(*command, "--optim", "adafisher") == 0
    assert run(*command, "--max_steps", 3, "--resume_from_checkpoint", "last") == 2
    assert "was not written by adafisherw" in caplog.records[-1].getMessage()
    assert run(*command, "--max_steps", 3, "--resume_from_checkpoint", "last", "--optim", "adafisher") == 0


def test_fine_tuning_replaces_the_head_and_says_so(
    digits: dict[str, Path], colours: Path, tmp_path: Path, caplog: Any
) -> None:
    flags = ["--model_name_or_path", digits["cct"], "--data_dir", colours, "--output_dir", tmp_path]
    with caplog.at_level("INFO"):
        made = prepared(*flags)
    old, new = load_file(digits["cct"] / "model.safetensors"), made.model.state_dict()
    for name, tensor in old.items():
        if not name.startswith("classifier"):
            assert torch.equal(tensor, new[name]), name
    assert new["classifier.weight"].shape == (3, 16) and old["classifier.weight"].shape == (10, 16)
    assert made.image_size == 8 and "new: classifier.bias, classifier.weight" in caplog.text
    assert run(*flags, "--max_steps", 1) == 0
    results = read_results(tmp_path)
    assert results["loaded"] == {
        "kept": len(old) - 2, "resized": 0, "new": 2, "unused": 0, "new_names": ["classifier.bias", "classifier.weight"]
    }  # fmt: skip
    assert results["model"]["name"] == str(digits["cct"]) and results["corpus"]["classes"] == ["blue", "green", "red"]
    card = (tmp_path / "README.md").read_text()
    assert f"is a fine-tuned version of `{digits['cct']}` on" in card and "from scratch" not in card


def test_the_same_classes_keep_the_head(digits: dict[str, Path], tmp_path: Path) -> None:
    made = prepared("--model_name_or_path", digits["resnet"], *FEW, "--image_size", "8", "--output_dir", tmp_path)
    old = load_file(digits["resnet"] / "model.safetensors")
    assert all(torch.equal(tensor, made.model.state_dict()[name]) for name, tensor in old.items())
    assert made.describe()["loaded"] == {"kept": len(old), "resized": 0, "new": 0, "unused": 0, "new_names": []}


def test_pretrained_models_keep_their_size_and_normalisation(
    digits: dict[str, Path], colours: Path, tmp_path: Path
) -> None:
    """Those saved beside the model, whatever the new images are like."""
    made = prepared("--model_name_or_path", digits["cct"], "--data_dir", colours, "--output_dir", tmp_path)
    other = prepared("--model_name_or_path", digits["vit"], *FEW, "--image_size", "16", "--output_dir", tmp_path)
    assert (made.image_size, other.image_size) == (8, 16)
    own = prepared(*TINY, *FEW, "--output_dir", tmp_path)  # what the saved model was trained with
    assert made.normalization == own.normalization
    assert other.describe()["loaded"]["resized"] == 1
    assert other.model.state_dict()["vit.embeddings.position_embeddings"].shape == (1, 1 + 4 * 4, 16)


@pytest.mark.parametrize("name", ["cct", "resnet"])
def test_a_frozen_backbone_stays_as_it_is(
    name: str, digits: dict[str, Path], colours: Path, tmp_path: Path, caplog: Any
) -> None:
    flags = ["--model_name_or_path", digits[name], "--data_dir", colours, "--image_size", 8, "--freeze_backbone"]
    with caplog.at_level("INFO"):
        assert run(*flags, "--max_steps", 3, "--output_dir", tmp_path) == 0
    before, after = (load_file(folder / "model.safetensors") for folder in (digits[name], tmp_path))
    head = {key for key in after if key.startswith("classifier")}
    assert all(torch.equal(after[key], before[key]) for key in after.keys() - head)
    start = prepared(*flags, "--output_dir", tmp_path).model.state_dict()
    assert all(not torch.equal(after[key], start[key]) for key in head)
    width = {"cct": 16, "resnet": 8}[name]
    results, trained = read_results(tmp_path), 3 * width + 3
    assert results["model"]["trainable_parameters"] == trained < results["model"]["parameters"]
    assert f"the backbone is frozen: {trained} of {results['model']['parameters']:,} parameters" in caplog.text


def rates(made: ImageRun) -> dict[str, float]:
    """The learning rate of every parameter, by name."""
    trainer = made.new_trainer([])
    optimizer: Any = trainer.create_optimizer()
    assert trainer.create_optimizer() is optimizer  # and is not scaled again
    names = {id(param): name for name, param in made.model.named_parameters()}
    found = [(names[id(p)], group["lr"]) for group in optimizer.param_groups for p in group["params"]]
    assert len(found) == len(dict(found)) == len(names)
    return dict(found)


def test_learning_rates_fall_with_the_depth(tmp_path: Path) -> None:
    """A CCT of two layers: tokenizer and positions, two layers, and what comes after them; by hand."""
    flags = [*TINY, *FEW, "--layer_decay", "0.5", "--learning_rate", "0.08", "--output_dir", tmp_path]
    for name, rate in rates(prepared(*flags)).items():
        if ".layers." in name:
            assert rate == pytest.approx(0.04 if ".layers.1." in name else 0.02), name
        else:
            first = "tokenizer" in name or "position" in name
            assert rate == pytest.approx(0.01 if first else 0.08), name


@pytest.mark.slow
@pytest.mark.parametrize("optim", available_optimizers())
def test_every_optimizer_takes_layer_decay(optim: str, tmp_path: Path) -> None:
    """Each learning rate is the one without it times the scale; all parameters are still trained; training goes on."""
    command = [*TINY_VIT, *FEW, "--optim", optim, "--output_dir", tmp_path]
    command += ["--learning_rate", "0.1"] if optim == "sgd" else []  # its default moves no norm's weight in float32
    scaled, plain = prepared(*command, "--layer_decay", "0.5"), prepared(*command)
    with_decay, without = rates(scaled), rates(plain)
    assert set(scaled.scales.values()) == {1.0, 0.5, 0.25, 0.125} and plain.scales == {}
    for name, rate in with_decay.items():
        assert rate == pytest.approx(without[name] * scaled.scales[name]), name
    flags = ["--layer_decay", "0.5", "--max_steps", 3, "--warmup_steps", 0, "--lr_scheduler_type", "constant"]
    flags += ["--eval_strategy", "no", "--save_strategy", "no"]
    assert run(*command, *flags) == 0
    after = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert all(torch.isfinite(param).all() for param in after.parameters())
    start = dict(plain.model.named_parameters())
    still = [name for name, param in after.named_parameters() if torch.equal(param, start[name])]
    assert not [name for name in still if not name.endswith("k_proj.bias")]  # a key's bias has no gradient
    log = read_results(tmp_path)["log_history"]
    rate = next(entry["learning_rate"] for entry in log if "learning_rate" in entry)
    assert rate == pytest.approx(max(without[name] * scaled.scales[name] for name in _first_kind(plain)))


def _first_kind(made: ImageRun) -> list[str]:
    """The parameters of the first group of the optimizer without layer decay, whose rate Trainer logs."""
    optimizer: Any = made.new_trainer([]).create_optimizer()
    names = {id(param): name for name, param in made.model.named_parameters()}
    return next([names[id(p)] for p in group["params"]] for group in optimizer.param_groups if group["params"])


def test_steps_are_those_of_the_scaled_learning_rates(tmp_path: Path) -> None:
    """One step of plain SGD: each parameter moves by its scale times what it moves without layer decay."""
    flags = ["--max_steps", 1, "--optim", "sgd", "--optim_args", "momentum=0.0", "--learning_rate", "0.5"]
    flags += ["--warmup_steps", 0, "--lr_scheduler_type", "constant", "--max_grad_norm", 0, "--eval_strategy", "no"]
    for name, more in (("plain", []), ("scaled", ["--layer_decay", "0.5"])):
        assert run(*TINY, *FEW, *flags, *more, "--output_dir", tmp_path / name) == 0
    made = prepared(*TINY, *FEW, "--layer_decay", "0.5", "--output_dir", tmp_path)
    plain, scaled = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "scaled"))
    for name, start in made.model.named_parameters():
        expected = start.detach() + made.scales[name] * (plain[name] - start.detach())
        torch.testing.assert_close(scaled[name], expected, rtol=1e-5, atol=1e-7)
        assert not torch.equal(plain[name], start.detach())


def test_layer_decay_and_a_frozen_backbone_leave_the_head(
    digits: dict[str, Path], colours: Path, tmp_path: Path
) -> None:
    flags = ["--model_name_or_path", digits["cct"], "--data_dir", colours, "--freeze_backbone", "--layer_decay", "0.5"]
    made = prepared(*flags, "--learning_rate", "0.3", "--output_dir", tmp_path)
    optimizer: Any = made.new_trainer([]).create_optimizer()
    assert sum(p.numel() for group in optimizer.param_groups for p in group["params"]) == 3 * 16 + 3
    assert {group["lr"] for group in optimizer.param_groups} == {0.3}


def test_options_reach_the_network(tmp_path: Path) -> None:
    options = "hidden_size=24,num_hidden_layers=1,drop_path_rate=0.25"
    config = prepared("--model_options", options, *FEW, "--output_dir", tmp_path).model.config
    assert (config.hidden_size, config.num_hidden_layers, config.drop_path_rate) == (24, 1, 0.25)
    resnet = prepared(*TINY_RESNET, *FEW, "--output_dir", tmp_path).model.config
    assert (resnet.hidden_sizes, resnet.depths) == ([8, 8], [1, 1])


@pytest.mark.parametrize("name", ["resnet", "vit"])
def test_a_network_from_scratch_starts_near_chance(name: str, digits: dict[str, Path]) -> None:
    """Three steps on 48 images: losses are still near log(10), and every one is finite."""
    losses = [entry["loss"] for entry in read_results(digits[name])["log_history"] if "loss" in entry]
    assert len(losses) == 3 and abs(losses[0] - math.log(10)) < 1.0
