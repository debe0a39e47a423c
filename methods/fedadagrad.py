"""FedAdagrad on LoRA (Reddi et al., ICLR 2021, arXiv 2003.00295): the server's v only grows."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from fedbench.methods._server_optimisers import Adaptive


class FedAdagrad(Adaptive):
    """The adaptive server whose v adds up Delta²; without momentum, as in the paper."""

    name: ClassVar[str] = "fedadagrad"
    version: ClassVar[int] = 1
    needs: ClassVar[Literal["sum", "each"]] = "sum"

    beta1: float = Field(0.0, ge=0, lt=1)

    def second(self, v: Tensor, square: Tensor) -> None:
        v.add_(square)
