"""Text corpora from the Hugging Face Hub, from local files, or embedded in CPython.

A corpus has three splits, each a list of lines without newlines. The text of a split is every line followed by one
newline. Each line end counts as one word (``count_words``), as in the published perplexities on Penn Treebank and
WikiText.
"""

from __future__ import annotations

import difflib
import logging
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from os import PathLike
from pathlib import Path

from hf_adafisher.data.tables import by_split, is_saved, load_saved, load_tables
from hf_adafisher.data.text.lines import Lines, LineStream, column_lines, file_lines, first_lines
from hf_adafisher.data.text.python_docs import read_topics, split_paragraphs, unique_paragraphs

logger = logging.getLogger(__name__)

DEFAULT_CORPUS = "python-docs"
HELD_OUT_FRACTION = 0.05
"""Share of the training lines, the last ones, that is held out where no validation file is given."""

HELD_OUT_LINES = 1000
"""Lines of a streamed text, the first ones, that are held out instead: its length is not known."""
_SPLITS = ("train", "validation", "test")
_OFFLINE = (
    "Without a network, give local text files with --train_file, --validation_file and --test_file, "
    "or use --dataset python-docs"
)

Paths = str | PathLike[str] | Sequence[str | PathLike[str]]


@dataclass(frozen=True)
class TextCorpus:
    """Three splits of text.

    Attributes:
        name: Corpus name, or "local files".
        train: Lines without their newline; of a streamed corpus they are read anew in every pass.
        validation: Lines without their newline.
        test: Lines without their newline; empty if the corpus has no test split.
        source: Provenance for the records: Hub id, configuration and revision, or paths, or Python version.
    """

    name: str
    train: Lines
    validation: list[str]
    test: list[str]
    source: str

    def limited(self, train: int | None, evaluation: int | None) -> TextCorpus:
        """Keep so many first lines of the training split, and of each of the others; None keeps all."""
        kept = first_lines(self.train, train)
        return replace(self, train=kept, validation=self.validation[:evaluation], test=self.test[:evaluation])


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
    config: str | None = None,
    column: str | None = None,
    token: str | None = None,
    train_files: Paths | None = None,
    validation_files: Paths | None = None,
    test_files: Paths | None = None,
    streaming: bool = False,
) -> TextCorpus:
    """Load a corpus by name, a data set with a column of text, or local UTF-8 text files.

    Args:
        name: One of ``available_corpora()``, the id ("owner/name") of another data set on the Hub, or a local one: a
            folder or file that ``load_dataset`` can read, or a folder written by ``save_to_disk``. Default without
            files: "python-docs", which needs no network.
        config: Configuration of a data set that is none of ``available_corpora()``.
        column: Column of the text in a data set, or in files that are tables (CSV, JSON, parquet). Default: "text", or
            the only one that holds text. A row of several lines is several lines.
        token: Of the Hub, for private data sets. Default: that of ``hf auth login``.
        train_files: Path or paths, concatenated in order.
        validation_files: Path or paths. Without it, the last 5 % of the training lines are held out for validation.
        test_files: Path or paths. Without it, the test split is empty.
        streaming: Read the training lines as they are needed, in every pass; without a validation split, the first 1000
            of them are held out.

    Returns:
        The corpus.

    Raises:
        ValueError: The name is unknown, name and files are both given, a file is empty or not UTF-8, a column is
            missing or holds no text, or there are too few lines to split.
        FileNotFoundError: A file does not exist.
        ConnectionError: A corpus of the Hub is neither cached nor reachable.
    """
    files = dict(zip(_SPLITS, map(_as_paths, (train_files, validation_files, test_files)), strict=True))
    if any(files.values()):
        if name is not None:
            raise ValueError(f"give either a corpus name (got {name!r}) or text files, not both")
        if config is not None:
            raise ValueError(f"text files have no configuration: leave out --dataset_config_name {config}")
        return _load_files(files, column, streaming)
    name = DEFAULT_CORPUS if name is None else name
    if name not in available_corpora():
        return _load_other(name, config, column, token, streaming)
    if config is not None or column is not None:
        raise ValueError(
            f"{name} has its own configuration and column: leave out --dataset_config_name and "
            "--text_column_name, or give the data set as OWNER/NAME"
        )
    if name != DEFAULT_CORPUS:
        return _load_hub(name, HUB_CORPORA[name], streaming)
    corpus = _load_python_docs()
    return replace(corpus, train=LineStream(lambda: corpus.train)) if streaming else corpus


def _load_python_docs() -> TextCorpus:
    train, validation, test = split_paragraphs(unique_paragraphs(read_topics()))
    source = f"pydoc_data.topics of {platform.python_implementation()} {platform.python_version()}"
    return TextCorpus(DEFAULT_CORPUS, train, validation, test, source)


