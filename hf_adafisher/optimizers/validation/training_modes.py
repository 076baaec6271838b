"""Training modes that some optimizers cannot work with: reasons, remedies, and the tests that prove the refusals."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Literal


class Needs(enum.Flag):
    """Requirements of an optimizer's step that a training mode may break."""

    NOTHING = 0
    LAYERS = enum.auto()
    """Hooks see every layer's inputs and output gradients, for the whole batch of their process."""
    SHAPES = enum.auto()
    """Parameters keep their shapes, sharded or not; every other need holds this one too."""
    WHOLE_PARAMETERS = enum.auto()
    """Every process holds whole parameters and gradients: their norms, or a matrix for one of their sides."""
    SECOND_DERIVATIVES = enum.auto()
    """Gradients can be differentiated again, and belong to the unscaled loss."""


_DDP = "DistributedDataParallel (torchrun, one process a GPU)"
_OR_FSDP2 = " or FSDP2 (fully_shard; with accelerate, set fsdp_version to 2)"
_WITHOUT_SHARDS = "Use torchrun without it"
_REFUSALS = "tests/optimizers/validation/test_refusals.py"
_ARGUMENTS = "tests/training/test_arguments.py"
_COMPILE = "tests/training/test_compile.py"
_FLAT_SHARDS = "it gives the optimizer flat shards instead of parameters"


@dataclass(frozen=True)
class TrainingMode:
    """A way to run a model, and what it takes from an optimizer.

    Attributes:
        name: The mode.
        breaks: Needs that it breaks; optimizers with one of them refuse it.
        reason: Why they do.
        instead: The mode to use instead.
        or_fsdp2: FSDP2 is a remedy too, for optimizers that work with it.
        eager_for: Needs for which ``AdaFisherTrainer`` leaves the mode out on the steps that refresh statistics.
        argument: Name in messages about training arguments; empty where these do not tell.
        argument_instead: The remedy, as a sentence about training arguments.
        tests: Tests of the refusal, as ``path::name``.
    """

    name: str
    breaks: Needs
    reason: str
    instead: str
    tests: tuple[str, ...]
    or_fsdp2: bool = False
    eager_for: Needs = Needs.NOTHING
    argument: str = ""
    argument_instead: str = ""

    def refused_by(self, needs: Needs) -> bool:
        """Tell if an optimizer with these needs refuses the mode."""
        return bool(self.breaks & needs)

    def support(self, needs: Needs) -> Literal["refused", "eager", "yes"]:
        """Support of the mode by an optimizer with these needs, under ``AdaFisherTrainer``."""
        if self.refused_by(needs):
            return "refused"
        return "eager" if self.eager_for & needs else "yes"

    def remedy(self, needs: Needs) -> str:
        """Name the mode that an optimizer with these needs can use instead."""
        return self.instead + (_OR_FSDP2 if self.or_fsdp2 and not FSDP2.refused_by(needs) else "")

    def refusal(self, kind: str, needs: Needs) -> str:
        """Word the error about a model in this mode.

        Args:
            kind: The optimizer's name.
            needs: Its needs.
        """
        return f"{kind} does not support {self.name} ({self.reason}): use {self.remedy(needs)}"

    def argument_refusal(self, optim: str, needs: Needs, detail: str = "") -> str:
        """Word the error about training arguments that ask for this mode.

        Args:
            optim: The optimizer's name.
            needs: Its needs.
            detail: What was asked for, in parentheses after the mode.
        """
        remedy = self.argument_instead
        if self.or_fsdp2 and "fsdp" in remedy and FSDP2.refused_by(needs):
            remedy = _WITHOUT_SHARDS
        asked = f"{self.argument} ({detail})" if detail else self.argument
        return f"optim={optim} does not support {asked}: {self.reason}. {remedy}, or use another optim"


