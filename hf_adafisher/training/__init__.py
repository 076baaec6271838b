"""How Hugging Face drives it: training arguments and a Trainer."""

from hf_adafisher.training.arguments import AdaFisherTrainingArguments
from hf_adafisher.training.trainer import AdaFisherTrainer

__all__ = ["AdaFisherTrainer", "AdaFisherTrainingArguments"]
