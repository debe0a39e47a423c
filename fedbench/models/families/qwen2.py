"""Qwen2: LLaMA with biases on query, key and value, and layers that may attend within a window (Yang et al. 2024)."""

from __future__ import annotations

from dataclasses import replace

from fedbench.models.families.family import Family
from fedbench.models.families.llama import LLAMA

QWEN2: Family = replace(
    LLAMA,
    name="qwen2",
    architecture="Qwen2ForSequenceClassification",
    language="Qwen2ForCausalLM",
    computes=(*LLAMA.computes, "sliding_window"),
)
