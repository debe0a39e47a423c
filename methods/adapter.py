"""Bottleneck adapters (Houlsby et al., ICML 2019, arXiv 1902.00751), federated as in FedPETuning (Zhang et al. 2023).

FedAvg of small networks behind attention and FFN of every layer, y + up(gelu(down(y))), and of the head. Up starts as
0, so that the model starts as the FM.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from fedbench.methods.fedavg_lora import TuningMethod
from fedbench.models.spec import ModelSpec


class Adapter(TuningMethod):
    """bottleneck: neurons of each adapter; 16 or 64 in FedPETuning."""

    name: ClassVar[str] = "adapter"
    version: ClassVar[int] = 1
    needs: ClassVar[Literal["sum", "each"]] = "sum"

    bottleneck: int = Field(16, ge=1)

    def tuned(self, spec: ModelSpec) -> ModelSpec:
        return spec.with_bottleneck(self.bottleneck)
