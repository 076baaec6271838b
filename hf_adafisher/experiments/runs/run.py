"""A training run of any task: train, evaluate, write results, picture, model and model card.

A task (``clm.py``, ``image.py``) subclasses ``PreparedRun``: its trainer, its evaluation and its description.
"""

from __future__ import annotations

import logging
import math
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from huggingface_hub import upload_folder
from transformers import PreTrainedModel, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, has_length

from hf_adafisher.experiments.outputs import hardware, software_versions, write_json
from hf_adafisher.experiments.runs.arguments import RunTrainingArguments
from hf_adafisher.experiments.runs.callbacks import StepTimer, StopOnDivergence, show_progress
from hf_adafisher.experiments.runs.earlier_run import STAGING_FOLDER, SetAside, swap_in
from hf_adafisher.experiments.runs.pictures import write_learning_curves
from hf_adafisher.optimizers.factory.create import optimizer_state_bytes
from hf_adafisher.optimizers.validation.environment import unwrapped
from hf_adafisher.training.arguments import optimizer_name
from hf_adafisher.training.checkpoints import CheckpointError
from hf_adafisher.training.curvature_callback import CurvatureCallback
from hf_adafisher.training.trainer import AdaFisherTrainer

RESULTS_FILE = "results.json"
EVALUATION_FILE = "eval_results.json"
"""File of a run that only evaluates; those of an earlier one in the same folder stay as they are."""
DATA_FILE = "data.json"
"""File of every checkpoint with the hashes of the data."""
CURVE_FILE = "learning_curve.png"
CARD_FILE = "README.md"
SPLITS = ("validation", "test")


