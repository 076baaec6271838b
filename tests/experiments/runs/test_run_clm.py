"""hf-adafisher clm from its command line to its files."""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer

from hf_adafisher.data.text import count_words
from hf_adafisher.experiments.runs import run as run_module
from hf_adafisher.experiments.runs.checkpoints import find_checkpoint
from hf_adafisher.experiments.runs.clm_arguments import parse_clm_arguments
from hf_adafisher.experiments.runs.clm_setup import prepare_clm_run
from hf_adafisher.experiments.runs.run import train_and_report
from hf_adafisher.optimizers.factory.create import available_optimizers
from tests.scripts import read_results


def test_results_hold_the_run(finished: Path, files: dict[str, str]) -> None:
    results = read_results(finished)
    assert (results["status"], results["optimizer"], results["steps"]) == ("completed", "adafisherw", 4)
    assert results["seed"] == 42 and results["resumed_from"] is None
    assert results["versions"]["torch"] == torch.__version__ and "hf_adafisher" in results["versions"]
    assert results["settings"]["training"]["max_steps"] == 4 and results["settings"]["model"]["n_embd"] == 16
    assert files["test"] in results["corpus"]["source"]
    assert [entry["step"] for entry in results["log_history"] if "loss" in entry] == [1, 2, 3, 4]
    assert results["train"]["loss"] == next(e["loss"] for e in results["log_history"] if e.get("step") == 4)
    assert 0 < results["train_seconds"] < results["wall_seconds"] and results["step_time"]["median_ms"] > 0
    momentum = 4 * results["model"]["parameters"]  # one float32 for each value; the factors are vectors
    assert momentum <= results["optimizer_state_bytes"] < 2 * momentum


