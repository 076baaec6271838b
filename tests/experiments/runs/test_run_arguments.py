"""Arguments named as in transformers' examples, files of arguments, the help, and the bar of a run."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_adafisher.data.text import count_words, encode_lines, evaluate_perplexity
from hf_adafisher.experiments.runs.callbacks import RunBar
from hf_adafisher.experiments.runs.clm_arguments import ClmTrainingArguments, DataArguments, parse_clm_arguments
from hf_adafisher.experiments.runs.image_arguments import parse_image_arguments
from tests.data.images.image_samples import picture
from tests.experiments.conftest import QUICK, TINY
from tests.experiments.runs.image_runs import TINY_RESNET, prepared
from tests.experiments.runs.image_runs import run as image_run
from tests.scripts import load_command, read_results

Main = Callable[[list[str]], int]


@pytest.fixture(scope="module")
def table(files: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The text of ``files`` as a local data set with the column ``body``."""
    folder = tmp_path_factory.mktemp("table")
    for split, path in files.items():
        rows = [json.dumps({"body": line, "id": 0}) for line in Path(path).read_text(encoding="utf-8").splitlines()]
        (folder / f"{split}.jsonl").write_text("\n".join(rows), encoding="utf-8")
    return folder


def data(files: dict[str, str]) -> list[str]:
    return [word for split, path in files.items() for word in (f"--{split}_file", path)]


def test_a_data_set_gives_the_run_of_its_text(main: Main, finished: Path, table: Path, tmp_path: Path) -> None:
    """The same lines as in the text files, so the same tokenizer, weights and losses."""
    flags = ["--dataset_name", str(table), "--text_column_name", "body", "--max_steps", "4", "--save_steps", "2"]
    assert main([*TINY, *QUICK, *flags, "--output_dir", str(tmp_path)]) == 0
    own, other = read_results(tmp_path), read_results(finished)
    assert own["test"] == other["test"] and own["data"] == other["data"]
    recorded = own["settings"]["data"]
    assert recorded["dataset"] == str(table) and recorded["text_column_name"] == "body"
    assert own["corpus"]["source"] == f"{table}, column body"


