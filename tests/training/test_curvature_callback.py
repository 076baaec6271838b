"""The record of every layer's curvature: its numbers against dense diagonals, its file, and who hears of it."""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.testing import assert_close
from transformers import Trainer, TrainerCallback
from transformers.integrations import integration_utils

from hf_adafisher import (
    AdaFisher,
    AdaFisherTrainer,
    AdaFisherW,
    CurvatureCallback,
    OptimizerFactory,
)
from hf_adafisher.optimizers import blocks, compiled, update
from hf_adafisher.optimizers.diagnostics import layer_curvature as module
from hf_adafisher.optimizers.diagnostics.layer_curvature import NUMBERS, layer_curvature, needs_every_process
from hf_adafisher.training import curvature_callback as callback_module
from hf_adafisher.training.curvature_callback import CURVATURE_FILE, read_curvature
from tests.model_zoo import family
from tests.training_helper import make_trainer, optimizer_of

RECORD = family("gpt2")
OPTIONS: dict[str, Any] = {"per_device_train_batch_size": 2, "max_steps": 7}
PAPER: dict[str, Any] = {"step_size": "paper", "learning_rate": 0.04, "damping": 3e-3, "update_interval": 3}
PAPER_OPTIONS = {key: value for key, value in PAPER.items() if key != "learning_rate"}
DAMPING = 0.05
INTERVALS = {"paper": 2, "root": 1}
both_forms = pytest.mark.parametrize("step_size", INTERVALS)


class Everything(nn.Module):
    """One parameter of each kind that has a diagonal of its own form."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(12, 6)
        self.head = nn.Linear(6, 12, bias=False)
        self.head.weight = self.embedding.weight  # two terms
        self.linear = nn.Linear(6, 8)
        self.norm = nn.LayerNorm(8)
        self.conv = nn.Conv1d(8, 6, 3, padding=1)
        self.grouped = nn.Conv1d(6, 6, 3, padding=1, groups=3)
        self.table = nn.Parameter(torch.randn(5, 6))  # gradient factors, as all that follow
        self.experts = nn.Parameter(torch.randn(2, 6, 6))
        self.shift = nn.Parameter(torch.randn(6))
        self.gain = nn.Parameter(torch.ones(()))
        self.unused = nn.Linear(2, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.norm(self.linear(self.embedding(tokens) + self.table))
        hidden = self.grouped(self.conv(hidden.transpose(1, 2))).transpose(1, 2)
        hidden = torch.tanh(hidden @ self.experts[0]) @ self.experts[1]
        return self.head(self.gain * hidden + self.shift)


def trained(
    kind: type[AdaFisher] = AdaFisherW, steps: int = 4, shard: bool = False, step_size: str = "paper", **options: Any
) -> Any:
    """The model, its optimizer after some steps, and the parameters before the last of them."""
    torch.manual_seed(0)
    model = Everything().to(options.pop("dtype", torch.float32))
    if shard:
        fully_shard(model, ignored_params={model.gain})  # it takes no scalars
    options = {"lr": 0.1, "damping": DAMPING, **options}
    optimizer = kind(model, step_size=step_size, update_interval=INTERVALS[step_size], **options)
    before: dict[str, Tensor] = {}
    for _ in range(steps):
        tokens = torch.randint(0, 9, (4, 6))
        nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer, before


def assert_steps_are_those_made(
    found: dict[str, dict[str, float]], model: nn.Module, optimizer: Any, before: dict[str, Tensor], weight_decay: float
) -> None:
    """``update_rms`` and ``step_gain`` of the last of four steps, by the difference of the parameters."""
    shrink = 1 - 0.1 * weight_decay if isinstance(optimizer, AdaFisherW) else 1.0
    for name, p in model.named_parameters():
        if name in found:
            moved = root_mean_square(before[name] * shrink - p.detach())
            momentum = root_mean_square(optimizer.state[p]["exp_avg"] / (1 - 0.9**4))
            assert_close(found[name]["update_rms"], moved, rtol=1e-9, atol=0)
            assert_close(found[name]["step_gain"], moved / (0.1 * momentum), rtol=1e-9, atol=0)


def dense_numbers(diagonal: Tensor, damping: float = DAMPING) -> dict[str, float]:
    """The definitions, on a diagonal that is there as a whole."""
    values = sorted(diagonal.flatten().tolist())
    return {
        "fisher_min": values[0],
        "fisher_median": values[(len(values) - 1) // 2],
        "fisher_max": values[-1],
        "condition_number": values[-1] / values[0],
        "floor_share": sum(value < 2 * damping for value in values) / len(values),
    }


def root_mean_square(values: Tensor) -> float:
    return values.double().square().mean().sqrt().item()


@pytest.fixture(params=["formed", "factors"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Small diagonals are formed; large ones are looked at through their factors, or in blocks: here all of them."""
    if request.param == "factors":
        monkeypatch.setattr(module, "SMALL", 0)
        monkeypatch.setattr(blocks, "CPU_BLOCK", 16)
    return request.param


