"""ModernBERT (Warner et al. 2024): pre-norm, gated FFN (GeGLU), rotary positions, attention within a window."""

from __future__ import annotations

from fedbench.models.families.family import Family

MODERNBERT = Family(
    name="modernbert",
    architecture="ModernBertForSequenceClassification",
    modality="text",
    embeddings="model.embeddings",
    layers="model.layers",
    attention=("attn.Wqkv", "attn.Wqkv", "attn.Wqkv", "attn.Wo"),
    ffn_in="mlp.Wi",
    ffn_gate="mlp.Wi",
    ffn_activation="mlp.act",
    ffn_out="mlp.Wo",
    ffn_norm=None,
    head=("head", "classifier"),
    dropout={"attention_dropout": 0.0, "embedding_dropout": 0.0, "mlp_dropout": 0.0, "classifier_dropout": 0.0},
    activation="hidden_activation",
    position_offset=0,
    words="tok_embeddings.weight",
    rotary=True,
    computes=("rope_parameters", "rope_scaling", "sliding_window"),
)
