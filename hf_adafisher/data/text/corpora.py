"""Text corpora from the Hugging Face Hub, from local files, or embedded in CPython.

A corpus has three splits, each a list of lines without newlines. The text of a split is every line followed by one
newline. Each line end counts as one word (``count_words``), as in the published perplexities on Penn Treebank and
WikiText.
"""

from __future__ import annotations

import difflib
import logging
import platform
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from hf_adafisher.data.text.python_docs import read_topics, split_paragraphs, unique_paragraphs

logger = logging.getLogger(__name__)

DEFAULT_CORPUS = "python-docs"
HELD_OUT_FRACTION = 0.05
"""Share of the training lines, the last ones, that is held out where no validation file is given."""

Paths = str | PathLike[str] | Sequence[str | PathLike[str]]


@dataclass(frozen=True)
class TextCorpus:
    """Three splits of text.

    Attributes:
        name: Corpus name, or "local files".
        train: Lines without their newline.
        validation: Lines without their newline.
        test: Lines without their newline; empty if the corpus has no test split.
        source: Provenance for the records: Hub id, configuration and revision, or paths, or Python version.
    """

    name: str
    train: list[str]
    validation: list[str]
    test: list[str]
    source: str


@dataclass(frozen=True)
class HubCorpus:
    """A corpus on the Hugging Face Hub.

    Attributes:
        path: Dataset id.
        config: Configuration of the dataset.
        revision: Commit or branch, pinned so that all results are on the same text.
        column: Column with one line of text per row.
        licence: Licence stated on the dataset card.
        note: Remark for readers of results about this version of the text.
        parquet: Read the parquet files of the revision directly, for datasets whose main branch is a loading script.
    """

    path: str
    config: str
    revision: str
    column: str
    licence: str
    note: str = ""
    parquet: bool = False

    def describe(self) -> str:
        """Describe the text in one line: path, configuration, revision, licence and note."""
        note = f", {self.note}" if self.note else ""
        return f"{self.path} ({self.config}, revision {self.revision}, licence {self.licence}{note})"


def _wikitext(config: str, note: str) -> HubCorpus:
    revision = "b08601e04326c79dfdd32d625aee71d232d685c3"
    return HubCorpus("Salesforce/wikitext", config, revision, "text", "CC BY-SA", note)


_RAW = "raw text with all its words, not the <unk> version"
_PROCESSED = "processed version: rare words are <unk>"
HUB_CORPORA: dict[str, HubCorpus] = {
    "wikitext-2": _wikitext("wikitext-2-raw-v1", _RAW),
    "wikitext-2-v1": _wikitext("wikitext-2-v1", _PROCESSED),
    "wikitext-103": _wikitext("wikitext-103-raw-v1", _RAW),
    "wikitext-103-v1": _wikitext("wikitext-103-v1", _PROCESSED),
    # The main branch is a loading script, which datasets no longer runs. This branch is the Hub's conversion of it.
    "ptb": HubCorpus(
        "ptb-text-only/ptb_text_only",
        "penn_treebank",
        "refs/convert/parquet",
        "sentence",
        "LDC User Agreement for Non-Members",
        "10,000-word vocabulary, the rest is <unk>",
        parquet=True,
    ),
}


def available_corpora() -> list[str]:
    """List the names that ``load_corpus`` accepts, the embedded default first."""
    return [DEFAULT_CORPUS, *HUB_CORPORA]


def count_words(lines: Iterable[str]) -> int:
    """Count words separated by white space, plus one end-of-line word per line.

    The count does not depend on a tokenizer, so perplexities per word can be compared between tokenizers.
    """
    return sum(len(line.split()) + 1 for line in lines)


