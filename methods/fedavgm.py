"""FedAvgM on LoRA (Hsu et al. 2019, arXiv 1909.06335): momentum at the server."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor

from fedbench.methods._server_optimisers import ServerOptimiser


class FedAvgM(ServerOptimiser):
    """FedAvg of LoRA adapters and head with momentum at the server.

    damped: m = b1 m + (1 - b1) Delta, as OpenFedLLM has it.
    """

    name: ClassVar[str] = "fedavgm"
    version: ClassVar[int] = 1
    needs: ClassVar[Literal["sum", "each"]] = "sum"

    damped: bool = False

    def change(self, delta: Tensor, m: Tensor, v: Tensor, steps: int) -> Tensor:
        m.mul_(self.beta1).add_(delta, alpha=1 - self.beta1 if self.damped else 1.0)
        return self.server_lr * m
