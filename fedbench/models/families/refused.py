"""Settings of checkpoints that ask for something that is not computed here, and settings that ask for nothing."""

from __future__ import annotations

from typing import Any

NOT_COMPUTED: dict[str, tuple[Any, str]] = {
    "is_decoder": (False, "attention that looks back only"),
    "is_encoder_decoder": (False, "a decoder"),
    "add_cross_attention": (False, "attention to another model"),
    "cross_attention_hidden_size": (None, "attention to another model"),
    "position_embedding_type": ("absolute", "relative positions"),
    "scale_attn_by_inverse_layer_idx": (False, "layers that differ by their number"),
    "rotary_value": (False, "rotary positions"),
    "rope_theta": (None, "rotary positions"),
    "rope_scaling": (None, "rotary positions"),
    "rope_parameters": (None, "rotary positions"),
    "attention_window": (None, "attention within a window"),
    "sliding_window": (None, "attention within a window"),
    "pre_norm": (False, "LayerNorms before attention and FFN"),
    "normalize_before": (False, "LayerNorms before attention and FFN"),
    "feed_forward_type": ("original", "another feed-forward layer"),
    "per_layer_config": (None, "layers that differ"),
    "pruned_heads": (None, "heads that were cut out"),
    "chunk_size_feed_forward": (0, "a feed-forward layer in chunks"),
    "quantization_config": (None, "quantised weights"),
    "compression_config": (None, "compressed weights"),
    "adapters": (None, "adapters of another library"),
}
"""Setting of a checkpoint -> the value that asks for nothing, and what any other but null, false or 0 asks for.

transformers keeps a setting that it has no use for, so a model of another make would run as if it were a plain one.
"""

WITHOUT_MEANING = (
    "model_type", "num_labels", "torch_dtype", "torchscript", "use_bfloat16", "finetuning_task",
    "task_specific_params", "auto_map", "tokenizer_class", "prefix", "sentence_transformers",
    "gradient_checkpointing", "output_past", "output_attentions", "directionality", "pooler_fc_size",
    "pooler_num_attention_heads", "pooler_num_fc_layers", "pooler_size_per_head", "pooler_type", "tie_weights_",
    "n_words", "do_sample", "early_stopping", "length_penalty", "max_length", "min_length", "num_beams",
    "num_beam_groups", "num_return_sequences", "repetition_penalty", "temperature", "top_k", "top_p", "typical_p",
    "diversity_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "decoder_start_token_id",
    "remove_invalid_values",
)  # fmt: skip
"""Settings of checkpoints that no encoder makes use of: of tasks, of text generation, of training, of files."""
