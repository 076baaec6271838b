"""Corpora: the text that they give, from files and columns of tables, in which encoding, and what they refuse."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import pickle
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict
from hypothesis import given
from hypothesis import strategies as st

from hf_adafisher.data.text import (
    TokenWindows,
    available_corpora,
    count_words,
    encode_lines,
    load_corpus,
    train_tokenizer,
)
from hf_adafisher.data.text import tokens as tokens_module
from hf_adafisher.data.text.corpora import HELD_OUT_LINES, HUB_CORPORA
from hf_adafisher.data.text.lines import LineStream, first_lines
from hf_adafisher.data.text.python_docs import read_topics, split_paragraphs, unique_paragraphs
from hf_adafisher.data.text.tokens import StreamedWindows

ROWS = ["one line", "null", "two lines,\nthe second", "a last newline\n", "", "ends"]
LINES = ["one line", "null", "two lines,", "the second", "a last newline", "", "ends"]
SPLITS = {"train": ROWS, "validation": ["v"], "test": ["t 1", "t 2"]}


def datasets_of(column: str = "text") -> DatasetDict:
    made = {split: {column: rows, "number": list(range(len(rows)))} for split, rows in SPLITS.items()}
    return DatasetDict({split: Dataset.from_dict(columns) for split, columns in made.items()})


def write_folder(folder: Path, form: str) -> Path:
    folder.mkdir()
    if form == "saved":
        datasets_of().save_to_disk(str(folder / "saved"))
        return folder / "saved"
    for split, table in datasets_of().items():
        path = folder / f"{split}.{form}"
        {"csv": table.to_csv, "jsonl": table.to_json, "parquet": table.to_parquet}[form](str(path))
    return folder


@pytest.mark.parametrize("form", ["csv", "jsonl", "parquet", "saved"])
def test_a_local_data_set_is_its_lines(form: str, tmp_path: Path) -> None:
    folder = str(write_folder(tmp_path / "d", form))
    if form == "csv":  # of which datasets takes the word null, and empty cells, for None; as --train_file they are text
        with pytest.raises(ValueError, match="train: row 1 of column 'text' holds None; every row must be text"):
            load_corpus(folder)
        return
    corpus = load_corpus(folder)
    assert (corpus.train, corpus.validation, corpus.test) == (LINES, ["v"], ["t 1", "t 2"])


@pytest.mark.parametrize("form", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize("streaming", [False, True])
def test_tables_as_files_are_the_same_text_as_text_files(form: str, streaming: bool, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "d", form)
    found = load_corpus(**{f"{split}_files": folder / f"{split}.{form}" for split in SPLITS}, streaming=streaming)
    assert (list(found.train), found.validation, found.test) == (LINES, ["v"], ["t 1", "t 2"])
    assert isinstance(found.train, LineStream) == streaming and list(found.train) == LINES  # a second pass
    (tmp_path / "a.txt").write_text("\n".join(LINES) + "\n")
    files = {"train_files": tmp_path / "a.txt", "validation_files": tmp_path / "a.txt", "streaming": streaming}
    assert list(load_corpus(**files).train) == LINES


def test_the_column_is_found_or_asked_for(tmp_path: Path) -> None:
    def corpus(columns: dict[str, list[Any]], column: str | None = None) -> list[str]:
        path = tmp_path / "a.parquet"
        Dataset.from_dict(columns).to_parquet(str(path))
        return list(load_corpus(train_files=path, validation_files=path, column=column).train)

    assert corpus({"sentence": ["a"], "n": [1]}) == ["a"]
    assert corpus({"text": ["a"], "title": ["b"]}) == ["a"] and corpus({"text": ["a"], "title": ["b"]}, "title") == [
        "b"
    ]
    for columns, wanted, message in (
        ({"x": ["a"], "y": ["b"]}, None, "which column has the text? Give --text_column_name; columns: x, y"),
        ({"n": [1]}, None, "which column has the text"),
        ({"text": ["a"]}, "txt", "has no column 'txt'"),
        ({"text": ["a"], "n": [1]}, "n", "column 'n' has the type"),
        ({"text": ["a", None]}, None, "row 1 of column 'text' holds None"),
    ):
        with pytest.raises(ValueError) as error:
            corpus(columns, wanted)
        assert message in str(error.value)
    (tmp_path / "a.txt").write_text("a\nb\n")
    with pytest.raises(ValueError, match="is a text file without columns"):
        load_corpus(train_files=tmp_path / "a.txt", column="text")


def test_names_of_data_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for arguments, kind, message in (
        ({"name": "wikitex-2"}, ValueError, "did you mean 'wikitext-2'.*OWNER/NAME"),
        ({"name": "owner/none"}, ConnectionError, "could not load the data set 'owner/none'.*--train_file"),
        ({"name": "wikitext-2", "config": "x"}, ValueError, "has its own configuration"),
        ({"name": str(tmp_path)}, ValueError, "cannot be read"),
        ({"train_files": "a", "config": "x"}, ValueError, "no configuration"),
    ):
        with pytest.raises(kind, match=message):
            load_corpus(**arguments)  # type: ignore[arg-type]
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "test.jsonl").write_text(json.dumps({"text": "a"}))
    with pytest.raises(ValueError, match="has no training split \\(found: test\\)"):
        load_corpus(str(tmp_path / "t"))


def test_of_a_stream_the_first_lines_are_held_out(tmp_path: Path) -> None:
    path, count = tmp_path / "a.txt", HELD_OUT_LINES + 7
    path.write_text("".join(f"{number}\n" for number in range(count)))
    corpus = load_corpus(train_files=path, streaming=True)
    assert corpus.validation == [str(number) for number in range(HELD_OUT_LINES)]
    assert list(corpus.train) == [str(number) for number in range(HELD_OUT_LINES, count)]
    limited = corpus.limited(3, 2)
    assert list(limited.train) == list(corpus.train)[:3] and limited.validation == ["0", "1"]
    assert first_lines(["a", "b"], 1) == ["a"] and first_lines(["a"], None) == ["a"]


@pytest.mark.parametrize("block_size", [3, 16, 1000])
def test_streamed_windows_are_the_windows(block_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over more than one chunk of lines; two workers together have each of them once."""
    lines = load_corpus().train[:1200]
    tokenizer = train_tokenizer(lines, 400)
    expected = TokenWindows(encode_lines(tokenizer, lines), block_size)
    streamed = StreamedWindows(tokenizer, lines, block_size, name="text")
    found = list(streamed)
    assert len(found) == len(expected) > 1
    for index in (0, 1, len(found) // 2, len(found) - 1):
        for key, value in expected[index].items():
            assert torch.equal(found[index][key], value)
    if block_size == 16:
        parts = []
        for worker in range(2):
            info = type("Info", (), {"id": worker, "num_workers": 2})
            monkeypatch.setattr(tokens_module, "get_worker_info", lambda info=info: info)
            parts.append([example["input_ids"] for example in streamed])
        assert len(parts[0]) + len(parts[1]) == len(found)
        assert all(torch.equal(ids, found[2 * i + w]["input_ids"]) for w in range(2) for i, ids in enumerate(parts[w]))


def test_a_stream_that_fills_no_window_is_an_error() -> None:
    tokenizer = train_tokenizer(["a b"], 300)
    with pytest.raises(ValueError, match=r"the text is too short: 2 tokens where one block needs 63"):
        list(StreamedWindows(tokenizer, ["a"], 64, name="text"))


@pytest.mark.subprocess
def test_the_ids_do_not_depend_on_the_number_of_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forked processes here: new ones, as a run starts them, import torch for seconds."""
    lines = load_corpus().train[:3000]
    tokenizer = train_tokenizer(lines, 400)
    methods: list[str] = []
    fork = multiprocessing.get_context("fork")
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: methods.append(method) or fork)
    assert torch.equal(encode_lines(tokenizer, lines, workers=2), encode_lines(tokenizer, lines))
    assert methods == ["spawn"]
    encoder = tokens_module._Encoder(tokenizer)  # what a new process gets
    assert pickle.loads(pickle.dumps(encoder))("a line\n") == encoder("a line\n")


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_bytes(b"\xef\xbb\xbfone two\r\n\nthree\x0cfour\xe2\x80\xa8five\n")
    return path


def test_lines_are_cut_at_line_ends_only(text_file: Path) -> None:
    """No byte order mark; Windows line ends understood; form feeds and Unicode separators stay inside."""
    twice = [text_file, text_file]
    corpus = load_corpus(train_files=text_file, validation_files=twice, test_files=str(text_file))
    lines = ["one two", "", "three\x0cfour\u2028five"]
    assert corpus.train == corpus.test == lines
    assert corpus.validation == lines + lines
    assert str(text_file) in corpus.source


def test_a_missing_last_newline_changes_nothing(tmp_path: Path) -> None:
    for name, text in (("with", "a\nb\n"), ("without", "a\nb")):
        (tmp_path / name).write_text(text)
    corpus = load_corpus(train_files=tmp_path / "with", validation_files=tmp_path / "without")
    assert corpus.train == corpus.validation == ["a", "b"]


def test_without_validation_file_the_last_twentieth_is_held_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lines = [f"line {number}" for number in range(100)]
    (tmp_path / "train.txt").write_text("\n".join(lines) + "\n")
    with caplog.at_level(logging.WARNING):
        corpus = load_corpus(train_files=tmp_path / "train.txt")
    assert (corpus.train, corpus.validation, corpus.test) == (lines[:95], lines[95:], [])
    assert "5 of 100" in caplog.text and "no test split" in caplog.text
    assert "last 5 lines of train" in corpus.source


@pytest.mark.parametrize(
    ("lines", "words"), [([], 0), ([""], 1), (["a b", "", " c "], 6), (["no-break\u00a0space\tand tab"], 5)]
)
def test_words_are_what_white_space_separates_and_line_ends(lines: list[str], words: int) -> None:
    assert count_words(lines) == words


@given(st.lists(st.text(alphabet="ab \t")))
def test_words_count_like_marked_line_ends(lines: list[str]) -> None:
    """The customary count: write <eos> where a line ends, then split at white space."""
    assert count_words(lines) == len(" ".join(f"{line} <eos>" for line in lines).split())


@pytest.mark.skipif("HF_ADAFISHER_DATA" not in os.environ, reason="HF_ADAFISHER_DATA is not set")
@pytest.mark.parametrize(("split", "words"), [("train", 2_088_628), ("valid", 217_646), ("test", 245_569)])
def test_wikitext_2_has_its_published_number_of_words(split: str, words: int) -> None:
    path = Path(os.environ["HF_ADAFISHER_DATA"]) / "data" / "wikitext-2" / f"{split}.txt"
    assert count_words(load_corpus(train_files=path, validation_files=path, test_files=path).train) == words


def test_python_docs_is_the_default_and_says_its_version() -> None:
    corpus = load_corpus()
    assert corpus == load_corpus("python-docs")
    assert corpus.name == "python-docs" and platform.python_version() in corpus.source
    sizes = [sum(len(line) + 1 for line in split) for split in (corpus.train, corpus.validation, corpus.test)]
    assert sum(sizes) > 300_000
    assert [size / sum(sizes) for size in sizes] == pytest.approx([0.8, 0.1, 0.1], abs=0.03)


def test_python_docs_splits_share_no_paragraph() -> None:
    corpus = load_corpus()
    parts = [
        {" ".join(paragraph.split()) for paragraph in "\n".join(split).split("\n\n")} - {""}
        for split in (corpus.train, corpus.validation, corpus.test)
    ]
    assert not parts[0] & parts[1] and not parts[0] & parts[2] and not parts[1] & parts[2]


def test_python_docs_loses_nothing_but_repetitions() -> None:
    kept = {" ".join(paragraph.split()) for paragraph in unique_paragraphs(read_topics())}
    for text in read_topics().values():
        for paragraph in text.split("\n\n"):
            words = " ".join(paragraph.split())
            assert not words or words in kept or any(words in longer for longer in kept)


def test_blocks_are_dealt_eight_one_one() -> None:
    train, validation, test = split_paragraphs([f"p{number}" for number in range(21)], block_characters=1)
    assert validation == ["p8", "", "p18", ""] and test == ["p9", "", "p19", ""]
    assert len(train) == 2 * 17 and train[-2] == "p20"


def test_python_docs_without_pydoc_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(FileNotFoundError, match=r"pydoc_data.*--train_file"):
        load_corpus("python-docs")


@pytest.mark.parametrize("name", list(HUB_CORPORA))
def test_hub_corpora_ask_for_the_pinned_text(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus, calls = HUB_CORPORA[name], []

    def load_dataset(*args: Any, **kwargs: Any) -> dict[str, dict[str, list[str]]]:
        calls.append((args, kwargs))
        return {split: {corpus.column: [" a \n", "", split]} for split in ("train", "validation", "test")}

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    loaded = load_corpus(name)
    assert (loaded.train, loaded.test) == ([" a ", "", "train"], [" a ", "", "test"])
    assert loaded.name == name and corpus.licence in loaded.source and corpus.config in loaded.source
    if name == "ptb":
        root = "hf://datasets/ptb-text-only/ptb_text_only@refs%2Fconvert%2Fparquet/penn_treebank"
        files = {split: f"{root}/{split}/*.parquet" for split in ("train", "validation", "test")}
        assert calls == [(("parquet",), {"data_files": files, "streaming": False})]
    else:
        config = name.removesuffix("-v1") + ("-v1" if name.endswith("-v1") else "-raw-v1")
        revision = "b08601e04326c79dfdd32d625aee71d232d685c3"
        assert calls == [(("Salesforce/wikitext", config), {"revision": revision, "streaming": False})]


PTB = {
    "train": ["mr. <unk> is chairman of <unk> n.v. the dutch publishing group", "pierre N years old"],
    "validation": ["consumers may want to move their telephones a little closer to the tv set"],
    "test": ["no it was n't black monday", "but while N"],
}
"""A few made-up lines in the form that Mikolov gave Penn Treebank."""


def test_ptb_is_read_from_parquet_files_in_the_form_of_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The library itself reads files laid out as the Hub's converter lays them out, at a folder in the Hub's place."""
    import datasets

    for split, lines in PTB.items():
        path = tmp_path / "penn_treebank" / split / "0000.parquet"
        path.parent.mkdir(parents=True)
        datasets.Dataset.from_dict({"sentence": lines}).to_parquet(path)
    real, root = datasets.load_dataset, "hf://datasets/ptb-text-only/ptb_text_only@refs%2Fconvert%2Fparquet"

    def load_dataset(*args: Any, data_files: dict[str, str], streaming: bool) -> Any:
        local = {split: pattern.replace(root, str(tmp_path)) for split, pattern in data_files.items()}
        assert local != data_files
        return real(*args, data_files=local, streaming=streaming, cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    corpus = load_corpus("ptb")
    assert {"train": corpus.train, "validation": corpus.validation, "test": corpus.test} == PTB
    assert list(load_corpus("ptb", streaming=True).train) == PTB["train"]
    assert count_words(corpus.train) == 11 + 1 + 4 + 1 and "LDC" in corpus.source


def test_ptb_from_the_files_of_mikolov_is_the_same_text(tmp_path: Path) -> None:
    """One sentence a line with a space on either side, which count no words; the end of each line counts."""
    for split, lines in PTB.items():
        (tmp_path / f"{split}.txt").write_text("".join(f" {line} \n" for line in lines))
    corpus = load_corpus(**{f"{split}_files": tmp_path / f"{split}.txt" for split in PTB})
    for split, lines in PTB.items():
        found = getattr(corpus, split)
        assert [line.strip() for line in found] == lines and count_words(found) == count_words(lines)
        assert count_words(found) == sum(line.count(" ") - 1 for line in found) + len(lines)


@pytest.mark.parametrize("name", list(HUB_CORPORA))
def test_hub_corpus_without_network_or_cache(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConnectionError, match=rf"'{name}'.*--train_file, --validation_file and --test_file"):
        load_corpus(name)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("wikitext2", "wikitext-2"), ("WikiText-103", "wikitext-103"), ("python_docs", "python-docs")],
)
def test_unknown_corpus_names_the_nearest_and_all(name: str, nearest: str) -> None:
    with pytest.raises(ValueError, match=f"unknown corpus '{name}'.*did you mean '{nearest}'") as error:
        load_corpus(name)
    assert all(known in str(error.value) for known in available_corpora())


