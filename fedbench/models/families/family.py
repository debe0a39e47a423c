"""What the parts of a model family are called: what `Family` says is all that fedbench knows of an architecture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Literal


@dataclass(frozen=True, slots=True)
class Family:
    """Paths of a family's parts, as in the transformers class `architecture`.

    name: transformers' `model_type`. layers, embeddings: from the model. attention (query, key, value, output), ffn_*:
    from a layer. Where one linear layer gives query, key and value, its path stands three times. ffn_activation: the
    module whose output is the FFN's activation; of a gated FFN, the module that the gate goes through. attention_norm,
    ffn_norm: the LayerNorms behind attention and FFN, None in pre-norm models. residual: the module that adds a layer's
    input (its second argument) to the attention's output, None where the layer does so itself. head: what is trained
    with the adapters. dropout: the configuration's fields that turn all dropout off. activation, layer_count,
    ffn_width: the configuration's fields. token_types: whether the model reads segment ids, which pairs then carry.
    position_offset: position of a row's first token; None where positions cannot be given. words, positions, segments:
    the tables of a text family's embeddings, from `embeddings`, or from the model where they lie elsewhere. left_over:
    ends of the names of tensors that checkpoints hold inside the encoder and classification does without.

    ffn_gate: the linear layer whose activation is multiplied with the output of ffn_in (GLU variants, Shazeer
    2020); the same path as ffn_in where one layer holds both, the gate's rows first. None for a plain FFN. reads:
    which token of a row the head reads: "last" in decoders, where no other token has seen the whole row. language:
    the class of transformers that predicts the next token, in decoders. rotary: whether positions are turned into
    the attention, so that the model has no table of them. relative: whether the scores of two tokens go by their
    distance too. beside: modules of embeddings outside of `embeddings`. packs: whether packed batches are computed;
    others are fed padded. transposed: whether checkpoints keep linear layers transposed (transformers' `Conv1D`);
    they are straightened when read. padding_token: the number of the padding token where the model has it built in.
    computes: settings among those of `fedbench.models.families.refused.NOT_COMPUTED` that this family's class does
    compute. norms_before: of a pre-norm model, the norms in front of attention and FFN, by which whole layers are
    computed as one function.
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
    # Hashes hold the text of a plugin's description: what was added since stays out of it where it says nothing.
    ffn_gate: str | None = field(default=None, repr=False)
    reads: Literal["first", "last"] = field(default="first", repr=False)
    rotary: bool = field(default=False, repr=False)
    relative: bool = field(default=False, repr=False)
    language: str | None = field(default=None, repr=False)
    beside: tuple[str, ...] = field(default=(), repr=False)
    packs: bool = field(default=True, repr=False)
    transposed: bool = field(default=False, repr=False)
    padding_token: int | None = field(default=None, repr=False)
    computes: tuple[str, ...] = field(default=(), repr=False)
    norms_before: tuple[str, str] | None = field(default=None, repr=False)

    def packed(self, pooling: str | None) -> bool:
        """Whether batches can lose their padding, in a model whose head pools tokens so, by its configuration."""
        return self.packs and self.position_offset is not None and pooling != "mean"

    def described(self) -> str:
        """All that this description says, as text; descriptions that say the same give the same text."""
        added = {f.name: getattr(self, f.name) for f in fields(self) if not f.repr}
        said = [f"{f.name}={added[f.name]!r}" for f in fields(self) if f.name in added and added[f.name] != f.default]
        return " ".join([repr(self), *said])
