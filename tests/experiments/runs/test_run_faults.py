"""Runs that fail, are killed, or are resumed with other arguments: nothing of an earlier run is lost or mixed in."""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from hf_adafisher.experiments.outputs import replacing
from hf_adafisher.experiments.runs.pictures import write_learning_curves
from hf_adafisher.optimizers.factory.catalog import optimizer_record
from hf_adafisher.training.arguments import AdaFisherTrainingArguments
from tests.data.images.image_samples import class_folders
from tests.experiments.runs.image_runs import TINY
from tests.experiments.runs.image_runs import run as run_images
from tests.scripts import read_results


def contents(folder: Path) -> dict[str, str]:
    """Hashes of all files below, by path."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def same_weights(*runs: Path) -> bool:
    first, second = (load_file(run / "model.safetensors") for run in runs)
    return all(torch.equal(tensor, second[name]) for name, tensor in first.items())


@pytest.fixture
def earlier(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


class Killed(BaseException):
    """Stands for SIGKILL: no handler of the run catches it."""


def kill_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the next run die in the middle of a step."""

    def training_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == step:
            raise Killed
        return original(self, *args, **kwargs)

    from hf_adafisher.training.trainer import AdaFisherTrainer

    original = AdaFisherTrainer.training_step
    monkeypatch.setattr(AdaFisherTrainer, "training_step", training_step)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--optim", "adamw", "--learning_rate", "nan"], "nan"),
        (["--n_layer", "2", "--resume_from_checkpoint", "last", "--max_steps", "6"], "does not fit the model"),
        (["--n_embd", "32", "--resume_from_checkpoint", "last", "--max_steps", "6"], "(48,) there, (96,) here"),
        (["--block_size", "8", "--resume_from_checkpoint", "last", "--max_steps", "6"], "(16, 16) there, (8, 16) here"),
        (["--optim", "adamw_torch", "--resume_from_checkpoint", "last", "--max_steps", "6"], "optimizer.pt"),
        (["--resume_from_checkpoint", "last", "--max_steps", "2"], "has 4 steps and --max_steps is 2"),
    ],
)
def test_a_rerun_that_is_refused_touches_nothing(
    main: Any, command: list[str], earlier: Path, caplog: pytest.LogCaptureFixture, flags: list[str], message: str
) -> None:
    """E1: one line, and every file of the earlier run as it was."""
    before = contents(earlier)
    assert main([*command, *flags, "--output_dir", str(earlier)]) == 2
    assert contents(earlier) == before
    assert message in caplog.records[-1].getMessage() and "\n" not in caplog.records[-1].getMessage()


