"""Head-only: FedAvg of the classification head on a shipped, frozen FM; the floor a scenario has to clear."""

from __future__ import annotations

from typing import ClassVar, Literal

from fedbench.methods.fedavg_lora import TuningMethod


class HeadOnly(TuningMethod):
    """Linear probing, federated: no adapters, the head alone is trained and sent."""

    name: ClassVar[str] = "head-only"
    version: ClassVar[int] = 1
    needs: ClassVar[Literal["sum", "each"]] = "sum"
