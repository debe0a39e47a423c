"""DistilBERT."""

from __future__ import annotations

from fedbench.models.families.family import Family

DISTILBERT = Family(
    name="distilbert",
    architecture="DistilBertForSequenceClassification",
    modality="text",
    embeddings="distilbert.embeddings",
    layers="distilbert.transformer.layer",
    attention=("attention.q_lin", "attention.k_lin", "attention.v_lin", "attention.out_lin"),
    ffn_in="ffn.lin1",
    ffn_activation="ffn.activation",
    ffn_out="ffn.lin2",
    ffn_norm="output_layer_norm",
    head=("pre_classifier", "classifier"),
    attention_norm="sa_layer_norm",
    dropout={"dropout": 0.0, "attention_dropout": 0.0, "qa_dropout": 0.0, "seq_classif_dropout": 0.0},
    activation="activation",
    layer_count="n_layers",
    ffn_width="hidden_dim",
    position_offset=0,
)