def test_a_stream_trains_in_order_and_goes_on_where_it_was(
    main: Main, table: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    words = [*TINY, *QUICK, "--dataset_name", str(table), "--text_column_name", "body", "--streaming"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main([*words, "--max_steps", "4", "--save_steps", "2", "--output_dir", str(whole)]) == 0
    results = read_results(whole)
    assert results["data"]["train"] == {"stream": f"{table}, column body, all lines"}
    assert results["steps_per_epoch"] is None and results["settings"]["data"]["streaming"] is True
    resumed = [*words, "--max_steps", "4", "--save_steps", "2", "--output_dir", str(parts)]
    resumed += ["--resume_from_checkpoint", str(whole / "checkpoint-2")]
    assert main(resumed) == 0
    assert same_tensors(whole / "model.safetensors", parts / "model.safetensors")
    assert "the data has changed" not in caplog.text
    assert main([*resumed, "--max_train_samples", "300"]) == 0 and "was written (train)" in caplog.text
    assert main([*words, "--output_dir", str(tmp_path / "none")]) == 2
    assert "--streaming needs --max_steps" in caplog.text


def test_so_many_lines(files: dict[str, str]) -> None:
    command = load_command("clm")
    run = command.prepared([*TINY, *data(files), "--max_train_samples", "30", "--max_eval_samples", "7"])
    assert [len(lines) for lines in (run.corpus.train, run.corpus.validation, run.corpus.test)] == [30, 7, 7]
    assert run.data_args.max_eval_lines == 7


def same_tensors(first: Path, second: Path) -> bool:
    ours, theirs = load_file(first), load_file(second)
    return ours.keys() == theirs.keys() and all(torch.equal(value, theirs[name]) for name, value in ours.items())


def lora(finished: Path, files: dict[str, str], output: Path, *more: str) -> list[str]:
    words = ["--model_name_or_path", str(finished), "--block_size", "16", "--learning_rate", "1e-3", "--max_steps", "4"]
    return [*words, *QUICK, *data(files), "--use_lora", "--save_steps", "2", "--output_dir", str(output), *more]


def test_lora_trains_adapters_alone_and_resumes(
    main: Main, finished: Path, files: dict[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main(lora(finished, files, whole, "--lora_r", "4", "--lora_target_modules", "c_attn", "c_fc")) == 0
    results = read_results(whole)
    weights = load_file(whole / "adapter_model.safetensors")
    assert not (whole / "model.safetensors").exists() and all("lora_" in name for name in weights)
    expected = 4 * ((16 + 48) + (16 + 64))  # of the rows and columns of c_attn and c_fc
    assert results["model"]["trainable_parameters"] == expected == sum(value.numel() for value in weights.values())
    settings = results["settings"]["model"]
    assert (settings["use_lora"], settings["lora_r"], settings["lora_target_modules"]) == (True, 4, ["c_attn", "c_fc"])
    base = AutoModelForCausalLM.from_pretrained(finished)
    adapted = AutoModelForCausalLM.from_pretrained(whole)  # transformers finds the base and adds the adapters
    ids = torch.arange(1, 9)[None]
    assert not torch.equal(adapted(ids).logits, base(ids).logits)
    assert 0 < results["test"]["loss"] < read_results(finished)["test"]["loss"]
    card = (whole / "README.md").read_text(encoding="utf-8")
    assert "# whole\n" in card and f"fine-tuned version of `{finished}`" in card and "library_name: peft" in card
    evaluated = ["--model_name_or_path", str(whole), "--block_size", "16", *QUICK, *data(files)]
    assert main([*evaluated, "--do_eval", "--output_dir", str(parts)]) == 0
    assert json.loads((parts / "eval_results.json").read_text())["test"] == pytest.approx(results["test"])
    assert main([*evaluated, "--output_dir", str(parts)]) == 2
    assert "holds LoRA adapters, which --do_eval can evaluate" in caplog.text
    resume = ["--resume_from_checkpoint", str(whole / "checkpoint-2"), "--lora_target_modules", "c_attn", "c_fc"]
    assert main(lora(finished, files, parts, *resume, "--lora_r", "4")) == 0
    assert same_tensors(whole / "adapter_model.safetensors", parts / "adapter_model.safetensors")
    assert main(lora(finished, files, parts, *resume)) == 2
    assert "was made with --lora_r 4, and now it is 16" in caplog.text
    plain = lora(finished, files, parts, "--resume_from_checkpoint", str(whole / "checkpoint-2"))
    plain.remove("--use_lora")
    assert main(plain) == 2 and "has LoRA adapters: to go on from it, give --use_lora" in caplog.text


def test_lora_arguments_that_do_not_fit(
    main: Main, finished: Path, files: dict[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for words, message in (
        (["--use_lora"], "--use_lora needs --model_name_or_path"),
        (["--lora_r", "3"], "--lora_r has no effect without --use_lora"),
        (lora(finished, files, tmp_path, "--lora_r", "0"), "lora_r is 0; it must be at least 1"),
        (lora(finished, files, tmp_path, "--lora_target_modules", "nothing"), "--lora_target_modules: "),
    ):
        assert main([*words, "--output_dir", str(tmp_path)]) == 2
        assert message in caplog.text


def test_types_of_weights_and_kernels(
    main: Main, finished: Path, files: dict[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    words = [*QUICK, *data(files), "--model_name_or_path", str(finished), "--learning_rate", "1e-3", "--max_steps", "2"]
    words += ["--block_size", "16", "--output_dir", str(tmp_path)]
    run = load_command("clm").prepared([*words, "--attn_implementation", "eager", "--dtype", "auto"])
    assert run.model.config._attn_implementation == "eager" and run.model.dtype == torch.float32
    assert main([*words, "--dtype", "bfloat16"]) == 0
    assert {value.dtype for value in load_file(tmp_path / "model.safetensors").values()} == {torch.bfloat16}
    assert read_results(tmp_path)["settings"]["model"]["dtype"] == "bfloat16"
    assert main([*words, "--max_steps", "3", "--resume_from_checkpoint", "last"]) == 2
    assert "are bfloat16, the model's torch.float32: give --dtype bfloat16" in caplog.text
    with pytest.raises(ValueError, match="invalid choice: 'float8'"):
        parse_clm_arguments(["--dtype", "float8"])


def test_the_token_of_the_hub_is_in_no_record(main: Main, files: dict[str, str], tmp_path: Path) -> None:
    words = [*TINY, *QUICK, *data(files), "--max_steps", "1", "--token", "hf_secret", "--hub_token", "hf_secret"]
    assert main([*words, "--output_dir", str(tmp_path)]) == 0
    assert read_results(tmp_path)["settings"]["model"]["token"] == "<TOKEN>"
    texts = [path for path in tmp_path.rglob("*") if path.suffix in (".json", ".md", ".jsonl")]
    assert texts and not any("hf_secret" in path.read_text(encoding="utf-8") for path in texts)


def test_do_eval_alone_evaluates_the_model_as_it_is(
    main: Main, finished: Path, files: dict[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    words = ["--do_eval", "--model_name_or_path", str(finished), *QUICK, *data(files), "--block_size", "16"]
    before = (finished / "results.json").read_bytes()
    assert main([*words, "--output_dir", str(tmp_path)]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["eval_results.json"]
    found = json.loads((tmp_path / "eval_results.json").read_text())
    tokenizer, lines = AutoTokenizer.from_pretrained(finished), Path(files["test"]).read_text("utf-8").splitlines()
    exact = evaluate_perplexity(
        AutoModelForCausalLM.from_pretrained(finished),
        encode_lines(tokenizer, lines),
        num_words=count_words(lines),
        block_size=16,
    )
    assert found["test"] == pytest.approx(exact.as_dict()) and found["steps"] == 0
    assert main([*words, "--output_dir", str(finished)]) == 0 and (finished / "results.json").read_bytes() == before
    (finished / "eval_results.json").unlink()
    assert main([*words, "--resume_from_checkpoint", "last", "--output_dir", str(tmp_path)]) == 2
    assert "give the checkpoint as --model_name_or_path" in caplog.text


def test_do_train_alone_evaluates_nothing(main: Main, command: list[str], finished: Path, tmp_path: Path) -> None:
    assert main([*command, "--do_train", "--save_steps", "2", "--output_dir", str(tmp_path)]) == 0
    results = read_results(tmp_path)
    assert results["validation"] is None and results["test"] is None and results["status"] == "completed"
    assert not any("eval_loss" in entry for entry in results["log_history"])
    assert same_tensors(tmp_path / "model.safetensors", finished / "model.safetensors")
    for words in ([], ["--do_train", "--do_eval"]):
        _, _, training = parse_clm_arguments(words)
        assert training.do_train and training.do_eval and training.eval_strategy == "steps"


YAML = """
# a comment
dataset_name: owner/name
dataset_config_name: small
learning_rate: 1e-3
eval_strategy: no
max_steps: 10
train_file: [a.txt, b.txt]
streaming: true
optim: adafisherw
"""


def test_a_yaml_file_a_json_file_and_a_command_line_are_one(tmp_path: Path) -> None:
    content: dict[str, Any] = {"dataset_name": "owner/name", "dataset_config_name": "small", "learning_rate": 1e-3}
    content |= {"eval_strategy": "no", "max_steps": 10, "train_file": ["a.txt", "b.txt"], "streaming": True}
    (tmp_path / "a.yaml").write_text(YAML)
    (tmp_path / "a.json").write_text(json.dumps({**content, "optim": "adafisherw"}))
    words = [f"--{key}={value}" for key, value in content.items() if key != "train_file"]
    expected = parse_clm_arguments([*words, "--train_file", "a.txt", "b.txt"])
    assert expected[1].dataset == "owner/name" and expected[2].learning_rate == 1e-3
    for name in ("a.yaml", "a.json"):
        model, text, training = parse_clm_arguments([str(tmp_path / name)])
        assert (model, text) == expected[:2]
        ours, theirs = training.to_dict(), expected[2].to_dict()
        assert {key for key in ours if ours[key] != theirs[key]} == set()
    for text, message in (
        ("a: [", "is no valid YAML"),
        ("max_steps: 1\nmax_steps: 2", "'max_steps' stands there twice"),
        ("max_step: 1", "unknown key 'max_step', did you mean 'max_steps'"),
        ("dataset: a\ndataset_name: b", "dataset_name and dataset are one argument: give dataset only"),
        ("- 1", "must hold an object"),
    ):
        (tmp_path / "b.yml").write_text(text)
        with pytest.raises(ValueError, match=re.escape(message)):
            parse_clm_arguments([str(tmp_path / "b.yml")])


def test_names_of_the_image_example(tmp_path: Path) -> None:
    from datasets import ClassLabel, Dataset, Features, Image

    kinds = Features({"photo": Image(), "kind": ClassLabel(names=["a", "b"])})
    rows = {"photo": [picture(size=(8, 8), seed=number) for number in range(20)], "kind": [0, 1] * 10}
    Dataset.from_dict(rows, kinds).save_to_disk(tmp_path / "table")
    columns = ["--image_column_name", "photo", "--label_column_name", "kind"]
    for name in ("--dataset_name", "--train_dir"):
        run = prepared(*TINY_RESNET, name, tmp_path / "table", *columns, "--output_dir", tmp_path / "out")
        assert run.corpus.class_names == ("a", "b") and len(run.corpus.train) == 18
    _, given, _ = parse_image_arguments(["--dataset_name", "o/n", "--dataset_config_name", "c", *columns])
    assert (given.dataset, given.dataset_config_name, given.image_column, given.label_column) == (
        "o/n", "c", "photo", "kind",
    )  # fmt: skip


def test_a_head_of_another_size_may_be_an_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    few = ["--max_train_samples", "32", "--max_eval_samples", "20", "--max_steps", "1"]
    assert image_run(*TINY_RESNET, *few, "--output_dir", tmp_path / "digits") == 0
    for number in range(8):
        folder = tmp_path / "own" / "ab"[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        picture(size=(8, 8), seed=number).save(folder / f"{number}.png")
    words = ["--model_name_or_path", tmp_path / "digits", "--train_dir", tmp_path / "own"]
    words += ["--max_steps", "1", "--output_dir", tmp_path / "out"]
    assert image_run(*words, "--ignore_mismatched_sizes", "false") == 2
    assert re.search(r"has no weights of these shapes: classifier\..*--ignore_mismatched_sizes", caplog.text)
    assert image_run(*words) == 0
    assert image_run(*words, "--do_eval", "--output_dir", tmp_path / "evaluated") == 0
    found = json.loads((tmp_path / "evaluated" / "eval_results.json").read_text())
    assert found["validation"]["examples"] == 1 and found["settings"]["model"]["ignore_mismatched_sizes"] is True


@pytest.mark.parametrize("name", ["clm", "image"])
def test_the_help_is_a_page_and_all_of_it_is_there(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a terminal of 120 columns or more, and in a pipe."""
    monkeypatch.setenv("COLUMNS", "200")
    command = load_command(name)
    assert command.main(["--help"]) == 0
    page = capsys.readouterr().out
    assert len(page.splitlines()) <= 80 and max(map(len, page.splitlines())) <= 120
    own = set(re.findall(r"^  (--\w+)", page, re.M))
    assert {"--dataset", "--model_name_or_path", "--optim", "--learning_rate", "--output_dir", "--verbose"} <= own
    assert "--fsdp" not in page and "--damping" in page and "--help_all" in page
    assert command.main(["--help_all"]) == 0
    everything = capsys.readouterr().out
    assert len(everything) > 3 * len(page) and "--fsdp" in everything
    assert all(f"{argument} " in everything for argument in own)


def test_the_help_has_every_argument_of_its_own(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    assert load_command("clm").main(["-h"]) == 0
    page = capsys.readouterr().out
    for type_ in (DataArguments, ClmTrainingArguments):
        for field in type_.__annotations__:
            assert f"  --{field}" in page
    assert "Default: python" in page and "Tokens per block, at least 2 (default 128)" in page


def test_a_run_shows_one_bar_and_verbose_everything(
    main: Main, command: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = [word for word in command if word not in ("--disable_tqdm", "true")]
    assert main([*words, "--output_dir", str(tmp_path)]) == 0
    shown = capfd.readouterr()
    last = [line for line in re.split(r"[\r\n]", shown.err) if line.startswith("training")][-1]
    assert re.match(r"training: 100%\|.*\| 4/4 \[.*, loss=\d+\.\d+, validation=\d+\.\d+\]", last)
    assert "{'loss'" not in shown.out + shown.err
    assert set(re.findall(r"(\w+): +\d+%", shown.err)) <= {"training", "perplexity"}
    assert main([*words, "--verbose", "--output_dir", str(tmp_path)]) == 0
    shown = capfd.readouterr()
    assert "{'loss'" in shown.out + shown.err and "training:" not in shown.err


def test_the_bar_counts_on_after_a_resume(capfd: pytest.CaptureFixture[str]) -> None:
    bar, state = RunBar(), SimpleNamespace(is_world_process_zero=True, max_steps=10, global_step=6)
    bar.on_train_begin(None, state, None)  # type: ignore[arg-type]
    for step in (7, 8):
        state.global_step = step
        bar.on_prediction_step(None, state, None, eval_dataloader=[1])  # type: ignore[arg-type]
        bar.on_step_end(None, state, None)  # type: ignore[arg-type]
    bar.on_log(None, state, None, logs={"loss": 1.23456})  # type: ignore[arg-type]
    bar.on_train_end(None, state, None)  # type: ignore[arg-type]
    for _ in range(3):
        bar.on_prediction_step(None, state, None, eval_dataloader=[1, 2, 3])  # type: ignore[arg-type]
    bar.on_predict(None, state, None, metrics={})  # type: ignore[arg-type]
    shown = [line for line in re.split(r"[\r\n]", capfd.readouterr().err) if line]
    assert any("8/10" in line and "loss=1.235" in line for line in shown)
    assert shown[-1].startswith("evaluation: 100%") and "3/3" in shown[-1]
