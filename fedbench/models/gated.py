"""Gated FFNs, computed so that what they multiply can be watched.

A gated FFN is down(activation(gate(x)) · up(x)) (GLU variants, Shazeer 2020). transformers multiplies the two in
passing, where no hook sees it; FedPFT counts there which neurons are zero.
"""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from fedbench.compat import watched
from fedbench.models.families.family import Family

OBSERVED = "observed"
"""The module of a gated FFN that observers watch."""


class GatedFFN(nn.Module):
    """transformers' gated FFN, the same to the bit, with a module `observed` whose hooks see activation(gate) · |up|.

    The sign of up says nothing of whether a neuron is active. Without it "at most 0" means what it means in a plain
    FFN with GELU or SiLU, a shut gate, and the size is that of what the last matrix is given.
    """

    @classmethod
    def adopt(cls, ffn: nn.Module, family: Family) -> None:
        """Make `ffn` one of these, in place; its parameters stay the same objects."""
        assert family.ffn_gate is not None
        paths = (family.ffn_gate, family.ffn_in, family.ffn_out, family.ffn_activation)
        ffn.__class__ = cls
        ffn.add_module(OBSERVED, nn.Identity())
        cast(GatedFFN, ffn).roles = tuple(path.rpartition(".")[2] for path in paths)

    roles: tuple[str, ...]
    """The names of gate, up, down and activation; gate and up are one where one layer holds both."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        gate, up, down, activation = (self.get_submodule(name) for name in self.roles)
        if gate is up:
            before, wide = up(hidden_states).chunk(2, dim=-1)
        else:
            before, wide = gate(hidden_states), up(hidden_states)
        active = activation(before)
        observed = self.get_submodule(OBSERVED)
        if watched(observed):
            observed(active * wide.abs())
        out: Tensor = down(active * wide)
        return out
