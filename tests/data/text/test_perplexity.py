"""Tokens, windows and perplexities against definitions written out in plain loops."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    OpenAIGPTTokenizer,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

from hf_adafisher.data.text import (
    PerplexityResult,
    TokenWindows,
    count_words,
    encode_lines,
    evaluate_perplexity,
    load_corpus,
    start_token_id,
    token_perplexity,
    train_tokenizer,
    word_perplexity,
)

VOCABULARY = 17


class Constant(nn.Module):
    """Gives every position the same logits, whatever it reads."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.register_buffer("logits", logits)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.logits.expand(*input_ids.shape, -1))


def tiny_gpt2(dropout: float = 0.0) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=8, n_embd=8, n_layer=2, n_head=2, initializer_range=1.0,
        resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def stream_of(length: int) -> Tensor:
    return torch.randint(VOCABULARY, (length + 1,), generator=torch.Generator().manual_seed(1))


def token_by_token_nll(model: nn.Module, stream: Tensor, block_size: int) -> float:
    """The definition: each token given the ones before it in its window, one forward pass for each."""
    terms = []
    with torch.no_grad():
        for position in range(1, len(stream)):
            start = (position - 1) // (block_size - 1) * (block_size - 1)
            logits = model(input_ids=stream[None, start:position]).logits[0, -1]
            terms.append(-float(logits.log_softmax(-1)[stream[position]]))
    return math.fsum(terms)


@pytest.mark.parametrize("block_size", [2, 5, 8])
@pytest.mark.parametrize("tokens", [1, 21, 28])
def test_evaluation_equals_a_token_by_token_loop(block_size: int, tokens: int) -> None:
    model, stream = tiny_gpt2().double().eval(), stream_of(tokens)
    result = evaluate_perplexity(model, stream, num_words=9, block_size=block_size, batch_size=3, progress=False)
    assert result.total_nll == pytest.approx(token_by_token_nll(model, stream, block_size), rel=1e-12)
    assert (result.num_tokens, result.num_words) == (tokens, 9)
    assert result.mean_loss == result.total_nll / tokens


@pytest.mark.parametrize("batch_size", [1, 2, 100])
def test_batches_do_not_matter(batch_size: int) -> None:
    model, stream = tiny_gpt2().double(), stream_of(40)
    results = [
        evaluate_perplexity(model, stream, num_words=1, block_size=6, batch_size=size, progress=False).total_nll
        for size in (batch_size, 7)
    ]
    assert results[0] == pytest.approx(results[1], rel=1e-12)


def test_evaluation_switches_dropout_off_and_every_module_back() -> None:
    model, stream = tiny_gpt2(dropout=0.5).double().train(), stream_of(21)
    model.transformer.h[1].eval()
    before = [module.training for module in model.modules()]
    total = evaluate_perplexity(model, stream, num_words=1, block_size=8, progress=False).total_nll
    assert [module.training for module in model.modules()] == before
    assert total == pytest.approx(token_by_token_nll(model.eval(), stream, 8), rel=1e-12)


def test_modes_come_back_after_an_error_too() -> None:
    model = tiny_gpt2().train()
    with pytest.raises(IndexError):
        evaluate_perplexity(model, torch.full((5,), VOCABULARY + 3), num_words=1, block_size=4, progress=False)
    assert all(module.training for module in model.modules())


def test_a_uniform_model_has_the_vocabulary_as_perplexity() -> None:
    stream = stream_of(50)
    result = evaluate_perplexity(
        Constant(torch.zeros(VOCABULARY).double()), stream, num_words=20, block_size=8, progress=False
    )
    assert result.token_perplexity == pytest.approx(VOCABULARY, rel=1e-12)
    assert result.word_perplexity == pytest.approx(VOCABULARY ** (50 / 20), rel=1e-12)


def test_half_precision_logits_are_not_summed_in_half_precision() -> None:
    logits, stream = torch.linspace(-3, 3, VOCABULARY).bfloat16(), stream_of(200)
    result = evaluate_perplexity(Constant(logits), stream, num_words=1, block_size=8, progress=False)
    losses = -logits.double().log_softmax(-1)[stream[1:]]
    assert result.total_nll == pytest.approx(float(losses.sum()), rel=1e-6)


def test_overflow_is_infinite_and_nan_stays_nan() -> None:
    logits = torch.zeros(VOCABULARY)
    logits[0] = 1e30
    result = evaluate_perplexity(Constant(logits), torch.ones(9).long(), num_words=1, block_size=4, progress=False)
    assert result.token_perplexity == result.word_perplexity == math.inf
    assert math.isnan(PerplexityResult(math.nan, 3, 2).token_perplexity)
    assert token_perplexity(math.inf, 3) == math.inf


@pytest.mark.parametrize(("total", "count"), [(0.0, 3), (7.5, 3), (700.0, 1)])
def test_both_perplexities_are_exp_of_a_mean(total: float, count: int) -> None:
    assert token_perplexity(total, count) == word_perplexity(total, count) == math.exp(total / count)


@pytest.mark.parametrize("function", [token_perplexity, word_perplexity])
def test_perplexity_needs_a_count(function: type) -> None:
    with pytest.raises(ValueError, match=r"positive count.*got 0"):
        function(1.0, 0)


@given(tokens=st.integers(1, 60), block_size=st.integers(2, 20))
def test_windows_predict_every_token_exactly_once(tokens: int, block_size: int) -> None:
    stream = torch.arange(tokens + 1)
    windows = TokenWindows(stream, block_size, drop_last=False)
    items = [windows[index] for index in range(len(windows))]
    targets = torch.cat([item["input_ids"][1:] for item in items])
    assert targets.tolist() == list(range(1, tokens + 1))
    assert torch.cat([item["labels"][1:] for item in items]).tolist() == targets.tolist()
    assert all(2 <= len(item["input_ids"]) <= block_size for item in items)
    assert all(len(item["input_ids"]) == block_size for item in items[:-1])


