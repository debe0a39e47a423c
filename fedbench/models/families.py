"""What a model family's parts are called: the only place with model-specific names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class Family:
    """Paths of a family's parts, as in the transformers class `architecture`.

    layers, embeddings: from the model. attention (query, key, value, output), ffn_*: from a layer. ffn_activation: the
    module whose output is the FFN's activation. attention_norm, ffn_norm: the LayerNorms behind attention and FFN, None
    in pre-norm models. residual: the module that adds a layer's input (its second argument) to the attention's output,
    None where the layer does so itself. head: what is trained with the adapters. dropout: the configuration's fields
    that turn all dropout off. activation, layer_count, ffn_width: the configuration's fields. token_types: whether the
    model reads segment ids, which pairs then carry. position_offset: position of a row's first token; None where
    positions cannot be given. words, positions, segments: the tables of a text family's embeddings, from `embeddings`.
    left_over: ends of the names of tensors that checkpoints hold inside the encoder and classification does without.
    """

    architecture: str
    modality: Literal["text", "image"]
    embeddings: str
    layers: str
    attention: tuple[str, str, str, str]
    ffn_in: str
    ffn_activation: str
    ffn_out: str
    ffn_norm: str | None
    head: tuple[str, ...]
    dropout: Mapping[str, float | None]
    attention_norm: str | None = None
    residual: str | None = None
    activation: str = "hidden_act"
    layer_count: str = "num_hidden_layers"
    ffn_width: str = "intermediate_size"
    token_types: bool = False
    position_offset: int | Literal["after padding token"] | None = None
    words: str = "word_embeddings.weight"
    positions: str = "position_embeddings.weight"
    segments: str = "token_type_embeddings.weight"
    left_over: tuple[str, ...] = ("position_ids", "token_type_ids", "mask_token")


_BERT = Family(
    architecture="BertForSequenceClassification",
    modality="text",
    embeddings="bert.embeddings",
    layers="bert.encoder.layer",
    attention=("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"),
    ffn_in="intermediate.dense",
    ffn_activation="intermediate",
    ffn_out="output.dense",
    ffn_norm="output.LayerNorm",
    head=("classifier",),
    attention_norm="attention.output.LayerNorm",
    residual="attention.output",
    dropout={"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "classifier_dropout": None},
    token_types=True,
    position_offset=0,
)

FAMILIES: dict[str, Family] = {
    "bert": _BERT,
    "roberta": replace(
        _BERT,
        architecture="RobertaForSequenceClassification",
        embeddings="roberta.embeddings",
        layers="roberta.encoder.layer",
        token_types=False,
        position_offset="after padding token",
    ),
    "distilbert": Family(
        architecture="DistilBertForSequenceClassification",
        modality="text",
        embeddings="distilbert.embeddings",
        layers="distilbert.transformer.layer",
        attention=("attention.q_lin", "attention.k_lin", "attention.v_lin", "attention.out_lin"),
        ffn_in="ffn.lin1",
        ffn_activation="ffn.activation",
        ffn_out="ffn.lin2",
        ffn_norm="output_layer_norm",
        head=("pre_classifier", "classifier"),
        attention_norm="sa_layer_norm",
        dropout={"dropout": 0.0, "attention_dropout": 0.0, "qa_dropout": 0.0, "seq_classif_dropout": 0.0},
        activation="activation",
        layer_count="n_layers",
        ffn_width="hidden_dim",
        position_offset=0,
    ),
    "vit": Family(
        architecture="ViTForImageClassification",
        modality="image",
        embeddings="vit.embeddings",
        layers="vit.layers",
        attention=("attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.o_proj"),
        ffn_in="mlp.fc1",
        ffn_activation="mlp.activation_fn",
        ffn_out="mlp.fc2",
        ffn_norm=None,
        head=("classifier",),
        dropout={"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    ),
}

NOT_COMPUTED: dict[str, tuple[Any, str]] = {
    "is_decoder": (False, "attention that looks back only"),
    "is_encoder_decoder": (False, "a decoder"),
    "add_cross_attention": (False, "attention to another model"),
    "cross_attention_hidden_size": (None, "attention to another model"),
    "position_embedding_type": ("absolute", "relative positions"),
    "rotary_value": (False, "rotary positions"),
    "rope_theta": (None, "rotary positions"),
    "rope_scaling": (None, "rotary positions"),
    "rope_parameters": (None, "rotary positions"),
    "attention_window": (None, "attention within a window"),
    "sliding_window": (None, "attention within a window"),
    "pre_norm": (False, "LayerNorms before attention and FFN"),
    "normalize_before": (False, "LayerNorms before attention and FFN"),
    "feed_forward_type": ("original", "another feed-forward layer"),
    "per_layer_config": (None, "layers that differ"),
    "pruned_heads": (None, "heads that were cut out"),
    "chunk_size_feed_forward": (0, "a feed-forward layer in chunks"),
    "quantization_config": (None, "quantised weights"),
    "compression_config": (None, "compressed weights"),
    "adapters": (None, "adapters of another library"),
}
"""Setting of a checkpoint -> the value that asks for nothing, and what any other but null, false or 0 asks for.

transformers keeps a setting that it has no use for, so a model of another make would run as if it were a plain one.
"""

WITHOUT_MEANING = (
    "model_type", "num_labels", "torch_dtype", "torchscript", "use_bfloat16", "finetuning_task",
    "task_specific_params", "auto_map", "tokenizer_class", "prefix", "sentence_transformers",
    "gradient_checkpointing", "output_past", "output_attentions", "directionality", "pooler_fc_size",
    "pooler_num_attention_heads", "pooler_num_fc_layers", "pooler_size_per_head", "pooler_type", "tie_weights_",
    "n_words", "do_sample", "early_stopping", "length_penalty", "max_length", "min_length", "num_beams",
    "num_beam_groups", "num_return_sequences", "repetition_penalty", "temperature", "top_k", "top_p", "typical_p",
    "diversity_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "decoder_start_token_id",
    "remove_invalid_values",
)  # fmt: skip
"""Settings of checkpoints that no encoder makes use of: of tasks, of text generation, of training, of files."""
