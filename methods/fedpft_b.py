"""FedPFT-B, an ablation of FedPFT: distillation before federated learning only."""

from __future__ import annotations

from typing import ClassVar, Literal

from fedbench.methods.fedpft import FedPFT


class FedPFTB(FedPFT):
    """Distilled before federated learning, never aligned during it."""

    name: ClassVar[str] = "fedpft-b"
    version: ClassVar[int] = 1
    needs: ClassVar[Literal["sum", "each"]] = "sum"

    t: Literal[0] = 0
