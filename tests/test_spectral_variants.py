"""What ``scripts/try_spectral_variants.py`` calls the rule as it is, and Muon, are these; finished runs are kept."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from hf_adafisher import SpectralAdaFisher
from hf_adafisher.optimizers import polar, spectral

SCRIPT = Path(__file__).parents[1] / "scripts" / "try_spectral_variants.py"
RATE, BETA, STEPS = 1e-2, 0.9, 4


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module; its patches are undone after the test."""
    for place, name in (
        (spectral, "spectral_directions"),
        (polar, "COEFFICIENTS"),
        (SpectralAdaFisher, "_move"),
        (SpectralAdaFisher, "_momenta"),
        (SpectralAdaFisher, "_move_by_root"),
    ):
        monkeypatch.setattr(place, name, getattr(place, name))
    spec = importlib.util.spec_from_file_location("try_spectral_variants", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("shape", [(6, 10), (10, 6), (4, 80)])
def test_the_directions_with_both_roots_are_the_rules(script: ModuleType, shape: tuple[int, int]) -> None:
    momenta = list(torch.randn(3, *shape, generator=torch.Generator().manual_seed(0)))
    torch.testing.assert_close(script.directions()(momenta, 0.1), spectral.spectral_directions(momenta, 0.1))
    assert not torch.allclose(script.directions(rows=0.0)(momenta, 0.1), spectral.spectral_directions(momenta, 0.1))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 3))


def moved(model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> dict[str, list[Tensor]]:
    """What each parameter moves by in each of ``STEPS`` steps along the same gradients whatever the weights are."""
    steps: dict[str, list[Tensor]] = {name: [] for name, _ in model.named_parameters()}
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator)
        for optimizer in optimizers:
            optimizer.step()
        for name, p in model.named_parameters():
            steps[name].append(p.detach() - before[name])
    return steps


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch < 2.9 has no Muon")
def test_muon_in_this_code_goes_where_torchs_muon_and_adamw_go(script: ModuleType) -> None:
    """Steps of matrices have the root mean square of orthogonal ones here; torch's keep what the polynomials leave."""
    model = network()
    matrices = {"0.weight", "2.weight"}
    patch, options = script.VARIANTS[script.MUON]
    assert options["optim_args"] == "max_relative_step=None"
    patch()
    ours = moved(model, [SpectralAdaFisher(model, lr=RATE, beta=BETA, max_relative_step=None)])

    model = network()
    hidden = [p for name, p in model.named_parameters() if name in matrices]
    rest = [p for name, p in model.named_parameters() if name not in matrices]
    muon = torch.optim.Muon(hidden, lr=RATE, momentum=BETA, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(rest, lr=RATE, betas=(BETA, 0.95), eps=1e-10, weight_decay=0.0)
    theirs = moved(model, [muon, adamw])

    for name, steps in ours.items():
        for a, b in zip(steps, theirs[name], strict=True):
            if name in matrices:  # torch iterates in bfloat16
                assert torch.cosine_similarity(a.flatten(), b.flatten(), dim=0) > 0.999
                assert 0.7 < b.norm() / a.norm() < 1.2  # where Muon's polynomials leave singular values
            else:
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


def test_a_finished_run_is_kept_and_one_of_other_arguments_refused(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdout", sys.stdout)
    monkeypatch.setattr(sys, "stderr", sys.stderr)
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    runs: list[list[str]] = []
    monkeypatch.setattr(script, "run_script", lambda _, words: runs.append(words) or 0)
    arguments = argparse.Namespace(task="text", set=[], local_data=None, output_dir=tmp_path)
    folder = script._folder(arguments, script.AS_IT_IS, 3)
    script._run((arguments, script.AS_IT_IS, 3))
    (folder / "results.json").write_text("{}")
    script._run((arguments, script.AS_IT_IS, 3))
    assert len(runs) == 1 and runs[0][-2:] == ["--output_dir", str(folder)]
    (folder / "arguments.json").unlink()
    with pytest.raises(ValueError, match="other or unknown arguments: use another --output_dir"):
        script._run((arguments, script.AS_IT_IS, 3))
    (folder / "arguments.json").write_text(json.dumps(["--seed", "4"]))
    with pytest.raises(ValueError, match="other or unknown arguments: use another --output_dir"):
        script._run((arguments, script.AS_IT_IS, 3))
