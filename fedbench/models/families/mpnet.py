"""MPNet (Song et al. 2020): BERT's layers, whose attention adds a learned bias of the distance of two tokens."""

from __future__ import annotations

from fedbench.models.families.family import Family

MPNET = Family(
    name="mpnet",
    architecture="MPNetForSequenceClassification",
    modality="text",
    embeddings="mpnet.embeddings",
    layers="mpnet.encoder.layer",
    attention=("attention.attn.q", "attention.attn.k", "attention.attn.v", "attention.attn.o"),
    ffn_in="intermediate.dense",
    ffn_activation="intermediate",
    ffn_out="output.dense",
    ffn_norm="output.LayerNorm",
    head=("classifier",),
    attention_norm="attention.LayerNorm",
    dropout={"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    position_offset="after padding token",
    relative=True,
    padding_token=1,
)