@pytest.mark.parametrize("split", ["validation", "test"])
def test_results_agree_with_the_saved_model(finished: Path, files: dict[str, str], split: str) -> None:
    """The model on disk, read afresh and evaluated on the whole text with windows made by hand."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(finished), AutoTokenizer.from_pretrained(finished)
    text = Path(files[split]).read_text(encoding="utf-8")
    ids = [tokenizer.bos_token_id, *tokenizer.encode(text)]
    total = 0.0
    for start in range(0, len(ids) - 1, 15):
        window = torch.tensor([ids[start : start + 16]])
        with torch.no_grad():
            total += model(input_ids=window, labels=window).loss.item() * (window.shape[1] - 1)
    found = read_results(finished)[split]
    assert found["num_tokens"] == len(ids) - 1 and found["num_words"] == count_words(text.split("\n")[:-1])
    assert found["total_nll"] == pytest.approx(total, rel=1e-5)
    assert found["loss"] == pytest.approx(total / (len(ids) - 1), rel=1e-5)
    assert math.log(found["token_perplexity"]) == pytest.approx(found["loss"])
    assert math.log(found["word_perplexity"]) == pytest.approx(found["total_nll"] / found["num_words"])


def test_files_beside_the_results(finished: Path) -> None:
    assert (finished / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    card = (finished / "README.md").read_text()
    assert "trained from scratch" in card and "AdaFisherW" in card


@pytest.mark.parametrize("optim", ["adafisherw", "adamw"])
def test_resumed_is_uninterrupted(main: Any, command: list[str], finished: Path, tmp_path: Path, optim: str) -> None:
    command = [*command, "--save_steps", "2", "--optim", optim]
    assert main([*command, "--output_dir", str(tmp_path / "whole")]) == 0
    middle = str(tmp_path / "whole" / "checkpoint-2")
    assert main([*command, "--output_dir", str(tmp_path / "rest"), "--resume_from_checkpoint", middle]) == 0
    whole, rest = read_results(tmp_path / "whole"), read_results(tmp_path / "rest")
    assert rest["resumed_from"] == middle
    assert rest["step_time"]["steps"] + rest["step_time"]["warmup_steps"] == 2  # only what was left to do
    for part in ("train", "validation", "test", "steps", "optimizer_state_bytes"):
        assert rest[part] == whole[part]
    weights = [load_file(tmp_path / run / "model.safetensors") for run in ("whole", "rest")]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
    start = load_file(Path(middle) / "model.safetensors")
    assert any(not torch.equal(tensor, start[name]) for name, tensor in weights[0].items())


def test_training_seconds_stand_in_the_log_and_go_on_after_a_resume(
    main: Any, command: list[str], tmp_path: Path
) -> None:
    """Also from a checkpoint (step 2) at which nothing was logged."""
    command = [*command, "--save_steps", "2", "--logging_steps", "3", "--eval_steps", "3"]
    assert main([*command, "--output_dir", str(tmp_path / "whole")]) == 0
    middle = tmp_path / "whole" / "checkpoint-2"
    assert main([*command, "--output_dir", str(tmp_path / "rest"), "--resume_from_checkpoint", str(middle)]) == 0
    whole, rest = read_results(tmp_path / "whole"), read_results(tmp_path / "rest")
    before = json.loads((middle / "trainer_state.json").read_text())["log_history"][-1]
    assert before["step"] == 2 and 0 < before["train_seconds"] < whole["train_seconds"]
    for results in (whole, rest):
        seconds = [entry["train_seconds"] for entry in results["log_history"]]
        assert seconds == sorted(seconds) and seconds[-1] == results["train_seconds"]
        curve = next(entry for entry in results["log_history"] if "eval_loss" in entry)
        assert curve["step"] == 3 and before["train_seconds"] < curve["train_seconds"] < results["train_seconds"]
    assert rest["log_history"][0] == before


def test_last_finds_the_latest_checkpoint(finished: Path) -> None:
    assert find_checkpoint(finished, "last") == find_checkpoint(finished, True) == str(finished / "checkpoint-4")
    assert find_checkpoint(finished, None) is None


def test_last_skips_a_checkpoint_that_was_cut_off_while_it_was_written(
    main: Any, command: list[str], finished: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Resumed from the one before, the run ends as the one that was not disturbed."""
    output = Path(shutil.copytree(finished, tmp_path / "run"))
    state = output / "checkpoint-4" / "trainer_state.json"
    state.write_bytes(state.read_bytes()[:50])
    resume = ["--output_dir", str(output), "--resume_from_checkpoint", "last"]
    assert main([*command, "--save_steps", "2", *resume]) == 0
    assert f"Skipping {output / 'checkpoint-4'}" in caplog.text and str(state) in caplog.text
    assert read_results(output)["resumed_from"] == str(output / "checkpoint-2")
    assert read_results(output)["test"] == read_results(finished)["test"]
    weights = [load_file(run / "model.safetensors") for run in (finished, output)]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


@pytest.mark.parametrize("resume", ["last", "checkpoint-4", "checkpoint-2"])
def test_broken_checkpoints_end_in_one_line_and_stay_as_they_are(
    main: Any, command: list[str], finished: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, resume: str
) -> None:
    output = Path(shutil.copytree(finished, tmp_path / "run"))
    cut = output / "checkpoint-4" / "optimizer.pt"
    cut.write_bytes(cut.read_bytes()[:1000])
    (output / "checkpoint-2" / "rng_state.pth").unlink()
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    given = resume if resume == "last" else str(output / resume)
    flags = ["--output_dir", str(output), "--max_steps", "8", "--resume_from_checkpoint", given]
    assert main([*command, *flags]) == 2
    error = caplog.records[-1].getMessage()
    named = output / "checkpoint-2" / "rng_state.pth" if resume == "checkpoint-2" else cut
    assert str(named) in error and "\n" not in error
    assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == before


