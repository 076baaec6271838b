"""Integration with Hugging Face: training arguments, a mixin for every Trainer, a Trainer and callbacks."""

from hf_adafisher.training.arguments import AdaFisherTrainingArguments
from hf_adafisher.training.callbacks import AdaFisherCallback
from hf_adafisher.training.curvature_callback import CurvatureCallback
from hf_adafisher.training.doctor_callback import DoctorCallback
from hf_adafisher.training.mixin import AdaFisherMixin
from hf_adafisher.training.stock_trainer import explain_to_stock_trainers
from hf_adafisher.training.trainer import AdaFisherTrainer

__all__ = [
    "AdaFisherCallback",
    "AdaFisherMixin",
    "AdaFisherTrainer",
    "AdaFisherTrainingArguments",
    "CurvatureCallback",
    "DoctorCallback",
]

explain_to_stock_trainers()