def _load_hub(name: str, corpus: HubCorpus, streaming: bool) -> TextCorpus:
    from datasets import load_dataset

    try:
        if corpus.parquet:
            root = f"hf://datasets/{corpus.path}@{corpus.revision.replace('/', '%2F')}/{corpus.config}"
            files = {split: f"{root}/{split}/*.parquet" for split in _SPLITS}
            data = load_dataset("parquet", data_files=files, streaming=streaming)
        else:
            data = load_dataset(corpus.path, corpus.config, revision=corpus.revision, streaming=streaming)
    # datasets and its dependencies raise a dozen unrelated types here. The advice is the same for all of them.
    except Exception as error:
        raise ConnectionError(
            f"could not load the corpus {name!r}, which is {corpus.describe()} on the Hugging Face Hub: "
            f"it is not in the local cache and the Hub gave no answer ({type(error).__name__}: {error}). {_OFFLINE}"
        ) from error

    def reader(split: str) -> Callable[[], Iterator[str]]:
        table, column = data[split], corpus.column
        # WikiText's rows end with a newline, Penn Treebank's do not.
        return lambda: (text.rstrip("\n") for text in ((row[column] for row in table) if streaming else table[column]))

    return _corpus(name, {split: reader(split) for split in _SPLITS}, corpus.describe(), streaming)


def _load_other(name: str, config: str | None, column: str | None, token: str | None, streaming: bool) -> TextCorpus:
    """Load any other data set, from the Hub or local."""
    path = Path(name)
    if not path.exists() and "/" not in name and config is None:
        near = difflib.get_close_matches(name.lower(), available_corpora(), n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise ValueError(
            f"unknown corpus {name!r}{hint} Known: {', '.join(available_corpora())}. Every other data set of the Hub "
            "is OWNER/NAME. For your own text use --train_file, --validation_file and --test_file"
        )
    if is_saved(path):
        if streaming or config is not None:
            raise ValueError(f"{name!r} was written by save_to_disk: it is read whole, without a configuration")
        tables = load_saved(path)
    else:
        tables = by_split(load_tables(name, config=config, token=token, streaming=streaming, advice=_OFFLINE))
    if "train" not in tables:
        raise ValueError(f"{name!r} has no training split (found: {', '.join(tables) or 'none'})")
    readers = {split: column_lines(table, column, f"{name}, {split}") for split, table in tables.items()}
    details = [f"configuration {config}"] * (config is not None) + [f"column {column}"] * (column is not None)
    source = ", ".join([name, *details])
    return _corpus(path.name if path.exists() else name, readers, source, streaming)


def _load_files(files: Mapping[str, list[Path]], column: str | None, streaming: bool) -> TextCorpus:
    if not files["train"]:
        raise ValueError("a corpus of local files needs at least a training file (--train_file)")
    each = {split: [file_lines(path, column, streaming) for path in paths] for split, paths in files.items() if paths}
    readers = {split: partial(_joined, parts) for split, parts in each.items()}
    source = "; ".join(f"{split}: {', '.join(map(str, paths))}" for split, paths in files.items() if paths)
    return _corpus("local files", readers, source, streaming)


def _joined(readers: Iterable[Callable[[], Iterable[str]]]) -> Iterator[str]:
    return (line for read in readers for line in read())


def _corpus(name: str, readers: Mapping[str, Callable[[], Iterable[str]]], source: str, streaming: bool) -> TextCorpus:
    """Read the splits, and hold out lines for validation where there is no such split."""
    train: Lines = LineStream(readers["train"]) if streaming else list(readers["train"]())
    if "validation" in readers:
        validation = list(readers["validation"]())
    elif isinstance(train, LineStream):
        validation = list(islice(iter(train), HELD_OUT_LINES))
        train = LineStream(readers["train"], len(validation))
        source += f"; validation: first {len(validation)} lines of train"
        logger.warning("no validation split: the first %d lines of the stream are held out", len(validation))
    else:
        train, validation = _hold_out(train)
        source += f"; validation: last {len(validation)} lines of train"
        logger.warning(
            "no validation split: the last %g %% of the training lines (%d of %d) are held out for validation",
            100 * HELD_OUT_FRACTION, len(validation), len(train) + len(validation),
        )  # fmt: skip
    if "test" not in readers:
        logger.warning("no test split: results will have none (for files: --test_file)")
    test = list(readers["test"]()) if "test" in readers else []
    return TextCorpus(name, train, validation, test, source)


def _as_paths(paths: Paths | None) -> list[Path]:
    if paths is None:
        return []
    return [Path(paths)] if isinstance(paths, str | PathLike) else [Path(path) for path in paths]


def _hold_out(lines: list[str]) -> tuple[list[str], list[str]]:
    if len(lines) < 2:
        raise ValueError(
            f"cannot hold out a validation split from {len(lines)} line of text; at least 2 are needed, "
            "or give a file with --validation_file"
        )
    held_out = max(1, round(len(lines) * HELD_OUT_FRACTION))
    return lines[:-held_out], lines[-held_out:]
