"""A foundation model in memory: its weights, and how to read inputs for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fedbench.models.build import build
from fedbench.models.families.family import Family
from fedbench.models.spec import LoraSpec, ModelSpec
from fedbench.models.weights import checkpoint_name, load_frozen, set_tensors, tunable_names


@dataclass
class FoundationModel:
    """A pre-trained model without a task head, and how to read inputs for it.

    name: what records call it, `fm_label`. state: frozen weights by checkpoint name. processor: its tokenizer or image
    settings. content_hash: of configuration and weights, and of the recipe for a model pre-trained here.
    trained_head: head tensors by parameter name where the checkpoint has one for this task's classes. notes: lines for
    the user about what was found.
    """

    name: str
    spec: ModelSpec
    state: dict[str, Tensor] = field(repr=False)
    processor: Any
    content_hash: str
    trained_head: dict[str, Tensor] | None = field(default=None, repr=False)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def family(self) -> Family:
        return self.spec.family

    def positions(self) -> int:
        """How many tokens a row may have: the positions a text model has embeddings for."""
        if self.family.rotary:
            return int(self.configured("max_position_embeddings"))
        first = self.family.position_offset
        if first == "after padding token":
            first = int(self.spec.config["pad_token_id"]) + 1
        return self._rows(self.family.positions) - (first or 0)

    def segments(self) -> int:
        """How many token types a text model has embeddings for."""
        return self._rows(self.family.segments)

    def _rows(self, table: str) -> int:
        inside = f"{self.family.embeddings}.{table}"
        return len(self.state[inside if inside in self.state else table])

    def configured(self, setting: str) -> Any:
        """A setting of the model's configuration, which holds only those that are not transformers' defaults."""
        from transformers import AutoConfig

        return getattr(AutoConfig.for_model(self.spec.model_type, **self.spec.config), setting)

    def build(self, lora: LoraSpec | None, device: torch.device) -> nn.Module:
        """A new module with the FM's weights; LoRA and head are zero until set."""
        return self.tuned(self.spec.with_lora(lora), device)

    def tuned(self, spec: ModelSpec, device: torch.device) -> nn.Module:
        """The same for a specification of this model with any tunables; those that are not the FM's own are zero."""
        model = build(spec)
        own = {name: there for name in tunable_names(model) if (there := checkpoint_name(name)) in self.state}
        load_frozen(model, {name: tensor for name, tensor in self.state.items() if name not in set(own.values())})
        set_tensors(model, {name: self.state[there] for name, there in own.items()})
        return model.to(device)
