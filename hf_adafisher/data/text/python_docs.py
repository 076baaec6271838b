"""The embedded corpus: the Python language reference that ships inside CPython.

`pydoc_data.topics` is the text behind `help("if")`: about 465 kB of English prose, grammar and code in 79
topics, present wherever CPython is, so a language model can be trained with no network and nothing to
download. The text changes a little with the Python version; for one version the splits are always the same.
"""

from __future__ import annotations

import re

BLOCK_CHARACTERS = 4000
"""A block ends with the paragraph that takes it to this many characters."""

_BLANK_LINES = re.compile(r"\n[ \t]*(?:\n[ \t]*)*\n")


def read_topics() -> dict[str, str]:
    """Returns CPython's help topics, name to text.

    Raises:
        FileNotFoundError: this Python comes without `pydoc_data` (some minimal distributions leave it out).
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
    """Returns all paragraphs (separated by blank lines), each text once, in a fixed order.

    Many topics are sections of a longer one (`if`, `for` and `with` are all inside `compound`): a fifth of
    the text stands there twice. Kept, it would put the same sentences into the training and the test split.
    Longest topic first, so that a chapter stays whole and its excerpts are what disappears. Two paragraphs
    are the same if they differ in white space only.
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
    """Splits paragraphs into training, validation and test lines, about 80 / 10 / 10 by characters.

    The text is cut into contiguous blocks of whole paragraphs; of every ten blocks the first eight are for
    training, the ninth for validation and the tenth for test. So all three splits come from the whole book,
    and none from one chapter only. A blank line follows each paragraph.

    Args:
        paragraphs: texts without surrounding newlines.
        block_characters: length at which a block is closed, in characters (default 4000).

    Returns:
        (train, validation, test), each a list of lines without newlines.
    """
    blocks: list[list[str]] = [[]]
    size = 0
    for paragraph in paragraphs:
        if size >= block_characters:
            blocks.append([])
            size = 0
        blocks[-1] += [*paragraph.split("\n"), ""]
        size += len(paragraph)
    parts: tuple[list[str], list[str], list[str]] = ([], [], [])
    for index, block in enumerate(blocks):
        parts[max(index % 10 - 7, 0)].extend(block)
    return parts
