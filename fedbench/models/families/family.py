"""What the parts of a model family are called: what `Family` says is all that fedbench knows of an architecture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Family:
    """Paths of a family's parts, as in the transformers class `architecture`.

    name: transformers' `model_type`. layers, embeddings: from the model. attention (query, key, value, output), ffn_*:
    from a layer. ffn_activation: the module whose output is the FFN's activation. attention_norm, ffn_norm: the
    LayerNorms behind attention and FFN, None in pre-norm models. residual: the module that adds a layer's input (its
    second argument) to the attention's output, None where the layer does so itself. head: what is trained with the
    adapters. dropout: the configuration's fields that turn all dropout off. activation, layer_count, ffn_width: the
    configuration's fields. token_types: whether the model reads segment ids, which pairs then carry. position_offset:
    position of a row's first token; None where positions cannot be given. words, positions, segments: the tables of a
    text family's embeddings, from `embeddings`. left_over: ends of the names of tensors that checkpoints hold inside
    the encoder and classification does without.
    """

    name: str
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
