"""Setup of a causal language modelling run: text, tokenizer, model and checkpoint, all checked."""

from __future__ import annotations

import logging
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from hf_adafisher.data.fingerprint import text_sha256
from hf_adafisher.data.text.corpora import TextCorpus, count_words, load_corpus
from hf_adafisher.data.text.lines import LineStream
from hf_adafisher.data.text.tokens import StreamedWindows, TokenWindows, encode_lines, train_tokenizer
from hf_adafisher.experiments.runs.checkpoints import (
    check_dtype,
    check_resumable,
    find_checkpoint,
    warn_of_changed_data,
)
from hf_adafisher.experiments.runs.clm import ClmRun, EncodedSplit
from hf_adafisher.experiments.runs.clm_arguments import ClmTrainingArguments, DataArguments, ModelArguments
from hf_adafisher.experiments.runs.clm_model import add_lora, base_model, check_lora, copy_embeddings

logger = logging.getLogger(__name__)

TOKENIZER_LINES = 100_000
"""First lines of a streamed text that a tokenizer is trained on."""


def prepare_clm_run(
    model_args: ModelArguments, data_args: DataArguments, training_args: ClmTrainingArguments
) -> ClmRun:
    """Load text, tokenizer and model, and check them before any work is done.

    The initial weights depend on the seed and the model's arguments only, never on the optimizer.

    Raises:
        ValueError: An unknown corpus, text that is empty or too short, a block larger than the model's
            context, a checkpoint that is incomplete, of another optimizer, of other adapters or of a run that has
            finished, or a streamed text without a number of steps.
        FileNotFoundError: A text file or a checkpoint that does not exist.
        ConnectionError: A corpus of the Hub that cannot be had.
    """
    pretrained = base_model(model_args.model_name_or_path or model_args.config_name or "") or None
    if training_args.do_train and model_args.model_name_or_path not in (None, pretrained):
        raise ValueError(
            f"{model_args.model_name_or_path!r} holds LoRA adapters, which --do_eval can evaluate: to train on, merge "
            "them into the model first (merge_and_unload of peft), or resume their run"
        )
    if data_args.streaming and training_args.do_train and training_args.max_steps < 1:
        raise ValueError("--streaming needs --max_steps: the length of a streamed text is not known")
    if pretrained is not None:
        check_context(AutoConfig.from_pretrained(pretrained, **model_args.hub()), data_args.block_size)
    checkpoint = find_checkpoint(Path(training_args.output_dir or "."), training_args.resume_from_checkpoint)
    if checkpoint is not None:
        check_resumable(Path(checkpoint), training_args)
        check_lora(Path(checkpoint), model_args.lora())
    corpus = load_corpus(
        data_args.dataset,
        config=data_args.dataset_config_name,
        column=data_args.text_column_name,
        token=model_args.token,
        train_files=data_args.train_file,
        validation_files=data_args.validation_file,
        test_files=data_args.test_file,
        streaming=data_args.streaming,
    ).limited(data_args.max_train_samples, data_args.max_eval_lines)
    texts = {"validation": corpus.validation, "test": corpus.test}
    if isinstance(corpus.train, list):
        texts = {"train": corpus.train, **texts}
    hashes = {name: {"sha256": text_sha256(lines)} for name, lines in texts.items() if lines}
    if isinstance(corpus.train, LineStream):  # what it holds is not known, only where it comes from
        hashes["train"] = {"stream": f"{corpus.source}, {data_args.max_train_samples or 'all'} lines"}
    if checkpoint is not None:
        warn_of_changed_data(Path(checkpoint), hashes)
    tokenizer = load_tokenizer(model_args, corpus, checkpoint)
    set_seed(training_args.seed)
    model = load_language_model(model_args, tokenizer, data_args.block_size)
    if checkpoint is not None:
        check_dtype(Path(checkpoint), model.dtype)
    workers = data_args.preprocessing_num_workers
    splits = {
        name: EncodedSplit(encode_lines(tokenizer, lines, workers), count_words(lines))
        for name, lines in texts.items()
        if lines
    }
    datasets: dict[str, Any] = {
        name: TokenWindows(splits[name].stream, data_args.block_size, name=f"{name} text")
        for name in ("train", "validation")
        if name in splits
    }
    if isinstance(corpus.train, LineStream):
        datasets["train"] = StreamedWindows(tokenizer, corpus.train, data_args.block_size, name="train text")
    return ClmRun(training_args, checkpoint, model, model_args, data_args, hashes, corpus, tokenizer, splits, datasets)


