r"""Train or fine-tune an image classifier with AdaFisher, AdaFisherW or any other optimizer, on one command.

A small network on scikit-learn's digits, no network needed; ResNet-18 on CIFAR-10 with SGD:

    hf-adafisher image --output_dir out
    hf-adafisher image --model resnet18 --dataset cifar10 --crop_padding 4 --flip 0.5 \
        --optim sgd --learning_rate 0.1 --output_dir out

Your own images, a pretrained model, options from a file (the same names as keys), an interrupted run:

    hf-adafisher image --data_dir flowers --image_size 96 --output_dir out
    hf-adafisher image --model_name_or_path google/vit-base-patch16-224-in21k \
        --data_dir flowers --layer_decay 0.8 --output_dir out
    hf-adafisher image config.json
    hf-adafisher image --output_dir out --resume_from_checkpoint last

The output directory then holds results.json, pictures, the model, its image processor and a model card.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from hf_adafisher.experiments.runs.arguments import show_help
from hf_adafisher.experiments.runs.image import ImageRun
from hf_adafisher.experiments.runs.image_arguments import (
    ImageDataArguments,
    ImageModelArguments,
    ImageTrainingArguments,
    parse_image_arguments,
)
from hf_adafisher.experiments.runs.image_setup import prepare_image_run
from hf_adafisher.experiments.runs.run import run_script

ARGUMENTS = {
    "Network": ImageModelArguments,
    "Images and augmentation": ImageDataArguments,
    "Training": ImageTrainingArguments,
}
"""Dataclasses of the arguments, by the titles of their groups in the help."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run it; return the exit status: 0; 1 if the run diverged; 2 for bad input."""
    if show_help(argv, "hf-adafisher image", str(__doc__), ARGUMENTS):
        return 0
    return run_script(prepared, argv)


def prepared(argv: Sequence[str] | None = None) -> ImageRun:
    """Prepare the run of a command line."""
    return prepare_image_run(*parse_image_arguments(argv))


if __name__ == "__main__":
    sys.exit(main())
