"""What a causal language modelling run can be told, on the command line or in a JSON file."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import HfArgumentParser
from transformers.trainer_utils import IntervalStrategy, SchedulerType

from hf_adafisher.data.text import DEFAULT_CORPUS, available_corpora
from hf_adafisher.data.tokens import MIN_VOCAB_SIZE
from hf_adafisher.training.arguments import AdaFisherTrainingArguments


@dataclass
class ModelArguments:
    """Which model: a pretrained one, or one trained from scratch (default: a small GPT-2 of the size given
    here).

    Raises:
        ValueError: sizes below 1, `n_embd` not a multiple of `n_head`, `vocab_size` below 257, `dropout`
            outside [0, 1), both a pretrained model and a configuration, `embeddings_from` beside one of these, or
            `freeze_embeddings` without it.
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
    """Which text, in blocks of how many tokens.

    Raises:
        ValueError: `block_size` below 2, `max_eval_lines` below 1.
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
            if isinstance(
                getattr(self, name), str
            ):  # a JSON file may hold one path where the command line makes a list
                setattr(self, name, [getattr(self, name)])


@dataclass
class ClmTrainingArguments(AdaFisherTrainingArguments):
    """AdaFisher's training arguments with defaults for a language modelling run from the command line.

    Different from `TrainingArguments`: batch 16, cosine schedule after 5 % warm-up, a log line every 10
    steps, ten evaluations (of the first 256 validation blocks) and four checkpoints per run (the last two
    are kept), and losses logged as they are: by default Trainer replaces a non-finite loss by the average of
    the others, which would hide a diverged run.

    Raises:
        ValueError: `max_steps` and `num_train_epochs` that leave nothing to train.
    """

    output_dir: str | None = field(default="clm_output", metadata={"help": "Where everything is written."})
    per_device_train_batch_size: int = field(default=16, metadata={"help": "Blocks per device and step."})
    per_device_eval_batch_size: int = field(default=16, metadata={"help": "Blocks per device in evaluation."})
    lr_scheduler_type: SchedulerType | str = field(default="cosine", metadata={"help": "Learning rate schedule."})
    warmup_steps: float = field(default=0.05, metadata={"help": "Warm-up steps, or their share of all if below 1."})
    logging_steps: float = field(default=10, metadata={"help": "Steps between log lines."})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Hide non-finite losses in the log."})
    eval_strategy: IntervalStrategy | str = field(default="steps", metadata={"help": "When to validate."})
    eval_steps: float | None = field(default=0.1, metadata={"help": "Steps between validations, or their share."})
    save_steps: float = field(default=0.25, metadata={"help": "Steps between checkpoints, or their share."})
    # On a machine without an accelerator pinning does nothing but warn.
    dataloader_pin_memory: bool = field(
        default=torch.accelerator.is_available(),
        metadata={"help": "Pin memory for faster copies to a device."},
    )
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints to keep."})
    timing_only: bool = field(
        default=False, metadata={"help": "Only train, to time the steps: nothing is evaluated or saved at the end."}
    )

    def __post_init__(self) -> None:
        if self.timing_only:
            self.eval_strategy = self.save_strategy = "no"
        super().__post_init__()
        if self.max_steps <= 0 and not (math.isfinite(self.num_train_epochs) and self.num_train_epochs > 0):
            raise ValueError(
                f"nothing to train: max_steps is {self.max_steps}, num_train_epochs {self.num_train_epochs}; "
                "one of them must be positive"
            )


def parse_arguments(
    argv: Sequence[str] | None = None,
) -> tuple[ModelArguments, DataArguments, ClmTrainingArguments]:
    """Reads the command line; a single argument that ends in `.json` is a file with the same names as keys.

    Args:
        argv: arguments without the program's name (default: `sys.argv[1:]`).

    Raises:
        FileNotFoundError: the JSON file does not exist.
        ValueError: an unknown name in it, or a value out of its range.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    # transformers types this parameter too narrowly for a tuple of dataclasses.
    parser = HfArgumentParser((ModelArguments, DataArguments, ClmTrainingArguments))  # type: ignore[arg-type]
    if len(argv) == 1 and argv[0].endswith(".json"):
        if not Path(argv[0]).is_file():
            raise FileNotFoundError(f"configuration file {argv[0]!r} does not exist; give the path of a JSON file")
        model, data, training = parser.parse_json_file(argv[0])
    else:
        model, data, training = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    return model, data, training
