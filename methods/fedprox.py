"""FedProx on LoRA (Li et al., MLSys 2020, arXiv 1812.06127): FedAvg with a pull back to what clients were sent.

Local loss: the rows' own plus mu/2 · ||w - w_received||², over LoRA and head. Under AdamW the pull is scaled like any
gradient, so a mu of an SGD paper means something else here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from fedbench.api.context import ClientContext
from fedbench.api.local import LocalTask
from fedbench.api.messages import Message
from fedbench.api.sides import Client
from fedbench.data.examples import Examples
from fedbench.methods.fedavg_lora import AdapterClient, LoraMethod


class FedProx(LoraMethod):
    """mu: weight of the pull; 0.01 in OpenFedLLM and pfl-research, 0.001 to 1 in the paper."""

    name: ClassVar[str] = "fedprox"
    version: ClassVar[int] = 1
    needs: ClassVar[Literal["sum", "each"]] = "sum"

    mu: float = Field(0.01, ge=0)

    def client(self, ctx: ClientContext) -> Client:
        return ProximalClient(self, ctx)

    def pull(self, parameters: Mapping[str, Tensor], received: Mapping[str, Tensor]) -> Tensor:
        """mu/2 times the squared distance from what was received."""
        moved = [(value - received[name]).square().sum() for name, value in parameters.items()]
        return self.mu / 2 * torch.stack(moved).sum()


class ProximalClient(AdapterClient):
    """FedAvg's client with the pull in its loss."""

    method: FedProx

    def task(self, round: int, inbox: Sequence[Message], data: Examples) -> LocalTask:
        return replace(super().task(round, inbox, data), penalty=self.method.pull)
