"""An image classification run: its trainer, its exact evaluation and its description."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset
from transformers import TrainerCallback

from hf_adafisher.data.images.augmentation import ImageCollator
from hf_adafisher.data.images.corpora import ImageCorpus
from hf_adafisher.data.images.dataset import ImageDataset
from hf_adafisher.data.images.metrics import TOP_K, accuracies, confusion_matrix, image_metrics, logits_and_labels
from hf_adafisher.data.images.normalization import Normalization, image_processor
from hf_adafisher.data.images.sampling import DatasetEpochs
from hf_adafisher.experiments.outputs import write_json
from hf_adafisher.experiments.runs.image_arguments import ImageDataArguments, ImageModelArguments
from hf_adafisher.experiments.runs.pictures import write_confusion_matrix
from hf_adafisher.experiments.runs.run import SPLITS, Evaluation, PreparedRun
from hf_adafisher.models import LoadReport, scale_groups
from hf_adafisher.training.trainer import AdaFisherTrainer

logger = logging.getLogger(__name__)


class ImageTrainer(AdaFisherTrainer):
    """AdaFisherTrainer with a collator of its own for evaluation, and scaled learning rates.

    Args:
        *args: As Trainer's; ``data_collator`` augments the training images.
        eval_collator: For validation and test images.
        scales: Each parameter's share of the learning rate, by name; parameters that are left out have all of it.
        **kwargs: As Trainer's.
    """

    def __init__(
        self, *args: Any, eval_collator: ImageCollator, scales: Mapping[str, float] | None = None, **kwargs: Any
    ) -> None:
        self.eval_collator = eval_collator
        self.scales = dict(scales or {})
        super().__init__(*args, **kwargs)

    def create_optimizer(self, model: torch.nn.Module | None = None) -> Optimizer:
        """Create the optimizer; the groups of a new one are split by their parameters' scales."""
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if is_new and self.scales:
            scale_learning_rates(optimizer, self.model if model is None else model, self.scales)
        return optimizer

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """Return the validation batches, not augmented."""
        return self._without_augmentation(super().get_eval_dataloader, eval_dataset)

    def get_test_dataloader(self, test_dataset: Dataset) -> DataLoader:
        """Return the test batches, not augmented."""
        return self._without_augmentation(super().get_test_dataloader, test_dataset)

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate a batch; the loss is that of the true labels, without label smoothing."""
        smoother, self.label_smoother = self.label_smoother, None
        try:
            return super().prediction_step(*args, **kwargs)
        finally:
            self.label_smoother = smoother

    def _without_augmentation(self, make: Any, dataset: Any) -> DataLoader:
        collator, self.data_collator = self.data_collator, self.eval_collator
        try:
            return make(dataset)
        finally:
            self.data_collator = collator


def scale_learning_rates(optimizer: Optimizer, model: Any, scales: Mapping[str, float]) -> None:
    """Split the groups of an optimizer that has made no step, each parameter's learning rate times its scale.

    The optimizer's own groups are split, not those it is made of, because some optimizers sort parameters into groups
    with learning rates of their own: each is scaled. Trainer logs the first group's, so higher rates come first.
    """
    groups: list[dict[str, Any]] = []
    for group in optimizer.param_groups:
        groups += reversed(scale_groups([group], model, scales, group["lr"]))
    optimizer.param_groups[:] = groups


CURVE_IMAGES = 500
"""Validation images, at most, for the curve during training; the evaluation at the end uses all of them."""
CONFUSION_PICTURE = "confusion_matrix.png"
CONFUSION_FILE = "confusion_matrix.json"
CONFUSION_CLASSES = 100
"""With more classes the confusion matrix has a file of its own."""

_CARD = """
## Use

