"""GPT-2 (Radford et al. 2019): a pre-norm decoder with a table of positions and one matrix for query, key and value."""

from __future__ import annotations

from fedbench.models.families.family import Family

GPT2 = Family(
    name="gpt2",
    architecture="GPT2ForSequenceClassification",
    modality="text",
    embeddings="transformer.wte",
    layers="transformer.h",
    attention=("attn.c_attn", "attn.c_attn", "attn.c_attn", "attn.c_proj"),
    ffn_in="mlp.c_fc",
    ffn_activation="mlp.act",
    ffn_out="mlp.c_proj",
    ffn_norm=None,
    head=("score",),
    dropout={"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "summary_first_dropout": 0.0},
    activation="activation_function",
    layer_count="n_layer",
    ffn_width="n_inner",
    position_offset=0,
    words="weight",
    positions="transformer.wpe.weight",
    left_over=(".attn.bias", ".attn.masked_bias"),
    beside=("transformer.wpe",),
    reads="last",
    language="GPT2LMHeadModel",
    transposed=True,
)
