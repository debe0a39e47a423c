"""FLoRA (Wang et al., NeurIPS 2024, arXiv 2409.05976): clients' adapters of any ranks are stacked and merged into W0.

Beside each other, A_1 .. A_K times p_k and B_1 .. B_K multiply to sum p_k B_k A_k exactly. The stack is sent to all and
added to the frozen weights; every round clients begin with a fresh A of their own and B = 0. The head is averaged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from fedbench.api.context import ClientContext, ServerContext
from fedbench.api.local import LocalTask
from fedbench.api.messages import ClientId, Message, TensorSpec, adapters_of
from fedbench.api.sides import Client, Server
from fedbench.data.examples import Examples
from fedbench.methods._products import FoldingClient, FoldingServer, pairs, stacked
from fedbench.methods._ranks import RankedClient, RankedMethod, cut
from fedbench.methods.fedavg_lora import AdapterClient, weighted_mean
from fedbench.models.foundation import FoundationModel
from fedbench.models.weights import set_tensors, tunable_names


class Flora(RankedMethod):
    """FLoRA's settings are the ranks; all the same number is its homogeneous form."""

    name: ClassVar[str] = "flora"
    version: ClassVar[int] = 1
    needs: ClassVar[Literal["sum", "each"]] = "each"

    def server(self, fm: FoundationModel, public: Examples | None, ctx: ServerContext) -> Server:
        return FloraServer(self, fm, ctx)

    def client(self, ctx: ClientContext) -> Client:
        return FloraClient(self, ctx)


class FloraServer(FoldingServer):
    """Folds stacks into the FM, and averages the head; between rounds there is no adapter."""

    method: Flora

    def __init__(self, method: Flora, fm: FoundationModel, ctx: ServerContext) -> None:
        super().__init__(method, fm, ctx)
        self.values = {name: value for name, value in self.initial.items() if ".lora_" not in name}

    def expected(self, round: int, client: ClientId) -> Mapping[str, Mapping[str, TensorSpec]]:
        tensors = cut(self.initial, self.method.rank(client))
        return {"adapter": {name: TensorSpec.of(tensor) for name, tensor in tensors.items()}}

    def aggregate(self, round: int, uploads: Mapping[ClientId, Sequence[Message]]) -> None:
        adapters = adapters_of(uploads)
        weights = self.weights(round, adapters)
        shares = [self.scale * w / sum(weights) for w in weights]
        self.values = weighted_mean([{n: m.tensors[n] for n in self.values} for m in adapters], weights)
        each = pairs(self.initial)
        self.add({w: stacked([(m.tensors[b], m.tensors[a]) for m in adapters], shares) for a, b, w in each})

    def put_in_fm(self) -> nn.Module:
        set_tensors(self.full, {**self.initial, **self.values})  # its B is 0
        return self.full


class FloraClient(RankedClient, FoldingClient):
    """Begins every round with a fresh adapter."""

    method: Flora

    def task(self, round: int, inbox: Sequence[Message], data: Examples) -> LocalTask:
        task = AdapterClient.task(self, round, inbox, data)
        fresh = self.fresh(round, task.frozen.module)
        return self.at_rank(replace(task, tunables={**fresh, **task.tunables}))

    def fresh(self, round: int, module: nn.Module) -> dict[str, Tensor]:
        """An adapter at the client's rank: A as LoRA starts it, drawn from the client's own stream, and B = 0."""
        out = {}
        for name in (n for n in tunable_names(module) if ".lora_" in n):
            value = torch.zeros(module.get_parameter(name).shape)
            if ".lora_A." in name:
                generator = self.ctx.streams.torch("fresh-adapter", round, self.ctx.client, name)
                nn.init.kaiming_uniform_(value, a=5**0.5, generator=generator)
            out[name] = value
        return cut(out, self.method.rank(self.ctx.client))
