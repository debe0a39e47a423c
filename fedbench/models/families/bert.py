"""BERT."""

from __future__ import annotations

from fedbench.models.families.family import Family

BERT = Family(
    name="bert",
    architecture="BertForSequenceClassification",
    modality="text",
    embeddings="bert.embeddings",
    layers="bert.encoder.layer",
    attention=("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"),
    ffn_in="intermediate.dense",
    ffn_activation="intermediate",
    ffn_out="output.dense",
    ffn_norm="output.LayerNorm",
    head=("classifier",),
    attention_norm="attention.output.LayerNorm",
    residual="attention.output",
    dropout={"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "classifier_dropout": None},
    token_types=True,
    position_offset=0,
)
