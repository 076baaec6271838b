"""Text corpora, tokens and perplexities."""
