"""Qwen3: Qwen2 with RMSNorm on queries and keys instead of biases (Yang et al. 2025)."""

from __future__ import annotations

from dataclasses import replace

from fedbench.models.families.family import Family
from fedbench.models.families.llama import LLAMA

QWEN3: Family = replace(
    LLAMA,
    name="qwen3",
    architecture="Qwen3ForSequenceClassification",
    language="Qwen3ForCausalLM",
    computes=(*LLAMA.computes, "sliding_window"),
)
