"""SCAFFOLD (Karimireddy et al. 2020) with plain SGD."""

from dataclasses import replace
from typing import ClassVar

import torch

from fedbench.api.local import SGD
from fedbench.api.messages import Message
from fedbench.methods.fedavg_lora import AdapterClient, AdapterServer, LoraMethod


class MyScaffold(LoraMethod):
    name: ClassVar[str] = "my-scaffold"

    def server(self, fm, public, ctx):
        return MyServer(self, fm, ctx)

    def client(self, ctx):
        return MyClient(self, ctx)

    def trainer(self, lr):
        return SGD(lr)


class MyServer(AdapterServer):
    def broadcast(self, round, cohort):
        c = self.memory.setdefault("c", {n: torch.zeros_like(w) for n, w in self.values.items()})
        return {k: [Message("control", c), *own] for k, own in super().broadcast(round, cohort).items()}

    def expected(self, round, client):
        return dict.fromkeys(("adapter", "control"), super().expected(round, client)["adapter"])

    def aggregate(self, round, uploads):
        super().aggregate(round, uploads)
        changes = [m.tensors for own in uploads.values() for m in own if m.kind == "control"]
        for n, c in self.memory["c"].items():
            self.memory["c"][n] = c + torch.stack([change[n] for change in changes]).sum(0) / self.ctx.clients


class MyClient(AdapterClient):
    def task(self, round, inbox, data):
        [c] = [m.tensors for m in inbox if m.kind == "control"]
        own = self.memory.setdefault("c", {n: torch.zeros_like(t) for n, t in c.items()})
        task = super().task(round, [m for m in inbox if m.kind != "control"], data)
        return replace(task, gradient_offset={n: t - own[n] for n, t in c.items()}, mean_gradient=True)

    def upload(self, round, result):
        change = {n: g - self.memory["c"][n] for n, g in result.mean_gradient.items()}
        self.memory["c"] = dict(result.mean_gradient)
        return [*super().upload(round, result), Message("control", change)]