@given(tokens=st.integers(1, 60), block_size=st.integers(2, 20))
def test_full_windows_are_all_but_a_shorter_last_one(tokens: int, block_size: int) -> None:
    stream = torch.arange(tokens + 1)
    if tokens < block_size - 1:
        with pytest.raises(ValueError, match=f"too short: {tokens} tokens.*--block_size"):
            TokenWindows(stream, block_size)
        return
    full, every = TokenWindows(stream, block_size), TokenWindows(stream, block_size, drop_last=False)
    assert len(full) == tokens // (block_size - 1) and len(every) - len(full) in (0, 1)
    assert all(torch.equal(full[index]["input_ids"], every[index]["input_ids"]) for index in range(len(full)))
    assert torch.equal(full[-1]["input_ids"], full[len(full) - 1]["input_ids"])
    with pytest.raises(IndexError):
        full[len(full)]


def test_trainer_and_exact_evaluation_agree_on_full_windows(tmp_path: Path) -> None:
    """Trainer divides by the labels it counts; they must be those that are predicted."""
    model, stream = tiny_gpt2(), stream_of(7 * 6)
    trainer = Trainer(
        model,
        TrainingArguments(str(tmp_path), per_device_eval_batch_size=4, use_cpu=True, disable_tqdm=True),
        eval_dataset=TokenWindows(stream, 8),
        data_collator=default_data_collator,
    )
    exact = evaluate_perplexity(model, stream, num_words=1, block_size=8, progress=False)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(exact.mean_loss, rel=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_size": 1}, "block_size is 1; it must be at least 2"),
        ({"batch_size": 0}, "batch_size is 0; it must be at least 1"),
        ({"num_words": 0}, "num_words is 0; it must be at least 1"),
        ({"stream": torch.zeros(1).long()}, "too short"),
    ],
)
def test_evaluation_refuses(options: dict, message: str) -> None:
    arguments = {"stream": stream_of(9), "num_words": 1, "block_size": 4, **options}
    with pytest.raises(ValueError, match=message):
        evaluate_perplexity(tiny_gpt2(), arguments.pop("stream"), progress=False, **arguments)


def test_encoding_loses_no_character_and_ends_every_line() -> None:
    lines = [
        "",
        "  two  spaces",
        "",
        "",
        "caf\u00e9 \u4e2d\u6587 \U0001f600",
        "\ttab",
    ] * 700  # more lines than one chunk
    tokenizer = train_tokenizer(lines, 300)
    stream = encode_lines(tokenizer, lines)
    assert stream.dtype == torch.long and stream[0] == tokenizer.bos_token_id
    assert tokenizer.decode(stream[1:]) == "".join(f"{line}\n" for line in lines)
    assert (stream[1:] != tokenizer.bos_token_id).all()


def test_tokenizer_is_deterministic_and_has_one_special_token() -> None:
    lines = load_corpus().train[:1500]
    first, second = train_tokenizer(lines, 600), train_tokenizer(lines, 600)
    assert first.get_vocab() == second.get_vocab() and len(first) == 600
    assert encode_lines(first, lines).tolist() == encode_lines(second, lines).tolist()
    assert {first.bos_token, first.eos_token, first.pad_token, first.unk_token} == {"<|endoftext|>"}
    assert first.all_special_ids == [0]


def test_words_do_not_depend_on_the_tokenizer() -> None:
    """Of a model that gives the text one fixed likelihood, word perplexity is the same for any pieces."""
    lines = load_corpus().validation[:300]
    counts = [len(encode_lines(train_tokenizer(lines, size), lines)) - 1 for size in (257, 500)]
    assert counts[0] > 1.3 * counts[1]
    per_token = [PerplexityResult(5000.0, count, count_words(lines)) for count in counts]
    assert per_token[0].word_perplexity == per_token[1].word_perplexity
    assert per_token[0].token_perplexity < per_token[1].token_perplexity


def test_tokenizer_refuses_a_vocabulary_smaller_than_bytes() -> None:
    with pytest.raises(ValueError, match=r"vocab_size is 256; .*at least 257"):
        train_tokenizer(["text"], 256)


def test_the_start_token_is_bos_or_else_eos() -> None:
    tokenizer = train_tokenizer(["text"], 257)
    tokenizer.bos_token = None
    assert start_token_id(tokenizer) == tokenizer.eos_token_id
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="neither a bos nor an eos"):
        start_token_id(tokenizer)


@pytest.mark.parametrize("newline", ["\n</w>", "x</w>"])
def test_line_ends_are_predicted_with_the_tokenizer_of_gpt1_too(newline: str) -> None:
    """It drops newlines, has a token for them, and neither bos nor eos."""
    words = ["<unk>", newline, "a</w>", "b</w>"]
    tokenizer = OpenAIGPTTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[])
    assert tokenizer.encode("a\nb\n") == [2, 3]
    if newline == "\n</w>":
        assert encode_lines(tokenizer, ["A b", "", "a <unk>"]).tolist() == [1, 2, 3, 1, 1, 2, 0, 1]
        many = encode_lines(tokenizer, ["a b"] * 2500)
        assert many.tolist() == [1, *[2, 3, 1] * 2500]
    else:
        with pytest.raises(ValueError, match="neither a bos nor an eos token"):
            start_token_id(tokenizer)
