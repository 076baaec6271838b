"""The table of training modes decides every refusal, and docs/reference.md shows it."""

from __future__ import annotations

import ast
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import accelerate.state
import pytest
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from hf_adafisher import AdaFisherTrainingArguments, OptimizerFactory, available_optimizers, create_optimizer
from hf_adafisher.optimizers.factory.catalog import optimizer_record
from hf_adafisher.optimizers.factory.optimizer_table import MODE_COLUMNS, mode_rows
from hf_adafisher.optimizers.validation.training_modes import (
    COMPILE,
    COMPILE_BY_A_STOCK_TRAINER,
    DATA_PARALLEL,
    DEEPSPEED,
    FSDP1,
    FSDP2,
    MEGATRON,
    TENSOR_PARALLEL,
    TRAINING_MODES,
    Needs,
    TrainingMode,
)
from tests.cases import mlp
from tests.scripts import load_command

ROOT = Path(__file__).parents[3]
FORMS = {
    form: (name, options) for name in available_optimizers() for form, options in optimizer_record(name).forms.items()
}
EACH_FORM = pytest.mark.parametrize("form", FORMS)
STATES: dict[str, tuple[TrainingMode, dict[str, Any]]] = {
    "deepspeed": (DEEPSPEED, {"distributed_type": DistributedType.DEEPSPEED}),
    "megatron": (MEGATRON, {"distributed_type": DistributedType.MEGATRON_LM}),
    "fsdp1": (FSDP1, {"distributed_type": DistributedType.FSDP, "fsdp_plugin": SimpleNamespace(fsdp_version=1)}),
    "fsdp2": (FSDP2, {"distributed_type": DistributedType.FSDP, "fsdp_plugin": SimpleNamespace(fsdp_version=2)}),
    "tp": (TENSOR_PARALLEL, {"parallelism_config": SimpleNamespace(tp_enabled=True)}),
    "cp": (TENSOR_PARALLEL, {"parallelism_config": SimpleNamespace(cp_enabled=True)}),
    "sp": (TENSOR_PARALLEL, {"parallelism_config": SimpleNamespace(sp_enabled=True)}),
}


def needs_of(form: str) -> Needs:
    """What a step of this form of an optimizer needs."""
    name, options = FORMS[form]
    return optimizer_record(name).needs_with(options)


def assert_support(mode: TrainingMode, form: str, model: nn.Module) -> None:
    """The optimizer is refused on the model, by the table's words, or built, as the table has it."""
    (name, options), needs = FORMS[form], needs_of(form)
    if not mode.refused_by(needs):
        create_optimizer(name, model, lr=0.1, **options)
        return
    with pytest.raises(ValueError, match="does not support") as raised:
        create_optimizer(name, model, lr=0.1, **options)
    assert f"does not support {mode.name} ({mode.reason}): use {mode.instead}" in str(raised.value)
    assert ("FSDP2" in str(raised.value).partition("): use ")[2]) == (mode.or_fsdp2 and not FSDP2.refused_by(needs))


def test_the_forms_of_adafisher_are_two() -> None:
    assert len(FORMS) == len(available_optimizers()) + 2
    assert needs_of("adafisherw") == Needs.SHAPES
    assert needs_of("adafisherw, step_size=paper") == Needs.SHAPES | Needs.LAYERS


