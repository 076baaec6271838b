"""Tiny, random transformers models of many families, built from configs without a network.

Each `Family` builds a seeded model (about 32 wide, two layers, 99 tokens, 16x16 pixels, no dropout), makes
deterministic batches with labels, and a list of examples for a `Trainer`. `FAMILIES` holds all; `family(name)`
finds one.
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
PATCH = 4
MELS = 8
FRAMES = 16
SAMPLES = 64

Kind = Literal[
    "causal_lm",
    "seq2seq",
    "text_classification",
    "image_classification",
    "image_segmentation",
    "image_text",
    "speech_seq2seq",
    "speech_ctc",
]


@dataclass(frozen=True)
class Family:
    """One model family: how to build it, what to feed it.

    Every trainable parameter of every family receives a gradient that is not identically zero. For key
    biases (opt, bart, bert, roberta, distilbert, albert, electra, vit and everything built like them) it is
    rounding noise only: softmax is blind to a constant added to all scores of a query, so the exact gradient is
    zero. So it is for shifts that a later BatchNorm takes away again (efficientnet, mobilenet_v2, mobilevit,
    segformer). The noise moves them; nothing may be concluded from its size.
    """

    name: str
    make: Callable[[], PreTrainedModel]
    kind: Kind
    image: int = IMAGE
    """Side of a square picture, where there is one."""

    def build(self, seed: int = 0) -> PreTrainedModel:
        """A new model in training mode; equal seeds give equal weights. Leaves the global generator alone."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = self.make()
        return model.train()

    def batch(self, n: int = 4, seq: int = 12, seed: int = 0) -> dict[str, Tensor]:
        """`n` stacked examples, labels included."""
        return self.collate(self.dataset(n, seq=seq, seed=seed))

    def collate(self, rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """A batch of examples; a contrastive model computes its loss only when it is asked to."""
        batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
        if self.kind == "image_text":
            batch["return_loss"] = torch.tensor(True)
        return batch

    def dataset(self, n: int, seq: int = 12, seed: int = 0) -> list[dict[str, Tensor]]:
        """`n` examples without a batch axis, as a `Trainer` takes them.

        With the default collator, except for the kind "image_text", which needs `collate`.
        """
        generator = torch.Generator().manual_seed(1_000 + seed)
        return [self._example(seq, index, generator) for index in range(n)]

    def _example(self, seq: int, index: int, generator: torch.Generator) -> dict[str, Tensor]:
        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        def integers(low: int, high: int, *shape: int) -> Tensor:
            return torch.randint(low, high, shape, generator=generator)

        # Of the tokens 0..3 are left for special ones.
        match self.kind:
            case "image_classification":
                return {"pixel_values": normal(3, self.image, self.image), "labels": torch.tensor(index % CLASSES)}
            case "image_segmentation":
                pixels = normal(3, self.image, self.image)
                return {"pixel_values": pixels, "labels": integers(0, CLASSES, self.image, self.image)}
            case "speech_seq2seq":
                return {"input_features": normal(MELS, FRAMES), "labels": integers(4, VOCABULARY, seq)}
            case "speech_ctc":
                return {"input_values": normal(SAMPLES), "labels": integers(4, VOCABULARY, seq // 3)}
        example = {"input_ids": integers(4, VOCABULARY, seq)}
        match self.kind:
            case "causal_lm":
                example["labels"] = example["input_ids"].clone()
            case "seq2seq":
                example["labels"] = integers(4, VOCABULARY, seq)
            case "image_text":
                example["pixel_values"] = normal(3, self.image, self.image)
            case "text_classification":
                example["labels"] = torch.tensor(index % CLASSES)
        if self.kind in ("text_classification", "image_text"):
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


def _patches(**extra: Any) -> dict[str, Any]:
    """The names the vision transformers share: sixteen patches."""
    shared = {
        "image_size": IMAGE,
        "patch_size": PATCH,
        "num_channels": 3,
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "num_labels": CLASSES,
    }
    return shared | extra


def _vit() -> PreTrainedModel:
    return transformers.ViTForImageClassification(transformers.ViTConfig(**_patches()))


def _deit() -> PreTrainedModel:
    return transformers.DeiTForImageClassification(transformers.DeiTConfig(**_patches()))


def _dinov2() -> PreTrainedModel:
    # A mask token is for pre-training only: the classification loss never reaches it.
    config = transformers.Dinov2Config(**_patches(mlp_ratio=2, use_mask_token=False, drop_path_rate=0.0))
    return transformers.Dinov2ForImageClassification(config)


def _beit() -> PreTrainedModel:
    config = transformers.BeitConfig(
        **_patches(
            drop_path_rate=0.0,
            use_absolute_position_embeddings=True,
            use_relative_position_bias=True,
            layer_scale_init_value=0.5,
        )
    )
    return transformers.BeitForImageClassification(config)


def _pyramid(**extra: Any) -> dict[str, Any]:
    """The names the hierarchical models share: two stages, of sixteen and of four positions."""
    shared = {
        "image_size": IMAGE,
        "patch_size": PATCH,
        "num_channels": 3,
        "embed_dim": 16,
        "depths": [2, 1],
        "num_heads": [2, 4],
        "window_size": 2,
        "mlp_ratio": 2.0,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "drop_path_rate": 0.0,
        "num_labels": CLASSES,
    }
    return shared | extra


def _swin() -> PreTrainedModel:
    return transformers.SwinForImageClassification(transformers.SwinConfig(**_pyramid()))


def _swinv2() -> PreTrainedModel:
    config = transformers.Swinv2Config(**_pyramid(initializer_range=0.05))
    return transformers.Swinv2ForImageClassification(config)


def _focalnet() -> PreTrainedModel:
    # With the usual initial weights of 0.02 the context's gradient is too small to move a float32 weight.
    config = transformers.FocalNetConfig(
        **_pyramid(
            hidden_sizes=[16, 32],
            focal_levels=[2, 2],
            focal_windows=[3, 3],
            use_layerscale=True,
            layerscale_value=0.5,
            initializer_range=0.2,
        )
    )
    return transformers.FocalNetForImageClassification(config)


def _stages(**extra: Any) -> dict[str, Any]:
    """The names the convolutional networks share: two stages."""
    return {"num_channels": 3, "hidden_sizes": [16, 32], "depths": [1, 1], "num_labels": CLASSES} | extra


def _convnext() -> PreTrainedModel:
    config = transformers.ConvNextConfig(**_stages(num_stages=2, drop_path_rate=0.0, layer_scale_init_value=0.5))
    return transformers.ConvNextForImageClassification(config)


def _convnextv2() -> PreTrainedModel:
    config = transformers.ConvNextV2Config(**_stages(num_stages=2, drop_path_rate=0.0, initializer_range=0.2))
    return transformers.ConvNextV2ForImageClassification(config)


def _resnet() -> PreTrainedModel:
    config = transformers.ResNetConfig(**_stages(embedding_size=8, layer_type="bottleneck"))
    return transformers.ResNetForImageClassification(config)


def _regnet() -> PreTrainedModel:
    config = transformers.RegNetConfig(**_stages(embedding_size=8, groups_width=8, layer_type="y"))
    return transformers.RegNetForImageClassification(config)


def _mobilevit() -> PreTrainedModel:
    # The depth is fixed. Norms start at scales of about `initializer_range`: 0.02 starves the first layers, and much
    # more than 0.05 makes a training so sensitive to rounding that two equal ones cannot be told from different ones.
    config = transformers.MobileViTConfig(
        image_size=2 * IMAGE,
        num_channels=3,
        patch_size=2,
        hidden_sizes=[8, 8, 8],
        neck_hidden_sizes=[4, 4, 8, 8, 8, 8, 16],
        num_attention_heads=2,
        expand_ratio=2.0,
        output_stride=8,
        hidden_dropout_prob=0.0,
        classifier_dropout_prob=0.0,
        initializer_range=0.05,
        num_labels=CLASSES,
    )
    return transformers.MobileViTForImageClassification(config)


def _mobilenet_v2() -> PreTrainedModel:
    # The number of layers is fixed.
    config = transformers.MobileNetV2Config(
        image_size=2 * IMAGE,
        num_channels=3,
        depth_multiplier=0.05,
        depth_divisible_by=4,
        min_depth=4,
        expand_ratio=2.0,
        output_stride=8,
        finegrained_output=False,
        classifier_dropout_prob=0.0,
        num_labels=CLASSES,
    )
    return transformers.MobileNetV2ForImageClassification(config)


def _efficientnet() -> PreTrainedModel:
    # Norms start at scales of about `initializer_range`, and the usual 0.02 starves the first layers.
    config = transformers.EfficientNetConfig(
        image_size=IMAGE,
        num_channels=3,
        width_coefficient=0.25,
        depth_coefficient=1.0,
        depth_divisor=4,
        in_channels=[32, 32],
        out_channels=[32, 64],
        kernel_sizes=[3, 5],
        strides=[1, 2],
        num_block_repeats=[1, 2],
        expand_ratios=[1, 2],
        hidden_dim=320,
        dropout_rate=0.0,
        drop_connect_rate=0.0,
        initializer_range=0.5,
        num_labels=CLASSES,
    )
    return transformers.EfficientNetForImageClassification(config)


def _segformer() -> PreTrainedModel:
    # With the usual initial weights of 0.02 some norms' gradients are too small to move a float32 one.
    config = transformers.SegformerConfig(
        num_channels=3,
        num_encoder_blocks=2,
        depths=[1, 1],
        sr_ratios=[2, 1],
        hidden_sizes=[16, 32],
        patch_sizes=[7, 3],
        strides=[4, 2],
        num_attention_heads=[2, 4],
        mlp_ratios=[2, 2],
        decoder_hidden_size=16,
        initializer_range=0.1,
        drop_path_rate=0.0,
        classifier_dropout_prob=0.0,
        num_labels=CLASSES,
    )
    return transformers.SegformerForSemanticSegmentation(config)


def _pair(**extra: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the text and the vision halves of a contrastive model are given."""
    shared = {
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
    } | extra
    text = {"vocab_size": VOCABULARY, "max_position_embeddings": CONTEXT, "pad_token_id": 1, "bos_token_id": 0}
    return shared | text | {"eos_token_id": 2}, shared | {"image_size": IMAGE, "patch_size": PATCH}


def _clip() -> PreTrainedModel:
    text, vision = _pair(projection_dim=WIDTH)
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=WIDTH)
    return transformers.CLIPModel(config)


def _siglip() -> PreTrainedModel:
    text, vision = _pair()
    return transformers.SiglipModel(transformers.SiglipConfig(text_config=text, vision_config=vision))


def _whisper() -> PreTrainedModel:
    config = transformers.WhisperConfig(
        vocab_size=VOCABULARY,
        num_mel_bins=MELS,
        d_model=WIDTH,
        encoder_layers=LAYERS,
        decoder_layers=LAYERS,
        encoder_attention_heads=HEADS,
        decoder_attention_heads=HEADS,
        encoder_ffn_dim=2 * WIDTH,
        decoder_ffn_dim=2 * WIDTH,
        max_source_positions=FRAMES // 2,
        max_target_positions=CONTEXT,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    return transformers.WhisperForConditionalGeneration(config)


def _wav2vec2() -> PreTrainedModel:
    config = transformers.Wav2Vec2Config(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        conv_dim=[8, 16],
        conv_kernel=[4, 3],
        conv_stride=[2, 2],
        conv_bias=False,
        feat_extract_norm="group",
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        hidden_dropout=0.0,
        activation_dropout=0.0,
        attention_dropout=0.0,
        feat_proj_dropout=0.0,
        final_dropout=0.0,
        layerdrop=0.0,
        mask_time_prob=0.0,
        ctc_loss_reduction="mean",
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return transformers.Wav2Vec2ForCTC(config)


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
    Family("deit", _deit, "image_classification"),
    Family("dinov2", _dinov2, "image_classification"),
    Family("beit", _beit, "image_classification"),
    Family("swin", _swin, "image_classification"),
    Family("swinv2", _swinv2, "image_classification"),
    Family("focalnet", _focalnet, "image_classification"),
    Family("convnext", _convnext, "image_classification"),
    Family("convnextv2", _convnextv2, "image_classification"),
    Family("resnet", _resnet, "image_classification"),
    Family("regnet", _regnet, "image_classification"),
    Family("efficientnet", _efficientnet, "image_classification"),
    Family("mobilenet_v2", _mobilenet_v2, "image_classification", image=2 * IMAGE),
    Family("mobilevit", _mobilevit, "image_classification", image=2 * IMAGE),
    Family("segformer", _segformer, "image_segmentation"),
    Family("clip", _clip, "image_text"),
    Family("siglip", _siglip, "image_text"),
    Family("whisper", _whisper, "speech_seq2seq"),
    Family("wav2vec2", _wav2vec2, "speech_ctc"),
)


def family(name: str) -> Family:
    """The family of that name."""
    return next(record for record in FAMILIES if record.name == name)
