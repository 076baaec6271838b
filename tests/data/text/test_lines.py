"""Text from columns of tables, and text that is encoded as it is read."""

from __future__ import annotations

import json
import multiprocessing
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict

from hf_adafisher.data.text import TokenWindows, encode_lines, load_corpus, train_tokenizer
from hf_adafisher.data.text import tokens as tokens_module
from hf_adafisher.data.text.corpora import HELD_OUT_LINES
from hf_adafisher.data.text.lines import LineStream, first_lines
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
