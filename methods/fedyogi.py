"""FedYogi on LoRA (Reddi et al., ICLR 2021, arXiv 2003.00295): the server's v moves by Delta² at most."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor

from fedbench.methods._server_optimisers import Adaptive


class FedYogi(Adaptive):
    """The adaptive server whose v moves by the sign of how far Delta² is off."""

    name: ClassVar[str] = "fedyogi"
    version: ClassVar[int] = 1
    needs: ClassVar[Literal["sum", "each"]] = "sum"

    def second(self, v: Tensor, square: Tensor) -> None:
        v.sub_((1 - self.beta2) * square * (v - square).sign())