def test_a_used_output_directory_gives_a_warning(
    finished: Path, command: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    prepare_clm_run(*parse_clm_arguments([*command, "--output_dir", str(finished)]))
    assert "starts anew" in caplog.text and "--resume_from_checkpoint last" in caplog.text
    caplog.clear()
    longer = ["--max_steps", "6", "--output_dir", str(finished), "--resume_from_checkpoint", "last"]
    prepare_clm_run(*parse_clm_arguments([*command, *longer]))
    assert "starts anew" not in caplog.text


def test_initial_weights_depend_on_the_seed_and_not_on_the_optimizer(command: list[str], tmp_path: Path) -> None:
    def weights(*flags: str) -> torch.Tensor:
        model = prepare_clm_run(*parse_clm_arguments([*command, "--output_dir", str(tmp_path), *flags])).model
        return torch.cat([parameter.flatten() for parameter in model.parameters()])

    first = weights("--optim", "adafisherw")
    assert torch.equal(first, weights("--optim", "sgd"))
    assert not torch.equal(first, weights("--seed", "43"))


def test_a_json_file_says_the_same_as_flags(
    main: Any, command: list[str], files: dict[str, str], finished: Path, tmp_path: Path
) -> None:
    config = {
        **{"n_layer": 1, "n_embd": 16, "n_head": 2, "vocab_size": 300, "block_size": 16, "max_steps": 4},
        **{"per_device_train_batch_size": 4, "logging_steps": 1, "disable_tqdm": True, "use_cpu": True},
        **{f"{split}_file": path for split, path in files.items()},
        "output_dir": str(tmp_path / "out"),
    }
    (tmp_path / "run.json").write_text(json.dumps(config))
    assert main([str(tmp_path / "run.json")]) == 0
    assert read_results(tmp_path / "out")["test"] == read_results(finished)["test"]


@pytest.mark.parametrize("optim", available_optimizers())
def test_every_optimizer_parses(optim: str, tmp_path: Path) -> None:
    training = parse_clm_arguments(["--optim", optim, "--output_dir", str(tmp_path)])[2]
    assert training.optim == optim and training.per_device_train_batch_size == 16
    assert training.lr_scheduler_type == "cosine" and training.logging_steps == 10


def test_flags_win_over_the_script_defaults(tmp_path: Path) -> None:
    flags = [
        "--lr_scheduler_type",
        "linear",
        "--warmup_steps",
        "0",
        "--learning_rate",
        "0.5",
        "--eval_strategy",
        "no",
    ]
    training = parse_clm_arguments(["--output_dir", str(tmp_path), *flags])[2]
    assert (training.lr_scheduler_type, training.warmup_steps, training.learning_rate) == ("linear", 0, 0.5)
    assert training.eval_strategy == "no"


def test_help_can_be_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse_clm_arguments(["--help"])
    assert stop.value.code == 0 and "--train_file" in capsys.readouterr().out


def test_a_diverged_run_says_so(main: Any, command: list[str], tmp_path: Path) -> None:
    flags = ["--optim", "sgd", "--learning_rate", "1e30", "--max_grad_norm", "0", "--max_steps", "30"]
    flags += ["--eval_strategy", "no"]  # the training loss alone must tell
    assert main([*command, *flags, "--output_dir", str(tmp_path)]) == 1
    results = read_results(tmp_path)
    assert results["status"] == "diverged" and results["steps"] == results["diverged_at_step"] < 30
    assert results["test"]["word_perplexity"] is None and results["test"]["num_words"] > 0
    assert not (tmp_path / "model.safetensors").exists()


def test_a_diverged_run_leaves_no_card_or_results_of_an_earlier_one(
    main: Any, command: list[str], tmp_path: Path
) -> None:
    for name in ("results.json", "README.md"):
        (tmp_path / name).write_text("of an earlier run")
    flags = ["--optim", "sgd", "--learning_rate", "1e30", "--max_grad_norm", "0", "--eval_strategy", "no"]
    assert main([*command, *flags, "--max_steps", "30", "--output_dir", str(tmp_path)]) == 1
    assert read_results(tmp_path)["status"] == "diverged" and not (tmp_path / "README.md").exists()


def test_fine_tuning_starts_from_the_given_model(main: Any, command: list[str], finished: Path, tmp_path: Path) -> None:
    command = [*command, "--model_name_or_path", str(finished), "--output_dir", str(tmp_path)]
    before = load_file(finished / "model.safetensors")
    state = prepare_clm_run(*parse_clm_arguments(command)).model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in before.items())
    assert main([*command, "--learning_rate", "1e-2"]) == 0
    assert read_results(tmp_path)["test"]["loss"] < read_results(finished)["test"]["loss"]
    assert AutoTokenizer.from_pretrained(tmp_path).get_vocab() == AutoTokenizer.from_pretrained(finished).get_vocab()


