"""Arguments of an image classification run, from the command line or a file."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from hf_adafisher.data.images.augmentation import LIBRARIES, Augmentation, Library
from hf_adafisher.data.images.corpora import DEFAULT_IMAGES, HELD_OUT_FRACTION, available_images
from hf_adafisher.experiments.runs.arguments import HubArguments, RunTrainingArguments, parse_dataclasses
from hf_adafisher.models import available_architectures
from hf_adafisher.models.configurations import Kind
from hf_adafisher.optimizers.factory.catalog import available_optimizers, optimizer_record
from hf_adafisher.training.arguments import default_learning_rate, optimizer_name, parse_options

logger = logging.getLogger(__name__)

_OPTIMIZERS: dict[Kind, str] = {"convolutional": "adafisher", "transformer": "adafisherw"}
_KINDS: dict[Kind, str] = {"convolutional": "a convolutional network", "transformer": "a transformer"}
FINE_TUNING_LEARNING_RATES = {
    name: rate for name in available_optimizers() if (rate := optimizer_record(name).fine_tuning_rate) is not None
}
"""Of pretrained weights, where none is given."""
_TAKEN_OPTIONS = ("image_size", "num_labels", "id2label", "label2id")


@dataclass
class ImageModelArguments(HubArguments):
    """The network: from scratch by name, or pretrained.

    Raises:
        ValueError: Both ``model`` and ``model_name_or_path``, an option that does not go with them, a malformed
            ``model_options``, or ``layer_decay`` outside (0, 1].
    """

    model: str | None = field(
        default=None,
        metadata={
            "help": "Train this network from scratch. "
            f"One of {', '.join(available_architectures())}, or timm/NAME. "
            "Default: cct-2-3x2 up to 64 pixels, else resnet18."
        },
    )
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Fine-tune this model instead, a Hub id or a directory."}
    )
    ignore_mismatched_sizes: bool = field(
        default=True, metadata={"help": "Replace a head for other classes. False makes it an error."}
    )
    model_options: str | None = field(
        default=None,
        metadata={"help": "Options of a new network's configuration: hidden_size=64,num_hidden_layers=4"},
    )
    image_size: int | None = field(
        default=None,
        metadata={
            "help": "Side of the square images, in pixels. Default: the model's own, or that of the images. "
            "(Digits: 16; images of different sizes: 224.)"
        },
    )
    freeze_backbone: bool = field(
        default=False, metadata={"help": "Train the classifier of a pretrained model only, not its backbone."}
    )
    layer_decay: float | None = field(
        default=None,
        metadata={"help": "Learning rates fall by this factor with every layer below the head, in (0, 1]."},
    )

    def __post_init__(self) -> None:
        if self.model is not None and self.model_name_or_path is not None:
            raise ValueError("give --model (from scratch) or --model_name_or_path (fine-tune), not both")
        if self.model_name_or_path is None and self.freeze_backbone:
            raise ValueError("--freeze_backbone needs --model_name_or_path: a backbone from scratch must be trained")
        if self.model_name_or_path is not None and self.model_options:
            raise ValueError("--model_options are for a network from scratch; a pretrained one has its own")
        if self.layer_decay is not None and not 0 < self.layer_decay <= 1:
            raise ValueError(f"layer_decay is {self.layer_decay}; it must be in (0, 1], where 1 scales nothing")
        taken = [name for name in self.options() if name in _TAKEN_OPTIONS]
        if taken:
            raise ValueError(f"model_options cannot set {taken[0]}: it follows from --image_size and the data")

    def options(self) -> dict[str, Any]:
        """Parse ``model_options``."""
        return parse_options(self.model_options, "model_options")


@dataclass
class ImageDataArguments:
    """The images, and the augmentation of those trained on.

    Raises:
        ValueError: A data set and a folder, numbers of samples below 1, or an option of the augmentation outside its
            range.
    """

    dataset: str | None = field(
        default=None,
        metadata={
            "help": "Images by name, OWNER/NAME of the Hub, or a folder. "
            f"Names: {', '.join(available_images())}. Default: {DEFAULT_IMAGES}, no network.",
            "aliases": ["--dataset_name"],
        },
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the data set."})
    data_dir: str | None = field(
        default=None,
        metadata={
            "help": "Your own images instead, a folder of class folders. They may also lie within train, validation "
            "and test, and it may hold parquet files, or be one written by save_to_disk.",
            "aliases": ["--train_dir"],
        },
    )
    image_column: str | None = field(
        default=None,
        metadata={"help": "Column of the images. Default: found by type.", "aliases": ["--image_column_name"]},
    )
    label_column: str | None = field(
        default=None,
        metadata={"help": "Column of the class numbers. Default: label.", "aliases": ["--label_column_name"]},
    )
    validation_fraction: float = field(
        default=HELD_OUT_FRACTION,
        metadata={"help": "Share of each class to validate on, if no split is for that."},
    )
    skip_broken: bool = field(
        default=False, metadata={"help": "Leave out images that cannot be decoded; all are decoded once for this."}
    )
    max_train_samples: int | None = field(
        default=None,
        metadata={"help": "Train on so many images, classes in proportion, the same ones for every seed."},
    )
    max_eval_samples: int | None = field(
        default=None, metadata={"help": "Evaluate on so many images of the validation and of the test split."}
    )
    crop_ratio: float = field(
        default=1.0,
        metadata={"help": "Share of the shorter side that the centre crop keeps. In (0, 1]; ImageNet's is 0.875."},
    )
    random_resized_crop: bool = field(
        default=False,
        metadata={"help": "Train on random parts, 8 to 100 per cent of the area, as is usual for ImageNet."},
    )
    crop_padding: int = field(default=0, metadata={"help": "Zeros around an image before a random crop; CIFAR's is 4."})
    flip: float = field(default=0.0, metadata={"help": "Probability of mirroring left and right."})
    randaugment_ops: int = field(default=0, metadata={"help": "Operations of RandAugment per image; 0: off."})
    randaugment_magnitude: int = field(default=9, metadata={"help": "Strength of these operations, in 1..29."})
    cutout: int = field(default=0, metadata={"help": "Side of the square that Cutout sets to the mean; 0: off."})
    mixup: float = field(default=0.0, metadata={"help": "Alpha of Mixup's Beta distribution; 0: off."})
    cutmix: float = field(default=0.0, metadata={"help": "Alpha of CutMix's Beta distribution; 0: off."})
    augmentation_library: str = field(
        default="auto", metadata={"help": f"Library for crops, flips and RandAugment: {', '.join(LIBRARIES)}."}
    )

    def __post_init__(self) -> None:
        if self.dataset is not None and self.data_dir is not None:
            raise ValueError("give --dataset or --data_dir, not both")
        for name in ("max_train_samples", "max_eval_samples"):
            number = getattr(self, name)
            if number is not None and number < 1:
                raise ValueError(f"{name} is {number}; it must be at least 1, or left out for all")
        self.augmentation()

    def augmentation(self) -> Augmentation:
        """Return the augmentation of training images."""
        return Augmentation(
            crop_padding=self.crop_padding,
            flip=self.flip,
            randaugment_ops=self.randaugment_ops,
            randaugment_magnitude=self.randaugment_magnitude,
            cutout=self.cutout,
            mixup=self.mixup,
            cutmix=self.cutmix,
            library=cast(Library, self.augmentation_library),
        )


@dataclass
class ImageTrainingArguments(RunTrainingArguments):
    """RunTrainingArguments with an optimizer that, unless one is named, follows from the kind of network.

    As in the paper, convolutional networks train with AdaFisher, whose weight decay is part of the gradient, and
    transformers with AdaFisherW. Where no learning rate is given, that of both is 0.004 from scratch and 5e-5 for
    pretrained weights (with ``step_size="paper"`` always the paper's 1e-3); all are starting points for a scan.
    """

    output_dir: str | None = field(default="image_output", metadata={"help": "Where everything is written."})
    optim: str | None = field(  # type: ignore[assignment]  # None until the network is known
        default=None,
        metadata={"help": "Optimizer by name. Default: adafisher for convolutional networks, else adafisherw."},
    )
    learning_rate: float | None = field(  # type: ignore[assignment]
        default=None,
        metadata={
            "help": "Learning rate. Default: that of `hf-adafisher list`. For pretrained weights "
            + ", ".join(f"{rate:g} with {name}" for name, rate in FINE_TUNING_LEARNING_RATES.items())
            + " (not with step_size=paper)."
        },
    )
    num_train_epochs: float = field(default=10.0, metadata={"help": "Epochs, unless max_steps is given."})
    per_device_train_batch_size: int = field(default=32, metadata={"help": "Images per device and step."})
    per_device_eval_batch_size: int = field(default=128, metadata={"help": "Images per device in evaluation."})

    def __post_init__(self) -> None:
        self._optim_is_free = self.optim is None
        if self.optim is None:
            self.optim = _OPTIMIZERS["transformer"]
        self._learning_rate_is_free = self.learning_rate is None
        super().__post_init__()

    def choose_optimizer(self, network: str, kind: Kind, pretrained: bool) -> None:
        """Set the optimizer and the learning rate that suit a network, unless they were given, and log them.

        AdaFisher and AdaFisherW differ in the meaning of weight decay only: checks of one hold for the other.
        """
        if self._optim_is_free:
            self.optim = _OPTIMIZERS[kind]
            logger.info("optimizer: %s, since %s is %s (--optim overrides)", self.optim, network, _KINDS[kind])
        rate = FINE_TUNING_LEARNING_RATES.get(optimizer_name(self))
        usual = self.learning_rate == default_learning_rate(optimizer_name(self))  # not that of another form
        if self._learning_rate_is_free and pretrained and usual and rate is not None:
            self.learning_rate = rate


def parse_image_arguments(
    argv: Sequence[str] | None = None,
) -> tuple[ImageModelArguments, ImageDataArguments, ImageTrainingArguments]:
    """Parse the command line or a JSON or YAML file: see ``parse_dataclasses``."""
    model, data, training = parse_dataclasses((ImageModelArguments, ImageDataArguments, ImageTrainingArguments), argv)
    return model, data, training
