"""Tiny random models of each kind, on which a method is checked in seconds: an encoder, a ViT and a decoder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from fedbench.errors import FedbenchError

KINDS = {"encoder": "tweets-noniid", "vit": "digits-noniid", "decoder": "tweets-noniid"}
"""Kind of model -> a scenario for it, of embedded data."""
_SHAPE = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 24}
_LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789#@.,!?'"
_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


@contextmanager
def tiny_model(kind: str) -> Iterator[Path]:
    """A folder, for the time of the block, with a random checkpoint of this kind: four layers of width 16.

    Its tokenizer knows letters. Raises FedbenchError for a kind that there is not.
    """
    import transformers

    if kind not in KINDS:
        raise FedbenchError(f"--model {kind}: there is no such kind; give {', '.join(KINDS)} or all")
    words: dict[str, int] = {w: i for i, w in enumerate((*_SPECIAL, *_LETTERS, *(f"##{c}" for c in _LETTERS)))}
    shape: dict[str, Any] = {**_SHAPE, "initializer_range": 0.3}
    text = {**shape, "vocab_size": len(words), "max_position_embeddings": 64, "pad_token_id": 0}
    with TemporaryDirectory() as folder, torch.random.fork_rng([]):
        torch.manual_seed(0)
        if kind == "vit":
            config: Any = transformers.ViTConfig(**shape, image_size=8, patch_size=4)
            transformers.ViTForImageClassification(config).save_pretrained(folder)
            transformers.ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(folder)
        elif kind == "encoder":
            transformers.BertForSequenceClassification(transformers.BertConfig(**text)).save_pretrained(folder)
        else:
            ends = {"bos_token_id": words["[CLS]"], "eos_token_id": words["[SEP]"], "num_key_value_heads": 1}
            transformers.LlamaForCausalLM(transformers.LlamaConfig(**text, **ends)).save_pretrained(folder)
        if kind != "vit":
            tokenizer: Any = transformers.BertTokenizerFast(vocab=words, do_lower_case=True)
            tokenizer.save_pretrained(folder)
        yield Path(folder)
