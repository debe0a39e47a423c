"""FFA-LoRA (Sun et al., ICLR 2024, arXiv 2403.12313): A is drawn once and frozen, only B and the head are trained.

The mean of B is then exact, mean(B_k) A = mean(B_k A), and half of the bytes cross. A is sent along with the model.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from fedbench.api.context import ServerContext
from fedbench.api.sides import Server
from fedbench.data.examples import Examples
from fedbench.methods.fedavg_lora import AdapterServer, LoraMethod
from fedbench.models.foundation import FoundationModel


class FFALora(LoraMethod):
    """FFA-LoRA's settings are those of LoRA."""

    name: ClassVar[str] = "ffa-lora"
    version: ClassVar[int] = 1
    needs: ClassVar[Literal["sum", "each"]] = "sum"

    def server(self, fm: FoundationModel, public: Examples | None, ctx: ServerContext) -> Server:
        return FFAServer(self, fm, ctx)


class FFAServer(AdapterServer):
    """FedAvg's server, with A among what is fixed."""

    def __init__(self, method: FFALora, fm: FoundationModel, ctx: ServerContext) -> None:
        super().__init__(method, fm, ctx)
        self.fixed = {name: value for name, value in self.initial.items() if ".lora_A." in name}
        self.values = {name: value for name, value in self.initial.items() if name not in self.fixed}