@dataclass(frozen=True)
class Evaluation:
    """Results of the evaluation at the end.

    Attributes:
        splits: Metrics of "validation" and "test", a "loss" among them; splits that the data lacks are left out.
        more: Further entries of results.json.
        files: Input of ``PreparedRun.write_files``, too large for results.json.
    """

    splits: Mapping[str, dict[str, Any]]
    more: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PreparedRun(ABC):
    """Everything a run needs, every input checked."""

    training_args: RunTrainingArguments
    checkpoint: str | None
    model: PreTrainedModel
    model_args: Any
    """A dataclass with ``model_name_or_path``; subclasses narrow its type."""
    data_args: Any
    data_hashes: dict[str, dict[str, str]]
    """Hash of the content of each split, ``{split: {"sha256": ...}}``."""

    loss_label: ClassVar[str]
    """Label of the losses' axis."""
    card_task: ClassVar[str]
    """The task's name on the Hub."""
    extra_files: ClassVar[tuple[str, ...]] = ()
    """Names of the files that ``write_files`` writes."""
    libraries: ClassVar[tuple[str, ...]] = ()
    """Libraries with a version in the results, beside those of every run."""

    @abstractmethod
    def new_trainer(self, callbacks: list[TrainerCallback]) -> AdaFisherTrainer:
        """Create the trainer, with its data sets."""

    @abstractmethod
    def evaluate(self, trainer: AdaFisherTrainer, diverged: bool) -> Evaluation:
        """Evaluate validation and test split exactly; of a diverged model every loss is nan, without any work.

        Every process calls this, and each gets the whole result.
        """

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Return the entries "corpus" (with a "name"), "model" (with its "parameters") and others of results.json."""

    @property
    def pretrained(self) -> str | None:
        """The model that is fine-tuned, a Hub id or a folder; None from scratch."""
        return self.model_args.model_name_or_path

    @abstractmethod
    def format_metrics(self, metrics: Mapping[str, Any]) -> str:
        """Format the metrics of one split as one line."""

    def write_files(self, folder: Path, results: Mapping[str, Any], files: Mapping[str, Any]) -> None:  # noqa: B027
        """Write ``extra_files``."""

    def card_text(self) -> str:
        """Return further text of the model card."""
        return ""

    @property
    def output_dir(self) -> Path:
        """Directory of all files."""
        return Path(self.training_args.output_dir or ".")


def train_and_report(run: PreparedRun) -> dict[str, Any]:
    """Train, evaluate exactly, and write results, picture, model, tokenizer or image processor, and model card.

    Returns:
        The contents of ``results.json`` in the output directory (there, numbers that are not finite are null).
        ``status`` is "completed", or "diverged" if a loss was not finite; a diverged model is neither evaluated
        nor saved. With ``timing_only`` nothing is evaluated, saved or drawn, and ``step_seconds`` has every step.
        Without ``do_train`` the evaluation alone is written, to ``EVALUATION_FILE``.
    """
    timer, watch = StepTimer(), StopOnDivergence()
    curvature = [CurvatureCallback()] if run.training_args.curvature_log else []
    trainer = run.new_trainer([SetAside(run.checkpoint), timer, watch, *curvature])
    show_progress(trainer, run.training_args.verbose)
    if not run.training_args.do_train:
        return _evaluate_only(run, trainer)
    trainer.checkpoint_files[DATA_FILE] = run.data_hashes
    outcome = trainer.train(resume_from_checkpoint=run.checkpoint)
    steps = {"steps": trainer.state.global_step, "steps_per_epoch": _steps_per_epoch(trainer)}
    # Optimizer steps alone, those before a resume included, where wall_seconds has evaluations and checkpoints as
    # well and counts from a resume.
    cost = {
        "train_seconds": timer.total,
        "optimizer_state_bytes": optimizer_state_bytes(unwrapped(trainer.optimizer)),
    }
    if run.training_args.timing_only:
        status = "completed" if watch.diverged_at is None else "diverged"
        results = {"status": status, **dict.fromkeys(SPLITS), **steps, **cost, "step_seconds": timer.seconds}
        results |= _describe(run)
        _write(trainer, run, results, {})
        return results
    evaluate = run.training_args.do_eval
    evaluation = run.evaluate(trainer, watch.diverged_at is not None) if evaluate else Evaluation({})
    train_loss = _last_loss(trainer.state.log_history)
    losses = [train_loss, *(metrics["loss"] for metrics in evaluation.splits.values())]
    diverged = watch.diverged_at is not None or not all(math.isfinite(loss) for loss in losses if loss is not None)
    results = {
        "status": "diverged" if diverged else "completed",
        "optimizer": optimizer_name(run.training_args),
        "seed": run.training_args.seed,
        **steps,
        "diverged_at_step": watch.diverged_at,
        "resumed_from": run.checkpoint,
        "train": {"loss": train_loss},
        **{split: evaluation.splits.get(split) for split in SPLITS},
        **evaluation.more,
        **cost,
        "wall_seconds": outcome.metrics.get("train_runtime"),
        "step_time": timer.summary(),
        **_describe(run),
        "optimizer_options": _options_used(trainer),
        "log_history": trainer.state.log_history,
    }
    _write(trainer, run, results, evaluation.files)
    return results


def _evaluate_only(run: PreparedRun, trainer: AdaFisherTrainer) -> dict[str, Any]:
    evaluation = run.evaluate(trainer, False)
    results = {
        "status": "completed",
        "steps": 0,
        **{split: evaluation.splits.get(split) for split in SPLITS},
        **evaluation.more,
        **_describe(run),
    }
    if trainer.is_world_process_zero():
        run.output_dir.mkdir(parents=True, exist_ok=True)
        write_json(run.output_dir / EVALUATION_FILE, results)
    return results


def run_script(prepare: Callable[[Sequence[str] | None], PreparedRun], argv: Sequence[str] | None = None) -> int:
    """Prepare a run from a command line, train, and print the results: the body of every training script.

    Args:
        prepare: Maps arguments (None: those of the process) to the run.
        argv: Arguments without the program's name.

    Returns:
        The exit status: 0; 1 if the run diverged; 2 for bad input or a missing extra: one line, no traceback.
    """
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.INFO)
    for library in ("httpx", "datasets", "matplotlib"):
        logging.getLogger(library).setLevel(logging.WARNING)
    try:
        run = prepare(argv)
    except (ValueError, OSError, ImportError) as error:
        logging.error("%s", " ".join(str(error).split()))
        return 2
    try:
        results = train_and_report(run)
    except (CheckpointError, OSError) as error:  # the checkpoint does not fit the run; a full disk
        logging.error("%s", " ".join(str(error).split()))
        return 2
    for split in SPLITS:
        if results[split] is not None:
            print(f"{split}: {run.format_metrics(results[split])}")
    print(f"{results['status']}: see {run.training_args.output_dir}")
    return 0 if results["status"] == "completed" else 1


def _describe(run: PreparedRun) -> dict[str, Any]:
    model_args = asdict(run.model_args)
    if model_args.get("token") is not None:
        model_args["token"] = "<TOKEN>"  # Trainer hides its own tokens in the same way
    settings = {"model": model_args, "data": asdict(run.data_args), "training": run.training_args.to_dict()}
    versions = software_versions(run.libraries)
    described = {**run.describe(), "data": run.data_hashes}
    return {**described, "versions": versions, "hardware": hardware(), "settings": settings}


def _options_used(trainer: AdaFisherTrainer) -> dict[str, Any]:
    """Options of the optimizer's first group as they were at the end, with the learning rate of the schedule."""
    group = unwrapped(trainer.optimizer).param_groups[0]
    options = {key: value for key, value in group.items() if key not in ("params", "lr", "initial_lr")}
    return {"learning_rate": group.get("initial_lr", group["lr"]), **options}


