"""A causal language modelling run: its trainer, its exact evaluation and its description."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor
from torch.utils.data import Subset
from transformers import PreTrainedTokenizerBase, TrainerCallback, default_data_collator

from hf_adafisher.data.text.corpora import TextCorpus
from hf_adafisher.data.text.perplexity import PerplexityResult, evaluate_perplexity
from hf_adafisher.experiments.runs.clm_arguments import DataArguments, ModelArguments
from hf_adafisher.experiments.runs.run import SPLITS, Evaluation, PreparedRun
from hf_adafisher.training.trainer import AdaFisherTrainer

CURVE_WINDOWS = 256
"""Validation windows, the first ones, for the curve during training; the evaluation at the end uses all of the text."""


@dataclass(frozen=True)
class EncodedSplit:
    """Token ids of one split, shape (1 + tokens,), and the number of words of its text."""

    stream: Tensor
    num_words: int


@dataclass(frozen=True)
class ClmRun(PreparedRun):
    """A language model, its text and its tokenizer, as ``clm_setup.prepare_clm_run`` checked them."""

    model_args: ModelArguments
    data_args: DataArguments
    corpus: TextCorpus
    tokenizer: PreTrainedTokenizerBase
    splits: dict[str, EncodedSplit]
    datasets: dict[str, Any]
    """``TokenWindows`` of "train" and "validation"; of a streamed text "train" is ``StreamedWindows``."""

    loss_label: ClassVar[str] = "loss (nats per token)"
    card_task: ClassVar[str] = "text-generation"

    def new_trainer(self, callbacks: list[TrainerCallback]) -> AdaFisherTrainer:
        """Create the trainer; during training only the first validation windows are evaluated."""
        validation = self.datasets["validation"]
        return AdaFisherTrainer(
            model=self.model,
            args=self.training_args,
            train_dataset=self.datasets["train"],
            eval_dataset=Subset(validation, range(min(len(validation), CURVE_WINDOWS))),
            processing_class=self.tokenizer,
            data_collator=default_data_collator,
            callbacks=callbacks,
        )

    def evaluate(self, trainer: AdaFisherTrainer, diverged: bool) -> Evaluation:
        """Compute the perplexities of all of the text, on every process."""
        results: dict[str, dict[str, Any]] = {}
        for name in [name for name in SPLITS if name in self.splits]:
            stream, num_words = self.splits[name].stream, self.splits[name].num_words
            if diverged:
                result = PerplexityResult(math.nan, len(stream) - 1, num_words)
            else:
                result = evaluate_perplexity(
                    self.model,
                    stream,
                    num_words=num_words,
                    block_size=self.data_args.block_size,
                    batch_size=trainer.args.per_device_eval_batch_size,
                    progress=not trainer.args.disable_tqdm,
                    description=f"{name} perplexity",
                )
            results[name] = result.as_dict()
        return Evaluation(results)

    def describe(self) -> dict[str, Any]:
        """Describe the text and the model."""
        counts = {
            name: {"tokens": len(split.stream) - 1, "words": split.num_words} for name, split in self.splits.items()
        }
        return {
            "corpus": {"name": self.corpus.name, "source": self.corpus.source, **counts},
            "model": {
                "type": self.model.config.model_type,
                "parameters": self.model.num_parameters(),
                "trainable_parameters": self.model.num_parameters(only_trainable=True),
                "vocabulary": len(self.tokenizer),
                "block_size": self.data_args.block_size,
            },
        }

    def format_metrics(self, metrics: Mapping[str, Any]) -> str:
        """Format loss and perplexities."""
        loss, token, word = (metrics[key] for key in ("loss", "token_perplexity", "word_perplexity"))
        return f"loss {loss:.4f}, perplexity per token {token:.2f}, per word {word:.2f}"
