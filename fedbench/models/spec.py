"""What a model is, but for its weights: a `ModelSpec`, JSON, sent along with weights."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from fedbench.errors import FedbenchError
from fedbench.models.families.family import Family
from fedbench.models.families.known import family_called

PROJECTIONS = ("query", "key", "value", "output")
"""The linear layers of an attention, in the order of `Family.attention`."""
FFN_ROLES = ("gate", "up", "down")
"""The linear layers of an FFN; a plain one has no gate."""
FFN = "ffn"
"""All linear layers that an FFN has."""

Head = Literal["classes", "vocabulary"]
"""What a model answers with: classes of a row, or of each token the next one."""
POOLING = "classifier_pooling"
"""The setting of how a head makes one state of a row's, in families that leave it open."""
LAYER_KINDS = "layer_types"
"""The setting that says of each layer how it attends, in families whose layers differ."""


@dataclass(frozen=True, slots=True)
class LoraSpec:
    """LoRA on these linear layers of these layers; None means all layers.

    projections: those of attention, as in `PROJECTIONS`, and of FFNs, as in `FFN_ROLES`, or `FFN` for all of an FFN.
    """

    r: int
    alpha: float
    dropout: float = 0.0
    layers: tuple[int, ...] | None = None
    projections: tuple[str, ...] = PROJECTIONS

    @property
    def on_ffns(self) -> bool:
        """Whether there is LoRA on a linear layer of an FFN."""
        return bool({FFN, *FFN_ROLES} & {*self.projections})


@dataclass(frozen=True)
class ModelSpec:
    """Everything needed to build a model but its weights; survives JSON.

    config: a transformers configuration as a dictionary, labels and layer count included.
    ffn_widths: neurons of each layer's FFN. What is tunable follows from it: the head, the adapters of `lora`, with
    `biases` every bias of the model itself, adapters of `bottleneck` neurons behind each layer's attention and FFN,
    keys and values of `prefix` tokens in each layer's attention, and the vectors of `prompt` tokens beside the
    embeddings. head: what the model answers with, classes of a row or, of each token, the next one. repeats: how often
    each layer is run, one after the other; None for once. ranks: of each layer's attention projections, which are then
    products of two matrices and have no adapters; None for whole ones.
    """

    model_type: str
    config: Mapping[str, Any]
    ffn_widths: tuple[int, ...]
    lora: LoraSpec | None = None
    biases: bool = False
    bottleneck: int | None = None
    head: Head = "classes"
    prefix: int | None = None
    prompt: int | None = None
    repeats: tuple[int, ...] | None = None
    ranks: tuple[int | None, ...] | None = None

    @property
    def architecture(self) -> str:
        """The class of transformers; FedbenchError where the family has none with such a head."""
        if self.head == "classes":
            return self.family.architecture
        if self.family.language is None:
            raise FedbenchError(
                f"a model of type {self.model_type} predicts no next token, which the objective of language asks for; "
                "give --fm a decoder"
            )
        return self.family.language

    @property
    def family(self) -> Family:
        return family_called(self.model_type)

    def with_lora(self, lora: LoraSpec | None) -> ModelSpec:
        """The same model with other adapters."""
        return replace(self, lora=lora)

    def with_biases(self, tunable: bool = True) -> ModelSpec:
        """The same model with its biases tunable, or frozen."""
        return replace(self, biases=tunable)

    def with_bottleneck(self, neurons: int | None) -> ModelSpec:
        """The same model with bottleneck adapters of so many neurons."""
        return replace(self, bottleneck=neurons)

    def with_prefix(self, tokens: int | None) -> ModelSpec:
        """The same model with a prefix of so many tokens in the attention of every layer."""
        return replace(self, prefix=tokens)

    def with_prompt(self, tokens: int | None) -> ModelSpec:
        """The same model with so many learned vectors beside its embeddings."""
        return replace(self, prompt=tokens)

    def with_ffn_widths(self, widths: Sequence[int]) -> ModelSpec:
        """The same model with other FFN widths, one a layer."""
        return replace(self, ffn_widths=tuple(widths))

    def with_layers(self, layers: Sequence[int]) -> ModelSpec:
        """A shallower model made of these layers of this one."""
        config = {**self.config, self.family.layer_count: len(layers)}
        if kinds := self.config.get(LAYER_KINDS):
            config[LAYER_KINDS] = [kinds[i] for i in layers]
        return replace(self, config=config, ffn_widths=tuple(self.ffn_widths[i] for i in layers))

    def to_json(self) -> str:
        lora: list[Any] | None = None
        if self.lora is not None:
            layers, projections = self.lora.layers, self.lora.projections
            alpha = int(self.lora.alpha) if self.lora.alpha == int(self.lora.alpha) else self.lora.alpha  # 48 is 48.0
            lora = [self.lora.r, alpha, self.lora.dropout, None if layers is None else list(layers)]
            if projections != PROJECTIONS:
                lora.append(list(projections))
        body: dict[str, Any] = {
            "type": self.model_type,
            "config": dict(self.config),
            "ffn": list(self.ffn_widths),
            "lora": lora,
        }
        if self.biases:
            body["biases"] = True
        if self.bottleneck is not None:
            body["bottleneck"] = self.bottleneck
        if self.head != "classes":
            body["head"] = self.head
        if self.prefix is not None:
            body["prefix"] = self.prefix
        if self.prompt is not None:
            body["prompt"] = self.prompt
        if self.repeats is not None:
            body["repeats"] = list(self.repeats)
        if self.ranks is not None:
            body["ranks"] = list(self.ranks)
        return json.dumps(body, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> ModelSpec:
        body = json.loads(text)
        lora = None
        if body["lora"] is not None:
            r, alpha, dropout, layers, *rest = body["lora"]
            lora = LoraSpec(r, alpha, dropout, None if layers is None else tuple(layers), *map(tuple, rest))
        more = {name: body[name] for name in ("biases", "bottleneck", "head", "prefix", "prompt") if name in body}
        more |= {name: tuple(body[name]) for name in ("repeats", "ranks") if name in body}
        return cls(body["type"], body["config"], tuple(body["ffn"]), lora, **more)