def test_another_architecture_from_scratch(command: list[str], tmp_path: Path) -> None:
    from transformers import LlamaConfig

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaConfig(**sizes, vocab_size=7, max_position_embeddings=16).save_pretrained(tmp_path)
    flags = ["--config_name", str(tmp_path), "--output_dir", str(tmp_path / "out")]
    run = prepare_clm_run(*parse_clm_arguments([*command, *flags]))
    assert run.model.config.model_type == "llama"
    assert run.model.get_input_embeddings().weight.shape == (len(run.tokenizer), 16)
    with pytest.raises(ValueError, match=r"block_size is 17, the model's context 16: use --block_size 16"):
        prepare_clm_run(*parse_clm_arguments([*command, *flags, "--block_size", "17"]))


def test_a_run_goes_on_without_matplotlib(
    main: Any,
    command: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    for name in ("matplotlib", "matplotlib.figure", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, name, None)
    assert main([*command, "--max_steps", "1", "--output_dir", str(tmp_path)]) == 0
    assert "pip install matplotlib" in caplog.text and not (tmp_path / "learning_curve.png").exists()
    assert (tmp_path / "results.json").exists()


def test_an_interrupted_run_leaves_the_earlier_results(
    main: Any, command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("transformers.Trainer.train", interrupt)
    (tmp_path / "results.json").write_text("an earlier run's")
    with pytest.raises(KeyboardInterrupt):
        main([*command, "--output_dir", str(tmp_path)])
    assert (tmp_path / "results.json").read_text() == "an earlier run's"


def test_a_refused_resume_leaves_the_earlier_run_as_it_was(
    main: Any, command: list[str], finished: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A finished run, and another optimizer: bad input, told in a line before anything is touched."""
    before = (finished / "results.json").read_bytes()
    again = [*command, "--output_dir", str(finished), "--resume_from_checkpoint"]
    assert main([*again, "last"]) == 2
    assert "has 4 steps and --max_steps is 4: the run has finished" in caplog.text
    assert main([*again, str(finished / "checkpoint-2"), "--optim", "adamw"]) == 2
    assert "this checkpoint was not written by adamw" in caplog.text
    assert (finished / "results.json").read_bytes() == before


def test_a_finished_run_is_uploaded_as_it_is(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With ``--push_to_hub``: once, complete, with the run's own card and results, and without checkpoints."""
    uploads: list[tuple[str, set[str], list[str]]] = []

    def upload(repo_id: str, folder_path: Path, ignore_patterns: list[str], **options: Any) -> None:
        uploads.append((repo_id, {path.name for path in Path(folder_path).iterdir()}, ignore_patterns))

    monkeypatch.setattr(run_module, "upload_folder", upload)
    monkeypatch.setattr(Trainer, "init_hf_repo", lambda self, token=None: setattr(self, "hub_model_id", "me/model"))
    monkeypatch.setattr(Trainer, "_push_from_checkpoint", lambda self, folder: None)
    out = tmp_path / "out"
    run = prepare_clm_run(*parse_clm_arguments([*command, "--output_dir", str(out), "--push_to_hub"]))
    assert train_and_report(run)["status"] == "completed"
    ((repository, files, ignored),) = uploads
    assert repository == "me/model" and {"results.json", "README.md", "model.safetensors", "tokenizer.json"} <= files
    assert "checkpoint-*" in ignored and ".unfinished" not in files
