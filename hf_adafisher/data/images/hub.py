"""Image data sets on the Hugging Face Hub, by name."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class HubImages:
    """A data set on the Hugging Face Hub.

    Attributes:
        path: Data set id.
        splits: Pairs of a split's name here and on the Hub, for the splits with labels. Default: matched by name.
        image_column: Column of the images. Default: the only one of that type.
        label_column: Column of the class numbers. Default: "label", or the only column with class names.
        licence: Licence stated on the data set card.
        note: Remark for readers of results.
    """

    path: str
    splits: tuple[tuple[str, str], ...] | None = None
    image_column: str | None = None
    label_column: str | None = None
    licence: str = ""
    note: str = ""

    def describe(self) -> str:
        """Describe the images in one line: path, licence and note."""
        return self.path + "".join(f", {part}" for part in (self.licence, self.note) if part)


_TRAIN_TEST = (("train", "train"), ("test", "test"))
HUB_IMAGES: dict[str, HubImages] = {
    "cifar10": HubImages("uoft-cs/cifar10", _TRAIN_TEST, "img", "label", "research use"),
    "cifar100": HubImages("uoft-cs/cifar100", _TRAIN_TEST, "img", "fine_label", "research use", "the 100 fine classes"),
    "imagenet-1k": HubImages(
        "ILSVRC/imagenet-1k",
        (("train", "train"), ("validation", "validation")),
        "image",
        "label",
        "ImageNet terms, to be accepted on the Hub",
        "its test split has no labels: results are those of its validation split",
    ),
    "tiny-imagenet": HubImages(
        "zh-plus/tiny-imagenet",
        (("train", "train"), ("validation", "valid")),
        "image",
        "label",
        "ImageNet terms",
        "200 classes of 64x64; results are those of its validation split",
    ),
}