def _steps_per_epoch(trainer: AdaFisherTrainer) -> int | None:
    """Optimizer steps of an epoch on this process, each with a batch on every process; None for a streamed text."""
    if not has_length(trainer.callback_handler.train_dataloader):
        return None
    batches = len(trainer.callback_handler.train_dataloader)
    return max(math.ceil(batches / trainer.args.gradient_accumulation_steps), 1)


def _last_loss(log_history: list[dict[str, Any]]) -> float | None:
    return next((entry["loss"] for entry in reversed(log_history) if "loss" in entry), None)


def _write(trainer: AdaFisherTrainer, run: PreparedRun, results: dict[str, Any], files: Mapping[str, Any]) -> None:
    """Write all files of the run to a new place, swap them in when they are complete, and upload them if asked to."""
    staging, main = run.output_dir / STAGING_FOLDER, trainer.is_world_process_zero()
    reported = not run.training_args.timing_only
    finished = reported and results["status"] == "completed"
    if main:
        shutil.rmtree(staging, ignore_errors=True)  # of a run that was killed here
        staging.mkdir(parents=True)
    if finished:
        trainer.save_model(str(staging), _internal_call=True)  # it would upload, before anything is in its place
    if not main:
        return
    write_json(staging / RESULTS_FILE, results)
    name = results["corpus"]["name"]
    if finished:
        _write_card(trainer, run, name, staging)
    if reported:
        title = f"{name}, {results['model']['parameters']:,} parameters"
        curves = {results["optimizer"]: results["log_history"]}
        write_learning_curves(staging / CURVE_FILE, curves, title, loss_label=run.loss_label)
        run.write_files(staging, results, files)
    swap_in(staging, run.output_dir, RESULTS_FILE, (CURVE_FILE, CARD_FILE, *run.extra_files))
    args = trainer.args
    if finished and args.push_to_hub:
        upload_folder(
            repo_id=str(trainer.hub_model_id),
            folder_path=run.output_dir,
            commit_message="Model save",
            token=args.hub_token,
            revision=args.hub_revision,
            ignore_patterns=["_*", f"{PREFIX_CHECKPOINT_DIR}-*"],
        )


def _write_card(trainer: AdaFisherTrainer, run: PreparedRun, corpus: str, folder: Path) -> None:
    if run.pretrained is None:
        # A model without a name of its own would be called "a fine-tuned version of" nothing.
        run.model.config._name_or_path = str(run.output_dir)
    final, name = trainer.args.output_dir, run.output_dir.resolve().name
    trainer.args.output_dir = str(folder)  # Trainer writes the card there
    try:
        trainer.create_model_card(model_name=name, tasks=run.card_task, dataset=corpus)
    finally:
        trainer.args.output_dir = final
    card = folder / CARD_FILE
    text = card.read_text(encoding="utf-8")
    if run.pretrained is not None:  # a folder, of which Trainer knows no link
        text = text.replace("was trained from scratch on", f"is a fine-tuned version of `{run.pretrained}` on")
    card.write_text(text + run.card_text(), encoding="utf-8")
