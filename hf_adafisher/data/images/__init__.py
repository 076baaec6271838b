"""Image corpora, data sets, augmentation, normalisation, and metrics.

Pillow, scikit-learn, kornia and torchvision are imported by the functions that need them.

>>> from hf_adafisher.data.images import load_images
>>> len(load_images("digits").class_names)
10
"""

from hf_adafisher.data.images.augmentation import Augmentation, ImageCollator
from hf_adafisher.data.images.corpora import ImageCorpus, ImageSplit, available_images, load_images
from hf_adafisher.data.images.dataset import ImageDataset
from hf_adafisher.data.images.files import BrokenImageError
from hf_adafisher.data.images.metrics import confusion_matrix, image_metrics, top_k_accuracy
from hf_adafisher.data.images.normalization import (
    Normalization,
    corpus_normalization,
    image_processor,
    pretrained_normalization,
)
from hf_adafisher.data.images.sampling import DatasetEpochs

__all__ = [
    "Augmentation",
    "BrokenImageError",
    "DatasetEpochs",
    "ImageCollator",
    "ImageCorpus",
    "ImageDataset",
    "ImageSplit",
    "Normalization",
    "available_images",
    "confusion_matrix",
    "corpus_normalization",
    "image_metrics",
    "image_processor",
    "load_images",
    "pretrained_normalization",
    "top_k_accuracy",
]
