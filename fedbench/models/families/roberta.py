"""RoBERTa: BERT without token types, whose positions are counted from the padding token."""

from __future__ import annotations

from dataclasses import replace

from fedbench.models.families.bert import BERT
from fedbench.models.families.family import Family

ROBERTA: Family = replace(
    BERT,
    name="roberta",
    architecture="RobertaForSequenceClassification",
    embeddings="roberta.embeddings",
    layers="roberta.encoder.layer",
    token_types=False,
    position_offset="after padding token",
)
