"""ELECTRA (Clark et al. 2020): BERT's layers under a head of two linear maps; embeddings may be narrower."""

from __future__ import annotations

from dataclasses import replace

from fedbench.models.families.bert import BERT
from fedbench.models.families.family import Family

ELECTRA: Family = replace(
    BERT,
    name="electra",
    architecture="ElectraForSequenceClassification",
    embeddings="electra.embeddings",
    layers="electra.encoder.layer",
)
