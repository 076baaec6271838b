"""Image classifiers for transformers: new ones by name, pretrained ones, and fine-tuning."""

from hf_adafisher.models.cct import CctConfig, CctForImageClassification, CctModel
from hf_adafisher.models.configurations import (
    ARCHITECTURES,
    available_architectures,
    check_image_size,
    model_kind,
    scratch_config,
)
from hf_adafisher.models.fine_tuning import freeze_backbone, layer_decay_scales, layer_depths, scale_groups
from hf_adafisher.models.losses import image_classification_loss, use_image_loss
from hf_adafisher.models.vision import LoadReport, create_model, head_parameter_names, load_pretrained

__all__ = [
    "ARCHITECTURES",
    "CctConfig",
    "CctForImageClassification",
    "CctModel",
    "LoadReport",
    "available_architectures",
    "check_image_size",
    "create_model",
    "freeze_backbone",
    "head_parameter_names",
    "image_classification_loss",
    "layer_decay_scales",
    "layer_depths",
    "load_pretrained",
    "model_kind",
    "scale_groups",
    "scratch_config",
    "use_image_loss",
]
