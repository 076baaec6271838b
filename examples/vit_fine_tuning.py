"""A pretrained ViT learns other classes, with the spectral AdaFisher.

The learning rate is three times the 5e-5 of a recipe for AdamW; its default, 0.01, is for weights that start at random.
A polar factor of each matrix comes with every step: with fewer tokens than here, 32 images of 197, take AdamW's rate
and ``optim="adafisherw"``.

    python examples/vit_fine_tuning.py
"""

import smoke
import torch
from datasets import load_dataset
from transformers import AutoImageProcessor, AutoModelForImageClassification

from hf_adafisher import AdaFisherTrainer, AdaFisherTrainingArguments

MODEL = smoke.image_model("google/vit-base-patch16-224-in21k")
DATA = smoke.images("uoft-cs/cifar10")

data = load_dataset(DATA, split="train").train_test_split(0.1, seed=0)
classes = data["train"].features["label"].names
processor = AutoImageProcessor.from_pretrained(MODEL)


def collate(rows):
    """A batch: pixels as the model wants them, and labels."""
    images = [row["img"].convert("RGB") for row in rows]
    return {**processor(images, return_tensors="pt"), "labels": torch.tensor([row["label"] for row in rows])}


trainer = AdaFisherTrainer(
    model=AutoModelForImageClassification.from_pretrained(
        MODEL, id2label=dict(enumerate(classes)), label2id={name: i for i, name in enumerate(classes)}
    ),
    args=AdaFisherTrainingArguments(
        "out/vit",
        optim="spectral-adafisher",
        learning_rate=1.5e-4,
        per_device_train_batch_size=32,
        num_train_epochs=1,
        eval_strategy="epoch",
        remove_unused_columns=False,  # collate makes the pixels
        **smoke.LIMITS,
    ),
    train_dataset=data["train"],
    eval_dataset=data["test"],
    data_collator=collate,
    compute_metrics=lambda p: {"accuracy": (p.predictions.argmax(1) == p.label_ids).mean()},
)
trainer.train()
print(trainer.evaluate())
