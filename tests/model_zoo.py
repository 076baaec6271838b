"""Twenty tiny, random transformers models of different families, built from configs without a network.

Each `Family` builds a seeded model (about 32 wide, two layers, 99 tokens, no dropout), makes deterministic
batches with labels, and a list of examples for a `Trainer`. `FAMILIES` holds all; `family(name)` finds one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

VOCABULARY = 99
WIDTH = 32
LAYERS = 2
HEADS = 4
CLASSES = 3
CONTEXT = 32
IMAGE = 16

Kind = Literal["causal_lm", "seq2seq", "text_classification", "image_classification"]


@dataclass(frozen=True)
class Family:
    """One model family: how to build it, what to feed it.

    Every trainable parameter of every family receives a gradient that is not identically zero. For key
    biases (opt, bart, bert, roberta, distilbert, albert, electra, vit) it is rounding noise only: softmax is
    blind to a constant added to all scores of a query, so the exact gradient is zero. The noise moves them;
    nothing may be concluded from its size.
    """

    name: str
    make: Callable[[], PreTrainedModel]
    kind: Kind

    def build(self, seed: int = 0) -> PreTrainedModel:
        """A new model in training mode; equal seeds give equal weights. Leaves the global generator alone."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = self.make()
        return model.train()

    def batch(self, n: int = 4, seq: int = 12, seed: int = 0) -> dict[str, Tensor]:
        """`n` stacked examples, labels included."""
        rows = self.dataset(n, seq=seq, seed=seed)
        return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}

    def dataset(self, n: int, seq: int = 12, seed: int = 0) -> list[dict[str, Tensor]]:
        """`n` examples without a batch axis, as a `Trainer` with the default collator takes them."""
        generator = torch.Generator().manual_seed(1_000 + seed)
        return [self._example(seq, index, generator) for index in range(n)]

    def _example(self, seq: int, index: int, generator: torch.Generator) -> dict[str, Tensor]:
        if self.kind == "image_classification":
            pixels = torch.randn(3, IMAGE, IMAGE, generator=generator)
            return {"pixel_values": pixels, "labels": torch.tensor(index % CLASSES)}
        tokens = torch.randint(4, VOCABULARY, (seq,), generator=generator)  # 0..3 are left for special tokens
        if self.kind == "causal_lm":
            return {"input_ids": tokens, "labels": tokens.clone()}
        if self.kind == "seq2seq":
            return {"input_ids": tokens, "labels": torch.randint(4, VOCABULARY, (seq,), generator=generator)}
        example = {"input_ids": tokens, "labels": torch.tensor(index % CLASSES)}
        example["attention_mask"] = torch.ones(seq, dtype=torch.long)
        return example


def _gpt2() -> PreTrainedModel:
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=CONTEXT,
        n_embd=WIDTH,
        n_layer=LAYERS,
        n_head=HEADS,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return transformers.GPT2LMHeadModel(config)


def _decoder(**extra: Any) -> dict[str, Any]:
    """The names most decoder configs share."""
    shared = {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "max_position_embeddings": CONTEXT,
        "attention_dropout": 0.0,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return shared | extra


def _gpt_neox() -> PreTrainedModel:
    return transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**_decoder(hidden_dropout=0.0)))


def _llama() -> PreTrainedModel:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**_decoder(num_key_value_heads=2)))


def _qwen3() -> PreTrainedModel:
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**_decoder(num_key_value_heads=2, head_dim=8)))


def _mistral() -> PreTrainedModel:
    return transformers.MistralForCausalLM(
        transformers.MistralConfig(**_decoder(num_key_value_heads=2, sliding_window=8))
    )


def _gemma3() -> PreTrainedModel:
    config = transformers.Gemma3TextConfig(
        **_decoder(
            num_key_value_heads=2,
            head_dim=8,
            query_pre_attn_scalar=8,
            sliding_window=8,
            layer_types=["sliding_attention", "full_attention"],
        )
    )
    return transformers.Gemma3ForCausalLM(config)


def _phi3() -> PreTrainedModel:
    return transformers.Phi3ForCausalLM(
        transformers.Phi3Config(
            **_decoder(
                num_key_value_heads=2,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                original_max_position_embeddings=CONTEXT,
            )
        )
    )


def _mixtral() -> PreTrainedModel:
    # Two of three experts are chosen, and the router's balancing loss is on: every expert soon sees a token.
    config = transformers.MixtralConfig(
        **_decoder(
            num_key_value_heads=2,
            num_local_experts=3,
            num_experts_per_tok=2,
            output_router_logits=True,
            router_aux_loss_coef=0.02,
        )
    )
    return transformers.MixtralForCausalLM(config)


def _opt() -> PreTrainedModel:
    config = transformers.OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        word_embed_proj_dim=WIDTH,
        ffn_dim=2 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        max_position_embeddings=CONTEXT,
        dropout=0.0,
        attention_dropout=0.0,
        layerdrop=0.0,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return transformers.OPTForCausalLM(config)


def _bloom() -> PreTrainedModel:
    config = transformers.BloomConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        n_layer=LAYERS,
        n_head=HEADS,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return transformers.BloomForCausalLM(config)


