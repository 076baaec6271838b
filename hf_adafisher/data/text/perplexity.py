"""The two perplexities, defined once, and their exact evaluation."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from hf_adafisher.data.text.tokens import TokenWindows


def token_perplexity(total_nll: float, num_tokens: int) -> float:
    """Returns exp(total negative log-likelihood / number of tokens).

    It depends on the tokenizer: compare it only between models that share one.

    Args:
        total_nll: in nats, summed over all tokens of the text.
        num_tokens: tokens that were predicted, more than 0.

    Returns:
        At least 1; infinity where the exponential overflows; nan if `total_nll` is nan.
    """
    return _exp_mean(total_nll, num_tokens)


def word_perplexity(total_nll: float, num_words: int) -> float:
    """Returns exp(total negative log-likelihood / number of words, each line end being one word).

    The likelihood of the whole text and its number of words are the same whatever its pieces are called, so
    this one compares models with different tokenizers, and is the one that papers on Penn Treebank and
    WikiText report.

    Args:
        total_nll: in nats, summed over all tokens of the text, however it was tokenized.
        num_words: see `hf_adafisher.data.text.corpora.count_words`, more than 0.

    Returns:
        At least 1; infinity where the exponential overflows; nan if `total_nll` is nan.
    """
    return _exp_mean(total_nll, num_words)


def _exp_mean(total: float, count: int) -> float:
    if count <= 0:
        raise ValueError(f"a perplexity needs a positive count of tokens or words, got {count}")
    try:
        return math.exp(total / count)
    except OverflowError:
        return math.inf


@dataclass(frozen=True)
class PerplexityResult:
    """What an exact evaluation found.

    Attributes:
        total_nll: negative log-likelihood of the text, nats.
        num_tokens: tokens predicted: all of the text.
        num_words: words of the text, line ends included.
    """

    total_nll: float
    num_tokens: int
    num_words: int

    @property
    def mean_loss(self) -> float:
        """Nats per token: what Transformers calls eval_loss."""
        return self.total_nll / self.num_tokens

    @property
    def token_perplexity(self) -> float:
        """See the function of this name."""
        return token_perplexity(self.total_nll, self.num_tokens)

    @property
    def word_perplexity(self) -> float:
        """See the function of this name."""
        return word_perplexity(self.total_nll, self.num_words)

    def as_dict(self) -> dict[str, float]:
        """Returns the counts, the mean loss and both perplexities."""
        return {
            "loss": self.mean_loss,
            "token_perplexity": self.token_perplexity,
            "word_perplexity": self.word_perplexity,
            "total_nll": self.total_nll,
            "num_tokens": self.num_tokens,
            "num_words": self.num_words,
        }


@torch.no_grad()
def evaluate_perplexity(
    model: nn.Module,
    stream: Tensor,
    *,
    num_words: int,
    block_size: int,
    batch_size: int = 16,
    progress: bool = True,
    description: str = "perplexity",
) -> PerplexityResult:
    """Sums the negative log-likelihood of every token of a stream, each predicted once.

    The windows are those of `TokenWindows`, the last and shorter one included: a token sees between 1 and
    `block_size - 1` tokens before it. Losses are computed in float32 (or the model's own precision, if
    higher) and summed in float64.

    Args:
        model: called as `model(input_ids=ids, attention_mask=ones)`, both of shape (batch, block_size); its
            output has `logits` of shape (batch, block_size, vocabulary). Evaluated in eval mode; every
            module's mode is restored.
        stream: ids, shape (1 + number of tokens,), start token first; see `encode_lines`.
        num_words: words of the same text, from `count_words`.
        block_size: ids per window, at least 2.
        batch_size: windows per forward pass (default 16).
        progress: show a progress bar.
        description: its label.

    Raises:
        ValueError: `block_size` below 2, `batch_size` or `num_words` below 1, a stream without a token to
            predict.
    """
    for name, value in (("batch_size", batch_size), ("num_words", num_words)):
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    windows = TokenWindows(stream, block_size, drop_last=False)
    parameter = next(model.parameters(), None)
    device = stream.device if parameter is None else parameter.device
    modes = {module: module.training for module in model.modules()}
    model.eval()
    total = 0.0
    try:
        bar = tqdm(total=len(windows), desc=description, unit="window", disable=not progress, leave=False)
        with bar:
            for ids in _batches(windows, batch_size):
                total += _batch_nll(model, ids.to(device))
                bar.update(len(ids))
    finally:
        for module, mode in modes.items():
            module.training = mode
    return PerplexityResult(total, len(stream) - 1, num_words)


def _batches(windows: TokenWindows, batch_size: int) -> Iterator[Tensor]:
    """Yields (batch, length) ids; the last window, if shorter, alone: no padding, so no mask is needed."""
    items = [windows[index]["input_ids"] for index in range(len(windows))]
    short = [items.pop()] if len(items[-1]) < windows.block_size else []
    for start in range(0, len(items), batch_size):
        yield torch.stack(items[start : start + batch_size])
    yield from (ids.unsqueeze(0) for ids in short)


def _batch_nll(model: nn.Module, ids: Tensor) -> float:
    # The mask says that nothing is padding; without it models warn where their pad token is the start token.
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, :-1]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    losses = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return float(losses.double().sum())