@both_forms
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_number_is_that_of_the_dense_diagonal(path: str, dtype: torch.dtype, step_size: str) -> None:
    """By the root the damping is in units of the diagonal's mean, and a single value has no factors."""
    model, optimizer, _ = trained(dtype=dtype, step_size=step_size)
    found = layer_curvature(optimizer)
    left_out = ("unused", "gain") if step_size == "root" else ("unused",)
    names = [name for name, _ in model.named_parameters() if not name.startswith(left_out)]
    assert list(found) == names and "head.weight" not in names  # in the model's order, tied ones once
    for name, p in model.named_parameters():
        if name in found:
            damping = DAMPING
            if step_size == "root":
                damping *= optimizer.fisher_diagonal(p, normalized=False).double().mean().item()
            expected = dense_numbers(optimizer.fisher_diagonal(p), damping)
            of_some = {"paper": ("embedding.weight", "grouped.weight"), "root": ("experts",)}[step_size]
            if path == "factors" and name in of_some:
                median = found[name].pop("fisher_median")
                values = optimizer.fisher_diagonal(p).flatten()
                share = ((values < median).double().mean().item(), (values <= median).double().mean().item())
                assert share[0] - 0.008 <= 0.5 <= share[1] + 0.008
                del expected["fisher_median"]
            assert_close({key: found[name][key] for key in expected}, expected, rtol=2e-6, atol=0)
    shares = [numbers["floor_share"] for numbers in found.values()]
    assert 0.0 in shares and any(0.2 < share < 0.9 for share in shares)  # or the damping would decide nothing here


def test_a_median_of_many_equal_values_and_of_zeros() -> None:
    """Unseen tokens, constant factors: products are tied, or zero."""
    for left, right in (([0, 0, 0, 1.0], [0, 0.5, 1]), ([1.0, 1, 1], [0.25, 0.25, 1, 1]), ([0, 1.0], [0.5, 1, 0.7, 0])):
        a, b = torch.tensor(left), torch.tensor(right)
        spread = module._spread_of_product(a, b, DAMPING)
        expected = dense_numbers(torch.outer(a, b).add(DAMPING))
        found = {"fisher_min": spread.low, "fisher_median": spread.median, "fisher_max": spread.high}
        assert_close(found, {key: expected[key] for key in found}, rtol=1e-6, atol=0)
        assert spread.floor_share == expected["floor_share"]


