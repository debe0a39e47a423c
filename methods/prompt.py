"""Prompt tuning (Lester et al., EMNLP 2021, arXiv 2104.08691), federated as in FedPrompt (Zhao et al. 2022).

FedAvg of a few learned vectors beside the embeddings of a row's tokens, and of the head. They begin at random.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from fedbench.methods.fedavg_lora import TuningMethod
from fedbench.models.spec import ModelSpec


class PromptTuning(TuningMethod):
    """tokens: vectors of the prompt."""

    name: ClassVar[str] = "prompt"
    version: ClassVar[int] = 1
    needs: ClassVar[Literal["sum", "each"]] = "sum"

    tokens: int = Field(20, ge=1)

    def tuned(self, spec: ModelSpec) -> ModelSpec:
        return spec.with_prompt(self.tokens)