def _mamba() -> PreTrainedModel:
    config = transformers.MambaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        state_size=4,
        num_hidden_layers=LAYERS,
        conv_kernel=4,
        expand=2,
        time_step_rank=4,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return transformers.MambaForCausalLM(config)


def _t5() -> PreTrainedModel:
    config = transformers.T5Config(
        vocab_size=VOCABULARY,
        d_model=WIDTH,
        d_kv=8,
        d_ff=2 * WIDTH,
        num_layers=LAYERS,
        num_heads=HEADS,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=16,
        dropout_rate=0.0,
        pad_token_id=0,
        eos_token_id=1,
    )
    config.decoder_start_token_id = 0
    return transformers.T5ForConditionalGeneration(config)


def _bart() -> PreTrainedModel:
    config = transformers.BartConfig(
        vocab_size=VOCABULARY,
        d_model=WIDTH,
        encoder_layers=LAYERS,
        decoder_layers=LAYERS,
        encoder_attention_heads=HEADS,
        decoder_attention_heads=HEADS,
        encoder_ffn_dim=2 * WIDTH,
        decoder_ffn_dim=2 * WIDTH,
        max_position_embeddings=CONTEXT,
        dropout=0.0,
        attention_dropout=0.0,
        activation_dropout=0.0,
        encoder_layerdrop=0.0,
        decoder_layerdrop=0.0,
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=2,
        decoder_start_token_id=2,
        forced_eos_token_id=2,
    )
    return transformers.BartForConditionalGeneration(config)


def _encoder(**extra: Any) -> dict[str, Any]:
    """The names the BERT-like configs share."""
    shared = {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "max_position_embeddings": CONTEXT,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "classifier_dropout": 0.0,
        "num_labels": CLASSES,
        "pad_token_id": 0,
    }
    return shared | extra


def _bert() -> PreTrainedModel:
    return transformers.BertForSequenceClassification(transformers.BertConfig(**_encoder()))


def _roberta() -> PreTrainedModel:
    config = transformers.RobertaConfig(**_encoder(type_vocab_size=1, pad_token_id=1, bos_token_id=0, eos_token_id=2))
    return transformers.RobertaForSequenceClassification(config)


def _electra() -> PreTrainedModel:
    return transformers.ElectraForSequenceClassification(transformers.ElectraConfig(**_encoder(embedding_size=16)))


def _albert() -> PreTrainedModel:
    config = transformers.AlbertConfig(
        **_encoder(embedding_size=16, classifier_dropout_prob=0.0, inner_group_num=1, num_hidden_groups=1)
    )
    return transformers.AlbertForSequenceClassification(config)


def _deberta_v2() -> PreTrainedModel:
    # With the usual initial weights of 0.02 the position norm's gradient is too small to move a float32 one.
    config = transformers.DebertaV2Config(
        **_encoder(
            initializer_range=0.2,
            relative_attention=True,
            pos_att_type=["p2c", "c2p"],
            share_att_key=True,
            position_buckets=8,
            max_relative_positions=16,
            norm_rel_ebd="layer_norm",
            position_biased_input=False,
            pooler_dropout=0.0,
            pooler_hidden_size=WIDTH,
            cls_dropout=0.0,
        )
    )
    return transformers.DebertaV2ForSequenceClassification(config)


def _distilbert() -> PreTrainedModel:
    config = transformers.DistilBertConfig(
        vocab_size=VOCABULARY,
        dim=WIDTH,
        hidden_dim=2 * WIDTH,
        n_layers=LAYERS,
        n_heads=HEADS,
        max_position_embeddings=CONTEXT,
        dropout=0.0,
        attention_dropout=0.0,
        seq_classif_dropout=0.0,
        pad_token_id=0,
    )
    config.num_labels = CLASSES
    return transformers.DistilBertForSequenceClassification(config)


def _vit() -> PreTrainedModel:
    config = transformers.ViTConfig(
        image_size=IMAGE,
        patch_size=4,
        num_channels=3,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    config.num_labels = CLASSES
    return transformers.ViTForImageClassification(config)


FAMILIES: tuple[Family, ...] = (
    Family("gpt2", _gpt2, "causal_lm"),
    Family("gpt_neox", _gpt_neox, "causal_lm"),
    Family("llama", _llama, "causal_lm"),
    Family("qwen3", _qwen3, "causal_lm"),
    Family("mistral", _mistral, "causal_lm"),
    Family("gemma3", _gemma3, "causal_lm"),
    Family("phi3", _phi3, "causal_lm"),
    Family("opt", _opt, "causal_lm"),
    Family("bloom", _bloom, "causal_lm"),
    Family("t5", _t5, "seq2seq"),
    Family("bart", _bart, "seq2seq"),
    Family("bert", _bert, "text_classification"),
    Family("roberta", _roberta, "text_classification"),
    Family("distilbert", _distilbert, "text_classification"),
    Family("deberta_v2", _deberta_v2, "text_classification"),
    Family("albert", _albert, "text_classification"),
    Family("electra", _electra, "text_classification"),
    Family("mixtral", _mixtral, "causal_lm"),
    Family("mamba", _mamba, "causal_lm"),
    Family("vit", _vit, "image_classification"),
)


def family(name: str) -> Family:
    """The family of that name."""
    return next(record for record in FAMILIES if record.name == name)
