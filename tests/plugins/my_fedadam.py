"""FedAdam (Reddi et al. 2021): the mean of what clients moved is the gradient of a step of Adam at the server."""

from typing import ClassVar

import torch

from fedbench.methods.fedavg_lora import AdapterServer, LoraMethod


class MyFedAdam(LoraMethod):
    name: ClassVar[str] = "my-fedadam"
    server_lr: float = 1e-2
    tau: float = 1e-3

    def server(self, fm, public, ctx):
        return MyServer(self, fm, ctx)


class MyServer(AdapterServer):
    def __init__(self, method, fm, ctx):
        super().__init__(method, fm, ctx)
        self.memory["m"] = {n: torch.zeros_like(w) for n, w in self.values.items()}
        self.memory["v"] = {n: torch.full_like(w, method.tau**2) for n, w in self.values.items()}

    def aggregate(self, round, uploads):
        before, m, v = self.values, self.memory["m"], self.memory["v"]
        super().aggregate(round, uploads)
        for n, w in before.items():
            delta = self.values[n] - w
            m[n] = 0.9 * m[n] + 0.1 * delta
            v[n] = 0.99 * v[n] + 0.01 * delta.square()
            self.values[n] = w + self.method.server_lr * m[n] / (v[n].sqrt() + self.method.tau)
