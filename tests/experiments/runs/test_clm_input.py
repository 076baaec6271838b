"""Language modelling runs: bad input, how much they evaluate, and pretrained embeddings with the paper's presets."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, OpenAIGPTConfig, OpenAIGPTModel, OpenAIGPTTokenizer

from hf_adafisher.data.text import count_words
from hf_adafisher.experiments.comparison.cells import expand_cells
from hf_adafisher.experiments.comparison.configuration import PRESETS
from hf_adafisher.experiments.runs.clm_arguments import ModelArguments, parse_clm_arguments
from hf_adafisher.experiments.runs.clm_setup import load_language_model, prepare_clm_run


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--dataset", "wikitext2"], "did you mean 'wikitext-2'"),
        (["--train_file", "nowhere.txt"], "'nowhere.txt' does not exist"),
        (["--block_size", "1"], "block_size is 1; it must be at least 2"),
        (["--n_embd", "10", "--n_head", "3"], "n_embd (10) must be a multiple of n_head (3)"),
        (["--n_layer", "0"], "n_layer is 0; it must be at least 1"),
        (["--vocab_size", "100"], "vocab_size is 100"),
        (["--dropout", "1"], "dropout is 1.0; it must be in [0, 1)"),
        (["--optim", "adafishr"], "'adafishr'"),
        (["--num_train_epochs", "0"], "nothing to train"),
        (["--config_name", "a", "--model_name_or_path", "b"], "not both"),
        (["--resume_from_checkpoint", "last"], "no checkpoint to resume from"),
        (["--resume_from_checkpoint", "nowhere"], "'nowhere' is not a checkpoint"),
        (["nowhere.json"], "'nowhere.json' does not exist"),
    ],
)
def test_bad_input_ends_in_one_line(
    main: Any, flags: list[str], message: str, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    output = [] if flags[0].endswith(".json") else ["--output_dir", str(tmp_path / "out")]
    assert main([*flags, *output]) == 2
    assert message in caplog.text and "\n" not in caplog.records[-1].getMessage()
    assert not (tmp_path / "out" / "results.json").exists()


def test_text_shorter_than_a_block_is_refused(main: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "short.txt").write_text("a few words\nand a line\n")
    flags = [
        "--train_file",
        str(tmp_path / "short.txt"),
        "--vocab_size",
        "257",
        "--output_dir",
        str(tmp_path),
    ]
    assert main(flags) == 2
    assert "the train text is too short" in caplog.text and "--block_size (now 128)" in caplog.text


def test_a_foreign_tokenizer_must_fit_the_model(
    main: Any, finished: Path, command: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(finished)
    tokenizer.add_tokens([f"more{number}" for number in range(5)])
    tokenizer.save_pretrained(tmp_path)
    flags = ["--model_name_or_path", str(finished), "--tokenizer_name", str(tmp_path)]
    assert main([*command, *flags, "--output_dir", str(tmp_path)]) == 2
    assert "305 tokens" in caplog.text and "only 300" in caplog.text


def test_unknown_keys_in_a_json_file_are_refused(main: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "run.json").write_text('{"n_layers": 2}')
    assert main([str(tmp_path / "run.json")]) == 2
    assert "n_layers" in caplog.text


def test_the_first_lines_alone_are_evaluated(
    main: Any, command: list[str], files: dict[str, str], tmp_path: Path
) -> None:
    """Equal to a run whose files end after these lines, training text aside."""
    short = {}
    for split in ("validation", "test"):
        lines = Path(files[split]).read_text(encoding="utf-8").split("\n")[:20]
        short[split] = (tmp_path / f"{split}.txt", count_words(lines))
        short[split][0].write_text("\n".join(lines) + "\n", encoding="utf-8")
    shortened = [item for split, (path, _) in short.items() for item in (f"--{split}_file", str(path))]
    results = []
    for name, extra in (("limit", ["--max_eval_lines", "20"]), ("files", shortened)):
        assert (
            main([*command, "--max_steps", "1", "--save_strategy", "no", *extra, "--output_dir", str(tmp_path / name)])
            == 0
        )
        results.append(json.loads((tmp_path / name / "results.json").read_text()))
    for split, (_, words) in short.items():
        assert results[0][split] == results[1][split]
        assert results[0]["corpus"][split]["words"] == words


def test_a_timing_run_neither_evaluates_nor_saves(main: Any, command: list[str], tmp_path: Path) -> None:
    flags = ["--timing_only", "true", "--eval_strategy", "steps", "--save_steps", "1", "--output_dir", str(tmp_path)]
    assert main([*command, *flags]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert len(results["step_seconds"]) == results["steps"] == 4 and results["validation"] is None
    assert not list(tmp_path.glob("checkpoint-*")) and not (tmp_path / "model.safetensors").exists()


def test_a_limit_of_no_lines_is_refused(main: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert main(["--max_eval_lines", "0", "--output_dir", str(tmp_path)]) == 2
    assert "max_eval_lines is 0; it must be at least 1" in caplog.text


def make_gpt1(folder: Path, width: int, heads: int = 2, positions: int = 256) -> str:
    """A GPT-1 with random weights whose vocabulary is letters, alone and at the end of a word."""
    torch.manual_seed(0)
    letters = string.ascii_lowercase + string.digits + string.punctuation
    words = ["<unk>", "\n</w>", *letters, *(f"{letter}</w>" for letter in letters)]
    OpenAIGPTTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[]).save_pretrained(folder)
    config = OpenAIGPTConfig(vocab_size=len(words), n_positions=positions, n_embd=width, n_layer=1, n_head=heads)
    OpenAIGPTModel(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def gpt1(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_gpt1(tmp_path_factory.mktemp("gpt1"), width=16)


@pytest.mark.parametrize("freeze", [True, False])
def test_embeddings_start_as_the_pretrained_ones_and_move_unless_frozen(
    main: Any, command: list[str], gpt1: str, tmp_path: Path, freeze: bool
) -> None:
    extra = ["--embeddings_from", gpt1, "--freeze_embeddings", str(freeze), "--output_dir", str(tmp_path)]
    model = prepare_clm_run(*parse_clm_arguments([*command, *extra])).model
    assert isinstance(model, GPT2LMHeadModel)
    assert main([*command, *extra]) == 0
    source, trained = OpenAIGPTModel.from_pretrained(gpt1), load_file(tmp_path / "model.safetensors")
    theirs = {"wte": source.tokens_embed.weight, "wpe": source.positions_embed.weight[:16]}
    for name, weight in theirs.items():
        torch.testing.assert_close(model.transformer.get_submodule(name).weight, weight, rtol=0, atol=0)
        assert torch.equal(trained[f"transformer.{name}.weight"], weight) is freeze
    assert model.lm_head.weight is model.transformer.wte.weight  # tied: frozen with it
    assert not torch.equal(trained["transformer.h.0.mlp.c_fc.weight"], model.transformer.h[0].mlp.c_fc.weight)


def test_the_embeddings_of_a_gpt2_do_too(tmp_path: Path, gpt1: str) -> None:
    from transformers import AutoTokenizer

    torch.manual_seed(1)
    source = GPT2LMHeadModel(GPT2Config(vocab_size=400, n_positions=32, n_embd=16, n_layer=1, n_head=2))
    source.save_pretrained(tmp_path)
    arguments = ModelArguments(n_embd=16, n_head=2, n_layer=1, embeddings_from=str(tmp_path))
    model = load_language_model(arguments, AutoTokenizer.from_pretrained(gpt1), block_size=8)
    rows = model.get_input_embeddings().weight
    assert torch.equal(rows, source.transformer.wte.weight[: len(rows)]) and len(rows) < 400


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--n_embd", "32"], "16 wide, the model 32: use --n_embd 16"),
        (["--block_size", "300"], "embeddings for 256 positions, the model needs 300"),
    ],
)
def test_embeddings_that_do_not_fit(command: list[str], gpt1: str, extra: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prepare_clm_run(*parse_clm_arguments([*command, "--embeddings_from", gpt1, *extra]))


def test_another_kind_of_model_is_refused(tmp_path: Path, gpt1: str) -> None:
    from transformers import AutoTokenizer, OPTConfig, OPTModel

    OPTModel(OPTConfig(vocab_size=400, hidden_size=16, num_hidden_layers=1, ffn_dim=16, num_attention_heads=2,
                       word_embed_proj_dim=16)).save_pretrained(tmp_path)  # fmt: skip
    arguments = ModelArguments(n_embd=16, n_head=2, n_layer=1, embeddings_from=str(tmp_path))
    with pytest.raises(ValueError, match="is a opt; embeddings can be taken from: openai-gpt, gpt2"):
        load_language_model(arguments, AutoTokenizer.from_pretrained(gpt1), block_size=8)


def test_arguments_that_contradict_each_other() -> None:
    with pytest.raises(ValueError, match="--freeze_embeddings needs --embeddings_from"):
        ModelArguments(freeze_embeddings=True)
    with pytest.raises(ValueError, match="give no other model"):
        ModelArguments(embeddings_from="a", tokenizer_name="b")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wikitext2-gpt1-paper", "ptb-gpt1-paper"])
def test_the_preset_of_the_paper_with_a_stand_in(name: str, main: Any, files: dict[str, str], tmp_path: Path) -> None:
    """The model at its full size but for the vocabulary. The paper's has 28,351,488 parameters: four blocks."""
    config = json.loads((PRESETS / f"{name}.json").read_text())
    assert config["budget"] == "like=adafisherw:epochs=50"
    common = {key: value for key, value in config["common"].items() if key != "dataset"}
    assert (common["per_device_train_batch_size"], common["weight_decay"]) == (32, 0.1)
    common |= {f"{split}_file": path for split, path in files.items()}
    common |= {"embeddings_from": make_gpt1(tmp_path / "gpt1", 768, 12), "max_steps": 1, "timing_only": True,
               "eval_strategy": "no", "per_device_train_batch_size": 1, "use_cpu": True}  # fmt: skip
    cell = next(cell for cell in expand_cells({**config, "common": common}) if cell.optim == "adafisherw")
    arguments = [*cell.arguments(), "--output_dir", str(tmp_path / "out")]
    model = prepare_clm_run(*parse_clm_arguments(arguments)).model
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert trainable == 28_351_488 + 2 * 768  # GPT-2 has one LayerNorm more than GPT-1
    if name.startswith("wikitext2"):  # the two differ in their text alone
        assert main(arguments) == 0
        assert len(json.loads((tmp_path / "out" / "results.json").read_text())["step_seconds"]) == 1