@EACH_FORM
@pytest.mark.parametrize("key", list(STATES))
def test_every_optimizer_refuses_what_accelerate_is_about_to_do_by_the_table(
    key: str, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    mode, state = STATES[key]
    fake = {"distributed_type": DistributedType.NO, **state}
    monkeypatch.setattr(accelerate.state.AcceleratorState, "_shared_state", fake)
    assert_support(mode, form, mlp(3, 2))


@EACH_FORM
def test_every_optimizer_refuses_wrapped_models_by_the_table(form: str, process_group: None) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    assert_support(DATA_PARALLEL, form, nn.DataParallel(mlp(3, 2)))
    assert_support(FSDP1, form, FullyShardedDataParallel(mlp(3, 2), device_id="cpu", use_orig_params=True))
    assert_support(FSDP2, form, fully_shard(mlp(4, 2, 2), mesh=init_device_mesh("cpu", (1,))))
    split = mlp(4, 2, 2)
    parallelize_module(split, init_device_mesh("cpu", (1,), mesh_dim_names=("tp",)), {"0": ColwiseParallel()})
    if TENSOR_PARALLEL.refused_by(needs_of(form)):
        assert_support(TENSOR_PARALLEL, form, split)


@EACH_FORM
def test_every_optimizer_refuses_a_compiling_stock_trainer_by_the_table(
    form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, options = FORMS[form]
    monkeypatch.setattr(
        accelerate.state.AcceleratorState, "_shared_state", {"dynamo_plugin": SimpleNamespace(backend="INDUCTOR")}
    )
    if COMPILE_BY_A_STOCK_TRAINER.refused_by(needs_of(form)):
        with pytest.raises(
            ValueError, match="second derivatives" if COMPILE.name in optimizer_record(name).refuses else "hooks"
        ):
            OptimizerFactory()(mlp(3, 2), name=name, lr=0.1, **options)
    else:
        OptimizerFactory()(mlp(3, 2), name=name, lr=0.1, **options)


def test_a_remedy_is_never_a_mode_that_the_optimizer_refuses(tmp_path: Path) -> None:
    arguments = AdaFisherTrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    arguments.deepspeed = {"zero_optimization": {"stage": 2}}
    for name in available_optimizers():
        needs = optimizer_record(name).needs
        if not DEEPSPEED.refused_by(needs):
            continue
        with pytest.raises(ValueError, match=f"optim={name} does not support deepspeed: .*Use ") as raised:
            arguments.set_optimizer(name)
        assert ("fsdp" in str(raised.value)) != FSDP2.refused_by(needs)


def test_support_is_refused_eager_or_yes() -> None:
    hooks = Needs.LAYERS | Needs.SHAPES
    assert COMPILE.support(hooks) == "eager" and COMPILE.support(Needs.NOTHING) == "yes"
    assert COMPILE.support(hooks | Needs.SECOND_DERIVATIVES) == "refused"
    assert all(mode.support(Needs.NOTHING) == "yes" for mode in TRAINING_MODES)


@pytest.mark.parametrize("mode", TRAINING_MODES, ids=lambda mode: mode.name)
def test_every_mode_has_reason_remedy_and_tests(mode: TrainingMode) -> None:
    assert mode.name and mode.reason and mode.instead and mode.breaks and mode.tests
    assert bool(mode.argument) == bool(mode.argument_instead)
    assert any(mode.refused_by(optimizer_record(name).needs) for name in available_optimizers())
    for test in mode.tests:
        path, _, function = test.partition("::")
        assert f"def {function}(" in (ROOT / path).read_text(encoding="utf-8")


def test_the_readme_holds_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    """To renew it: `hf-adafisher list --modes`."""
    assert load_command("list_optimizers").main(["--modes"]) == 0
    table = capsys.readouterr().out.strip()
    assert table.count("\n") == len(TRAINING_MODES) + 1
    assert table in (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")


def test_the_table_names_refusing_and_eager_optimizers() -> None:
    rows = {row[0]: dict(zip(MODE_COLUMNS, row, strict=True)) for row in mode_rows()}
    for mode in TRAINING_MODES:
        for form in FORMS:
            row, support = rows[mode.name], mode.support(needs_of(form))
            assert (f"`{form}`" in row["refused by"]) == (support == "refused")
            assert (f"`{form}`" in row["due steps run eagerly by"]) == (support == "eager")


def test_validation_imports_nothing_that_imports_it() -> None:
    """Not even for type checkers: the checks take plain arguments, so no circle of imports can arise."""
    package = "hf_adafisher.optimizers"
    for path in (ROOT / "hf_adafisher/optimizers/validation").glob("*.py"):
        imported = {node.module for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)}
        inside = {module for module in imported if module and module.startswith("hf_adafisher")}
        assert all(module == f"{package}.sharding" or module.startswith(f"{package}.validation.") for module in inside)
