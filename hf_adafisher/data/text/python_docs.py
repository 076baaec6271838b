"""Embedded text corpus: the Python language reference that CPython ships.

``pydoc_data.topics`` is the text behind ``help("if")``: about 465 kB of English prose, grammar and code in 79 topics.
It needs no network. The text differs slightly between Python versions; for one version the splits are fixed.
"""

from __future__ import annotations

import re

BLOCK_CHARACTERS = 4000
"""Number of characters at which a block ends, after the current paragraph."""

_BLANK_LINES = re.compile(r"\n[ \t]*(?:\n[ \t]*)*\n")


def read_topics() -> dict[str, str]:
    """Read CPython's help topics.

    Returns:
        Texts by topic name.

    Raises:
        FileNotFoundError: This Python has no ``pydoc_data``, as in some minimal distributions.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise FileNotFoundError(
            "the corpus python-docs is the module pydoc_data.topics, which this Python does not have; "
            "install its full standard library, or give your own text with --train_file"
        ) from error
    return dict(topics)


def unique_paragraphs(topics: dict[str, str]) -> list[str]:
    """Split topics into paragraphs and drop duplicates, longest topic first.

    Many topics are sections of a longer one (``if``, ``for`` and ``with`` are inside ``compound``), which duplicates a
    fifth of the text. Duplicates would put the same sentences into the training and the test split. The longest topic
    comes first, so that chapters stay complete and their excerpts are dropped. White space is ignored in comparisons.

    Args:
        topics: Texts by name; blank lines separate paragraphs.

    Returns:
        Unique paragraphs in an order that depends on the topics alone.
    """
    seen: set[str] = set()
    paragraphs = []
    for name in sorted(topics, key=lambda key: (-len(topics[key]), key)):
        for paragraph in _BLANK_LINES.split(topics[name].strip("\n")):
            key = " ".join(paragraph.split())
            if key and key not in seen:
                seen.add(key)
                paragraphs.append(paragraph)
    return paragraphs


def split_paragraphs(
    paragraphs: list[str], block_characters: int = BLOCK_CHARACTERS
) -> tuple[list[str], list[str], list[str]]:
    """Split paragraphs into training, validation and test lines, about 80 / 10 / 10 by characters.

    Paragraphs are grouped into contiguous blocks. Of every ten blocks, the first eight are for training, the ninth for
    validation and the tenth for test, so every split samples the whole text. A blank line follows each paragraph.

    Args:
        paragraphs: Texts without surrounding newlines.
        block_characters: Length at which a block ends, in characters. Default 4000.

    Returns:
        The three splits ``(train, validation, test)``, each a list of lines without newlines.
    """
    blocks: list[list[str]] = [[]]
    size = 0
    for paragraph in paragraphs:
        if size >= block_characters:
            blocks.append([])
            size = 0
        blocks[-1] += [*paragraph.split("\n"), ""]
        size += len(paragraph)
    splits: tuple[list[str], list[str], list[str]] = ([], [], [])
    for index, block in enumerate(blocks):
        splits[max(index % 10 - 7, 0)].extend(block)
    return splits
