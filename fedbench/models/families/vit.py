"""ViT: pre-norm, on images."""

from __future__ import annotations

from fedbench.models.families.family import Family

VIT = Family(
    name="vit",
    architecture="ViTForImageClassification",
    modality="image",
    embeddings="vit.embeddings",
    layers="vit.layers",
    attention=("attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.o_proj"),
    ffn_in="mlp.fc1",
    ffn_activation="mlp.activation_fn",
    ffn_out="mlp.fc2",
    ffn_norm=None,
    head=("classifier",),
    norms_before=("layernorm_before", "layernorm_after"),
    dropout={"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
)
