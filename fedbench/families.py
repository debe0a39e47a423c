"""What a model family's parts are called: the only place with model-specific names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal


@dataclass(frozen=True, slots=True)
class Family:
    """Paths of a family's parts, as in the transformers class `architecture`.

    layers, embeddings: from the model. attention (query, key, value, output), ffn_*: from a layer. ffn_activation: the
    module whose output is the FFN's activation. attention_norm, ffn_norm: the LayerNorms behind attention and FFN, None
    in pre-norm models. residual: the module that adds a layer's input (its second argument) to the attention's output,
    None where the layer does so itself. head: what is trained with the adapters. dropout: the configuration's fields
    that turn all dropout off. activation, layer_count, ffn_width: the configuration's fields. token_types: whether the
    model reads segment ids, which pairs then carry. position_offset: position of a row's first token; None where
    positions cannot be given.
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