@pytest.mark.skipif(
    not hasattr(optimizer_record("kfac"), "options_class"), reason="K-FAC's options are not a dataclass yet"
)
@pytest.mark.parametrize(
    ("options", "message"),
    [({"learning_rate": float("nan")}, "nan"), ({"optim_args": "damping=-1"}, "damping")],
)
def test_the_values_of_kfac_are_checked_before_there_is_a_model(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    """E1: with everybody's, when the arguments are parsed."""
    with pytest.raises(ValueError, match=message):
        AdaFisherTrainingArguments(str(tmp_path), optim="kfac", **options)


def test_a_rerun_that_is_killed_leaves_the_earlier_results(
    main: Any, command: list[str], earlier: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """E1: results, model, picture and checkpoints of the earlier run stand until the new run is complete."""
    before = contents(earlier)
    again = [*command, "--save_steps", "1", "--learning_rate", "0.02", "--output_dir", str(earlier)]
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(3, patch)
        main(again)
    after = contents(earlier)
    kept = {name: value for name, value in before.items() if not name.startswith("checkpoint-")}
    assert kept.items() <= after.items()
    moved = {name.partition("/")[2]: value for name, value in after.items() if name.startswith("earlier-run-1/")}
    assert moved == {name: value for name, value in before.items() if name.startswith("checkpoint-")}
    assert sorted(path.name for path in earlier.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]
    assert main([*again, "--resume_from_checkpoint", "last"]) == 0  # the new run's last, not the earlier one's
    assert read_results(earlier)["resumed_from"] == str(earlier / "checkpoint-3")
    assert read_results(earlier)["settings"]["training"]["learning_rate"] == 0.02
    assert not list(earlier.glob("earlier-run-*")) and not list(earlier.glob(".unfinished*"))


def test_a_complete_rerun_takes_the_place_of_the_earlier_run(main: Any, command: list[str], earlier: Path) -> None:
    """E1: no weights file of the earlier run is left beside the new model's."""
    (earlier / "model.safetensors").rename(earlier / "model-00001-of-00001.safetensors")
    (earlier / "model.safetensors.index.json").write_text("{}")
    assert main([*command, "--seed", "1", "--output_dir", str(earlier)]) == 0
    assert read_results(earlier)["seed"] == 1 and "\n- seed: 1\n" in (earlier / "README.md").read_text()
    assert sorted(path.name for path in earlier.glob("model*")) == ["model.safetensors"]
    assert same_weights(earlier, earlier / "checkpoint-4")


@pytest.mark.parametrize("where", ["evaluation", "model", "results"])
def test_a_run_killed_after_its_last_checkpoint_is_finished(
    main: Any, command: list[str], finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """E2: evaluation, model and results of a run that ended between its last checkpoint and results.json."""
    output = tmp_path / "run"
    again = [*command, "--save_steps", "2", "--output_dir", str(output)]
    place = {
        "evaluation": "hf_adafisher.experiments.runs.clm.evaluate_perplexity",
        "model": "hf_adafisher.experiments.runs.run.write_learning_curves",
        "results": "hf_adafisher.experiments.runs.run.swap_in",
    }[where]

    def die(*args: Any, **kwargs: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(place, die)
        main(again)
    assert not (output / "results.json").exists() and (output / "checkpoint-4").is_dir()
    assert main([*again, "--resume_from_checkpoint", "last"]) == 0
    whole, rest = read_results(finished), read_results(output)
    for part in ("status", "steps", "train", "validation", "test", "optimizer_state_bytes", "optimizer"):
        assert rest[part] == whole[part]
    assert rest["train_seconds"] > 0 and rest["step_time"]["steps"] == 0
    assert same_weights(output, finished) and "AdaFisherW" in (output / "README.md").read_text()
    assert (output / "learning_curve.png").is_file()
    before = contents(output)
    assert main([*again, "--resume_from_checkpoint", "last"]) == 2  # now it has finished
    assert contents(output) == before


def test_a_killed_rerun_is_finished_though_an_earlier_run_has_results(
    main: Any, command: list[str], earlier: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """E2: the earlier run's results.json does not count for the checkpoint of the new one."""
    again = [*command, "--seed", "7", "--output_dir", str(earlier)]

    def die(*args: Any, **kwargs: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("hf_adafisher.experiments.runs.clm.evaluate_perplexity", die)
        main(again)
    assert read_results(earlier)["seed"] == 42
    assert main([*again, "--resume_from_checkpoint", "last"]) == 0
    assert read_results(earlier)["seed"] == 7 and same_weights(earlier, earlier / "checkpoint-4")


def test_no_step_is_trained_beyond_the_last(main: Any, command: list[str], earlier: Path) -> None:
    """E2: Trainer itself trains one step more from a checkpoint that has all its steps."""
    (earlier / "results.json").unlink()
    assert main([*command, "--output_dir", str(earlier), "--resume_from_checkpoint", "last"]) == 0
    assert read_results(earlier)["steps"] == 4 and same_weights(earlier, earlier / "checkpoint-4")


def test_a_resume_after_changed_data_keeps_the_tokenizer_and_says_so(
    main: Any, command: list[str], files: dict[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """E3: embeddings stand for the tokens of the checkpoint's tokenizer; hashes tell changed_data."""
    train, output = tmp_path / "train.txt", tmp_path / "run"
    text = Path(files["train"]).read_text(encoding="utf-8")
    train.write_text(text, encoding="utf-8")
    flags = [*command, "--train_file", str(train), "--save_steps", "2", "--output_dir", str(output)]
    assert main([*flags, "--max_steps", "2"]) == 0
    hashes = read_results(output)["data"]
    assert hashes["train"] == {"sha256": hashlib.sha256(text.encode()).hexdigest()}
    assert set(hashes) == {"train", "validation", "test"}
    assert json.loads((output / "checkpoint-2" / "data.json").read_text()) == hashes
    assert main([*flags, "--max_steps", "4", "--resume_from_checkpoint", "last"]) == 0
    assert "the data has changed" not in caplog.text
    train.write_text(text + "zyxwvut zyxwvut zyxwvut zyxwvut\n" * 500, encoding="utf-8")
    before = AutoTokenizer.from_pretrained(output / "checkpoint-4").get_vocab()
    assert main([*flags, "--max_steps", "6", "--resume_from_checkpoint", "last"]) == 0
    assert f"the data has changed since {output / 'checkpoint-4'} was written (train)" in caplog.text
    assert AutoTokenizer.from_pretrained(output).get_vocab() == before
    after = read_results(output)["data"]
    assert after["train"] != hashes["train"] and after["test"] == hashes["test"]


@pytest.mark.parametrize(
    ("optim", "asked", "used"),
    [
        ("adafisherw", ["--damping", "0.3", "--weight_decay", "0.1"], {"adafisher_damping": 0.1, "weight_decay": 0.0}),
        ("adamw", ["--adam_beta1", "0.5"], {"adam_beta1": 0.9}),
        ("kfac", ["--optim_args", "damping=0.5"], {"optim_args": "damping=0.01"}),
    ],
)
def test_a_resume_with_other_options_records_what_ran(
    main: Any,
    command: list[str],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    optim: str,
    asked: list[str],
    used: dict[str, Any],
) -> None:
    """E4: the checkpoint's options train on, so results and model card have these, and a warning has both."""
    flags = [*command, "--save_steps", "2", "--optim", optim, "--output_dir", str(tmp_path)]
    assert main([*flags, "--learning_rate", "0.04", "--max_steps", "2"]) == 0
    assert "trains on with its own options" not in caplog.text
    again = [*flags, "--learning_rate", "0.4", *asked, "--resume_from_checkpoint", "last"]
    assert main(again) == 0
    assert "learning_rate=0.04 (not 0.4)" in caplog.text
    results, card = read_results(tmp_path), (tmp_path / "README.md").read_text()
    settings = results["settings"]["training"]
    assert {key: settings[key] for key in used} == used and settings["learning_rate"] == 0.04
    assert results["optimizer_options"]["learning_rate"] == 0.04
    assert "learning_rate: 0.04\n" in card and "0.4\n" not in card
    rates = [entry["learning_rate"] for entry in results["log_history"] if "learning_rate" in entry]
    assert max(rates) <= 0.04


@pytest.mark.parametrize("name", [r"$\frac{$", "a$b$c", r"\alpha_$x^$", "$$"])
def test_class_names_are_no_formulas(tmp_path: Path, name: str) -> None:
    """E6: dollar signs and backslashes in the name of a folder stand in the picture as they are."""
    class_folders(tmp_path / "data" / "images", {name: 6, "red": 6})
    output = tmp_path / "out"
    assert run_images(*TINY, "--data_dir", tmp_path / "data" / "images", "--max_steps", 1, "--output_dir", output) == 0
    assert (output / "confusion_matrix.png").read_bytes().startswith(b"\x89PNG")
    assert read_results(output)["confusion_matrix"]["classes"] == sorted([name, "red"])
    assert write_learning_curves(tmp_path / "curve.png", {name: [{"step": 1, "loss": 1.0}]}, name)


def test_a_full_disk_leaves_the_earlier_file_and_is_named(tmp_path: Path) -> None:
    """E6: nothing is truncated in place, and the message has the path that Python's own lacks."""
    path = tmp_path / "report.html"
    path.write_text("an earlier report")
    with pytest.raises(OSError, match=f"No space left on device.*{path}"), replacing(path) as partial:
        partial.write_text("half of the new")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert path.read_text() == "an earlier report" and [file.name for file in tmp_path.iterdir()] == ["report.html"]


@pytest.mark.parametrize("place", ["checkpoint", "results"])
def test_a_full_disk_ends_a_run_in_one_line(
    main: Any,
    command: list[str],
    earlier: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    place: str,
) -> None:
    """E6: the folder is named, and the earlier run's results stay."""
    before = {name: value for name, value in contents(earlier).items() if not name.startswith("checkpoint-")}

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    where = {"checkpoint": "torch.save", "results": "pathlib.Path.write_text"}[place]
    monkeypatch.setattr(where, full)
    assert main([*command, "--output_dir", str(earlier)]) == 2
    message = caplog.records[-1].getMessage()
    assert "No space left on device" in message and str(earlier) in message and "\n" not in message
    assert before.items() <= contents(earlier).items()
