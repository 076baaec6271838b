"""Text corpora, tokenization, and perplexity.

>>> from hf_adafisher.data.text import load_corpus
>>> load_corpus().name
'python-docs'
"""

from hf_adafisher.data.text.corpora import TextCorpus, available_corpora, count_words, load_corpus
from hf_adafisher.data.text.perplexity import PerplexityResult, evaluate_perplexity, token_perplexity, word_perplexity
from hf_adafisher.data.text.tokens import TokenWindows, encode_lines, start_token_id, train_tokenizer

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
