"""RoLoRA (Chen et al. 2024, arXiv 2409.02346, 2502.01755): B and A are trained in turns, the other factor is fixed.

Averages are exact, since the factor that is not trained is the same at all clients, both factors learn, and of a round
only the trained one goes up. A client is sent the factors that changed since it was last sent them, and the head.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar, Literal

from fedbench.api.context import ClientContext, ServerContext
from fedbench.api.local import LocalTask
from fedbench.api.messages import ClientId, Message, State, TensorSpec, adapters_of
from fedbench.api.sides import Client, Server
from fedbench.data.examples import Examples
from fedbench.methods.fedavg_lora import AdapterClient, AdapterServer, LoraMethod, weighted_mean
from fedbench.models.foundation import FoundationModel

FACTORS = (".lora_B.", ".lora_A.")
"""The factor that is trained in a round, by the round's number modulo 2."""


class RoLora(LoraMethod):
    """RoLoRA's settings are those of LoRA."""

    name: ClassVar[str] = "rolora"
    version: ClassVar[int] = 1
    needs: ClassVar[Literal["sum", "each"]] = "sum"

    def server(self, fm: FoundationModel, public: Examples | None, ctx: ServerContext) -> Server:
        return RoLoraServer(self, fm, ctx)

    def client(self, ctx: ClientContext) -> Client:
        return RoLoraClient(self, ctx)


def trained(name: str, round: int) -> bool:
    """Whether a tunable is trained in a round: the head always, a factor of LoRA in every other."""
    return FACTORS[round % 2] in name or not any(factor in name for factor in FACTORS)


class RoLoraServer(AdapterServer):
    """Knows which version of each factor a client holds; `factors[i]` counts the aggregations of `FACTORS[i]`."""

    def __init__(self, method: RoLora, fm: FoundationModel, ctx: ServerContext) -> None:
        super().__init__(method, fm, ctx)
        self.factors = [0, 0]
        self.sent: dict[ClientId, list[int]] = {}

    def adapters(self, round: int, cohort: Sequence[ClientId]) -> Mapping[ClientId, Message]:
        messages: dict[tuple[str, ...], Message] = {}
        out = {}
        for client in cohort:
            held = self.sent.get(client, [-1, -1])
            old = tuple(factor for i, factor in enumerate(FACTORS) if held[i] < self.factors[i])
            if old not in messages:
                kept = [factor for factor in FACTORS if factor not in old]
                values = {n: v for n, v in self.values.items() if not any(factor in n for factor in kept)}
                messages[old] = Message("adapter", values, self.adapter_meta(round))
            out[client] = messages[old]
            self.sent[client] = list(self.factors)
        return out

    def expected(self, round: int, client: ClientId) -> Mapping[str, Mapping[str, TensorSpec]]:
        return {"adapter": {n: TensorSpec.of(v) for n, v in self.values.items() if trained(n, round)}}

    def aggregate(self, round: int, uploads: Mapping[ClientId, Sequence[Message]]) -> None:
        adapters = adapters_of(uploads)
        self.values = {**self.values, **weighted_mean([m.tensors for m in adapters], self.weights(round, adapters))}
        self.factors[round % 2] += 1

    def state(self) -> State:
        state = super().state()
        sent = {str(client): versions for client, versions in self.sent.items()}
        return State(state.tensors, {**state.values, "factors": list(self.factors), "sent": sent})

    def restore(self, state: State) -> None:
        super().restore(state)
        self.factors = list(state.values["factors"])
        self.sent = {int(client): list(versions) for client, versions in state.values["sent"].items()}


class RoLoraClient(AdapterClient):
    """Keeps both factors as the server last sent them."""

    def task(self, round: int, inbox: Sequence[Message], data: Examples) -> LocalTask:
        task = super().task(round, inbox, data)
        known = self.memory["known"] = self.ctx.modules.intern({**self.memory.get("known", {}), **task.tunables})
        tunables = {n: v for n, v in known.items() if trained(n, round)}
        return replace(task, tunables=tunables, fixed={n: v for n, v in known.items() if n not in tunables})
