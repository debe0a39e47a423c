"""Prefix tuning (Li & Liang, ACL 2021, arXiv 2101.00190), federated as in FedPETuning (Zhang et al. 2023).

FedAvg of keys and values that every token of a layer's attention sees, and of the head. They are trained themselves,
without a network that makes them (P-tuning v2, Liu et al. 2022, arXiv 2110.07602), and begin at random.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from fedbench.methods.fedavg_lora import TuningMethod
from fedbench.models.spec import ModelSpec


class PrefixTuning(TuningMethod):
    """tokens: of each layer's prefix; from 8 to 64 by task in FedPETuning."""

    name: ClassVar[str] = "prefix"
    version: ClassVar[int] = 1
    needs: ClassVar[Literal["sum", "each"]] = "sum"

    tokens: int = Field(16, ge=1)

    def tuned(self, spec: ModelSpec) -> ModelSpec:
        return spec.with_prefix(self.tokens)