def load_corpus(
    name: str | None = None,
    *,
    train_files: Paths | None = None,
    validation_files: Paths | None = None,
    test_files: Paths | None = None,
) -> TextCorpus:
    """Load a corpus by name or from local UTF-8 text files.

    Args:
        name: One of ``available_corpora()``. Default without files: "python-docs", which needs no network.
        train_files: Path or paths, concatenated in order.
        validation_files: Path or paths. Without it, the last 5 % of the training lines are held out for validation.
        test_files: Path or paths. Without it, the test split is empty.

    Returns:
        The corpus.

    Raises:
        ValueError: The name is unknown, name and files are both given, a file is empty or not UTF-8, or there are too
            few lines to split.
        FileNotFoundError: A file does not exist.
        ConnectionError: A corpus of the Hub is neither cached nor reachable.
    """
    files = (train_files, validation_files, test_files)
    if any(paths is not None for paths in files):
        if name is not None:
            raise ValueError(f"give either a corpus name (got {name!r}) or text files, not both")
        return _load_files(train_files, validation_files, test_files)
    name = DEFAULT_CORPUS if name is None else name
    if name not in available_corpora():
        near = difflib.get_close_matches(name.lower(), available_corpora(), n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise ValueError(
            f"unknown corpus {name!r}{hint} Known: {', '.join(available_corpora())}. "
            "For your own text use --train_file, --validation_file and --test_file"
        )
    return _load_python_docs() if name == DEFAULT_CORPUS else _load_hub(name, HUB_CORPORA[name])


def _load_python_docs() -> TextCorpus:
    train, validation, test = split_paragraphs(unique_paragraphs(read_topics()))
    source = f"pydoc_data.topics of {platform.python_implementation()} {platform.python_version()}"
    return TextCorpus(DEFAULT_CORPUS, train, validation, test, source)


def _load_hub(name: str, corpus: HubCorpus) -> TextCorpus:
    from datasets import load_dataset

    splits = ("train", "validation", "test")
    try:
        if corpus.parquet:
            root = f"hf://datasets/{corpus.path}@{corpus.revision.replace('/', '%2F')}/{corpus.config}"
            data = load_dataset("parquet", data_files={split: f"{root}/{split}/*.parquet" for split in splits})
        else:
            data = load_dataset(corpus.path, corpus.config, revision=corpus.revision)
    # datasets and its dependencies raise a dozen unrelated types here. The advice is the same for all of them.
    except Exception as error:
        raise ConnectionError(
            f"could not load the corpus {name!r}, which is {corpus.describe()} on the Hugging Face Hub: "
            f"it is not in the local cache and the Hub gave no answer ({type(error).__name__}: {error}). "
            "Without a network, give local text files with --train_file, --validation_file and --test_file, "
            "or use --dataset python-docs"
        ) from error
    # WikiText's rows end with a newline, Penn Treebank's do not.
    train, validation, test = ([row.rstrip("\n") for row in data[split][corpus.column]] for split in splits)
    return TextCorpus(name, train, validation, test, corpus.describe())


def _load_files(train: Paths | None, validation: Paths | None, test: Paths | None) -> TextCorpus:
    if train is None:
        raise ValueError("a corpus of local files needs at least a training file (--train_file)")
    groups = [_as_paths(paths) for paths in (train, validation, test)]
    for path in (path for group in groups for path in group):
        if not path.is_file():
            raise FileNotFoundError(
                f"text file {str(path)!r} does not exist (or is not a file); give the path of a text file"
            )
    lines = [[line for path in group for line in _read_lines(path)] for group in groups]
    source = "; ".join(
        f"{split}: {', '.join(map(str, group))}"
        for split, group in zip(("train", "validation", "test"), groups, strict=True)
        if group
    )
    if validation is None:
        lines[0], lines[1] = _hold_out(lines[0])
        source += f"; validation: last {len(lines[1])} lines of train"
        logger.warning(
            "no validation file: the last %g %% of the training lines (%d of %d) are held out for validation",
            100 * HELD_OUT_FRACTION, len(lines[1]), len(lines[0]) + len(lines[1]),
        )  # fmt: skip
    if test is None:
        logger.warning("no test file: results will have no test split (give one with --test_file)")
    return TextCorpus("local files", lines[0], lines[1], lines[2], source)


def _as_paths(paths: Paths | None) -> list[Path]:
    if paths is None:
        return []
    return [Path(paths)] if isinstance(paths, str | PathLike) else [Path(path) for path in paths]


def _read_lines(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8-sig")  # -sig: a byte order mark is not part of the text
    except UnicodeDecodeError as error:
        raise ValueError(
            f"text file {str(path)!r} is not UTF-8 ({error}); convert it, for example with iconv"
        ) from error
    if not text.strip():
        raise ValueError(f"text file {str(path)!r} is empty or holds only blank lines; give a file with text")
    # Not splitlines(): that also cuts at form feeds and Unicode separators, which are no line ends in a file.
    return text.removesuffix("\n").split("\n")


def _hold_out(lines: list[str]) -> tuple[list[str], list[str]]:
    if len(lines) < 2:
        raise ValueError(
            f"cannot hold out a validation split from {len(lines)} line of text; at least 2 are needed, "
            "or give a file with --validation_file"
        )
    held_out = max(1, round(len(lines) * HELD_OUT_FRACTION))
    return lines[:-held_out], lines[-held_out:]
