"""Text corpora and labelled images: ``hf_adafisher.data.text`` and ``hf_adafisher.data.images``."""

from hf_adafisher.data.text import (
    PerplexityResult,
    TextCorpus,
    TokenWindows,
    available_corpora,
    count_words,
    encode_lines,
    evaluate_perplexity,
    load_corpus,
    start_token_id,
    token_perplexity,
    train_tokenizer,
    word_perplexity,
)

__all__ = [
    "PerplexityResult",
    "TextCorpus",
    "TokenWindows",
    "available_corpora",
    "count_words",
    "encode_lines",
    "evaluate_perplexity",
    "load_corpus",
    "start_token_id",
    "token_perplexity",
    "train_tokenizer",
    "word_perplexity",
]