```python
{own}from transformers import AutoImageProcessor, AutoModelForImageClassification

model = AutoModelForImageClassification.from_pretrained("{folder}")
processor = AutoImageProcessor.from_pretrained("{folder}")
```
"""


@dataclass(frozen=True)
class ImageRun(PreparedRun):
    """A classifier and its images, as ``image_setup.prepare_image_run`` checked them.

    Attributes:
        network: Name of the network.
        image_size: Side of the images, in pixels.
        datasets: "train" and those of "validation" and "test" that there are.
        train_collator: With augmentation.
        eval_collator: Without augmentation.
        normalization: Of both.
        scales: Each parameter's share of the learning rate, by name.
        loaded: Report on a pretrained model's weights.
    """

    model_args: ImageModelArguments
    data_args: ImageDataArguments
    corpus: ImageCorpus
    network: str
    image_size: int
    datasets: dict[str, ImageDataset]
    train_collator: ImageCollator
    eval_collator: ImageCollator
    normalization: Normalization
    scales: dict[str, float]
    loaded: LoadReport | None

    loss_label: ClassVar[str] = "loss (nats per image)"
    card_task: ClassVar[str] = "image-classification"
    extra_files: ClassVar[tuple[str, ...]] = (CONFUSION_FILE, CONFUSION_PICTURE)
    libraries: ClassVar[tuple[str, ...]] = ("pillow", "scikit-learn", "kornia", "torchvision", "timm")

    def new_trainer(self, callbacks: list[TrainerCallback]) -> AdaFisherTrainer:
        """Create the trainer; during training only a sample of the validation images is evaluated."""
        validation = self.datasets["validation"]
        return ImageTrainer(
            model=self.model,
            args=self.training_args,
            train_dataset=self.datasets["train"],
            eval_dataset=ImageDataset(
                validation.split.sample(CURVE_IMAGES), self.image_size, crop_ratio=validation.crop_ratio
            ),
            processing_class=image_processor(self.normalization, self.image_size),
            data_collator=self.train_collator,
            eval_collator=self.eval_collator,
            scales=self.scales,
            compute_metrics=image_metrics,
            callbacks=[DatasetEpochs(), *callbacks],
        )

    def evaluate(self, trainer: AdaFisherTrainer, diverged: bool) -> Evaluation:
        """Compute loss and accuracies over every image of both splits, and the confusion matrix of the last one."""
        metrics: dict[str, dict[str, Any]] = {}
        matrix: dict[str, Any] = {}
        for split in [split for split in SPLITS if split in self.datasets]:
            examples = len(self.datasets[split])
            if diverged:
                metrics[split] = {"loss": math.nan, "accuracy": None, "examples": examples}
                continue
            logits, labels = logits_and_labels(trainer.predict(self.datasets[split]))
            metrics[split] = {**classification_metrics(logits, labels), "examples": examples}
            counts = confusion_matrix(logits, labels)
            matrix = {"split": split, "classes": list(self.corpus.class_names), "counts": counts.tolist()}
        if not matrix:
            return Evaluation(metrics)
        large = len(self.corpus.class_names) > CONFUSION_CLASSES
        shown = {"split": matrix["split"], "file": CONFUSION_FILE} if large else matrix
        return Evaluation(metrics, {"confusion_matrix": shown}, {"confusion_matrix": matrix})

    def describe(self) -> dict[str, Any]:
        """Describe the images, the network and the pretrained weights."""
        counts = {name: {"examples": len(dataset)} for name, dataset in self.datasets.items()}
        corpus = {"name": self.corpus.name, "source": self.corpus.source, **counts}
        corpus |= {"classes": list(self.corpus.class_names), "skipped": dict(self.corpus.skipped)}
        model = {
            "type": self.model.config.model_type,
            "name": self.network,
            "parameters": self.model.num_parameters(),
            "trainable_parameters": self.model.num_parameters(only_trainable=True),
            "image_size": self.image_size,
        }
        loaded = None if self.loaded is None else _counts(self.loaded)
        return {"corpus": corpus, "model": model, "loaded": loaded}

    def format_metrics(self, metrics: Mapping[str, Any]) -> str:
        """Format loss and accuracies."""
        if metrics["accuracy"] is None:
            return f"loss {metrics['loss']}"
        shown = f"loss {metrics['loss']:.4f}, accuracy {metrics['accuracy']:.2%}"
        top = metrics.get(f"top{TOP_K}_accuracy")
        return shown + (f", top-{TOP_K} {top:.2%}" if top is not None else "")

    def write_files(self, folder: Path, results: Mapping[str, Any], files: Mapping[str, Any]) -> None:
        """Draw the confusion matrix, and with many classes write it into a file of its own."""
        matrix = files.get("confusion_matrix")
        if matrix is None:
            return
        if "file" in results["confusion_matrix"]:
            write_json(folder / CONFUSION_FILE, matrix)
        title = f"{self.corpus.name}, {matrix['split']}"
        write_confusion_matrix(folder / CONFUSION_PICTURE, matrix["counts"], matrix["classes"], title)

    def card_text(self) -> str:
        """Return the code that loads the model again."""
        own = type(self.model).__module__.startswith("hf_adafisher.")
        line = "import hf_adafisher.models  # the model is one of this package's\n" if own else ""
        return _CARD.format(own=line, folder=self.output_dir)


def classification_metrics(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Return the mean loss (in nats, summed in float64) and the ``accuracies``.

    Args:
        logits: Shape (examples, classes).
        labels: Class numbers, shape (examples,).
    """
    loss = torch.nn.functional.cross_entropy(torch.from_numpy(logits).double(), torch.from_numpy(labels).long())
    return {"loss": loss.item(), **accuracies(logits, labels)}


def _counts(report: LoadReport) -> dict[str, Any]:
    parts = {name: len(getattr(report, name)) for name in ("kept", "resized", "new", "unused")}
    return {**parts, "new_names": list(report.new)}