def test_a_far_name_suggests_nothing() -> None:
    with pytest.raises(ValueError, match=r"^(?!.*did you mean).*'qqqq'\. Known: python-docs"):
        load_corpus("qqqq")


def test_a_missing_file_is_named_before_any_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    with pytest.raises(FileNotFoundError, match=r"nowhere\.txt"):
        load_corpus(train_files=tmp_path / "empty.txt", test_files=tmp_path / "nowhere.txt")
    with pytest.raises(FileNotFoundError, match="not a file"):
        load_corpus(train_files=tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b" \n\n\t\n", "only blank lines"),
        (b"caf\xe9", "not UTF-8.*iconv"),
        (b"one line", "at least 2"),
    ],
)
def test_useless_files_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "text.txt").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_corpus(train_files=tmp_path / "text.txt")


def test_name_and_files_or_no_training_file_are_refused(text_file: Path) -> None:
    with pytest.raises(ValueError, match="either a corpus name"):
        load_corpus("ptb", train_files=text_file)
    with pytest.raises(ValueError, match="--train_file"):
        load_corpus(validation_files=text_file)


def test_a_long_line_is_encoded_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    """E6: with the same tokens, whatever the length of the pieces; no piece is longer."""
    from hf_adafisher.data.text import tokens

    text = " ".join(load_corpus().validation[:40]) + "  two  spaces   three " + "unbroken" * 10
    tokenizer = tokens.train_tokenizer([text], 400)
    whole = tokens.encode_lines(tokenizer, [text])
    monkeypatch.setattr(tokens, "_CHUNK_CHARS", 150)
    pieces = list(tokens._chunks([text]))
    assert "".join(pieces) == text + "\n" and len(pieces) > 10 and max(map(len, pieces)) <= 150
    assert torch.equal(tokens.encode_lines(tokenizer, [text]), whole)
    assert tokens.train_tokenizer([text], 400).get_vocab() == tokenizer.get_vocab()


