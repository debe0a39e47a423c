"""FedOT: offsite-tuning (Xiao et al. 2023) in a federation, as FedPFT compares against it.

The first and last layers are the adapter, tuned with LoRA; the middle is an emulator of fewer layers, distilled at the
server on public data and frozen at the clients. Plug-in puts the tuned layers back around the FM's full middle.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from fedbench.api.context import ServerContext
from fedbench.api.sides import Server
from fedbench.data.examples import Examples
from fedbench.methods._distillation import required
from fedbench.methods._layers import Emulator, LayersMethod, LayersServer
from fedbench.methods._layerwise import Schedule
from fedbench.models.foundation import FoundationModel


class FedOT(LayersMethod):
    """FedOT's shape, `front`-`emulator`-`back` layers (l-n-r), and its distillation.

    emulator: layers of it; None keeps half the middle. "fedpft" keeps as many as bring what a client holds nearest to
    what it holds in fedpft, as fedpft's defaults are.
    """

    name: ClassVar[str] = "fedot"
    version: ClassVar[int] = 1
    needs: ClassVar[Literal["sum", "each"]] = "sum"

    emulator: Emulator = None
    distil_steps: int = Field(200, ge=0)
    distil_batch: int = Field(32, ge=1)
    distil_lr: float = Field(6e-4, gt=0)

    def server(self, fm: FoundationModel, public: Examples | None, ctx: ServerContext) -> Server:
        return FedOTServer(self, fm, required(self, public), ctx)


class FedOTServer(LayersServer):
    """Distils the whole emulator towards the output of the FM's middle."""

    method: FedOT

    def schedule(self) -> Schedule:
        m = self.method
        return Schedule(m.distil_steps, m.distil_batch, m.distil_lr)
