"""hf-adafisher image from its command line to its files."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification

from hf_adafisher.data.images.corpora import load_images
from hf_adafisher.experiments.runs.image_arguments import parse_image_arguments
from hf_adafisher.training.curvature_callback import CURVATURE_FILE, read_curvature
from tests.data.images.image_samples import class_folders, picture
from tests.experiments.runs.image_runs import TINY, prepared, run
from tests.scripts import read_results

AUGMENTED = ["--cutout", "2", "--mixup", "0.4", "--cutmix", "1"]
FEW = ["--max_train_samples", "64", "--max_eval_samples", "50"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight steps of a tiny CCT on the digits, with checkpoints at 4 and 8."""
    output = tmp_path_factory.mktemp("finished")
    assert run(*TINY, "--max_steps", 8, "--save_steps", 4, "--eval_steps", 4, "--output_dir", output) == 0
    return output


def recomputed(folder: Path, split: str) -> dict[str, Any]:
    """Loss, accuracies and confusion matrix of the saved model by their definitions, image by image."""
    model = AutoModelForImageClassification.from_pretrained(folder).double()
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    mean, std = (torch.tensor(settings[f"image_{key}"]).double().view(3, 1, 1) for key in ("mean", "std"))
    images, losses, right, near = getattr(load_images(), split), [], 0, 0
    matrix = [[0] * 10 for _ in range(10)]
    for position, label in enumerate(images.labels.tolist()):
        pixels = torch.from_numpy(np.asarray(images.image(position)).copy()).permute(2, 0, 1).double() / 255
        with torch.no_grad():
            logits = model(pixel_values=((pixels - mean) / std)[None]).logits[0].tolist()
        losses.append(math.log(sum(map(math.exp, logits))) - logits[label])
        order = sorted(range(10), key=lambda number: -logits[number])
        right, near = right + (order[0] == label), near + (label in order[:5])
        matrix[label][order[0]] += 1
    count = len(losses)
    return {"loss": sum(losses) / count, "accuracy": right / count, "top5": near / count, "matrix": matrix}


@pytest.mark.parametrize("split", ["validation", "test"])
def test_results_agree_with_the_saved_model(finished: Path, split: str) -> None:
    results, expected = read_results(finished), recomputed(finished, split)
    found = results[split]
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert found["accuracy"] == expected["accuracy"] and found["top5_accuracy"] == expected["top5"]
    assert found["examples"] == results["corpus"][split]["examples"] == {"validation": 180, "test": 179}[split]
    if split == "test":
        assert results["confusion_matrix"] == {
            "split": "test", "classes": [str(number) for number in range(10)], "counts": expected["matrix"]
        }  # fmt: skip


def test_results_hold_the_run(finished: Path) -> None:
    results = read_results(finished)
    assert (results["status"], results["optimizer"], results["steps"], results["seed"]) == (
        "completed", "adafisherw", 8, 42
    )  # fmt: skip
    assert results["steps_per_epoch"] == math.ceil(1438 / 16) and results["corpus"]["train"] == {"examples": 1438}
    assert results["resumed_from"] is None and results["diverged_at_step"] is None and results["loaded"] is None
    assert results["corpus"]["name"] == "digits" and "scikit-learn" in results["corpus"]["source"]
    state = load_file(finished / "model.safetensors")
    number = sum(tensor.numel() for tensor in state.values())
    model = {"type": "cct", "name": "cct-2-3x2", "image_size": 8, "parameters": number, "trainable_parameters": number}
    assert results["model"] == model
    assert results["settings"]["model"]["image_size"] == 8 and results["settings"]["data"]["mixup"] == 0
    assert results["settings"]["training"]["optim"] == "adafisherw"
    assert {"torch", "hf_adafisher", "pillow", "scikit-learn"} <= set(results["versions"])
    assert results["train"]["loss"] == next(e["loss"] for e in results["log_history"] if e["step"] == 8)
    assert 0 < results["train_seconds"] < results["wall_seconds"] and results["step_time"]["median_ms"] > 0
    assert 4 * number <= results["optimizer_state_bytes"] < 2 * 4 * number


def test_the_curve_ends_where_the_exact_evaluation_begins(finished: Path) -> None:
    """Fewer validation images than the curve may use: its last point is the result."""
    results = read_results(finished)
    curve = [entry for entry in results["log_history"] if "eval_accuracy" in entry]
    assert [entry["step"] for entry in curve] == [4, 8]
    for key in ("accuracy", "top5_accuracy", "loss"):
        assert curve[-1][f"eval_{key}"] == pytest.approx(results["validation"][key], rel=1e-5)