def load_tokenizer(
    model_args: ModelArguments, corpus: TextCorpus, checkpoint: str | None = None
) -> PreTrainedTokenizerBase:
    """Load a checkpoint's tokenizer, the one named, or the pretrained model's, or train one on the training split.

    The embeddings of a checkpoint stand for the tokens of its own tokenizer, whatever the text has become.
    """
    if checkpoint is not None and (Path(checkpoint) / "tokenizer_config.json").is_file():
        return AutoTokenizer.from_pretrained(checkpoint)
    name = model_args.tokenizer_name or model_args.model_name_or_path or model_args.embeddings_from
    if name is not None:
        return AutoTokenizer.from_pretrained(name, **model_args.hub())
    lines = corpus.train if isinstance(corpus.train, list) else list(islice(corpus.train, TOKENIZER_LINES))
    tokenizer = train_tokenizer(lines, model_args.vocab_size)
    if len(tokenizer) < model_args.vocab_size:
        logger.warning("the training text yields only %d of %d tokens", len(tokenizer), model_args.vocab_size)
    return tokenizer


def load_language_model(
    model_args: ModelArguments, tokenizer: PreTrainedTokenizerBase, block_size: int
) -> PreTrainedModel:
    """Load the pretrained model, with adapters if asked for, or create a new one for this tokenizer.

    Args:
        model_args: Of the run.
        tokenizer: Gives a new model its vocabulary.
        block_size: Context of a new GPT-2, in tokens.

    Raises:
        ValueError: A tokenizer with more tokens than the pretrained model knows, or no such modules for adapters.
    """
    options = _model_options(model_args)
    if model_args.model_name_or_path is not None:
        name = model_args.model_name_or_path
        known = AutoConfig.from_pretrained(base_model(name), **model_args.hub()).get_text_config().vocab_size
        if len(tokenizer) > known:
            raise ValueError(
                f"the tokenizer has {len(tokenizer)} tokens, the model {name!r} only {known}: "
                "use the model's own tokenizer (leave out --tokenizer_name)"
            )
        model = AutoModelForCausalLM.from_pretrained(name, **options, **model_args.hub())
    else:
        config = _new_config(model_args, tokenizer, block_size)
        if options["dtype"] == "auto":
            options["dtype"] = config.dtype or torch.float32
        options["trust_remote_code"] = model_args.trust_remote_code
        model = AutoModelForCausalLM.from_config(config, **options)
    if model_args.embeddings_from is not None:
        source, freeze = model_args.embeddings_from, model_args.freeze_embeddings
        copy_embeddings(source, model, freeze=freeze, **model_args.hub())
    if getattr(model, "loss_type", "") is None:  # GPT-2's: it then falls back to this one, with a warning
        model.loss_type = "ForCausalLM"
    lora = model_args.lora()
    return model if lora is None else add_lora(model, lora)


def _model_options(model_args: ModelArguments) -> dict[str, Any]:
    name = model_args.dtype or "float32"
    options: dict[str, Any] = {"dtype": name if name == "auto" else getattr(torch, name)}
    if model_args.attn_implementation is not None:
        options["attn_implementation"] = model_args.attn_implementation
    return options


def _new_config(model_args: ModelArguments, tokenizer: PreTrainedTokenizerBase, block_size: int) -> PreTrainedConfig:
    # No pad token: an embedding's row for it never learns, and here that would be the start token's row.
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": None,
    }
    if model_args.config_name is not None:
        return AutoConfig.from_pretrained(model_args.config_name, vocab_size=len(tokenizer), **ids, **model_args.hub())
    return GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=block_size,
        n_layer=model_args.n_layer,
        n_embd=model_args.n_embd,
        n_head=model_args.n_head,
        resid_pdrop=model_args.dropout,
        embd_pdrop=model_args.dropout,
        attn_pdrop=model_args.dropout,
        **ids,
    )


def check_context(config: PreTrainedConfig, block_size: int) -> None:
    """Raise ValueError if a block has more tokens than the model has positions; no limit passes."""
    text = config.get_text_config()
    context = getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None)
    if context and block_size > context:
        raise ValueError(
            f"block_size is {block_size}, the model's context {context}: use --block_size {context} or less"
        )
