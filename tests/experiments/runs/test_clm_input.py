"""Bad input to hf-adafisher clm: one line that names the value and the way out, and no work done."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--dataset", "wikitext2"], "did you mean 'wikitext-2'"),
        (["--train_file", "nowhere.txt"], "'nowhere.txt' does not exist"),
        (["--block_size", "1"], "block_size is 1; it must be at least 2"),
        (["--n_embd", "10", "--n_head", "3"], "n_embd (10) must be a multiple of n_head (3)"),
        (["--n_layer", "0"], "n_layer is 0; it must be at least 1"),
        (["--vocab_size", "100"], "vocab_size is 100"),
        (["--dropout", "1"], "dropout is 1.0; it must be in [0, 1)"),
        (["--optim", "adafishr"], "'adafishr'"),
        (["--num_train_epochs", "0"], "nothing to train"),
        (["--config_name", "a", "--model_name_or_path", "b"], "not both"),
        (["--resume_from_checkpoint", "last"], "no checkpoint to resume from"),
        (["--resume_from_checkpoint", "nowhere"], "'nowhere' is not a checkpoint"),
        (["nowhere.json"], "'nowhere.json' does not exist"),
    ],
)
def test_bad_input_ends_in_one_line(
    main: Any, flags: list[str], message: str, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    output = [] if flags[0].endswith(".json") else ["--output_dir", str(tmp_path / "out")]
    assert main([*flags, *output]) == 2
    assert message in caplog.text and "\n" not in caplog.records[-1].getMessage()
    assert not (tmp_path / "out" / "results.json").exists()


def test_text_shorter_than_a_block_is_refused(main: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "short.txt").write_text("a few words\nand a line\n")
    flags = [
        "--train_file",
        str(tmp_path / "short.txt"),
        "--vocab_size",
        "257",
        "--output_dir",
        str(tmp_path),
    ]
    assert main(flags) == 2
    assert "the train text is too short" in caplog.text and "--block_size (now 128)" in caplog.text


def test_a_foreign_tokenizer_must_fit_the_model(
    main: Any, finished: Path, command: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(finished)
    tokenizer.add_tokens([f"more{number}" for number in range(5)])
    tokenizer.save_pretrained(tmp_path)
    flags = ["--model_name_or_path", str(finished), "--tokenizer_name", str(tmp_path)]
    assert main([*command, *flags, "--output_dir", str(tmp_path)]) == 2
    assert "305 tokens" in caplog.text and "only 300" in caplog.text


def test_unknown_keys_in_a_json_file_are_refused(main: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "run.json").write_text('{"n_layers": 2}')
    assert main([str(tmp_path / "run.json")]) == 2
    assert "n_layers" in caplog.text
