"""FedAdam on LoRA (Reddi et al., ICLR 2021, arXiv 2003.00295): Adam at the server, without bias correction."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor

from fedbench.methods._server_optimisers import Adaptive


class FedAdam(Adaptive):
    """The adaptive server whose v is a running mean of Delta²."""

    name: ClassVar[str] = "fedadam"
    version: ClassVar[int] = 1
    needs: ClassVar[Literal["sum", "each"]] = "sum"

    def second(self, v: Tensor, square: Tensor) -> None:
        v.mul_(self.beta2).add_(square, alpha=1 - self.beta2)
