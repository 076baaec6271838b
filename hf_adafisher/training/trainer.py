"""A Trainer that builds AdaFisher(W) by ``args.optim``."""

from __future__ import annotations

from transformers import Trainer

from hf_adafisher.training.mixin import AdaFisherMixin


class AdaFisherTrainer(AdaFisherMixin, Trainer):
    """``transformers.Trainer``, and ``args.optim`` may name every optimizer of ``available_optimizers()``.

    Use it with ``hf_adafisher.AdaFisherTrainingArguments``; the constructor is Trainer's. All that it does beside
    Trainer is in ``AdaFisherMixin``, which does the same for every other Trainer.
    """