DATA_PARALLEL = TrainingMode(
    "nn.DataParallel",
    Needs.LAYERS | Needs.SECOND_DERIVATIVES,
    "it runs copies of the model in threads, whose statistics would be mixed up",
    instead=_DDP,
    or_fsdp2=True,
    argument="DataParallel",
    argument_instead="Start one process a GPU with torchrun, or show only one with CUDA_VISIBLE_DEVICES",
    tests=(
        f"{_REFUSALS}::test_data_parallel_is_refused",
        f"{_REFUSALS}::test_a_replica_of_data_parallel_is_refused_before_any_work",
        f"{_REFUSALS}::test_our_trainer_refuses_several_gpus_in_one_process",
    ),
)
FSDP1 = TrainingMode(
    "FSDP1",
    Needs.SHAPES,
    _FLAT_SHARDS,
    instead=_DDP,
    or_fsdp2=True,
    argument="FSDP1",
    argument_instead="Set fsdp_config['version'] to 2 (the default)",
    tests=(f"{_REFUSALS}::test_fsdp1_is_refused",),
)
DEEPSPEED = TrainingMode(
    "DeepSpeed",
    Needs.SHAPES,
    _FLAT_SHARDS,
    instead=_DDP,
    or_fsdp2=True,
    argument="deepspeed",
    argument_instead="Use fsdp (FSDP2) or torchrun without it",
    tests=(f"{_REFUSALS}::test_what_accelerate_is_about_to_do_is_refused",),
)
MEGATRON = TrainingMode(
    "Megatron-LM",
    Needs.SHAPES,
    _FLAT_SHARDS,
    instead=_DDP,
    or_fsdp2=True,
    tests=(f"{_REFUSALS}::test_what_accelerate_is_about_to_do_is_refused",),
)
TENSOR_PARALLEL = TrainingMode(
    "tensor, context or sequence parallelism",
    Needs.LAYERS | Needs.WHOLE_PARAMETERS,
    "a process then sees a part of a layer or of the sequence",
    instead=_DDP,
    or_fsdp2=True,
    tests=(
        f"{_REFUSALS}::test_tensor_parallel_is_refused",
        f"{_REFUSALS}::test_what_accelerate_is_about_to_do_is_refused",
    ),
)
PIPELINE_PARALLEL = TrainingMode(
    "pipeline parallelism",
    Needs.LAYERS,
    "the processes hold different layers, which is seen at the first refresh",
    instead=_DDP,
    or_fsdp2=True,
    tests=("tests/distributed/test_ddp.py::test_processes_that_train_different_parameters_are_told_so",),
)
FSDP2 = TrainingMode(
    "FSDP2",
    Needs.WHOLE_PARAMETERS,
    "it shards the parameters, and a step needs the whole of each in one process",
    instead=_DDP,
    argument="fsdp",
    argument_instead=_WITHOUT_SHARDS,
    tests=(
        "tests/optimizers/baselines/test_library_baselines.py::test_sharded_parameters_are_refused_or_known",
        "tests/optimizers/baselines/test_kfac.py::test_sharded_parameters_are_refused_before_and_after_it_was_built",
    ),
)
COMPILE = TrainingMode(
    "torch.compile",
    Needs.SECOND_DERIVATIVES,
    "its graphs have no second derivatives",
    instead="the model as it is",
    eager_for=Needs.LAYERS,
    argument="torch_compile",
    argument_instead="Unset it",
    tests=(f"{_ARGUMENTS}::test_what_has_no_second_derivatives_is_refused",),
)
COMPILE_BY_A_STOCK_TRAINER = TrainingMode(
    "torch.compile under a stock Trainer",
    Needs.LAYERS | Needs.SECOND_DERIVATIVES,
    "compiled graphs run no hooks, and it compiles the steps that record too",
    instead="AdaFisherTrainer",
    tests=(
        f"{_COMPILE}::test_a_stock_trainer_that_compiles_is_refused_before_it_trains",
        f"{_COMPILE}::test_a_stock_trainer_that_compiles_is_refused_with_an_optimizer_older_than_its_arguments",
    ),
)
FP16 = TrainingMode(
    "fp16",
    Needs.SECOND_DERIVATIVES,
    "the scale of the loss would be in the Hessian",
    instead="bf16",
    argument="fp16",
    argument_instead="Use bf16",
    tests=(f"{_ARGUMENTS}::test_modes_that_take_parameters_apart_are_refused_by_what_needs_them_whole",),
)
REENTRANT_CHECKPOINTING = TrainingMode(
    "reentrant checkpointing",
    Needs.SECOND_DERIVATIVES,
    "it has no second derivatives",
    instead="use_reentrant=False",
    argument="reentrant activation checkpointing",
    argument_instead="Set use_reentrant to False in activation_checkpointing_kwargs",
    tests=(f"{_ARGUMENTS}::test_what_has_no_second_derivatives_is_refused",),
)

TRAINING_MODES = (
    DATA_PARALLEL,
    FSDP1,
    FSDP2,
    DEEPSPEED,
    MEGATRON,
    TENSOR_PARALLEL,
    PIPELINE_PARALLEL,
    COMPILE,
    COMPILE_BY_A_STOCK_TRAINER,
    FP16,
    REENTRANT_CHECKPOINTING,
)
"""All of them, in the order of the support table."""
