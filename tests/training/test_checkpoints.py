"""Checkpoints that are truncated, foreign or half-written, and runs that are killed."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as distributed_checkpoint
from safetensors.torch import save_file
from torch.testing import assert_close
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_adafisher import AdaFisherTrainer
from hf_adafisher.training.checkpoints import CheckpointError, check_checkpoint_files, last_complete_checkpoint
from tests.model_zoo import family
from tests.training_helper import make_trainer

ROOT = Path(__file__).parents[2]
RECORD = family("gpt2")
NEEDED = ("model.safetensors", "optimizer.pt", "rng_state.pth", "scheduler.pt", "trainer_state.json")
NOT_READ = ("config.json", "generation_config.json", "training_args.bin")
"""Files that Trainer writes and does not read when it resumes."""


def our_trainer(folder: Path, model: Any = None, seed: int = 0, **options: Any) -> AdaFisherTrainer:
    settings: dict[str, Any] = {
        **{"max_steps": 6, "logging_steps": 1, "per_device_train_batch_size": 2},
        **{"step_size": "paper", "damping": 3e-3, "update_interval": 3},
        **{"save_strategy": "steps", "save_steps": 2},
        **options,
    }
    return make_trainer(folder, RECORD, model=model or RECORD.build(seed), **settings)


def small_gpt2(**sizes: int) -> Any:
    """The zoo's GPT-2 with another width or depth."""
    config = RECORD.build().config
    config.update(sizes)
    return type(RECORD.build())(config)


