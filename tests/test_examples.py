"""The programs in ``examples/``: each trains two steps with ``--smoke``, is short, is named in docs/start.md."""

from __future__ import annotations

import math
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import Optimizer

from hf_adafisher import AdaFisherW, SpectralAdaFisher
from tests.training_helper import logged_losses

ROOT = Path(__file__).parents[1]
PROGRAMS = sorted(path for path in (ROOT / "examples").glob("*.py") if path.name != "smoke.py")
NEEDS = {"sft_lora": ("trl", "peft"), "dpo": ("trl",), "hyperparameter_search": ("optuna",)}
ACCELERATE = ["-m", "accelerate.commands.launch", "--main_process_port", "0", "--cpu", "--num_machines", "1"]
LAUNCHERS = {
    "accelerate_loop": [*ACCELERATE, "--num_processes", "2"],
    "fsdp2": ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
}


def run(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The global names of an example after it has run in this process; those of its helper are new each time."""
    for library in NEEDS.get(name, ()):
        pytest.importorskip(library)
    program = ROOT / "examples" / f"{name}.py"
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", [str(program), "--smoke"])
    monkeypatch.syspath_prepend(program.parent)
    for key, value in {"HF_HUB_OFFLINE": "1", "CI": "1", "GLOO_SOCKET_IFNAME": "lo"}.items():
        monkeypatch.setenv(key, value)
    monkeypatch.delitem(sys.modules, "smoke", raising=False)
    environment = dict(os.environ)
    try:
        return runpy.run_path(str(program), run_name="__main__")
    finally:
        sys.modules.pop("smoke", None)
        os.environ.clear()
        os.environ.update(environment)


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: path.stem)
def test_programs_are_short_and_named_in_the_readme(program: Path) -> None:
    assert len(program.read_text(encoding="utf-8").splitlines()) < 60
    assert f"(../examples/{program.name})" in (ROOT / "docs" / "start.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "kind", "steps"),
    [
        ("trainer", AdaFisherW, 2),
        ("sft_lora", AdaFisherW, 2),
        ("dpo", AdaFisherW, 2),
        ("vit_fine_tuning", SpectralAdaFisher, 2),
        ("hyperparameter_search", AdaFisherW, 2),
    ],
)
def test_a_trainer_takes_two_steps(
    name: str, kind: type[Optimizer], steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = run(name, tmp_path, monkeypatch)["trainer"]
    assert type(trainer.optimizer.optimizer) is kind
    assert trainer.state.global_step == steps == trainer.optimizer.param_groups[0]["steps"]
    assert all(math.isfinite(loss) for loss in logged_losses(trainer))
    if name == "sft_lora":
        assert {n for n, p in trainer.model.named_parameters() if p.requires_grad} == {
            n for n, _ in trainer.model.named_parameters() if "lora_" in n
        }
        assert all(len(row) > 20 for row in trainer.train_dataset["input_ids"])  # one conversation has fewer
    if name == "dpo":
        assert trainer.beta == 0.1
    if name == "trainer":
        assert (tmp_path / "out/trainer/diagnosis.json").is_file()
        assert (tmp_path / "out/trainer/model.safetensors").is_file()


def test_a_loop_of_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = run("accelerate_loop", tmp_path, monkeypatch)
    assert type(names["optimizer"].optimizer) is AdaFisherW and names["optimizer"].param_groups[0]["steps"] == 2
    assert len(names["norms"]) == 2 and "after 2 steps: nothing was found" in capsys.readouterr().out
    assert (tmp_path / "out/accelerate/model.safetensors").is_file()


@pytest.mark.distributed
@pytest.mark.subprocess
@pytest.mark.slow
@pytest.mark.parametrize("name", LAUNCHERS)
def test_several_processes(name: str, tmp_path: Path) -> None:
    program = ROOT / "examples" / f"{name}.py"
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *LAUNCHERS[name], str(program), "--smoke"]
    subprocess.run(command, check=True, cwd=tmp_path, env=environment, timeout=240)
    if name == "fsdp2":
        whole = torch.load(tmp_path / "out/fsdp2-model.pt", weights_only=True)
        assert all(value.isfinite().all() for value in whole.values()) and whole["lm_head.weight"].shape[1] == 32
    else:
        assert (tmp_path / "out/accelerate/model.safetensors").is_file()
