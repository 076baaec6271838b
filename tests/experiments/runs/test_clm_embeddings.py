"""A new GPT-2 on a pretrained model's embeddings, and with it the paper's presets, on a small stand-in of GPT-1."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel, OpenAIGPTConfig, OpenAIGPTModel, OpenAIGPTTokenizer

from hf_adafisher.experiments.comparison.cells import expand_cells
from hf_adafisher.experiments.comparison.configuration import PRESETS
from hf_adafisher.experiments.runs.clm_arguments import ModelArguments, parse_clm_arguments
from hf_adafisher.experiments.runs.clm_setup import load_language_model, prepare_clm_run


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