def test_a_long_line_shows_its_progress(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """E6: a text that takes more than a few seconds has a bar; any other has none."""
    from hf_adafisher.data.text import tokens

    line = "a line of words " * 1000
    tokenizer = tokens.train_tokenizer([line], 300)
    assert "tokens" not in capsys.readouterr().err
    monkeypatch.setattr(tokens, "_QUIET_SECONDS", 0)
    monkeypatch.setattr(tokens, "_CHUNK_CHARS", 1000)
    tokens.encode_lines(tokenizer, [line])
    assert "tokens" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.subprocess
def test_a_line_of_20_mb_stays_under_1_gb(tmp_path: Path) -> None:
    """E6: tokenizer and tokens of one line, in a process of its own; 100 MB take 1.6 GB."""
    code = (
        "import resource\n"
        "from hf_adafisher.data.text.corpora import load_corpus\n"
        "from hf_adafisher.data.text.tokens import encode_lines, train_tokenizer\n"
        "words = ' '.join(load_corpus().train)\n"
        "line = (words * (20_000_000 // len(words) + 1))[:20_000_000]\n"
        "del words\n"
        "print(len(encode_lines(train_tokenizer([line], 300), [line])))\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    tokens, kilobytes = map(int, done.stdout.split())
    assert tokens > 6_000_000 and kilobytes < 1_000_000, (tokens, kilobytes)
