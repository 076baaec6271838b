"""Bad input to hf-adafisher image: one line that names it and the way out, and no work done."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value

from hf_adafisher.experiments.runs.image_arguments import parse_image_arguments
from hf_adafisher.experiments.runs.run import PreparedRun, run_script
from tests.data.images.image_samples import class_folders, picture
from tests.experiments.runs.image_runs import TINY, run
from tests.scripts import read_results

Check = Callable[[Sequence[Any], str], str]


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path) -> Check:
    """Checks that a command line ends with status 2 and this message in one line, and that nothing is written."""

    def train(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a run with bad input was started")

    monkeypatch.setattr("transformers.Trainer.train", train)

    def check(flags: Sequence[Any], message: str) -> str:
        caplog.clear()
        output = tmp_path / "out"
        assert run(*flags, "--output_dir", output) == 2
        error = caplog.records[-1]
        assert error.levelname == "ERROR" and message in error.getMessage() and "\n" not in error.getMessage()
        assert not output.exists()
        return error.getMessage()

    return check


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--dataset", "digit"], "did you mean 'digits'"),
        (["--model", "resnet19"], "did you mean 'resnet18'"),
        (["--model", "vit", "--image_size", "10"], "image_size is 10, not a multiple of the model's patch of 4 pixels"),
        (["--image_size", "0"], "image_size is 0"),
        (["--data_dir", "nowhere"], "'nowhere' does not exist"),
        (["--data_dir", "nowhere", "--dataset", "digits"], "give --dataset or --data_dir, not both"),
        (["--model", "vit", "--model_name_or_path", "a"], "give --model (from scratch) or --model_name_or_path"),
        (["--model_name_or_path", "/nowhere/at/all"], "/nowhere/at/all"),
        (["--model", "timm/resnet10t"], "pip install timm"),
        (["--freeze_backbone"], "--freeze_backbone needs --model_name_or_path"),
        (["--layer_decay", "0"], "layer_decay is 0.0; it must be in (0, 1]"),
        (["--layer_decay", "1.5"], "layer_decay is 1.5; it must be in (0, 1]"),
        (["--layer_decay", "0.5", "--optim", "adamw_torch"], "not with Trainer's adamw_torch: use one of adafisher"),
        (["--label_smoothing_factor", "0.1", "--mixup", "0.2"], "does not go together with --mixup or --cutmix"),
        (["--max_train_samples", "0"], "max_train_samples is 0; it must be at least 1"),
        (["--max_eval_samples", "-1"], "max_eval_samples is -1; it must be at least 1"),
        (["--max_train_samples", "5"], "classes without a training image"),
        (["--crop_ratio", "0"], "crop_ratio is 0.0; it must be more than 0"),
        (["--flip", "2"], "flip is 2.0; a probability must be in [0, 1]"),
        (["--mixup", "-1"], "mixup is -1.0; it must be 0 (off) or more"),
        (["--cutout", "17"], "cutout is 17, more than the image's 16 pixels"),
        (["--augmentation_library", "albumentations"], "known: auto, kornia, torchvision"),
        (["--augmentation_library", "torchvision", "--flip", "0.5"], "torchvision cannot be imported"),
        (["--validation_fraction", "1"], "validation_fraction is 1.0"),
        (["--model_options", "hidden_size"], 'model_options must look like "key=value'),
        (["--model_options", "hiden_size=16"], "has no 'hiden_size'; it has:"),
        (["--model_options", "num_labels=3"], "model_options cannot set num_labels"),
        (["--model_options", "hidden_size=17"], "hidden_size is 17, which 2 attention heads cannot share"),
        (["--model_options", "hidden_size=wide"], "hidden_size"),
        (["--model_options", "num_attention_heads=0"], "num_attention_heads"),
        (["--model_name_or_path", "a", "--model_options", "hidden_size=16"], "are for a network from scratch"),
        (["--optim", "adafishr"], "'adafishr'"),
        (["--num_train_epochs", "0"], "nothing to train"),
        (["--resume_from_checkpoint", "last"], "no checkpoint to resume from"),
        (["--resume_from_checkpoint", "nowhere"], "'nowhere' is not a checkpoint"),
        (["--damping", "0"], "damping"),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else "",
)
def test_bad_options_end_in_one_line(flags: list[str], message: str, refused: Check) -> None:
    refused(flags, message)


def saved(folder: Path, **splits: dict[str, Any]) -> Path:
    """Tables of pictures, one for each split, with the given columns beside them."""
    tables = {}
    for split, columns in splits.items():
        rows = len(next(iter(columns.values()))[1])
        features = {"image": Image(), **{key: kind for key, (kind, _) in columns.items()}}
        data = {"image": [picture(size=(8, 8), seed=row) for row in range(rows)]}
        tables[split] = Dataset.from_dict({**data, **{k: v for k, (_, v) in columns.items()}}, Features(features))
    DatasetDict(tables).save_to_disk(folder)
    return folder


TWO = ClassLabel(names=["cat", "dog"])


@pytest.mark.parametrize(
    ("splits", "flags", "message"),
    [
        ({"train": {"kind": (Value("int64"), [0, 1])}}, [], "has no column 'label'; give the label column"),
        ({"train": {"label": (TWO, [0, 1])}}, ["--label_column", "fine"], "has no label column 'fine'"),
        ({"train": {"label": (TWO, [0, 1])}}, ["--image_column", "img"], "has no column 'img'"),
        ({"train": {"label": (Value("float32"), [0.0, 1.0])}}, [], "has the type float32; it must hold class numbers"),
        ({"train": {"label": (Value("string"), ["a", "b"])}}, [], "has the type string; it must hold class numbers"),
        ({"train": {"label": (TWO, [1, 1, 1])}}, [], "the training split has only the class 'dog'"),
        ({"train": {"label": (Value("int64"), [0, 1, -3])}}, [], "row 2 has the label -3"),
        (
            {"train": {"label": (Value("int64"), [0, 1] * 4)}, "test": {"label": (Value("int64"), [0, 2])}},
            [],
            "the test split has 1 classes without a training image: '2'",
        ),
        ({"test": {"label": (TWO, [0, 1])}}, [], "has no training split"),
        ({"train": {"label": (TWO, [0, 1])}}, [], "cannot hold out a validation split"),
    ],
    ids=["no-column", "label", "image", "float", "text", "one", "negative", "foreign", "no-train", "too-few"],
)
def test_bad_tables_end_in_one_line(
    splits: dict[str, Any], flags: list[str], message: str, refused: Check, tmp_path: Path
) -> None:
    data = saved(tmp_path / "data", **splits)
    refused([*TINY, "--data_dir", data, *flags], message)


def zero_bytes(path: Path) -> None:
    """Empties it."""
    path.write_bytes(b"")


def truncated(path: Path) -> None:
    """Cuts off its second half."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def text(path: Path) -> None:
    """Puts words into it."""
    path.write_text("no picture")


