"""FedPFT-N, an ablation of FedPFT: no distillation at all."""

from __future__ import annotations

from typing import ClassVar, Literal

from fedbench.methods.fedpft import FedPFT


class FedPFTN(FedPFT):
    """Neither distilled before federated learning nor aligned during it."""

    name: ClassVar[str] = "fedpft-n"
    version: ClassVar[int] = 1
    needs: ClassVar[Literal["sum", "each"]] = "sum"

    distil_steps: Literal[0] = 0
    t: Literal[0] = 0