def snapshot(folder: Path) -> dict[str, tuple[int, str]]:
    """Every file and directory below, when it was changed, and what is in it."""
    return {
        str(path.relative_to(folder)): (
            path.stat().st_mtime_ns,
            hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "",
        )
        for path in sorted(folder.rglob("*"))
    }


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps with checkpoints at 2, 4 and 6, none of them at a refresh of the factors."""
    folder = tmp_path_factory.mktemp("whole")
    our_trainer(folder).train()
    return folder


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    """A copy of it, to be broken."""
    return Path(shutil.copytree(whole, tmp_path / "run"))


@pytest.fixture
def checkpoint(run: Path) -> Path:
    return run / "checkpoint-4"


def problem_of(checkpoint: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        check_checkpoint_files(checkpoint)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_the_tests_below_know_every_file_of_a_checkpoint(checkpoint: Path) -> None:
    assert {path.name for path in checkpoint.iterdir()} == {*NEEDED, *NOT_READ}
    assert issubclass(CheckpointError, ValueError)
    check_checkpoint_files(checkpoint)
    check_checkpoint_files(str(checkpoint))  # type: ignore[arg-type]


@pytest.mark.parametrize("length", ["0", "1", "9", "half", "all but 2", "zeros"])
@pytest.mark.parametrize("name", [*NEEDED, *NOT_READ])
def test_a_damaged_file_is_named(checkpoint: Path, name: str, length: str) -> None:
    """Two bytes, since a JSON file without the line break at its end is whole."""
    path, content = checkpoint / name, (checkpoint / name).read_bytes()
    sizes = {"half": len(content) // 2, "all but 2": len(content) - 2, "zeros": 0}
    size = sizes[length] if length in sizes else int(length)
    path.write_bytes(content[:size] if length != "zeros" else bytes(len(content)))
    expected = "is empty" if length == "0" else "is truncated or damaged"
    assert f"{path} {expected}" in problem_of(checkpoint)


@pytest.mark.parametrize("name", NEEDED)
def test_a_missing_file_is_named(checkpoint: Path, name: str) -> None:
    (checkpoint / name).unlink()
    assert problem_of(checkpoint).startswith(f"{checkpoint / name} is missing")


def test_files_that_resuming_does_not_read_may_be_absent(run: Path, checkpoint: Path, tmp_path: Path) -> None:
    for name in NOT_READ:
        (checkpoint / name).unlink()
    check_checkpoint_files(checkpoint)
    resumed, uninterrupted = our_trainer(tmp_path / "b", seed=1), our_trainer(tmp_path / "c")
    resumed.train(resume_from_checkpoint=str(checkpoint))
    uninterrupted.train()
    assert_close(resumed.model.state_dict(), uninterrupted.model.state_dict(), rtol=0, atol=0)


def test_a_file_that_cannot_be_read_is_named(checkpoint: Path) -> None:
    (checkpoint / "scheduler.pt").unlink()
    (checkpoint / "scheduler.pt").mkdir()
    assert f"{checkpoint / 'scheduler.pt'} cannot be read (" in problem_of(checkpoint)


def test_what_is_no_checkpoint_directory_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    assert f"{tmp_path / 'nowhere'} is not a directory" in problem_of(tmp_path / "nowhere")
    assert "optimizer.pt is not a directory" in problem_of(checkpoint / "optimizer.pt")
    (tmp_path / "empty").mkdir()
    assert "trainer_state.json is missing: it is written last" in problem_of(tmp_path / "empty")


@pytest.mark.parametrize("name", ["optimizer.pt", "rng_state.pth", "training_args.bin"])
def test_a_hole_in_an_archive_is_found(checkpoint: Path, name: str) -> None:
    """The table of contents at the end of the file is whole; what it points to is not there."""
    path, content = checkpoint / name, (checkpoint / name).read_bytes()
    with zipfile.ZipFile(path) as archive:
        offset = archive.infolist()[len(archive.infolist()) // 2].header_offset
    path.write_bytes(content[:offset] + bytes(30) + content[offset + 30 :])
    assert str(path) in problem_of(checkpoint)
    path.write_bytes(content[:offset] + content[offset + 64 :])
    assert str(path) in problem_of(checkpoint)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("trainer_state.json", b"[]", "no global_step"),
        ("trainer_state.json", b'{"global_step": null}', "no global_step"),
        ("config.json", b'{"a": "\xff"}', "utf-8"),
        ("model.safetensors", b"weights", "header"),
        ("optimizer.pt", b"\x80\x02}q\x00.", "not a zip file"),
    ],
)
def test_a_file_of_another_kind_is_named(checkpoint: Path, name: str, content: bytes, message: str) -> None:
    (checkpoint / name).write_bytes(content)
    assert re.search(f"{re.escape(str(checkpoint / name))} is truncated or damaged .*{message}", problem_of(checkpoint))


def test_an_archive_that_torch_did_not_write_is_named(checkpoint: Path) -> None:
    with zipfile.ZipFile(checkpoint / "optimizer.pt", "w") as archive:
        archive.writestr("letter.txt", "hello")
    assert "optimizer.pt is truncated or damaged (it has no data.pkl" in problem_of(checkpoint)


def test_no_code_of_a_checkpoint_is_run(checkpoint: Path, tmp_path: Path) -> None:
    """E5: what resuming would load is refused with the name of the file, and nothing is executed."""

    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "sprung",)

    torch.save(Trap(), checkpoint / "training_args.bin")  # not loaded by Trainer when it resumes
    check_checkpoint_files(checkpoint)
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "scaler.pt", "pytorch_model.bin"):
        content = (checkpoint / name).read_bytes() if (checkpoint / name).is_file() else None
        torch.save(Trap(), checkpoint / name)
        assert re.search(f"{checkpoint / name} is truncated or damaged \\(it names .*getattr", problem_of(checkpoint))
        (checkpoint / name).unlink()
        if content is not None:
            (checkpoint / name).write_bytes(content)
    check_checkpoint_files(checkpoint)
    assert not (tmp_path / "sprung").exists()
    torch.load(checkpoint / "training_args.bin", weights_only=False)
    assert (tmp_path / "sprung").exists()  # it was set


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "scaler.pt", "pytorch_model.bin"])
@pytest.mark.parametrize("content", [5, [], {"param_groups": [3], "state": {}, "python": 1}])
def test_files_of_other_contents(checkpoint: Path, name: str, content: Any) -> None:
    """E5: valid for torch.load, and nothing that Trainer could use."""
    if name in ("scheduler.pt", "scaler.pt") and isinstance(content, dict):
        pytest.skip("any dictionary may be one of these")
    torch.save(content, checkpoint / name)
    assert f"{checkpoint / name} is truncated or damaged" in problem_of(checkpoint)


def test_a_leftover_of_a_killed_writer_does_no_harm(checkpoint: Path) -> None:
    (checkpoint / ".tmpA1b2C3").write_bytes(b"half of the weights")
    (checkpoint / "._optimizer.pt").write_bytes(b"what some archivers put beside a file")
    (checkpoint / "._config.json").write_bytes(b"likewise")
    check_checkpoint_files(checkpoint)


def test_shards_of_the_weights(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    RECORD.build().save_pretrained(checkpoint, max_shard_size="60KB")
    index, shards = checkpoint / "model.safetensors.index.json", sorted(checkpoint.glob("model-*-of-*.safetensors"))
    assert len(shards) > 1 and index.is_file()
    check_checkpoint_files(checkpoint)
    for path in shards:
        content = path.read_bytes()
        path.write_bytes(content[:-1])
        assert f"{path} is truncated" in problem_of(checkpoint)
        path.unlink()
        assert f"{path} is missing, a part of the weights by {index.name}" in problem_of(checkpoint)
        path.write_bytes(content)
    for content in (b'{"weight_map": {"a": 5}}', b'{"weight_map": 5}', b"{}"):
        index.write_bytes(content)
        assert f"{index} is truncated or damaged" in problem_of(checkpoint)
    index.unlink()
    assert f"{index} is missing" in problem_of(checkpoint)


def test_weights_written_by_torch_save(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    path = checkpoint / "pytorch_model.bin"
    torch.save(RECORD.build().state_dict(), path)
    check_checkpoint_files(checkpoint)
    path.write_bytes(path.read_bytes()[:-1])
    assert f"{path} is truncated" in problem_of(checkpoint)
    path.rename(checkpoint / "pytorch_model-00001-of-00002.bin")
    assert f"{path}.index.json is missing" in problem_of(checkpoint)


@pytest.mark.parametrize("place", [".", "second"])
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_adapters(checkpoint: Path, place: str, kind: str) -> None:
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / "adapter_config.json").write_text("{}")
    assert f"{checkpoint / 'adapter_model.safetensors'} is missing" in problem_of(checkpoint)
    path = checkpoint / place / f"adapter_model.{kind}"
    path.parent.mkdir(exist_ok=True)
    (save_file if kind == "safetensors" else torch.save)({"lora_A": torch.ones(2)}, path)
    check_checkpoint_files(checkpoint)
    path.write_bytes(path.read_bytes()[:-1])
    assert f"{path} is truncated" in problem_of(checkpoint)


def test_the_random_generators_of_several_processes(checkpoint: Path) -> None:
    """A node may have the files of its own ranks only; a gap between them is a file that is missing."""
    content = (checkpoint / "rng_state.pth").read_bytes()
    (checkpoint / "rng_state.pth").unlink()
    for rank in (9, 10, 11):
        (checkpoint / f"rng_state_{rank}.pth").write_bytes(content)
    check_checkpoint_files(checkpoint)
    (checkpoint / "rng_state_11.pth").write_bytes(content[:-1])
    assert "rng_state_11.pth is truncated" in problem_of(checkpoint)
    (checkpoint / "rng_state_11.pth").write_bytes(content)
    (checkpoint / "rng_state_10.pth").unlink()
    assert f"{checkpoint / 'rng_state_10.pth'} is missing" in problem_of(checkpoint)


def test_the_loss_scaler_need_not_be_there_but_must_be_whole(checkpoint: Path) -> None:
    torch.save({"scale": 65536.0}, checkpoint / "scaler.pt")
    check_checkpoint_files(checkpoint)
    (checkpoint / "scaler.pt").write_bytes((checkpoint / "scaler.pt").read_bytes()[:-1])
    assert f"{checkpoint / 'scaler.pt'} is truncated" in problem_of(checkpoint)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_fsdp_shards(checkpoint: Path) -> None:
    """Directories that torch.distributed.checkpoint itself wrote, as accelerate calls it."""
    for name in ("model.safetensors", "optimizer.pt", "training_args.bin", "config.json"):
        (checkpoint / name).unlink()
    state, folders = RECORD.build().state_dict(), [checkpoint / "pytorch_model_fsdp_0", checkpoint / "optimizer_0"]
    for folder, missing in zip(folders, ("model.safetensors", "optimizer.pt"), strict=True):
        assert f"{checkpoint / missing} is missing" in problem_of(checkpoint)
        writer = distributed_checkpoint.FileSystemWriter(folder)
        distributed_checkpoint.save(state, storage_writer=writer, no_dist=True)
    check_checkpoint_files(checkpoint)
    for folder in folders:
        assert any(path.suffix == ".distcp" for path in folder.iterdir())
        for path in sorted(folder.iterdir()):
            content = path.read_bytes()
            path.write_bytes(b"")
            assert f"{path} is empty" in problem_of(checkpoint)
            path.unlink()
            assert f"{path} is missing" in problem_of(checkpoint)
            path.write_bytes(content)
        metadata = folder / ".metadata"
        content = metadata.read_bytes()
        metadata.write_bytes(content[:-1])
        assert f"{metadata} is truncated" in problem_of(checkpoint)
        metadata.write_bytes(content)
    shutil.rmtree(checkpoint / "optimizer_0")
    assert "optimizer.pt is missing" in problem_of(checkpoint)


def test_fsdp_full_state(checkpoint: Path) -> None:
    (checkpoint / "optimizer.pt").rename(checkpoint / "optimizer.bin")
    (checkpoint / "model.safetensors").unlink()
    torch.save(RECORD.build().state_dict(), checkpoint / "pytorch_model_fsdp.bin")
    check_checkpoint_files(checkpoint)
    for name in ("optimizer.bin", "pytorch_model_fsdp.bin"):
        content = (checkpoint / name).read_bytes()
        (checkpoint / name).write_bytes(content[:-1])
        assert f"{checkpoint / name} is truncated" in problem_of(checkpoint)
        (checkpoint / name).write_bytes(content)


def test_deepspeed_checks_its_own_files(checkpoint: Path) -> None:
    for name in ("model.safetensors", "optimizer.pt", "scheduler.pt"):
        (checkpoint / name).unlink()
    assert "is missing" in problem_of(checkpoint)
    (checkpoint / "latest").write_text("global_step4")
    check_checkpoint_files(checkpoint)
    (checkpoint / "rng_state.pth").unlink()
    assert f"{checkpoint / 'rng_state.pth'} is missing" in problem_of(checkpoint)


def test_a_model_that_transformers_does_not_know_has_whole_checkpoints(tmp_path: Path) -> None:
    class Plain(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(3, 1)

        def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"loss": (self.linear(x).squeeze(-1) - labels).square().mean()}

    arguments = TrainingArguments(str(tmp_path), max_steps=2, save_steps=1, use_cpu=True, disable_tqdm=True)
    rows = [{"x": torch.ones(3) * i, "labels": torch.tensor(1.0)} for i in range(8)]
    Trainer(Plain(), arguments, train_dataset=rows).train()
    assert last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-2"


def test_a_checkpoint_of_the_model_only_is_refused_with_the_reason(tmp_path: Path) -> None:
    our_trainer(tmp_path, save_only_model=True, max_steps=4).train()
    message = problem_of(tmp_path / "checkpoint-4")
    assert f"{tmp_path / 'checkpoint-4' / 'optimizer.pt'} is missing (save_only_model=True" in message
    assert "from_pretrained" in message
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* is complete; of the newest, .*save_only_model"):
        last_complete_checkpoint(tmp_path)


def test_the_newest_is_the_one_with_the_highest_number(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    (run / "checkpoint-2").rename(run / "checkpoint-10")
    (run / "checkpoint-4").rename(run / "checkpoint-9")
    os.utime(run / "checkpoint-9")  # the last one touched, as by a copy
    (run / "checkpoint-11").write_text("not a directory")
    for name in ("checkpoint-best", "checkpoint-12-old", "my-checkpoint-13", "checkpoint-"):
        (run / name).mkdir()
    assert last_complete_checkpoint(run) == run / "checkpoint-10"
    assert not caplog.text


def test_without_any_checkpoint_there_is_none(run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert last_complete_checkpoint(tmp_path / "nowhere") is None
    (tmp_path / "empty").mkdir()
    assert last_complete_checkpoint(tmp_path / "empty") is None
    assert last_complete_checkpoint(run) == run / "checkpoint-6"
    assert not caplog.text


def break_them(run: Path) -> list[Path]:
    """Breaks checkpoints 6 and 4 in different ways; returns the files, the newest first."""
    files = [run / "checkpoint-6" / "trainer_state.json", run / "checkpoint-4" / "optimizer.pt"]
    files[0].unlink()
    files[1].write_bytes(files[1].read_bytes()[:-500])
    return files


def test_incomplete_ones_are_skipped_with_a_warning_each_and_left_alone(
    run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = break_them(run)
    before = snapshot(run)
    assert last_complete_checkpoint(run) == run / "checkpoint-2"
    assert snapshot(run) == before
    assert [record.levelno for record in caplog.records] == [logging.WARNING, logging.WARNING]
    for record, path in zip(caplog.records, files, strict=True):
        message = record.getMessage()
        assert f"Skipping {path.parent}," in message and str(path) in message
    assert "missing" in caplog.messages[0] and "truncated" in caplog.messages[1]


def test_if_all_are_broken_nobody_starts_over(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    newest, _ = break_them(run)
    (run / "checkpoint-2" / "rng_state.pth").unlink()
    with pytest.raises(CheckpointError, match=re.escape(f"of the newest, {newest} is missing")) as error:
        last_complete_checkpoint(run)
    assert str(run) in str(error.value) and "To start anew" in str(error.value)
    assert len(caplog.records) == 3


def test_the_trainer_resumes_from_the_newest_complete_checkpoint(
    run: Path, whole: Path, caplog: pytest.LogCaptureFixture
) -> None:
    break_them(run)
    trainer = our_trainer(run, seed=1)
    steps: list[int] = []

    class Record(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            steps.append(state.global_step)

    trainer.add_callback(Record())
    trainer.train(resume_from_checkpoint=True)
    assert steps == [3, 4, 5, 6] and caplog.text.count("Skipping") == 2
    for name in ("model.safetensors", "optimizer.pt"):
        written = [folder / "checkpoint-6" / name for folder in (run, whole)]
        assert written[0].read_bytes() == written[1].read_bytes()
    check_checkpoint_files(run / "checkpoint-6")  # the broken one was written again


@pytest.mark.parametrize("name", NEEDED)
def test_the_trainer_refuses_an_incomplete_checkpoint_and_touches_nothing(run: Path, name: str) -> None:
    """Stock Trainer trains on without optimizer.pt, scheduler.pt or rng_state.pth and says nothing."""
    (run / "checkpoint-4" / name).unlink()
    before, trainer = snapshot(run), our_trainer(run, seed=1, max_steps=8)
    with pytest.raises(CheckpointError, match=re.escape(name)):
        trainer.train(resume_from_checkpoint=str(run / "checkpoint-4"))
    assert snapshot(run) == before
    assert_close(trainer.model.state_dict(), RECORD.build(1).state_dict(), rtol=0, atol=0)


def test_the_trainer_does_not_start_over_where_all_checkpoints_are_broken(run: Path) -> None:
    break_them(run)
    (run / "checkpoint-2" / "model.safetensors").unlink()
    before = snapshot(run)
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* is complete"):
        our_trainer(run, max_steps=8).train(resume_from_checkpoint=True)
    assert snapshot(run) == before


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (RECORD.build, {"optim": "adamw"}, "this checkpoint was not written by AdaFisherW"),
        (RECORD.build, {"optim": "adafisher"}, "this checkpoint was not written by AdaFisherW"),
        (lambda: small_gpt2(n_embd=16), {}, r"does not fit the model: .* is \(48,\) there, \(96,\) here, and 27 more"),
        (
            lambda: small_gpt2(n_layer=1),
            {},
            "it has no transformer.h.1.ln_1.weight, and 11 more",
        ),
    ],
    ids=["adamw", "adafisher", "width", "depth"],
)
def test_a_foreign_checkpoint_is_refused_before_anything_is_overwritten(
    model: Callable[[], Any], options: dict[str, Any], message: str, run: Path, tmp_path: Path
) -> None:
    """Whether it is named, or the last in the output directory itself."""
    foreign = tmp_path / "foreign"
    our_trainer(foreign, model(), **options).train()
    for folder, resume in ((run, str(foreign / "checkpoint-2")), (foreign, True)):
        before = snapshot(folder)
        with pytest.raises((ValueError, RuntimeError), match=message):
            our_trainer(folder, max_steps=8, save_steps=1).train(resume_from_checkpoint=resume)
        assert snapshot(folder) == before


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "pytorch_model.bin"])
def test_the_last_falls_back_from_a_hostile_file(
    run: Path, whole: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """E5: the run ends as the one that was not disturbed."""
    torch.save({"a": print}, run / "checkpoint-6" / name)
    our_trainer(run, seed=1).train(resume_from_checkpoint=True)
    assert f"Skipping {run / 'checkpoint-6'}" in caplog.text and f"{run / 'checkpoint-6' / name}" in caplog.text
    ends = [(folder / "checkpoint-6" / "model.safetensors").read_bytes() for folder in (run, whole)]
    assert ends[0] == ends[1]


def test_a_stray_loss_scaler_is_told_and_not_used(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    """E5: of a run with fp16, or none of this one."""
    torch.save({"scale": 65536.0}, run / "checkpoint-4" / "scaler.pt")
    our_trainer(run).train(resume_from_checkpoint=str(run / "checkpoint-4"))
    assert f"{run / 'checkpoint-4' / 'scaler.pt'} is not used" in caplog.text


@pytest.mark.parametrize("optim", ["adamw_torch", "adagrad", "rmsprop"])
def test_an_optimizer_of_trainer_refuses_another_ones_checkpoint(run: Path, optim: str) -> None:
    """E5: not a bare ``KeyError: 'betas'``."""
    before = snapshot(run)
    with pytest.raises(CheckpointError, match=r"optimizer\.pt was written by another optimizer than .*: it has no "):
        our_trainer(run, optim=optim, max_steps=8).train(resume_from_checkpoint=True)
    assert snapshot(run) == before


def test_an_unusable_state_names_its_checkpoint(run: Path) -> None:
    """E5: a scheduler that is a dictionary of other things."""
    torch.save({"base_lrs": 3, "lr_lambdas": 5}, run / "checkpoint-6" / "scheduler.pt")
    with pytest.raises(CheckpointError, match=re.escape(f"cannot resume from {run / 'checkpoint-6'}: ")):
        our_trainer(run, max_steps=8).train(resume_from_checkpoint=True)


def test_a_checkpoint_that_is_being_written_over_another_runs_does_not_count(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its new weights beside the old optimizer would be a run that never was."""

    class Stopped(Exception):
        pass

    def stop(*args: Any, **kwargs: Any) -> None:
        raise Stopped

    trainer = our_trainer(run, data_seed=7)
    monkeypatch.setattr(trainer, "_save_optimizer_and_scheduler", stop)
    with pytest.raises(Stopped):
        trainer.train(resume_from_checkpoint=str(run / "checkpoint-2"))
    assert (run / "checkpoint-4" / "optimizer.pt").exists()
    with pytest.raises(CheckpointError, match=r"checkpoint-4/trainer_state\.json is missing"):
        check_checkpoint_files(run / "checkpoint-4")


@pytest.mark.subprocess
def test_killed_ten_times_a_run_ends_as_if_it_had_been_left_alone(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "tests.training.kill_loop", "--folder", str(tmp_path), "--seed", "0"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    found = json.loads(result.stdout)
    rounds, steps = found["rounds"], found["steps"]
    assert len(rounds) == 10 and all(one["signal"] == 9 for one in rounds)
    assert found["alone_signal"] == found["last_signal"] == 0
    assert sum(one["left"][-1] in one["broken"] for one in rounds) >= 5  # at least those killed in the middle of a file
    # `broken` comes from reading every file: each start took the newest complete one, and said what it skipped.
    resumed = [*(one["resumed"] for one in rounds), found["last_resumed"]]
    skipped = [*(one["skipped"] for one in rounds), found["last_skipped"]]
    expected = [[step for step in one["left"] if step not in one["broken"]][-1] for one in rounds]
    assert resumed == [0, *expected]
    assert skipped == [0, *(sum(b > last for b in one["broken"]) for one, last in zip(rounds, expected, strict=True))]
    assert found["logged_steps"] == list(range(1, steps + 1)) and found["weights_moved"]
    assert found["model_equal"] and found["optimizer_equal"] and found["losses_equal"]