@pytest.mark.parametrize("damage", [zero_bytes, truncated, text])
def test_broken_images_are_named(damage: Any, refused: Check, tmp_path: Path) -> None:
    data = class_folders(tmp_path / "data", {"blue": 4, "red": 4})
    broken = data / "red" / "002.png"
    damage(broken)
    assert "use --skip_broken" in refused([*TINY, "--data_dir", data], f"1 of 8 images are broken: {broken}")


def test_broken_images_can_be_left_out(tmp_path: Path) -> None:
    data = class_folders(tmp_path / "data", {"blue": 4, "red": 4})
    zero_bytes(data / "red" / "002.png")
    output = tmp_path / "out"
    assert run(*TINY, "--data_dir", data, "--skip_broken", "--max_steps", 1, "--output_dir", output) == 0
    corpus = read_results(output)["corpus"]
    assert list(corpus["skipped"]) == [str(data / "red" / "002.png")]
    assert corpus["train"]["examples"] + corpus["validation"]["examples"] == 7


def test_folders_without_images_are_named(refused: Check, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    refused(["--data_dir", empty], f"{str(empty)!r} holds no images in class folders")
    one = class_folders(tmp_path / "one", {"blue": 4})
    refused(["--data_dir", one], "the training split has only the class 'blue'")
    (one / "red").mkdir()
    refused(["--data_dir", one], f"class folder {str(one / 'red')!r} holds no images")
    class_folders(tmp_path / "more" / "train", {"blue": 4, "red": 4})
    class_folders(tmp_path / "more" / "test", {"green": 1})
    refused(["--data_dir", tmp_path / "more"], "classes without a folder")


def test_checkpoints_of_other_tasks_are_refused(refused: Check, tmp_path: Path) -> None:
    """A language model, and an image model's configuration with weights of something else."""
    from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, ViTConfig

    GPT2LMHeadModel(GPT2Config(vocab_size=10, n_positions=8, n_layer=1, n_embd=8, n_head=1)).save_pretrained(
        tmp_path / "gpt2"
    )
    refused(["--model_name_or_path", tmp_path / "gpt2"], "'gpt2', which classifies no images")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=10, **sizes)).save_pretrained(tmp_path / "mixed")
    ViTConfig(**sizes, image_size=8, patch_size=4).save_pretrained(tmp_path / "mixed")
    message = "is a checkpoint of another task or architecture"
    refused(["--model_name_or_path", tmp_path / "mixed"], message)