def test_files_beside_the_results(finished: Path) -> None:
    for name in ("learning_curve.png", "confusion_matrix.png"):
        assert (finished / name).read_bytes().startswith(b"\x89PNG")
    assert not (finished / "confusion_matrix.json").exists()
    card = (finished / "README.md").read_text()
    assert "trained from scratch" in card and "AdaFisherW" in card and "import hf_adafisher.models  # the model" in card


def test_the_card_tells_how_to_use_the_model(finished: Path) -> None:
    """The lines on it run, and classify the digits as the results say."""
    lines = (finished / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    names: dict[str, Any] = {}
    exec(lines, names)
    images = load_images().test
    batch = names["processor"](images=[images.image(row) for row in range(len(images))], return_tensors="pt")
    with torch.no_grad():
        predicted = names["model"](**batch).logits.argmax(dim=1).numpy()
    assert np.mean(predicted == images.labels) == read_results(finished)["test"]["accuracy"]


@pytest.mark.parametrize(
    "flags", [["--layer_decay", "0.7"], ["--optim", "sgd", "--learning_rate", "0.1"]], ids=["adafisherw", "sgd"]
)
def test_resumed_is_uninterrupted(tmp_path: Path, flags: list[str]) -> None:
    """In the middle of the second epoch, with augmentation that mixes images, dropout and stochastic depth."""
    command = [*TINY, *AUGMENTED, *FEW, "--max_steps", 8, "--save_steps", 6, *flags]
    assert run(*command, "--output_dir", tmp_path / "whole") == 0
    middle = tmp_path / "whole" / "checkpoint-6"
    assert run(*command, "--output_dir", tmp_path / "rest", "--resume_from_checkpoint", middle) == 0
    whole, rest = read_results(tmp_path / "whole"), read_results(tmp_path / "rest")
    assert rest["resumed_from"] == str(middle) and whole["steps_per_epoch"] == 4
    assert rest["step_time"]["steps"] + rest["step_time"]["warmup_steps"] == 2
    for part in ("train", "validation", "test", "confusion_matrix", "steps", "optimizer_state_bytes"):
        assert rest[part] == whole[part]
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("whole", "rest")]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
    start = load_file(middle / "model.safetensors")
    assert any(not torch.equal(tensor, start[name]) for name, tensor in weights[0].items())


def test_a_json_file_says_the_same_as_flags(finished: Path, tmp_path: Path) -> None:
    config = {
        **{"model_options": TINY[1], "image_size": 8, "max_steps": 8, "per_device_train_batch_size": 16},
        **{"logging_steps": 1, "disable_tqdm": True, "use_cpu": True, "eval_steps": 4},
        "output_dir": str(tmp_path / "out"),
    }
    (tmp_path / "run.json").write_text(json.dumps(config))
    assert run(tmp_path / "run.json", quick=[]) == 0
    assert read_results(tmp_path / "out")["test"] == read_results(finished)["test"]


def test_timing_only_trains_and_writes_the_times(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*TINY, *FEW, "--max_steps", 5, "--timing_only", "true", "--output_dir", tmp_path) == 0
    results = read_results(tmp_path)
    assert results["steps"] == len(results["step_seconds"]) == 5 and results["steps_per_epoch"] == 4
    assert sum(results["step_seconds"]) == pytest.approx(results["train_seconds"])
    assert results["validation"] is None and results["test"] is None and results["model"]["name"] == "cct-2-3x2"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results.json"]
    assert "completed" in capsys.readouterr().out


def test_the_curvature_is_recorded_where_it_is_asked_for(finished: Path, tmp_path: Path) -> None:
    assert not (finished / CURVATURE_FILE).exists()
    assert (
        run(
            *TINY,
            *FEW,
            "--max_steps",
            3,
            "--curvature_log",
            "true",
            "--step_size",
            "paper",
            "--update_interval",
            10,
            "--output_dir",
            tmp_path,
        )
        == 0
    )
    (line,) = read_curvature(tmp_path / CURVATURE_FILE)  # the factors are refreshed every ten steps
    model = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert line["step"] == 1 and set(line["layers"]) == {name for name, _ in model.named_parameters()}


