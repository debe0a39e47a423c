"""SCAFFOLD on LoRA (Karimireddy et al., ICML 2020, arXiv 1910.06378): control variates against client drift.

A client steps by g - c_i + c. Afterwards its control becomes the mean gradient g of its round, which with plain SGD is
the paper's option II, c_i - c + (w_received - w) / (steps · lr), and stays a gradient with any other trainer. Both the
adapter and the control cross, in both directions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar, Literal

import torch
from pydantic import Field

from fedbench.api.context import ClientContext, ServerContext
from fedbench.api.local import SGD, AdamW, LocalResult, LocalTask, Trainer
from fedbench.api.messages import ClientId, Message, TensorSpec
from fedbench.api.sides import Client, Server
from fedbench.data.examples import Examples
from fedbench.methods.fedavg_lora import AdapterClient, AdapterServer, WeightedMethod
from fedbench.models.foundation import FoundationModel


class Scaffold(WeightedMethod):
    """SCAFFOLD's settings.

    optimiser: the paper's SGD, or AdamW as OpenFedLLM has it. lr: of plain SGD, so larger than elsewhere. server_lr:
    share of the clients' mean move that the server takes. weighting: of that mean; the paper's is uniform.
    """

    name: ClassVar[str] = "scaffold"
    version: ClassVar[int] = 1
    needs: ClassVar[Literal["sum", "each"]] = "sum"

    lr: float = Field(0.1, gt=0)
    optimiser: Literal["sgd", "adamw"] = "sgd"
    server_lr: float = Field(1.0, gt=0)

    def trainer(self, lr: float) -> Trainer:
        kind = SGD if self.optimiser == "sgd" else AdamW
        return kind(lr=lr, weight_decay=self.weight_decay)

    def server(self, fm: FoundationModel, public: Examples | None, ctx: ServerContext) -> Server:
        return ScaffoldServer(self, fm, ctx)

    def client(self, ctx: ClientContext) -> Client:
        return ScaffoldClient(self, ctx)


class ScaffoldServer(AdapterServer):
    """Keeps the mean control over all clients, those never sampled counted as 0."""

    method: Scaffold

    def __init__(self, method: Scaffold, fm: FoundationModel, ctx: ServerContext) -> None:
        super().__init__(method, fm, ctx)
        self.memory["control"] = {name: torch.zeros_like(value) for name, value in self.values.items()}

    def broadcast(self, round: int, cohort: Sequence[ClientId]) -> Mapping[ClientId, Sequence[Message]]:
        control = Message("control", self.memory["control"])
        return {cid: [control, *messages] for cid, messages in super().broadcast(round, cohort).items()}

    def expected(self, round: int, client: ClientId) -> Mapping[str, Mapping[str, TensorSpec]]:
        expected = super().expected(round, client)
        return {**expected, "control": expected["adapter"]}

    def aggregate(self, round: int, uploads: Mapping[ClientId, Sequence[Message]]) -> None:
        before = self.values
        super().aggregate(round, uploads)
        self.values = {n: v + self.method.server_lr * (self.values[n] - v) for n, v in before.items()}
        changes = [m.tensors for messages in uploads.values() for m in messages if m.kind == "control"]
        self.memory["control"] = {
            name: value + torch.stack([change[name] for change in changes]).sum(0) / self.ctx.clients
            for name, value in self.memory["control"].items()
        }


class ScaffoldClient(AdapterClient):
    """Keeps a control of its own, 0 until it has trained."""

    method: Scaffold

    def task(self, round: int, inbox: Sequence[Message], data: Examples) -> LocalTask:
        [common] = [m.tensors for m in inbox if m.kind == "control"]
        own = self.memory.setdefault("control", {name: torch.zeros_like(value) for name, value in common.items()})
        task = super().task(round, [m for m in inbox if m.kind != "control"], data)
        return replace(task, gradient_offset={n: value - own[n] for n, value in common.items()}, mean_gradient=True)

    def upload(self, round: int, result: LocalResult) -> Sequence[Message]:
        own = self.memory["control"]
        change = {name: mean - own[name] for name, mean in result.mean_gradient.items()}
        self.memory["control"] = dict(result.mean_gradient)
        return [*super().upload(round, result), Message("control", change)]
