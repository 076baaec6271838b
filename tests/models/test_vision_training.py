"""Images, augmentation, models and metrics together under the Trainer."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_adafisher import AdaFisherTrainer, AdaFisherTrainingArguments
from hf_adafisher.data.images.augmentation import Augmentation, ImageCollator
from hf_adafisher.data.images.corpora import ImageCorpus, load_images
from hf_adafisher.data.images.dataset import ImageDataset, ImageItem
from hf_adafisher.data.images.metrics import image_metrics
from hf_adafisher.data.images.normalization import corpus_normalization
from hf_adafisher.data.images.sampling import DatasetEpochs
from hf_adafisher.models import create_model

SIDE = 16
MIXED = Augmentation(crop_padding=2, cutout=4, mixup=0.2, cutmix=1.0, library="kornia")


@pytest.fixture(scope="module")
def digits() -> ImageCorpus:
    """Scikit-learn's digits."""
    return load_images()


def new_model(corpus: ImageCorpus) -> PreTrainedModel:
    """A small CCT, with dropout and stochastic depth."""
    torch.manual_seed(0)
    return create_model("cct-2-3x2", corpus.class_names, image_size=SIDE, options={"hidden_size": 64})


class RecordingCollator(ImageCollator):
    """Keeps the epochs and the pictures of its training batches."""

    def __call__(self, items: list[ImageItem]) -> dict[str, Tensor]:  # type: ignore[override]
        """A batch, as ever."""
        batch = super().__call__(items)
        if self.augmentation.uses_soft_labels:
            SEEN.append((items[0].epoch, batch["pixel_values"].sum().item()))
        return batch


SEEN: list[tuple[int, float]] = []


def trainer(corpus: ImageCorpus, folder: Path, augmentation: Augmentation | None, **options: Any) -> AdaFisherTrainer:
    """A trainer of the small CCT with AdaFisherW."""
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "optim": "adafisherw",
        "learning_rate": 0.02,
        "per_device_train_batch_size": 32,
        "per_device_eval_batch_size": 256,
        "max_grad_norm": 1.0,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 1,
        **options,
    }
    normalization = corpus_normalization(corpus)
    plain = ImageCollator(normalization, 10, SIDE)
    collator = plain if augmentation is None else RecordingCollator(normalization, 10, SIDE, augmentation, seed=1)
    made = AdaFisherTrainer(
        model=new_model(corpus),
        args=AdaFisherTrainingArguments(**settings),
        train_dataset=ImageDataset(corpus.train, SIDE, seed=1),
        eval_dataset=ImageDataset(corpus.test, SIDE),
        data_collator=collator,
        compute_metrics=image_metrics,
        callbacks=[DatasetEpochs()],
    )
    return made


def test_a_cct_learns_the_digits(digits: ImageCorpus, tmp_path: Path) -> None:
    run = trainer(digits, tmp_path, None, max_steps=60)
    before = run.evaluate()
    run.train()
    after = run.evaluate()
    assert before["eval_accuracy"] < 0.3 < 0.5 < after["eval_accuracy"]
    assert after["eval_loss"] < before["eval_loss"]
    assert after["eval_top5_accuracy"] > after["eval_accuracy"]


def test_class_shares_train_to_a_finite_loss_and_epochs_differ(digits: ImageCorpus, tmp_path: Path) -> None:
    """The shuffled data of two epochs, each picture augmented anew; the loss is that of shares, near log(10)."""
    SEEN.clear()
    digits_small = digits.train.sample(96)
    corpus = ImageCorpus("few", digits_small, digits.validation, digits.test, digits.class_names, "")
    run = trainer(corpus, tmp_path, MIXED, num_train_epochs=2, logging_steps=1)
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert len(losses) == 6 and all(1.0 < loss < 6.0 for loss in losses)
    assert abs(losses[0] - math.log(10)) < 0.3
    assert [epoch for epoch, _ in SEEN] == [0, 0, 0, 1, 1, 1]
    assert len({total for _, total in SEEN}) == 6


@pytest.mark.subprocess
@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_is_the_uninterrupted_one(digits: ImageCorpus, tmp_path: Path, workers: int) -> None:
    """In the middle of the second epoch, with augmentation: bitwise the same weights."""
    few = digits.train.sample(128)
    corpus = ImageCorpus("few", few, digits.validation, digits.test, digits.class_names, "")
    options = {"max_steps": 8, "dataloader_num_workers": workers, "save_steps": 6, "save_strategy": "steps"}
    SEEN.clear()
    whole = trainer(corpus, tmp_path, MIXED, **options)
    whole.train()
    resumed = trainer(corpus, tmp_path, MIXED, **options)
    if not workers:
        SEEN.clear()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    if not workers:
        assert [epoch for epoch, _ in SEEN] == [1, 1]
    for (name, first), second in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(first, second), name