def test_a_diverged_run_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--optim", "sgd", "--learning_rate", "1e30", "--max_grad_norm", "0", "--max_steps", "30", *FEW]
    assert run(*TINY, *flags, "--eval_strategy", "no", "--output_dir", tmp_path) == 1
    results = read_results(tmp_path)
    assert results["status"] == "diverged" and results["steps"] == results["diverged_at_step"] < 30
    assert results["test"] == {"loss": None, "accuracy": None, "examples": 50}
    assert "confusion_matrix" not in results and not (tmp_path / "model.safetensors").exists()
    assert "diverged" in capsys.readouterr().out


def test_what_is_printed_is_what_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*TINY, *FEW, "--max_steps", 1, "--output_dir", tmp_path) == 0
    test = read_results(tmp_path)["test"]
    line = f"loss {test['loss']:.4f}, accuracy {test['accuracy']:.2%}, top-5 {test['top5_accuracy']:.2%}"
    assert f"test: {line}" in capsys.readouterr().out


def test_few_classes_have_no_top5(tmp_path: Path) -> None:
    class_folders(tmp_path / "data", {"blue": 6, "red": 6})
    assert run(*TINY, "--data_dir", tmp_path / "data", "--max_steps", 1, "--output_dir", tmp_path / "out") == 0
    results = read_results(tmp_path / "out")
    assert set(results["validation"]) == {"loss", "accuracy", "examples"} and results["test"] is None
    assert results["confusion_matrix"]["split"] == "validation"
    assert results["confusion_matrix"]["classes"] == results["corpus"]["classes"] == ["blue", "red"]


def test_label_smoothing_is_for_training_alone(tmp_path: Path) -> None:
    """At a learning rate of 0 nothing moves: the training loss is the smoothed one, the validation loss is not."""
    still = [*TINY, *FEW, "--max_steps", 4, "--learning_rate", "0", "--optim", "sgd", "--eval_steps", "4"]
    still += ["--model_options", f"{TINY[1]},drop_path_rate=0.0,attention_probs_dropout_prob=0.0"]
    losses = {}
    for smoothing in ("0", "0.3"):
        output = tmp_path / smoothing
        assert run(*still, "--label_smoothing_factor", smoothing, "--output_dir", output) == 0
        results = read_results(output)
        evaluated = next(entry["eval_loss"] for entry in results["log_history"] if "eval_loss" in entry)
        assert evaluated == pytest.approx(results["validation"]["loss"], rel=1e-5)
        losses[smoothing] = [entry["loss"] for entry in results["log_history"] if "loss" in entry]
        losses[smoothing].append(evaluated)
    assert losses["0"][-1] == losses["0.3"][-1]
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "0.3")
    made = prepared(*still, "--output_dir", tmp_path)
    made.model.load_state_dict(model.state_dict())
    for batch, found in zip(made.new_trainer([]).get_train_dataloader(), losses["0.3"], strict=False):
        with torch.no_grad():
            logs = model(pixel_values=batch["pixel_values"]).logits.log_softmax(dim=1)
        own = logs.gather(1, batch["labels"][:, None]).mean()
        assert found == pytest.approx(-(0.7 * own + 0.3 * logs.mean()).item(), rel=1e-4)


def test_help_can_be_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse_image_arguments(["--help"])
    assert stop.value.code == 0 and "--layer_decay" in capsys.readouterr().out


@pytest.mark.slow
def test_more_than_a_hundred_classes(tmp_path: Path) -> None:
    """Their confusion matrix has a file of its own."""
    from datasets import ClassLabel, Dataset, DatasetDict, Features, Image

    names = [f"class {number}" for number in range(101)]
    features = Features({"image": Image(), "label": ClassLabel(names=names)})
    rows = {"image": [picture(size=(8, 8), seed=number) for number in range(101)], "label": list(range(101))}
    table = Dataset.from_dict(rows, features)
    DatasetDict(dict.fromkeys(("train", "validation", "test"), table)).save_to_disk(tmp_path / "data")
    assert run(*TINY, "--data_dir", tmp_path / "data", "--max_steps", 1, "--output_dir", tmp_path / "out") == 0
    results = read_results(tmp_path / "out")
    assert results["confusion_matrix"] == {"split": "test", "file": "confusion_matrix.json"}
    written = json.loads((tmp_path / "out" / "confusion_matrix.json").read_text())
    counts = np.asarray(written["counts"])
    assert counts.shape == (101, 101) and (counts.sum(axis=1) == 1).all() and written["classes"] == names
    assert np.trace(counts) / 101 == results["test"]["accuracy"]
    assert (tmp_path / "out" / "confusion_matrix.png").exists()
