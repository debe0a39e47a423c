"""FedPFT-D, an ablation of FedPFT: distillation during federated learning only."""

from __future__ import annotations

from typing import ClassVar, Literal

from fedbench.methods.fedpft import FedPFT


class FedPFTD(FedPFT):
    """Aligned during federated learning, not distilled before it."""

    name: ClassVar[str] = "fedpft-d"
    version: ClassVar[int] = 1
    needs: ClassVar[Literal["sum", "each"]] = "sum"

    distil_steps: Literal[0] = 0