def test_sizes_that_a_pretrained_model_cannot_take_are_refused(refused: Check, tmp_path: Path) -> None:
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    ViTForImageClassification(ViTConfig(**sizes, image_size=28, patch_size=14)).save_pretrained(tmp_path / "vit")
    flags = ["--model_name_or_path", tmp_path / "vit", "--image_size", 32]
    refused(flags, "not a multiple of the model's patch of 14 pixels: use --image_size 28 or 42")


def test_unknown_keys_in_a_json_file_are_refused(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"image_sizes": 8}')
    assert run(tmp_path / "run.json", quick=[]) == 2
    assert "image_sizes" in caplog.text
    assert run("nowhere.json", quick=[]) == 2
    assert "'nowhere.json' does not exist" in caplog.text


def test_a_refused_resume_leaves_the_earlier_run_as_it_was(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    """A finished run, and another optimizer: bad input, told in a line before anything is touched."""
    command = [*TINY, "--max_train_samples", 32, "--max_eval_samples", 20, "--save_steps", 1, "--output_dir", tmp_path]
    assert run(*command, "--max_steps", 2) == 0
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    again = [*command, "--resume_from_checkpoint"]
    assert run(*again, "last", "--max_steps", 2) == 2
    assert "has 2 steps and --max_steps is 2: the run has finished" in caplog.text
    assert run(*again, "last", "--max_steps", 3, "--optim", "adamw") == 2
    assert "this checkpoint was not written by adamw" in caplog.text
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_without_scikit_learn_nothing_is_trained(
    refused: Check, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The evaluation at the end needs it."""
    class_folders(tmp_path / "images", {"red": 8, "blue": 8})
    monkeypatch.setitem(sys.modules, "sklearn", None)
    refused([*TINY, "--data_dir", tmp_path / "images"], "scikit-learn: pip install 'hf_adafisher[vision]'")


def test_options_that_exclude_each_other_are_known_before_the_data_is(tmp_path: Path) -> None:
    """The arguments alone tell, wherever they come from."""
    for flags in (["--freeze_backbone"], ["--layer_decay", "2"], ["--model_options", "a"]):
        with pytest.raises(ValueError, match=r"freeze_backbone|layer_decay|model_options"):
            parse_image_arguments([*flags, "--output_dir", str(tmp_path)])


def test_an_error_of_several_lines_is_told_in_one(caplog: pytest.LogCaptureFixture) -> None:
    """Libraries raise such."""

    def prepare(argv: Sequence[str] | None) -> PreparedRun:
        raise OSError("no such model:\n  nowhere\n")

    assert run_script(prepare, []) == 2
    assert caplog.records[-1].getMessage() == "no such model: nowhere"
