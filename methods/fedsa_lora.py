"""FedSA-LoRA (Guo et al., ICLR 2025, arXiv 2410.01463): A is shared, B and the head stay with each client.

Clients train both factors and send A alone, which the server averages. So there is no one model for all clients: what
is scored are the clients' own models, the last common A with each client's B and head.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar, Literal

from fedbench.api.context import ClientContext, ServerContext
from fedbench.api.local import LocalResult, LocalTask, PersonalModel
from fedbench.api.messages import ClientId, Message
from fedbench.api.sides import Client, Server
from fedbench.data.examples import Examples
from fedbench.methods.fedavg_lora import AdapterClient, AdapterServer, LoraMethod
from fedbench.models.foundation import FoundationModel


class FedSALora(LoraMethod):
    """share_head: whether the head is averaged too; in the paper it stays with the client, as B does."""

    name: ClassVar[str] = "fedsa-lora"
    version: ClassVar[int] = 1
    needs: ClassVar[Literal["sum", "each"]] = "sum"
    personal: ClassVar[bool] = True

    share_head: bool = False

    def shared(self, name: str) -> bool:
        """Whether a tunable crosses in every round."""
        return ".lora_A." in name or (self.share_head and ".lora_" not in name)

    def server(self, fm: FoundationModel, public: Examples | None, ctx: ServerContext) -> Server:
        return SharedAServer(self, fm, ctx)

    def client(self, ctx: ClientContext) -> Client:
        return SharedAClient(self, ctx)


class SharedAServer(AdapterServer):
    """Averages what is shared; where the rest starts is sent once, along with the model."""

    method: FedSALora

    def __init__(self, method: FedSALora, fm: FoundationModel, ctx: ServerContext) -> None:
        super().__init__(method, fm, ctx)
        self.fixed = {n: v for n, v in self.initial.items() if not method.shared(n)}
        self.values = {n: v for n, v in self.initial.items() if method.shared(n)}

    def trainable(self, client: ClientId) -> int:
        return sum(value.numel() for value in self.initial.values())

    def put_in_fm(self) -> None:  # type: ignore[override]  # other servers of adapters have one model for all
        return None

    def farewell(self, clients: Sequence[ClientId]) -> Mapping[ClientId, Sequence[Message]]:
        message = Message("adapter", self.values)
        return {client: [message] for client in clients}


class SharedAClient(AdapterClient):
    """Keeps its own B and head from round to round."""

    method: FedSALora

    def task(self, round: int, inbox: Sequence[Message], data: Examples) -> LocalTask:
        task = super().task(round, inbox, data)
        return replace(task, tunables={**task.tunables, **self.memory.get("own", self.fixed)}, fixed={})

    def upload(self, round: int, result: LocalResult) -> Sequence[Message]:
        self.memory["own"] = {n: result.tunables[n] for n in self.fixed}
        shared = {n: v for n, v in result.tunables.items() if n not in self.fixed}
        return super().upload(round, replace(result, tunables=shared))

    def personal(self, inbox: Sequence[Message]) -> PersonalModel | None:
        if self.spec is None or "own" not in self.memory:
            return None
        [shared] = [m.tensors for m in inbox]
        return PersonalModel(self.ctx.model(self.spec, self.frozen), {**shared, **self.memory["own"]})
