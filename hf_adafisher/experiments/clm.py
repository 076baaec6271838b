"""One causal language modelling run: train, evaluate exactly, write everything down."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch.utils.data import Subset
from transformers import default_data_collator

from hf_adafisher.data.perplexity import PerplexityResult, evaluate_perplexity
from hf_adafisher.experiments.callbacks import StepTimer, StopOnDivergence
from hf_adafisher.experiments.clm_arguments import ClmTrainingArguments, DataArguments, ModelArguments
from hf_adafisher.experiments.clm_setup import RESULTS_FILE, PreparedRun, prepare
from hf_adafisher.experiments.report import hardware, software_versions, write_json, write_learning_curves
from hf_adafisher.optimizers.factory import optimizer_state_bytes
from hf_adafisher.training.trainer import AdaFisherTrainer

CURVE_FILE = "learning_curve.png"
CURVE_WINDOWS = 256
"""Validation windows, the first ones, for the curve during training; the evaluation at the end uses all of the text."""


def run_clm(
    model_args: ModelArguments, data_args: DataArguments, training_args: ClmTrainingArguments
) -> dict[str, Any]:
    """Trains and evaluates a causal language model: `prepare`, then `train_and_report`, which see."""
    return train_and_report(prepare(model_args, data_args, training_args))


def train_and_report(run: PreparedRun) -> dict[str, Any]:
    """Trains, evaluates exactly, and writes results, picture, model, tokenizer and model card.

    Returns:
        What `results.json` in the output directory holds (there, numbers that are not finite are null).
        `status` is "completed", or "diverged" if a loss was not finite; a diverged model is neither evaluated
        nor saved. With `timing_only` nothing is evaluated, saved or drawn, and `step_seconds` has every step.
    """
    timer, watch, validation = StepTimer(), StopOnDivergence(), run.datasets["validation"]
    trainer = AdaFisherTrainer(
        model=run.model,
        args=run.training_args,
        train_dataset=run.datasets["train"],
        eval_dataset=Subset(validation, range(min(len(validation), CURVE_WINDOWS))),
        processing_class=run.tokenizer,
        data_collator=default_data_collator,
        callbacks=[timer, watch],
    )
    if trainer.is_world_process_zero():  # an earlier run's results must not stand beside this one's files
        (Path(run.training_args.output_dir or ".") / RESULTS_FILE).unlink(missing_ok=True)
    outcome = trainer.train(resume_from_checkpoint=run.checkpoint)
    if run.training_args.timing_only:
        return _write_times(trainer, run, timer, watch)
    evaluations = _evaluate(trainer, run, diverged=watch.diverged_at is not None)
    train_loss = _last_loss(trainer.state.log_history)
    losses = [train_loss, *(evaluation["loss"] for evaluation in evaluations.values() if evaluation)]
    diverged = watch.diverged_at is not None or not all(math.isfinite(loss) for loss in losses if loss is not None)
    results = {
        "status": "diverged" if diverged else "completed",
        "optimizer": str(getattr(run.training_args.optim, "value", run.training_args.optim)),
        "seed": run.training_args.seed,
        "steps": trainer.state.global_step,
        "steps_per_epoch": _steps_per_epoch(trainer),
        "diverged_at_step": watch.diverged_at,
        "resumed_from": run.checkpoint,
        "train": {"loss": train_loss},
        **evaluations,
        # Optimizer steps alone, those before a resume included, where wall_seconds has evaluations and checkpoints as
        # well and counts from a resume.
        "train_seconds": timer.total,
        "wall_seconds": outcome.metrics.get("train_runtime"),
        "step_time": timer.summary(),
        "optimizer_state_bytes": optimizer_state_bytes(getattr(trainer.optimizer, "optimizer", trainer.optimizer)),
        **_describe(run),
        "log_history": trainer.state.log_history,
    }
    _write(trainer, run, results)
    return results


def _evaluate(trainer: AdaFisherTrainer, run: PreparedRun, diverged: bool) -> dict[str, dict[str, float] | None]:
    """Evaluates validation and test exactly; every process does all of it, so each knows the result."""
    results: dict[str, dict[str, float] | None] = {"validation": None, "test": None}
    for name in [name for name in results if name in run.splits]:
        stream, num_words = run.splits[name].stream, run.splits[name].num_words
        if diverged:
            result = PerplexityResult(math.nan, len(stream) - 1, num_words)
        else:
            result = evaluate_perplexity(
                run.model,
                stream,
                num_words=num_words,
                block_size=run.data_args.block_size,
                batch_size=trainer.args.per_device_eval_batch_size,
                progress=not trainer.args.disable_tqdm,
                description=f"{name} perplexity",
            )
        results[name] = result.as_dict()
    return results


def _describe(run: PreparedRun) -> dict[str, Any]:
    counts = {name: {"tokens": len(split.stream) - 1, "words": split.num_words} for name, split in run.splits.items()}
    return {
        "corpus": {"name": run.corpus.name, "source": run.corpus.source, **counts},
        "model": {
            "type": run.model.config.model_type,
            "parameters": run.model.num_parameters(),
            "vocabulary": len(run.tokenizer),
            "block_size": run.data_args.block_size,
        },
        "versions": software_versions(),
        "hardware": hardware(),
        "settings": {
            "model": asdict(run.model_args),
            "data": asdict(run.data_args),
            "training": run.training_args.to_dict(),
        },
    }


def _steps_per_epoch(trainer: AdaFisherTrainer) -> int:
    """Optimizer steps, those of this process: each step takes a batch on every process."""
    batches = len(trainer.callback_handler.train_dataloader)
    return max(math.ceil(batches / trainer.args.gradient_accumulation_steps), 1)


def _write_times(
    trainer: AdaFisherTrainer, run: PreparedRun, timer: StepTimer, watch: StopOnDivergence
) -> dict[str, Any]:
    results = {
        "status": "completed" if watch.diverged_at is None else "diverged",
        "validation": None,
        "test": None,
        "steps": trainer.state.global_step,
        "steps_per_epoch": _steps_per_epoch(trainer),
        "train_seconds": timer.total,
        "step_seconds": timer.seconds,
        "optimizer_state_bytes": optimizer_state_bytes(getattr(trainer.optimizer, "optimizer", trainer.optimizer)),
        **_describe(run),
    }
    if trainer.is_world_process_zero():
        output_dir = Path(run.training_args.output_dir or ".")
        output_dir.mkdir(parents=True, exist_ok=True)
        write_json(output_dir / RESULTS_FILE, results)
    return results


def _last_loss(log_history: list[dict[str, Any]]) -> float | None:
    return next((entry["loss"] for entry in reversed(log_history) if "loss" in entry), None)


def _write(trainer: AdaFisherTrainer, run: PreparedRun, results: dict[str, Any]) -> None:
    finished = results["status"] == "completed"
    if finished:
        trainer.save_model()
    if not trainer.is_world_process_zero():
        return
    output_dir = Path(run.training_args.output_dir or ".")
    output_dir.mkdir(parents=True, exist_ok=True)
    write_json(output_dir / RESULTS_FILE, results)
    title = f"{run.corpus.name}, {results['model']['parameters']:,} parameters"
    write_learning_curves(output_dir / CURVE_FILE, {results["optimizer"]: results["log_history"]}, title)
    if finished:
        if run.model_args.model_name_or_path is None:
            # A model without a name of its own would be called "a fine-tuned version of" nothing.
            run.model.config._name_or_path = str(output_dir)
        trainer.create_model_card(tasks="text-generation", dataset=run.corpus.name)
