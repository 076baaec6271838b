"""Arguments of a causal language modelling run, from the command line or a JSON file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from hf_adafisher.data.text.corpora import DEFAULT_CORPUS, available_corpora
from hf_adafisher.data.text.tokens import MIN_VOCAB_SIZE
from hf_adafisher.experiments.runs.arguments import RunTrainingArguments, parse_dataclasses


@dataclass
class ModelArguments:
    """The model: a pretrained one, or one trained from scratch (default: a small GPT-2 of the size given here).

    Raises:
        ValueError: Sizes below 1, ``n_embd`` not a multiple of ``n_head``, ``vocab_size`` below 257, ``dropout``
            outside [0, 1), both a pretrained model and a configuration, ``embeddings_from`` beside one of these, or
            ``freeze_embeddings`` without it.
    """

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Fine-tune this model (Hub id or directory). Default: train from scratch."},
    )
    config_name: str | None = field(
        default=None,
        metadata={"help": "Train this configuration (Hub id or directory) from scratch instead of a GPT-2."},
    )
    tokenizer_name: str | None = field(
        default=None,
        metadata={"help": "Tokenizer (Hub id or directory). Default: the model's, or a BPE trained on the text."},
    )
    embeddings_from: str | None = field(
        default=None,
        metadata={
            "help": "Start a GPT-2 with the tokenizer, token and position embeddings of this GPT or GPT-2 "
            "(Hub id or directory), of the same width."
        },
    )
    freeze_embeddings: bool = field(
        default=False, metadata={"help": "Do not train these embeddings, nor the head that is tied to them."}
    )
    n_layer: int = field(default=4, metadata={"help": "Layers of the GPT-2."})
    n_embd: int = field(default=192, metadata={"help": "Width of the GPT-2."})
    n_head: int = field(default=4, metadata={"help": "Attention heads of the GPT-2; they divide the width."})
    vocab_size: int = field(default=4096, metadata={"help": "Tokens of the tokenizer to train, at least 257."})
    dropout: float = field(default=0.0, metadata={"help": "Dropout of the GPT-2, everywhere."})

    def __post_init__(self) -> None:
        if self.model_name_or_path is not None and self.config_name is not None:
            raise ValueError("give --model_name_or_path (fine-tune) or --config_name (from scratch), not both")
        if self.embeddings_from is not None and (self.model_name_or_path or self.config_name or self.tokenizer_name):
            raise ValueError("--embeddings_from gives a new GPT-2 its tokenizer and embeddings: give no other model")
        if self.freeze_embeddings and self.embeddings_from is None:
            raise ValueError(
                "--freeze_embeddings needs --embeddings_from: embeddings that start random must be trained"
            )
        for name in ("n_layer", "n_embd", "n_head"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd ({self.n_embd}) must be a multiple of n_head ({self.n_head})")
        if self.vocab_size < MIN_VOCAB_SIZE:
            raise ValueError(f"vocab_size is {self.vocab_size}; a byte-level tokenizer needs at least {MIN_VOCAB_SIZE}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}; it must be in [0, 1)")


@dataclass
class DataArguments:
    """The text, and the block size in tokens.

    Raises:
        ValueError: ``block_size`` below 2, ``max_eval_lines`` below 1.
    """

    dataset: str | None = field(
        default=None,
        metadata={"help": f"One of {', '.join(available_corpora())}. Default: {DEFAULT_CORPUS}, no network."},
    )
    train_file: list[str] | None = field(
        default=None, metadata={"help": "Text file(s) to train on, instead of --dataset."}
    )
    validation_file: list[str] | None = field(
        default=None,
        metadata={"help": "Text file(s) to validate on. Default: the last twentieth of the training lines."},
    )
    test_file: list[str] | None = field(default=None, metadata={"help": "Text file(s) to test on. Default: no test."})
    max_eval_lines: int | None = field(
        default=None,
        metadata={"help": "Evaluate the first lines of validation and test text only. Default: all of them."},
    )
    block_size: int = field(default=128, metadata={"help": "Tokens per block, at least 2."})

    def __post_init__(self) -> None:
        if self.block_size < 2:
            raise ValueError(
                f"block_size is {self.block_size}; it must be at least 2, one token to see, one to predict"
            )
        if self.max_eval_lines is not None and self.max_eval_lines < 1:
            raise ValueError(f"max_eval_lines is {self.max_eval_lines}; it must be at least 1, or left out for all")
        for name in ("train_file", "validation_file", "test_file"):
            value = getattr(self, name)
            if isinstance(value, str):  # a JSON file may hold one path where the command line makes a list
                setattr(self, name, [value])


@dataclass
class ClmTrainingArguments(RunTrainingArguments):
    """RunTrainingArguments with the batch sizes of a language model."""

    output_dir: str | None = field(default="clm_output", metadata={"help": "Where everything is written."})
    per_device_train_batch_size: int = field(default=16, metadata={"help": "Blocks per device and step."})
    per_device_eval_batch_size: int = field(default=16, metadata={"help": "Blocks per device in evaluation."})


def parse_clm_arguments(
    argv: Sequence[str] | None = None,
) -> tuple[ModelArguments, DataArguments, ClmTrainingArguments]:
    """Parse the command line or a JSON file: see ``parse_dataclasses``."""
    model, data, training = parse_dataclasses((ModelArguments, DataArguments, ClmTrainingArguments), argv)
    return model, data, training
