"""FlexLoRA (Bai et al., NeurIPS 2024, arXiv 2402.11505): mixed ranks by the mean of products and its SVD.

The server forms M = sum p_k B_k A_k and keeps its best approximation of the largest rank, U S Vᵀ. B = U S and A = Vᵀ
are sent to every client cut to its rank, which is the best approximation of that rank. The SVD is taken of the stack of
the clients' factors, so that M itself is never formed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import torch

from fedbench.api.context import ClientContext, ServerContext
from fedbench.api.messages import ClientId, Message, adapters_of
from fedbench.api.sides import Client, Server
from fedbench.data.examples import Examples
from fedbench.methods._products import decomposed, pairs, stacked
from fedbench.methods._ranks import RankedClient, RankedMethod, RankedServer
from fedbench.methods.fedavg_lora import weighted_mean
from fedbench.models.foundation import FoundationModel


class FlexLora(RankedMethod):
    """FlexLoRA's settings are the ranks."""

    name: ClassVar[str] = "flexlora"
    version: ClassVar[int] = 1
    needs: ClassVar[Literal["sum", "each"]] = "each"

    def server(self, fm: FoundationModel, public: Examples | None, ctx: ServerContext) -> Server:
        return FlexServer(self, fm, ctx)

    def client(self, ctx: ClientContext) -> Client:
        return RankedClient(self, ctx)


class FlexServer(RankedServer):
    """Averages products, and the head."""

    method: FlexLora

    def aggregate(self, round: int, uploads: Mapping[ClientId, Sequence[Message]]) -> None:
        adapters = adapters_of(uploads)
        weights = self.weights(round, adapters)
        shares = [w / sum(weights) for w in weights]
        head = [n for n in self.values if ".lora_" not in n]
        values = dict(self.values) | weighted_mean([{n: m.tensors[n] for n in head} for m in adapters], weights)
        for name_a, name_b, _ in pairs(self.values):
            u, s, vt = decomposed(
                stacked([(m.tensors[name_b], m.tensors[name_a]) for m in adapters], shares), self.method.lora_r
            )
            # Where the clients' ranks do not add up to the largest, the rest goes on from the first A and B = 0.
            a, b = self.initial[name_a].clone(), torch.zeros_like(self.initial[name_b])
            a[: len(s)], b[:, : len(s)] = vt.to(a.dtype), (u * s).to(b.dtype)
            values[name_a], values[name_b] = a, b
        self.values = values
