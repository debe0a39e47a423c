"""HetLoRA (Cho et al., EMNLP 2024, arXiv 2401.06432): mixed ranks by zero-padding, with ranks that clients prune.

The server averages factors padded with zeros to the largest rank, each client weighted by the norm of its products
||B_k A_k||_F instead of its rows. A client is sent the first r_k rows of A and columns of B. Its loss holds down the
last part of its rank, from gamma · r_k on: sparsity · ||B[:, cut:]|| · ||A[cut:, :]||. Where that product ends below
where it began, the client goes on with a rank of gamma · r_k, rounded down. The head is averaged by sample count.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from fedbench.api.context import ClientContext, ServerContext
from fedbench.api.local import LocalResult, LocalTask
from fedbench.api.messages import ClientId, Message, State, adapters_of
from fedbench.api.sides import Client, Server
from fedbench.data.examples import Examples
from fedbench.errors import MessageError
from fedbench.methods._products import pairs
from fedbench.methods._ranks import RankedClient, RankedMethod, RankedServer, padded
from fedbench.methods.fedavg_lora import weighted_mean
from fedbench.models.foundation import FoundationModel


class HetLora(RankedMethod):
    """gamma: share of its rank that a client keeps; 1 prunes nothing. sparsity: weight of what holds the rest down."""

    name: ClassVar[str] = "hetlora"
    version: ClassVar[int] = 1
    needs: ClassVar[Literal["sum", "each"]] = "each"

    gamma: float = Field(0.99, gt=0, le=1)
    sparsity: float = Field(5e-3, ge=0)

    def kept(self, rank: int) -> int:
        """The rank that a client of `rank` goes on with once it prunes, at least 1."""
        return max(1, int(self.gamma * rank))

    def server(self, fm: FoundationModel, public: Examples | None, ctx: ServerContext) -> Server:
        return HetServer(self, fm, ctx)

    def client(self, ctx: ClientContext) -> Client:
        return HetClient(self, ctx)


def tail(values: Mapping[str, Tensor], start: int, end: int) -> Tensor:
    """Sum over adapters of ||B[:, start:end]|| · ||A[start:end, :]||, with a gradient of 0 where a part is 0."""
    products = []
    for a, b, _ in pairs(values):
        squares = values[b][:, start:end].square().sum() * values[a][start:end].square().sum()
        # The root has no gradient at 0, where B starts.
        products.append(torch.where(squares > 0, squares, torch.ones_like(squares)).sqrt() * (squares > 0))
    return torch.stack(products).sum()


class HetServer(RankedServer):
    """Knows the rank of each client, which only falls."""

    method: HetLora

    def __init__(self, method: HetLora, fm: FoundationModel, ctx: ServerContext) -> None:
        super().__init__(method, fm, ctx)
        self.ranks: dict[ClientId, int] = {}

    def rank(self, client: ClientId) -> int:
        return self.ranks.get(client, self.method.rank(client))

    def accept(self, round: int, messages: Sequence[Message]) -> None:
        super().accept(round, messages)
        for message in messages:
            most = next((len(t) for n, t in message.tensors.items() if ".lora_A." in n), 1)
            rank = message.meta.get("rank")
            if message.kind == "adapter" and (type(rank) is not int or not 1 <= rank <= most):
                raise MessageError(f"adapter: rank is not a whole number from 1 to {most}")

    def aggregate(self, round: int, uploads: Mapping[ClientId, Sequence[Message]]) -> None:
        adapters = adapters_of(uploads)
        counts = self.weights(round, adapters)
        whole = [padded(m.tensors, self.method.lora_r) for m in adapters]
        norms = [
            sum(float((v[b].double() @ v[a].double()).square().sum()) for a, b, _ in pairs(v)) ** 0.5 for v in whole
        ]
        lora, head = ([n for n in self.values if (".lora_" in n) is own] for own in (True, False))
        self.values = {
            **weighted_mean([{n: v[n] for n in lora} for v in whole], norms if any(norms) else counts),
            **weighted_mean([{n: v[n] for n in head} for v in whole], counts),
        }
        self.ranks |= {client: int(m.meta["rank"]) for client, m in zip(uploads, adapters, strict=True)}

    def state(self) -> State:
        state = super().state()
        return State(state.tensors, {**state.values, "ranks": {str(c): r for c, r in self.ranks.items()}})

    def restore(self, state: State) -> None:
        super().restore(state)
        self.ranks = {int(client): rank for client, rank in state.values["ranks"].items()}


class HetClient(RankedClient):
    """Holds down the last part of its rank, and says whether it can do without it."""

    method: HetLora

    def __init__(self, method: HetLora, ctx: ClientContext) -> None:
        super().__init__(method, ctx)
        self.began = 0.0

    def task(self, round: int, inbox: Sequence[Message], data: Examples) -> LocalTask:
        task = super().task(round, inbox, data)
        rank, kept = self.rank, self.method.kept(self.rank)
        self.began = float(tail(task.tunables, kept, rank))
        if kept == rank or self.method.sparsity == 0:
            return task
        return replace(task, penalty=lambda now, then: self.method.sparsity * tail(now, kept, rank))

    def upload(self, round: int, result: LocalResult) -> Sequence[Message]:
        kept = self.method.kept(self.rank)
        fell = float(tail(result.tunables, kept, self.rank)) < self.began
        [message] = super().upload(round, result)
        return [replace(message, meta={**message.meta, "rank": kept if fell else self.rank})]
