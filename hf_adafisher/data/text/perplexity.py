"""Token and word perplexity, and their exact evaluation."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from hf_adafisher.data.text.tokens import TokenWindows


def token_perplexity(total_nll: float, num_tokens: int) -> float:
    """Perplexity per token, ``exp(total_nll / num_tokens)``.

    It depends on the tokenizer: compare it only between models that share one.

    Args:
        total_nll: Negative log-likelihood summed over all tokens of the text, in nats.
        num_tokens: Number of predicted tokens, > 0.

    Returns:
        A value >= 1; infinity where the exponential overflows; nan if ``total_nll`` is nan.

    Raises:
        ValueError: ``num_tokens`` is not positive.
    """
    return _exp_mean(total_nll, num_tokens)


def word_perplexity(total_nll: float, num_words: int) -> float:
    """Perplexity per word, ``exp(total_nll / num_words)``, where each line end is a word.

    Neither argument depends on the tokenizer, so it compares models with different ones. Papers on Penn Treebank and
    WikiText report this perplexity.

    Args:
        total_nll: Negative log-likelihood summed over all tokens of the text, in nats.
        num_words: Number of words by ``count_words``, > 0.

    Returns:
        A value >= 1; infinity where the exponential overflows; nan if ``total_nll`` is nan.

    Raises:
        ValueError: ``num_words`` is not positive.
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
    """Result of an exact evaluation.

    Attributes:
        total_nll: Negative log-likelihood of the text, in nats.
        num_tokens: Number of tokens of the text, all of which are predicted.
        num_words: Number of words of the text, line ends included.
    """

    total_nll: float
    num_tokens: int
    num_words: int

    @property
    def mean_loss(self) -> float:
        """Mean negative log-likelihood per token in nats, ``eval_loss`` in transformers."""
        return self.total_nll / self.num_tokens

    @property
    def token_perplexity(self) -> float:
        """Perplexity per token."""
        return token_perplexity(self.total_nll, self.num_tokens)

    @property
    def word_perplexity(self) -> float:
        """Perplexity per word."""
        return word_perplexity(self.total_nll, self.num_words)

    def as_dict(self) -> dict[str, float]:
        """Dictionary of the mean loss, both perplexities, the total and the counts."""
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
    """Evaluate the perplexity of a token stream exactly: every token is predicted once.

    The windows are those of ``TokenWindows`` with the shorter last one, so a token sees between 1 and
    ``block_size - 1`` tokens before it. Losses are computed in float32, or the model's precision if that is higher, and
    summed in float64. The model is evaluated in eval mode; the mode of every module is restored.

    Args:
        model: Called as ``model(input_ids=ids, attention_mask=ones)`` with both of shape (batch, block_size). Its
            output has ``logits`` of shape (batch, block_size, vocabulary).
        stream: Token ids, shape (1 + tokens,), start token first; see ``encode_lines``.
        num_words: Number of words of the text, from ``count_words``.
        block_size: Ids per window, >= 2.
        batch_size: Windows per forward pass. Default 16.
        progress: Show a progress bar. Default True.
        description: Label of the progress bar.

    Returns:
        The total negative log-likelihood with both counts.

    Raises:
        ValueError: ``block_size`` is below 2, ``batch_size`` or ``num_words`` is below 1, or the stream has no token to
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
    """Yield ids of shape (batch, length). A shorter last window is a batch of its own, so nothing is padded."""
    last = windows[len(windows) - 1]["input_ids"]
    full = len(windows) - (len(last) < windows.block_size)
    for start in range(0, full, batch_size):
        yield torch.stack([windows[index]["input_ids"] for index in range(start, min(start + batch_size, full))])
    if full < len(windows):
        yield last.unsqueeze(0)


def _batch_nll(model: nn.Module, ids: Tensor) -> float:
    # The mask says that nothing is padding; without it models warn where their pad token is the start token.
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, :-1]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    losses = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return float(losses.double().sum())
