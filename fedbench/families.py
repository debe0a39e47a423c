"""What a model family's parts are called: the only place with model-specific names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Family:
    """Paths of a family's parts, as in the transformers class `architecture`.

    layers, embeddings: from the model. attention (query, key, value, output), ffn_*: from a layer. ffn_activation: the
    module whose output is the FFN's activation. ffn_norm: the LayerNorm behind the FFN, None in pre-norm models.
    residual: the module that adds a layer's input (its second argument) to the attention's output, None where the layer
    does so itself. head: what is trained with the adapters. layer_count: the configuration's field. token_types:
    whether inputs carry segment ids. position_offset: position of a row's first token; None where positions cannot be
    given.
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
    residual: str | None = None
    layer_count: str = "num_hidden_layers"
    token_types: bool = False
    position_offset: int | Literal["after padding token"] | None = None


_BERT_ATTENTION = ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense")

FAMILIES: dict[str, Family] = {
    "bert": Family(
        architecture="BertForSequenceClassification",
        modality="text",
        embeddings="bert.embeddings",
        layers="bert.encoder.layer",
        attention=_BERT_ATTENTION,
        ffn_in="intermediate.dense",
        ffn_activation="intermediate",
        ffn_out="output.dense",
        ffn_norm="output.LayerNorm",
        head=("classifier",),
        residual="attention.output",
        token_types=True,
        position_offset=0,
    ),
    "roberta": Family(
        architecture="RobertaForSequenceClassification",
        modality="text",
        embeddings="roberta.embeddings",
        layers="roberta.encoder.layer",
        attention=_BERT_ATTENTION,
        ffn_in="intermediate.dense",
        ffn_activation="intermediate",
        ffn_out="output.dense",
        ffn_norm="output.LayerNorm",
        head=("classifier",),
        residual="attention.output",
        position_offset="after padding token",
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
    ),
}