@pytest.mark.parametrize("max_rms", [0.02, 1e-9])
@pytest.mark.parametrize("kind", [AdaFisher, AdaFisherW])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("large", [False, True])
def test_update_rms_of_a_step_by_the_root_is_the_difference_that_it_made(
    kind: type[AdaFisher], weight_decay: float, max_rms: float, large: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With everything that the rule does to it: Nesterov, the largest size, the bound by the norm; in blocks or not."""
    if large:
        monkeypatch.setattr(blocks, "CPU_BLOCK", 16)
    monkeypatch.setattr(update, "LEAST_RMS", max_rms)  # the bound of weights that are nearly zero holds, or not
    model, optimizer, before = trained(kind, step_size="root", dtype=torch.float64, weight_decay=weight_decay)
    found = layer_curvature(optimizer)
    assert_steps_are_those_made(found, model, optimizer, before, weight_decay)
    with torch.no_grad():
        model.linear.weight.zero_()
    assert layer_curvature(optimizer) == found  # of the step, not of what the weights are by now


def test_the_step_of_a_compiled_update_is_known_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rule that would be compiled is run as it is: it measures its own step."""
    ran: list[str] = []
    monkeypatch.setattr(compiled, "COMPILED_FROM", 1)
    monkeypatch.setattr(compiled, "_kernel", lambda kind, rule: ran.append(rule.__name__) or rule)
    model, optimizer, before = trained(step_size="root", dtype=torch.float64, compiled=True)
    for name, numbers in layer_curvature(optimizer).items():
        moved = root_mean_square(before[name] - model.get_parameter(name).detach())
        assert_close(numbers["update_rms"], moved, rtol=1e-9, atol=0)
    assert set(ran) == {"root_update_"}


def test_by_the_root_a_restored_state_has_no_step_yet_and_zeros_have_a_floor() -> None:
    model, optimizer, _ = trained(step_size="root")
    other = trained(step_size="root", steps=0)[1]
    other.load_state_dict(optimizer.state_dict())
    ours, theirs = layer_curvature(optimizer), layer_curvature(other)
    assert list(ours) == list(theirs)
    for name, numbers in theirs.items():
        assert math.isnan(numbers["update_rms"]) and math.isnan(numbers["step_gain"])
        assert_close(numbers["fisher_median"], ours[name]["fisher_median"])
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    fresh = AdaFisherW(model, step_size="root")
    fresh.step()
    for numbers in layer_curvature(fresh).values():
        assert numbers["condition_number"] == 1.0 and numbers["fisher_min"] > 0 and numbers["update_rms"] == 0
        assert math.isnan(numbers["step_gain"])
    assert 0 < fresh.curvature_summary()["fisher_mean"] == pytest.approx(1e-16)


@pytest.mark.parametrize("kind", [AdaFisher, AdaFisherW])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_update_rms_is_the_difference_that_the_step_made(kind: type[AdaFisher], weight_decay: float) -> None:
    """Without the decoupled decay; the L2 term of AdaFisher is part of its momentum."""
    model, optimizer, before = trained(kind, dtype=torch.float64, weight_decay=weight_decay)
    found = layer_curvature(optimizer)
    assert_steps_are_those_made(found, model, optimizer, before, weight_decay)
    for numbers in found.values():
        low, high = 1 / numbers["fisher_max"], 1 / numbers["fisher_min"]
        assert low * (1 - 1e-12) <= numbers["step_gain"] <= high * (1 + 1e-12)


def test_before_the_first_step_there_is_nothing_and_a_low_precision_momentum_is_looked_at_in_float32() -> None:
    assert layer_curvature(AdaFisherW(Everything())) == {}
    model, optimizer, _ = trained(momentum_dtype="bfloat16")
    weight = model.linear.weight
    m, diagonal = optimizer.state[weight]["exp_avg"], optimizer.fisher_diagonal(weight)
    assert m.dtype == torch.bfloat16
    expected = 0.1 / (1 - 0.9**4) * root_mean_square(m.double() / diagonal.double())
    assert_close(layer_curvature(optimizer)["linear.weight"]["update_rms"], expected, rtol=1e-5, atol=0)


def test_sharded_parameters_take_one_reduction(process_group: None, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    """Two processes are played: the second holds replicas, then shards of zero momentum.

    In float64, since the updates of a sharded and of a whole grouped convolution round differently.
    """
    plain = trained(dtype=torch.float64)[1]
    sharded = trained(shard=True, dtype=torch.float64)[1]
    expected = layer_curvature(plain)
    assert needs_every_process(sharded) and not needs_every_process(plain)
    assert_close(layer_curvature(sharded), expected)
    calls = []

    def with_replica(sums: Tensor) -> Tensor:
        calls.append(tuple(sums.shape))
        return 2 * sums

    monkeypatch.setattr(module, "sum_over_ranks", with_replica)
    assert_close(layer_curvature(sharded), expected)
    assert calls == [(len(expected), 3)]
    monkeypatch.setattr(module, "sum_over_ranks", lambda sums: sums * torch.tensor([1.0, 1.0, 2.0], dtype=sums.dtype))
    assert_close(
        layer_curvature(sharded)["linear.weight"]["update_rms"],
        expected["linear.weight"]["update_rms"] / math.sqrt(2),
    )


def test_by_the_root_the_step_of_a_sharded_parameter_is_known_everywhere(process_group: None) -> None:
    plain = trained(dtype=torch.float64, step_size="root")[1]
    sharded = trained(shard=True, dtype=torch.float64, step_size="root")[1]
    assert_close(layer_curvature(sharded), layer_curvature(plain))


# --- in a Trainer -----------------------------------------------------------------------------


def our_trainer(folder: Path, *callbacks: TrainerCallback, **options: Any) -> AdaFisherTrainer:
    model = RECORD.build()
    for part in model.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.1  # random numbers, which nobody else may draw
    given = {"model": model, "callbacks": list(callbacks), "logging_steps": 2}
    if options.get("step_size", "paper") == "paper":
        given |= PAPER
    return make_trainer(folder, RECORD, **(OPTIONS | given | options))


def lines_of(folder: Path) -> list[dict[str, Any]]:
    """The record without what depends on the clock."""
    lines = read_curvature(folder / CURVATURE_FILE)
    for line in lines:
        cost, interval = line.pop("record_seconds"), line.pop("interval_seconds")
        assert 0 < cost < interval
    return lines


class Witness(TrainerCallback):
    """Every parameter's change in every step, and how many lines the file had when the next step began."""

    def __init__(self) -> None:
        self.moved: dict[int, dict[str, float]] = {}
        self.lines: list[int] = []
        self._before: dict[str, Tensor] = {}

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        file = Path(args.output_dir) / CURVATURE_FILE
        self.lines.append(file.read_text().count("\n") if file.exists() else 0)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self._before = {name: p.detach().double() for name, p in model.named_parameters()}

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.moved[state.global_step + 1] = {
            name: root_mean_square(self._before[name] - p.detach().double()) for name, p in model.named_parameters()
        }


def test_one_line_a_refresh_with_the_numbers_of_that_step(tmp_path: Path) -> None:
    witness = Witness()
    trainer = our_trainer(tmp_path, CurvatureCallback(), witness)
    trainer.train()
    lines = lines_of(tmp_path)
    assert [(line["step"], line["refresh"]) for line in lines] == [(1, 1), (4, 2), (7, 3)]
    assert [line["epoch"] for line in lines] == [1 / 8, 4 / 8, 7 / 8]
    assert witness.lines == [0, 1, 1, 1, 2, 2, 2]  # on the disk as soon as the step has ended
    optimizer: Any = optimizer_of(trainer)
    params = dict(trainer.model.named_parameters())
    for line in lines:  # the learning rate falls from step to step
        assert line["layers"].keys() == params.keys()
        found = {name: numbers["update_rms"] for name, numbers in line["layers"].items()}
        assert_close(found, witness.moved[line["step"]], rtol=1e-3, atol=1e-7)
    for name, numbers in lines[-1]["layers"].items():
        expected = dense_numbers(optimizer.fisher_diagonal(params[name]), trainer.args.damping)
        assert_close({key: numbers[key] for key in expected}, expected, rtol=1e-6, atol=0)
        assert tuple(numbers) == NUMBERS


def test_by_the_root_there_is_a_line_a_step(tmp_path: Path) -> None:
    """Every step has new factors, and the warm-up starts from a learning rate of zero."""
    witness = Witness()
    trainer = our_trainer(tmp_path, CurvatureCallback(2), witness, step_size="root", warmup_steps=2, max_steps=6)
    trainer.train()
    lines = lines_of(tmp_path)
    assert [(line["step"], line["refresh"]) for line in lines] == [(1, 1), (3, 3), (5, 5)]
    for line in lines:
        assert line["layers"].keys() == dict(trainer.model.named_parameters()).keys()
        found = {name: numbers["update_rms"] for name, numbers in line["layers"].items()}
        assert_close(found, witness.moved[line["step"]], rtol=1e-3, atol=1e-7)
        gains = {numbers["step_gain"] for numbers in line["layers"].values()}
        assert gains == {None} if line["step"] == 1 else None not in gains


@both_forms
def test_training_is_the_same_to_the_bit(step_size: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dropout draws random numbers, and so does the median of a large tied weight: here every tied one."""
    monkeypatch.setattr(module, "SMALL", 0)
    ends = []
    for name, callbacks in (("a", [CurvatureCallback()]), ("b", [])):
        trainer = our_trainer(tmp_path / name, *callbacks, step_size=step_size)
        trainer.train()
        history = [entry for entry in trainer.state.log_history if "loss" in entry]
        optimizer = trainer.optimizer.state_dict()
        numbers = trainer.model.state_dict(), optimizer["state"], history, torch.get_rng_state()
        ends.append((optimizer["param_groups"], numbers))
    assert ends[0][0] == ends[1][0]
    assert_close(ends[0][1], ends[1][1], rtol=0, atol=0)
    assert not (tmp_path / "b" / CURVATURE_FILE).exists()


@pytest.mark.parametrize("every", [1, 2])
def test_a_killed_run_goes_on_without_doubled_lines(every: int, tmp_path: Path) -> None:
    """The checkpoint, of the middle of an interval, is older than the last lines, and the last of all is torn."""
    options = {"max_steps": 11, "save_strategy": "steps", "save_steps": 5}
    alone, killed = tmp_path / "alone", tmp_path / "killed"
    our_trainer(alone, CurvatureCallback(every), **options).train()
    steps = [line["step"] for line in lines_of(alone)]
    assert steps == [1, 4, 7, 10][::every]
    shutil.copytree(alone, killed)
    with (killed / CURVATURE_FILE).open("a") as file:
        file.write('{"step": 10, "epoch": 1.2')
    our_trainer(killed, CurvatureCallback(every), **options).train(str(killed / "checkpoint-5"))
    assert lines_of(killed) == lines_of(alone)
    our_trainer(killed, CurvatureCallback(every), max_steps=2).train()  # from the beginning: anew
    assert [line["step"] for line in lines_of(killed)] == [1]


def test_every_integration_of_report_to_hears_of_it_and_nobody_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    heard: list[tuple[int, dict[str, float]]] = []

    class Integration(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, model: Any = None, **_: Any) -> None:
            assert isinstance(model, nn.Module)
            heard.append((state.global_step, dict(logs)))

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "stub", Integration)
    callback = CurvatureCallback()
    earlier = our_trainer(tmp_path / "ours", callback, report_to=["stub"], max_steps=1)
    earlier.train()
    heard.clear()
    trainer = our_trainer(tmp_path / "ours", callback, report_to=["stub"])
    trainer.train()
    assert earlier.callback_handler.callbacks  # still there, and silent
    curvature = [(step, logs) for step, logs in heard if any(key.startswith("curvature/") for key in logs)]
    assert [step for step, _ in curvature] == [1, 4, 7]
    for (_, logs), line in zip(curvature, lines_of(tmp_path / "ours"), strict=True):
        flat = {f"curvature/{name}/{key}": v for name, row in line["layers"].items() for key, v in row.items()}
        assert logs == {key: value for key, value in flat.items() if value is not None}
    assert "curvature/transformer.h.0.attn.c_attn.weight/fisher_median" in curvature[0][1]
    assert [step for step, logs in heard if "loss" in logs] == [2, 4, 6]  # Trainer's own, which are still asked for
    assert not any("curvature/" in key for entry in trainer.state.log_history for key in entry)
    assert "curvature/" not in capsys.readouterr().out
    heard.clear()
    our_trainer(tmp_path / "silent", CurvatureCallback(report=False), report_to=["stub"]).train()
    assert heard and not any("curvature/" in key for _, logs in heard for key in logs)
    assert len(lines_of(tmp_path / "silent")) == 3


def test_a_stock_trainer_records_too(tmp_path: Path) -> None:
    factory: Any = (OptimizerFactory, {"name": "adafisher", "lr": 0.05, **PAPER_OPTIONS})
    given = {"optimizer_cls_and_kwargs": factory, "callbacks": [CurvatureCallback()]}
    make_trainer(tmp_path, RECORD, Trainer, **given, **OPTIONS).train()
    assert [line["step"] for line in lines_of(tmp_path)] == [1, 4, 7]


@pytest.mark.parametrize("attached", [True, False])
def test_a_stock_trainer_reports_once_it_is_attached(
    attached: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    heard: list[int] = []

    class Integration(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            heard.extend([state.global_step] if any(key.startswith("curvature/") for key in logs) else [])

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "stub", Integration)
    callback = CurvatureCallback()
    factory: Any = (OptimizerFactory, {"name": "adafisherw", "lr": 0.05, **PAPER_OPTIONS})
    given = {"optimizer_cls_and_kwargs": factory, "callbacks": [callback], "report_to": ["stub"]}
    trainer = make_trainer(tmp_path, RECORD, Trainer, **given, **OPTIONS)
    if attached:
        callback.attach(trainer)
    trainer.train()
    assert heard == ([1, 4, 7] if attached else [])
    assert ("call callback.attach(trainer) before train()" in caplog.text) != attached
    assert [line["step"] for line in lines_of(tmp_path)] == [1, 4, 7]


@pytest.mark.parametrize("optim", ["adamw", "kfac"])
def test_another_optimizer_is_said_once_and_leaves_no_file(
    optim: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "hf_adafisher.training.curvature_callback"):
        our_trainer(tmp_path, CurvatureCallback(), optim=optim, max_steps=4).train()
    said = [record.message for record in caplog.records if "CurvatureCallback" in record.message]
    assert len(said) == 1 and "AdaFisher" in said[0] and {"adamw": "AdamW", "kfac": "KFAC"}[optim] in said[0]
    assert not (tmp_path / CURVATURE_FILE).exists()


def test_only_process_zero_writes_and_a_number_that_is_not_finite_is_null(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where all have the numbers, since they share them out (FSDP2)."""
    monkeypatch.setattr("hf_adafisher.training.curvature_callback.needs_every_process", lambda _: True)
    model, optimizer, _ = trained()
    optimizer.state[model.gain]["exp_avg"].zero_()
    for zero in (False, True):
        callback = CurvatureCallback()
        state = SimpleNamespace(is_world_process_zero=zero, global_step=0, epoch=0.0)
        events: Any = (SimpleNamespace(output_dir=str(tmp_path / "new"), report_to=[]), state, None)
        callback.on_train_begin(*events, optimizer=optimizer)
        for group in optimizer.param_groups:
            group["refreshes"] += 1
        callback.on_optimizer_step(*events, optimizer=optimizer)
        callback.on_step_end(*events, optimizer=optimizer)
        assert (tmp_path / "new" / CURVATURE_FILE).exists() == zero
    (line,) = [json.loads(text) for text in (tmp_path / "new" / CURVATURE_FILE).read_text().splitlines()]
    assert line["layers"]["gain"]["step_gain"] is None and line["layers"]["gain"]["update_rms"] == 0


def test_only_devices_that_work_on_their_own_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[torch.device] = []
    monkeypatch.setattr(torch.accelerator, "synchronize", waited.append)
    devices = [torch.device("cpu"), torch.device("cuda", 1)]
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda *_: None)
    callback_module._wait_for(devices)
    assert waited == []
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda *_: torch.device("cuda"))
    callback_module._wait_for(devices)
    assert waited == devices[1:]


def test_the_device_is_waited_for_on_both_sides_of_the_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock stands still until the step's kernels have ended, and goes on until the record's have."""
    clock, queued = [0.0], [100.0]  # seconds, those of the step's kernels being queued

    def wait(devices: Iterable[torch.device]) -> None:
        assert set(devices) == {torch.device("cpu")}
        clock[0] += queued.pop() if queued else 0.0

    def look(_: Any) -> dict[str, dict[str, float]]:
        queued.append(7.0)
        return {}

    _, optimizer, _ = trained()
    monkeypatch.setattr(callback_module, "_wait_for", wait)
    monkeypatch.setattr(callback_module, "layer_curvature", look)
    monkeypatch.setattr(callback_module, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    callback = CurvatureCallback()
    state = SimpleNamespace(is_world_process_zero=True, global_step=0, epoch=0.0)
    events: Any = (SimpleNamespace(output_dir=str(tmp_path), report_to=[]), state, None)
    callback.on_train_begin(*events, optimizer=optimizer)
    for group in optimizer.param_groups:
        group["refreshes"] += 1
    callback.on_optimizer_step(*events, optimizer=optimizer)
    callback.on_step_end(*events, optimizer=optimizer)
    (line,) = read_curvature(tmp_path / CURVATURE_FILE)
    assert (line["record_seconds"], line["interval_seconds"]) == (7.0, 107.0)


@pytest.mark.parametrize("every", [0, -1, 1.5, True, "2"])
def test_a_bad_interval_is_refused(every: Any) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        CurvatureCallback(every)


def test_a_file_of_something_else_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="CurvatureCallback"):
        read_curvature(tmp_path / CURVATURE_FILE)
    (tmp_path / CURVATURE_FILE).write_text('{"step": 1, "layers": {}}\n{"loss": 1}\n')
    with pytest.raises(ValueError, match="line 2"):
        read_curvature(tmp_path / CURVATURE_FILE)
