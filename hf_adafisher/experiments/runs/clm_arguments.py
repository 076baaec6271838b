"""Arguments of a causal language modelling run, from the command line or a file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from hf_adafisher.data.text.corpora import DEFAULT_CORPUS, available_corpora
from hf_adafisher.data.text.tokens import MIN_VOCAB_SIZE
from hf_adafisher.experiments.runs.arguments import HubArguments, RunTrainingArguments, parse_dataclasses

DTYPES = ("auto", "bfloat16", "float16", "float32")


@dataclass
class ModelArguments(HubArguments):
    """The model: a pretrained one, or one trained from scratch (default: a small GPT-2 of the size given here).

    Raises:
        ValueError: Sizes below 1, ``n_embd`` not a multiple of ``n_head``, ``vocab_size`` below 257, ``dropout``
            outside [0, 1), both a pretrained model and a configuration, ``embeddings_from`` beside one of these,
            ``freeze_embeddings`` without it, ``use_lora`` without a pretrained model, or an option of it alone.
    """

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Fine-tune this model, a Hub id or a directory. Default: train from scratch."},
    )
    config_name: str | None = field(
        default=None,
        metadata={"help": "Train a new model of this one's configuration instead of a GPT-2."},
    )
    tokenizer_name: str | None = field(
        default=None,
        metadata={"help": "Tokenizer. Default: the model's, or a BPE trained on the text."},
    )
    embeddings_from: str | None = field(
        default=None,
        metadata={"help": "Start a GPT-2 with tokenizer and embeddings of this GPT or GPT-2. They have one width."},
    )
    freeze_embeddings: bool = field(
        default=False, metadata={"help": "Do not train these embeddings, nor the head that is tied to them."}
    )
    n_layer: int = field(default=4, metadata={"help": "Layers of the GPT-2."})
    n_embd: int = field(default=192, metadata={"help": "Width of the GPT-2."})
    n_head: int = field(default=4, metadata={"help": "Attention heads of the GPT-2; they divide the width."})
    vocab_size: int = field(default=4096, metadata={"help": "Tokens of the tokenizer to train, at least 257."})
    dropout: float = field(default=0.0, metadata={"help": "Dropout of the GPT-2, everywhere."})
    dtype: str | None = field(
        default=None, metadata={"help": "Type of the weights. Default: float32.", "choices": list(DTYPES)}
    )
    attn_implementation: str | None = field(
        default=None,
        metadata={"help": "Attention: eager, sdpa, flash_attention_2 or another. Default: the model's."},
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run the code of a model's repository, which can do anything: read it first."}
    )
    use_lora: bool = field(default=False, metadata={"help": "Train LoRA adapters of a pretrained model, by peft."})
    lora_r: int = field(default=16, metadata={"help": "Rank of the adapters."})
    lora_alpha: int = field(default=32, metadata={"help": "Scale of the adapters, alpha / rank."})
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "Modules with an adapter, or all-linear. Default: peft's for the model."}
    )

    def hub(self) -> dict[str, Any]:
        """Return the arguments of ``from_pretrained``."""
        return {**super().hub(), "trust_remote_code": self.trust_remote_code}

    def lora(self) -> dict[str, Any] | None:
        """Return the settings of LoRA as ``LoraConfig`` names them; None without it."""
        targets = self.lora_target_modules
        named = targets[0] if targets == ["all-linear"] else targets
        return {"r": self.lora_r, "lora_alpha": self.lora_alpha, "target_modules": named} if self.use_lora else None

    def __post_init__(self) -> None:
        if isinstance(self.lora_target_modules, str):  # of a file
            self.lora_target_modules = [self.lora_target_modules]
        if self.use_lora and self.model_name_or_path is None:
            raise ValueError("--use_lora needs --model_name_or_path: the weights of a new model must be trained")
        changed = [one.name for one in fields(self) if one.name.startswith("lora_")]
        changed = [name for name in changed if getattr(self, name) != getattr(ModelArguments, name)]
        if changed and not self.use_lora:
            raise ValueError(f"--{changed[0]} has no effect without --use_lora")
        if self.dtype not in (None, *DTYPES):
            raise ValueError(f"dtype is {self.dtype!r}; it must be one of {', '.join(DTYPES)}")
        if self.model_name_or_path is not None and self.config_name is not None:
            raise ValueError("give --model_name_or_path (fine-tune) or --config_name (from scratch), not both")
        if self.embeddings_from is not None and (self.model_name_or_path or self.config_name or self.tokenizer_name):
            raise ValueError("--embeddings_from gives a new GPT-2 its tokenizer and embeddings: give no other model")
        if self.freeze_embeddings and self.embeddings_from is None:
            raise ValueError(
                "--freeze_embeddings needs --embeddings_from: embeddings that start random must be trained"
            )
        for name in ("n_layer", "n_embd", "n_head", "lora_r", "lora_alpha"):
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
        ValueError: ``block_size`` below 2, or numbers of samples or processes below 1.
    """

    dataset: str | None = field(
        default=None,
        metadata={
            "help": f"OWNER/NAME of the Hub, a local data set, or one of {', '.join(available_corpora())}. "
            f"Default: {DEFAULT_CORPUS}, no network.",
            "aliases": ["--dataset_name"],
        },
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the data set."})
    text_column_name: str | None = field(
        default=None, metadata={"help": "Column of the text. Default: text, or the only one that holds text."}
    )
    train_file: list[str] | None = field(
        default=None,
        metadata={"help": "File(s) to train on: text, or csv, json, jsonl or parquet with a column of text."},
    )
    validation_file: list[str] | None = field(
        default=None,
        metadata={"help": "File(s) to validate on. Default: the last twentieth of the training lines."},
    )
    test_file: list[str] | None = field(default=None, metadata={"help": "File(s) to test on. Default: no test."})
    streaming: bool = field(
        default=False,
        metadata={"help": "Read the training text as it is needed, in its order; needs max_steps."},
    )
    max_train_samples: int | None = field(
        default=None, metadata={"help": "Train on the first so many lines only. Default: all of them."}
    )
    max_eval_lines: int | None = field(
        default=None,
        metadata={
            "help": "Evaluate the first so many lines of both splits only. Default: all of them.",
            "aliases": ["--max_eval_samples"],
        },
    )
    preprocessing_num_workers: int | None = field(
        default=None, metadata={"help": "Processes that encode the text. Default: this one."}
    )
    block_size: int = field(default=128, metadata={"help": "Tokens per block, at least 2."})

    def __post_init__(self) -> None:
        if self.block_size < 2:
            raise ValueError(
                f"block_size is {self.block_size}; it must be at least 2, one token to see, one to predict"
            )
        for name in ("max_train_samples", "max_eval_lines", "preprocessing_num_workers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1, or left out for the default")
        if self.streaming and self.preprocessing_num_workers is not None:
            raise ValueError(
                "--preprocessing_num_workers does not go with --streaming, which encodes as it reads: use "
                "--dataloader_num_workers"
            )
        for name in ("train_file", "validation_file", "test_file"):
            value = getattr(self, name)
            if isinstance(value, str):  # a file of arguments may hold one path where the command line makes a list
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
    """Parse the command line or a JSON or YAML file: see ``parse_dataclasses``."""
    model, data, training = parse_dataclasses((ModelArguments, DataArguments, ClmTrainingArguments), argv)
    return model, data, training
