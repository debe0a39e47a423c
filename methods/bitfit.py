"""BitFit (Ben Zaken et al., ACL 2022, arXiv 2106.10199), federated as in FedPETuning: biases and head are tuned.

FedAvg of every bias of the FM and of the head; no adapters. Biases start as they are in the FM.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from fedbench.methods.fedavg_lora import TuningMethod
from fedbench.models.spec import ModelSpec


class BitFit(TuningMethod):
    """BitFit's settings are those of local training."""

    name: ClassVar[str] = "bitfit"
    version: ClassVar[int] = 1
    needs: ClassVar[Literal["sum", "each"]] = "sum"

    def tuned(self, spec: ModelSpec) -> ModelSpec:
        return spec.with_biases()
