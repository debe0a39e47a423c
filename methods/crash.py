"""CRaSh (Zhang et al., EMNLP 2023, arXiv 2310.15477): clustering, removing and sharing layers, without training.

The FM's middle layers are clustered by the CKA of what they make of public rows; of each cluster the layer most like
all of it stays, the others are removed, and the one that stays is run in their places as well, so that the emulator is
as deep as the middle it stands for. The outer layers are tuned and put back, as in offsite-tuning. Written after the
paper's description: clusters are of neighbouring layers, joined by mean similarity.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal

from fedbench.api.context import ServerContext
from fedbench.api.sides import Server
from fedbench.data.examples import Examples
from fedbench.methods._distillation import required
from fedbench.methods._groups import centre, grouped, layer_states, similarities
from fedbench.methods._layers import LayersMethod, LayersServer
from fedbench.models.foundation import FoundationModel
from fedbench.models.spec import ModelSpec


class CRaSh(LayersMethod):
    """share: whether a layer that stays is run once for each layer of its cluster; else removed layers are left out."""

    name: ClassVar[str] = "crash"
    version: ClassVar[int] = 1
    needs: ClassVar[Literal["sum", "each"]] = "sum"

    share: bool = True

    def server(self, fm: FoundationModel, public: Examples | None, ctx: ServerContext) -> Server:
        return CRaShServer(self, fm, required(self, public), ctx)


class GroupsServer(LayersServer):
    """An emulator of the centres of groups of the FM's middle layers; `groups[i]`: what its layer i stands for."""

    def chosen(self, middle: range, keep: int) -> list[int]:
        alike = similarities(layer_states(self.full, middle, self.public, self.ctx.execution))
        found = grouped(alike, keep)
        self.groups = [[middle[i] for i in group] for group in found]
        return [middle[centre(alike, group)] for group in found]

    def stands_for(self, layer: int) -> int:
        return self.groups[layer - self.method.front][-1]


class CRaShServer(GroupsServer):
    """Nothing is trained at the server."""

    method: CRaSh

    def shape(self, spec: ModelSpec) -> ModelSpec:
        spec = super().shape(spec)
        outer = [1] * self.method.front, [1] * self.method.back
        times = (*outer[0], *map(len, self.groups), *outer[1])
        return replace(spec, repeats=times) if self.method.share and max(times) > 1 else spec

    def trained(self) -> list[str]:
        return []
