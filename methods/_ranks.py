"""What the methods of mixed ranks share: who trains at which rank, cut and padded adapters.

A client of rank r trains the first r rows of A and columns of B. It does so in a model of the largest rank, the rest
masked, so that clients of all ranks share one model; what crosses is cut to its rank. The scale alpha / lora_r is that
of the largest rank for all, so that a product means the same everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Self

import torch
from pydantic import model_validator
from torch import Tensor

from fedbench.api.local import LocalResult, LocalTask
from fedbench.api.messages import ClientId, Message, TensorSpec
from fedbench.data.examples import Examples
from fedbench.methods.fedavg_lora import AdapterClient, AdapterServer, LoraMethod


class RankedMethod(LoraMethod):
    """ranks: those of the clients, in turn over their numbers; each at most lora_r."""

    ranks: tuple[int, ...] = (8, 4, 4, 2)

    @model_validator(mode="after")
    def _ranked(self) -> Self:
        if not self.ranks or not all(1 <= rank <= self.lora_r for rank in self.ranks):
            raise ValueError(f"ranks are {list(self.ranks)}, expected numbers from 1 to lora_r, which is {self.lora_r}")
        return self

    def rank(self, client: ClientId) -> int:
        """The rank a client can afford."""
        return self.ranks[client % len(self.ranks)]


def cut(values: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
    """The first `rank` rows of each A and columns of each B; other tensors whole."""
    return {
        n: t[:rank].contiguous() if ".lora_A." in n else t[:, :rank].contiguous() if ".lora_B." in n else t
        for n, t in values.items()
    }


def padded(values: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
    """The same tensors with zeros up to `rank`."""
    out = {}
    for name, t in values.items():
        if ".lora_A." in name:
            t = torch.cat([t, t.new_zeros(rank - t.shape[0], t.shape[1])])
        elif ".lora_B." in name:
            t = torch.cat([t, t.new_zeros(t.shape[0], rank - t.shape[1])], 1)
        out[name] = t
    return out


def masks(values: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
    """For each factor of LoRA, 1 where a client of `rank` trains and 0 elsewhere; values are of full rank."""
    ones = {n: torch.ones_like(t) for n, t in values.items() if ".lora_" in n}
    return padded(cut(ones, rank), next(len(t) for n, t in ones.items() if ".lora_A." in n))


class RankedServer(AdapterServer):
    """Sends each client the adapter at its rank, and expects it back so."""

    method: RankedMethod

    def rank(self, client: ClientId) -> int:
        """The rank at which a client trains now."""
        return self.method.rank(client)

    def sent(self, client: ClientId) -> dict[str, Tensor]:
        """The tunables a client is sent."""
        return cut(self.values, self.rank(client))

    def adapters(self, round: int, cohort: Sequence[ClientId]) -> Mapping[ClientId, Message]:
        by_rank: dict[int, Message] = {}
        for client in cohort:
            rank = self.rank(client)
            by_rank[rank] = by_rank.get(rank) or Message("adapter", self.sent(client), self.adapter_meta(round))
        return {client: by_rank[self.rank(client)] for client in cohort}

    def expected(self, round: int, client: ClientId) -> Mapping[str, Mapping[str, TensorSpec]]:
        return {"adapter": {n: TensorSpec.of(t) for n, t in cut(self.values, self.rank(client)).items()}}


class RankedClient(AdapterClient):
    """Trains at its rank inside a model of the largest."""

    method: RankedMethod

    def __init__(self, method: RankedMethod, ctx: Any) -> None:
        super().__init__(method, ctx)
        self.rank = method.rank(ctx.client)

    def task(self, round: int, inbox: Sequence[Message], data: Examples) -> LocalTask:
        return self.at_rank(super().task(round, inbox, data))

    def at_rank(self, task: LocalTask) -> LocalTask:
        """The task of an adapter cut to a rank, in a model of the largest rank."""
        self.rank = next(len(t) for n, t in task.tunables.items() if ".lora_A." in n)
        values = padded(task.tunables, self.method.lora_r)
        return replace(task, tunables=values, rank_mask=masks(values, self.rank))

    def upload(self, round: int, result: LocalResult) -> Sequence[Message]:
        return super().upload(round, replace(result, tunables=cut(result.tunables, self.rank)))
