"""LLaMA and what is built alike (SmolLM2, TinyLlama, Llama 3): a pre-norm decoder with RMSNorm, SwiGLU and rotary
positions (Touvron et al. 2023).
"""

from __future__ import annotations

from fedbench.models.families.family import Family

LLAMA = Family(
    name="llama",
    architecture="LlamaForSequenceClassification",
    modality="text",
    embeddings="model.embed_tokens",
    layers="model.layers",
    attention=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    ffn_in="mlp.up_proj",
    ffn_gate="mlp.gate_proj",
    ffn_activation="mlp.act_fn",
    ffn_out="mlp.down_proj",
    ffn_norm=None,
    head=("score",),
    dropout={"attention_dropout": 0.0},
    position_offset=0,
    words="weight",
    left_over=("rotary_emb.inv_freq",),
    reads="last",
    language="LlamaForCausalLM",
    rotary=True,
    norms_before=("input_layernorm", "post_attention_layernorm"),
    computes=("rope_theta", "rope_scaling", "rope_parameters"),
)
