"""An image classification run: its trainer, its exact evaluation, and what is said about it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from transformers import TrainerCallback

from hf_adafisher.data.images.augmentation import ImageCollator
from hf_adafisher.data.images.corpora import ImageCorpus
from hf_adafisher.data.images.dataset import ImageDataset
from hf_adafisher.data.images.epochs import DatasetEpochs
from hf_adafisher.data.images.metrics import TOP_K, confusion_matrix, image_metrics, top_k_accuracy
from hf_adafisher.data.images.normalization import Normalization, image_processor
from hf_adafisher.experiments.outputs import write_json
from hf_adafisher.experiments.runs.image_arguments import ImageDataArguments, ImageModelArguments
from hf_adafisher.experiments.runs.image_pictures import write_confusion_matrix
from hf_adafisher.experiments.runs.image_trainer import ImageTrainer
from hf_adafisher.experiments.runs.run import SPLITS, Evaluation, PreparedRun
from hf_adafisher.models import LoadReport
from hf_adafisher.training.trainer import AdaFisherTrainer

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
    """A classifier and its images: what `image_setup.prepare` returns.

    Attributes:
        network: what to call the network.
        image_size: side of the images, in pixels.
        datasets: "train" and those of "validation" and "test" that there are.
        train_collator: augments.
        eval_collator: does not.
        normalization: of both.
        scales: each parameter's share of the learning rate, by name.
        loaded: what became of a pretrained model's weights.
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
    own_files: ClassVar[tuple[str, ...]] = (CONFUSION_FILE, CONFUSION_PICTURE)
    libraries: ClassVar[tuple[str, ...]] = ("pillow", "scikit-learn", "kornia", "torchvision", "timm")

    def new_trainer(self, callbacks: list[TrainerCallback]) -> AdaFisherTrainer:
        """See `PreparedRun`."""
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
        """Loss and accuracies of every image of both splits, and the confusion matrix of the last one."""
        measures: dict[str, dict[str, Any]] = {}
        matrix: dict[str, Any] = {}
        for split in [split for split in SPLITS if split in self.datasets]:
            examples = len(self.datasets[split])
            if diverged:
                measures[split] = {"loss": math.nan, "accuracy": None, "examples": examples}
                continue
            output = trainer.predict(self.datasets[split])
            logits, labels = np.asarray(_first(output.predictions)), np.asarray(output.label_ids)
            measures[split] = {**classification_measures(logits, labels), "examples": examples}
            counts = confusion_matrix(logits, labels, len(self.corpus.class_names))
            matrix = {"split": split, "classes": list(self.corpus.class_names), "counts": counts.tolist()}
        if not matrix:
            return Evaluation(measures)
        large = len(self.corpus.class_names) > CONFUSION_CLASSES
        shown = {"split": matrix["split"], "file": CONFUSION_FILE} if large else matrix
        return Evaluation(measures, {"confusion_matrix": shown}, {"confusion_matrix": matrix})

    def describe(self) -> dict[str, Any]:
        """See `PreparedRun`."""
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

    def sentence(self, measures: Mapping[str, Any]) -> str:
        """Loss and accuracies."""
        if measures["accuracy"] is None:
            return f"loss {measures['loss']}"
        shown = f"loss {measures['loss']:.4f}, accuracy {measures['accuracy']:.2%}"
        top = measures.get(f"top{TOP_K}_accuracy")
        return shown + (f", top-{TOP_K} {top:.2%}" if top is not None else "")

    def write_files(self, folder: Path, results: Mapping[str, Any], files: Mapping[str, Any]) -> None:
        """The confusion matrix: a picture, and with many classes a file."""
        matrix = files.get("confusion_matrix")
        if matrix is None:
            return
        if "file" in results["confusion_matrix"]:
            write_json(folder / CONFUSION_FILE, matrix)
        title = f"{self.corpus.name}, {matrix['split']}"
        write_confusion_matrix(folder / CONFUSION_PICTURE, matrix["counts"], matrix["classes"], title)

    def card_text(self) -> str:
        """How to load the model again."""
        own = type(self.model).__module__.startswith("hf_adafisher.")
        line = "import hf_adafisher.models  # the model is one of this package's\n" if own else ""
        return _CARD.format(own=line, folder=self.output_dir)


def classification_measures(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Mean loss (in nats, summed in float64), accuracy, and with more than 5 classes top-5 accuracy.

    Args:
        logits: shape (examples, classes).
        labels: class numbers, shape (examples,).
    """
    loss = torch.nn.functional.cross_entropy(torch.from_numpy(logits).double(), torch.from_numpy(labels).long())
    measures = {"loss": loss.item(), "accuracy": top_k_accuracy(logits, labels, 1)}
    if logits.shape[1] > TOP_K:
        measures[f"top{TOP_K}_accuracy"] = top_k_accuracy(logits, labels, TOP_K)
    return measures


def _first(predictions: Any) -> Any:
    """Logits, of models that give more than that."""
    return predictions[0] if isinstance(predictions, tuple) else predictions


def _counts(report: LoadReport) -> dict[str, Any]:
    parts = {name: len(getattr(report, name)) for name in ("kept", "resized", "new", "unused")}
    return {**parts, "new_names": list(report.new)}
