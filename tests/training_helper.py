"""Small training runs: in a plain loop, and under a Trainer that runs on the CPU and reports to nobody."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from hf_adafisher import AdaFisherTrainer, AdaFisherTrainingArguments, AdaFisherW, SpectralAdaFisher
from tests.cases import Case, Loss
from tests.model_zoo import Family

StepLoss = Callable[[nn.Module, int], Tensor]
"""The loss of a model on the batch of a step; equal steps have equal batches."""
TRAINER_ARGUMENTS = inspect.signature(Trainer).parameters.keys()
FORMS: dict[str, dict[str, Any]] = {
    "paper": {"optim": "adafisherw", "step_size": "paper"},
    "root": {"optim": "adafisherw", "step_size": "root"},
    "spectral": {"optim": "spectral-adafisher"},
}
"""AdaFisherW with hooks, without, and SpectralAdaFisher, as training arguments."""
QUIET: dict[str, Any] = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no"}


def of_form(form: str, **options: Any) -> dict[str, Any]:
    """Training arguments of one of `FORMS`, without what only the paper's form knows."""
    papers = () if form == "paper" else ("update_interval", "damping")
    return FORMS[form] | {key: value for key, value in options.items() if key not in papers}


def built(form: str, model: nn.Module, **options: Any) -> Any:
    """The optimizer of one of `FORMS`, of its class, likewise."""
    given = of_form(form, **options)
    return {"adafisherw": AdaFisherW, "spectral-adafisher": SpectralAdaFisher}[given.pop("optim")](model, **given)


def of_case(case_loss: Loss) -> StepLoss:
    """Losses over a new batch a step."""
    return lambda model, step: case_loss(model, torch.Generator().manual_seed(step))


def of_family(record: Family, n: int = 4, seq: int = 12, seed: int | None = None) -> StepLoss:
    """Losses over a new batch of a model family a step, or over one batch, in the model's precision."""

    def loss(model: nn.Module, step: int) -> Tensor:
        batch = record.batch(n=n, seq=seq, seed=step if seed is None else seed)
        dtype = next(model.parameters()).dtype
        return model(**{k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()}).loss

    return loss


def train(model: nn.Module, data: Case | StepLoss, optimizer: Any, steps: int, start: int = 0) -> list[float]:
    """Take optimizer steps.

    Args:
        model: The model, or its wrapper.
        data: A case, or the loss of each step.
        optimizer: Any; schedule-free ones are set to training, second-order ones get the gradients' graph.
        steps: Number of steps.
        start: Number of the first, so that a loop can go on where another one stopped.

    Returns:
        The loss of each step.
    """
    loss_of = of_case(data.loss) if isinstance(data, Case) else data
    losses = []
    for step in range(start, start + steps):
        if hasattr(optimizer, "train"):
            optimizer.train()
        optimizer.zero_grad()
        loss = loss_of(model, step)
        loss.backward(create_graph=getattr(optimizer, "needs_graph", False))
        optimizer.step()
        losses.append(loss.item())
    return losses


def make_trainer(
    folder: Path,
    record: Family,
    kind: type[Trainer] = AdaFisherTrainer,
    arguments: type[TrainingArguments] | None = None,
    *,
    seed: int = 0,
    **options: Any,
) -> Any:
    """Create a Trainer of a new model over sixteen examples of its family.

    Args:
        folder: Output directory.
        record: The family.
        kind: Class of the Trainer.
        arguments: Class of its arguments; for ``AdaFisherTrainer`` and its subclasses ours, else transformers' own.
        seed: Seed of the model's weights.
        options: Arguments of the Trainer (``model``, ``train_dataset``, ``callbacks``, ...) by their names; all
            others are training arguments, after those of ``QUIET``.
    """
    if arguments is None:
        arguments = AdaFisherTrainingArguments if issubclass(kind, AdaFisherTrainer) else TrainingArguments
    given = {key: options.pop(key) for key in TRAINER_ARGUMENTS & options.keys()}
    if "model" not in given and "model_init" not in given:
        given["model"] = record.build(seed)
    given.setdefault("train_dataset", record.dataset(16))
    return kind(args=arguments(str(folder), **(QUIET | options)), **given)


def hook_count(model: nn.Module) -> int:
    """All hooks on all modules; only those of an optimizer that will record the coming step are left after one."""
    tables = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(module, table)) for module in model.modules() for table in tables)


def optimizer_of(trainer: Trainer) -> Any:
    """The optimizer of a Trainer, out of accelerate's wrapper."""
    return getattr(trainer.optimizer, "optimizer", trainer.optimizer)


def logged_losses(trainer: Trainer) -> list[float]:
    """The training losses of a Trainer's log."""
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
