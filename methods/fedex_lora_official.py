"""FedEx-LoRA as its released code has it: all clients count alike, and the residual is added transposed."""

from __future__ import annotations

from typing import ClassVar, Literal

from fedbench.methods.fedex_lora import FedExLora


class FedExLoraOfficial(FedExLora):
    """transposed: add the residual as to GPT-2's Conv1D, which keeps its weight turned.

    To a linear layer, as in RoBERTa, it is then added in the wrong place, unnoticed as all four projections are square.
    """

    name: ClassVar[str] = "fedex-lora-official"
    version: ClassVar[int] = 1
    needs: ClassVar[Literal["sum", "each"]] = "each"

    weighting: Literal["samples", "uniform"] = "uniform"
    transposed: bool = True

    @property
    def turned(self) -> bool:
        return self.transposed
