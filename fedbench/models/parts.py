"""Access to a model's parts by role, whatever its family calls them."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedbench.errors import FedbenchError
from fedbench.models.families.family import Family
from fedbench.models.families.known import family_called
from fedbench.models.gated import OBSERVED
from fedbench.models.spec import PROJECTIONS


@dataclass(frozen=True, slots=True)
class NeuronSlices:
    """A tensor of an FFN that holds a slice of each neuron along `dim`; `times` slices, where it holds two matrices."""

    name: str
    dim: int
    times: int = 1

    def index(self, neurons: Tensor, width: int) -> Tensor:
        """Where along `dim` the slices of these neurons lie, in an FFN of `width` neurons."""
        return torch.cat([neurons + i * width for i in range(self.times)])


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

    def ffn_gate_path(self, i: int) -> str | None:
        """The layer whose activation gates the FFN; None in a plain FFN. It is `ffn_in_path` where one holds both."""
        return f"{self.layer_path(i)}.{self.family.ffn_gate}" if self.family.ffn_gate else None

    @property
    def stacked(self) -> bool:
        """Whether one layer holds an FFN's gate and what it gates, the gate's rows first."""
        return self.family.ffn_gate == self.family.ffn_in

    def ffn_norm_path(self, i: int) -> str | None:
        """The LayerNorm behind the FFN in post-norm models; None where there is none."""
        return f"{self.layer_path(i)}.{self.family.ffn_norm}" if self.family.ffn_norm else None

    def ffn_activation_path(self, i: int) -> str:
        """The module whose output is the FFN's activation, [B, T, d_ff]; of a gated FFN that of `GatedFFN.observed`."""
        if self.family.ffn_gate:
            return f"{self.ffn_path(i)}.{OBSERVED}"
        return f"{self.layer_path(i)}.{self.family.ffn_activation}"

    def ffn_path(self, i: int) -> str:
        """The module that holds the linear layers of a gated FFN."""
        return self.ffn_out_path(i).rpartition(".")[0]

    def ffn_in(self, i: int) -> nn.Linear:
        return _linear(self.model, self.ffn_in_path(i))

    def ffn_out(self, i: int) -> nn.Linear:
        return _linear(self.model, self.ffn_out_path(i))

    def ffn_gate(self, i: int) -> nn.Linear | None:
        path = self.ffn_gate_path(i)
        return _linear(self.model, path) if path else None

    def ffn_weights(self, i: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """The matrices of a layer's FFN: up [d_ff, d], down [d, d_ff], and the gate [d_ff, d] if there is one."""
        up, down, gate = self.ffn_in(i).weight, self.ffn_out(i).weight, self.ffn_gate(i)
        if self.stacked:
            first, second = up.chunk(2)
            return second, down, first
        return up, down, None if gate is None else gate.weight

    def neurons(self, i: int) -> dict[str, NeuronSlices]:
        """role -> the tensor of a layer's FFN that has a slice of each neuron: matrices, and biases where there are."""
        up, down, gate = self.ffn_in_path(i), self.ffn_out_path(i), self.ffn_gate_path(i)
        found = {"w_in": NeuronSlices(f"{up}.weight", 0, 2 if self.stacked else 1)}
        if self.ffn_in(i).bias is not None:
            found["b_in"] = NeuronSlices(f"{up}.bias", 0, found["w_in"].times)
        found["w_out"] = NeuronSlices(f"{down}.weight", 1)
        if gate is not None and not self.stacked:
            found["w_gate"] = NeuronSlices(f"{gate}.weight", 0)
            if _linear(self.model, gate).bias is not None:
                found["b_gate"] = NeuronSlices(f"{gate}.bias", 0)
        return found

    def attention_paths(self, i: int) -> list[str]:
        """Query, key, value and output projections, as in `PROJECTIONS`."""
        return [f"{self.layer_path(i)}.{path}" for path in self.family.attention]

    def linear_paths(self, i: int) -> list[tuple[str, str]]:
        """(role, path) of the linear layers that LoRA can be put on: those of attention and, with it, of the FFN.

        One layer may have several roles.
        """
        gate = self.ffn_gate_path(i)
        ffn = [("gate", gate), ("up", self.ffn_in_path(i)), ("down", self.ffn_out_path(i))]
        return [*zip(PROJECTIONS, self.attention_paths(i), strict=True), *((role, p) for role, p in ffn if p)]

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


def note_added_tokens(model: nn.Module) -> None:
    """Note in a model that it adds tokens to those of a row: it has a prefix or a prompt."""
    model.adds_tokens = True  # type: ignore[assignment]  # no module and no parameter


def adds_tokens(model: nn.Module) -> bool:
    """Whether that was noted."""
    return bool(getattr(model, "adds_tokens", False))


def note_repeats(model: nn.Module) -> None:
    """Note in a model that some of its layers are run again on what they made."""
    model.repeats_layers = True  # type: ignore[assignment]  # no module and no parameter


def why_it_cannot_write(model: nn.Module) -> str | None:
    """Why a language model cannot write answers with a cache of keys and values here; None if it can."""
    if adds_tokens(model):
        return "it has a prefix or a prompt"
    return "it runs layers again" if getattr(model, "repeats_layers", False) else None


def family_of(model: nn.Module) -> Family:
    """The description of a model's family, by its configuration."""
    return family_called(getattr(getattr(model, "config", None), "model_type", None))
