"""Access to a model's parts by role, whatever its family calls them."""

from __future__ import annotations

import re

from torch import nn

from fedbench.errors import FedbenchError
from fedbench.models.families.family import Family
from fedbench.models.families.known import family_called


class Parts:
    """A model's parts by role, whatever the family calls them; works with and without LoRA."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.family = family_of(model)
        layers = model.get_submodule(self.family.layers)
        assert isinstance(layers, nn.ModuleList)
        self.count = len(layers)

    def layer_path(self, i: int) -> str:
        return f"{self.family.layers}.{i}"

    def layer(self, i: int) -> nn.Module:
        return self.model.get_submodule(self.layer_path(i))

    def ffn_in_path(self, i: int) -> str:
        return f"{self.layer_path(i)}.{self.family.ffn_in}"

    def ffn_out_path(self, i: int) -> str:
        return f"{self.layer_path(i)}.{self.family.ffn_out}"

    def ffn_norm_path(self, i: int) -> str | None:
        """The LayerNorm behind the FFN in post-norm models; None where there is none."""
        return f"{self.layer_path(i)}.{self.family.ffn_norm}" if self.family.ffn_norm else None

    def ffn_activation_path(self, i: int) -> str:
        """The module whose output is the FFN's activation, [B, T, d_ff]."""
        return f"{self.layer_path(i)}.{self.family.ffn_activation}"

    def ffn_in(self, i: int) -> nn.Linear:
        return _linear(self.model, self.ffn_in_path(i))

    def ffn_out(self, i: int) -> nn.Linear:
        return _linear(self.model, self.ffn_out_path(i))

    def attention_paths(self, i: int) -> list[str]:
        """Query, key, value and output projections, as in `PROJECTIONS`."""
        return [f"{self.layer_path(i)}.{path}" for path in self.family.attention]

    def layer_of(self, name: str) -> int | None:
        """The layer a parameter belongs to; None for embeddings, pooler and head."""
        found = re.match(re.escape(self.family.layers) + r"\.(\d+)\.", name)
        return int(found[1]) if found else None

    def is_head(self, name: str) -> bool:
        return any(name.startswith(head + ".") for head in self.family.head)


def _linear(model: nn.Module, path: str) -> nn.Linear:
    try:
        module = model.get_submodule(path)
    except AttributeError:
        raise FedbenchError(
            f"{type(model).__name__} has no {path}: its family's description is wrong; docs/adding-a-family.md says "
            "what each path is"
        ) from None
    module = getattr(module, "base_layer", module)
    if not isinstance(module, nn.Linear):
        raise FedbenchError(f"{path} is a {type(module).__name__}, expected Linear: the family description is wrong")
    return module


def family_of(model: nn.Module) -> Family:
    """The description of a model's family, by its configuration."""
    return family_called(getattr(getattr(model, "config", None), "model_type", None))
