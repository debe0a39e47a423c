"""`tiny-llama`: a small LLaMA pre-trained here, once, on Python's own documentation; the embedded decoder.

The text is what `help()` knows of the language, which comes with every Python. The recipe is fixed and seeded, but text
and rounding differ between versions and machines, so what the model is, by hash, is its weights. It is kept as a
checkpoint folder in the cache, with the perplexity it reached on text that was held out.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor
from torch.nn import functional as F

from fedbench.errors import FedbenchError
from fedbench.rng import Streams

_log = logging.getLogger(__name__)

RECIPE: dict[str, Any] = {
    "version": 1,
    "config": {
        "hidden_size": 160,
        "num_hidden_layers": 6,
        "num_attention_heads": 5,
        "num_key_value_heads": 5,
        "intermediate_size": 432,
        "max_position_embeddings": 512,
        "vocab_size": 2048,
        "tie_word_embeddings": True,
    },
    "context": 128,
    "batch_size": 16,
    "steps": 240,
    "lr": 3e-3,
    "weight_decay": 0.1,
    "worst_perplexity": 150,
}
END = "<|endoftext|>"
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def documentation() -> list[str]:
    """The topics of `help()`, in the order of their names."""
    from pydoc_data.topics import topics

    return [topics[name] for name in sorted(topics)]


def tiny_llama_folder(cache: Path) -> tuple[Path, dict[str, Any]]:
    """The checkpoint folder, from `cache` or trained now (about two minutes on two cores), and where it is from.

    One whose files are not those that were written is made anew, which is said.
    """
    texts = documentation()
    recipe = hashlib.sha256(json.dumps([RECIPE, TEMPLATE, texts], sort_keys=True).encode()).hexdigest()
    folder = cache / "fms" / f"tiny-llama-{recipe[:12]}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if folder.is_dir() and not _whole(folder):
            _log.warning("fedbench: a model of the cache is damaged and made anew: %s", folder)
            shutil.rmtree(folder)
        if not folder.is_dir():
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".tiny-llama-") as scratch:
                made = Path(scratch) / "made"
                about = {"held_out_perplexity": _pretrain(texts, made)}
                files = {path.name: _sha256(path) for path in made.iterdir()}
                (made / "made.json").write_text(json.dumps({"files": files, "about": about}))
                os.replace(made, folder)
    about = json.loads((folder / "made.json").read_text())["about"]
    return folder, {"source": "pre-trained here", "recipe": recipe, **about}


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _whole(folder: Path) -> bool:
    try:
        files = json.loads((folder / "made.json").read_text())["files"]
        return all(_sha256(folder / name) == sha256 for name, sha256 in files.items())
    except (OSError, ValueError, KeyError):
        return False


def _tokenizer(texts: list[str]) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    words.post_processor = processors.ByteLevel(trim_offsets=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    size = RECIPE["config"]["vocab_size"]
    words.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=size, min_frequency=2, special_tokens=[END], initial_alphabet=alphabet),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token=END, eos_token=END, pad_token=END, chat_template=TEMPLATE
    )


def _pretrain(texts: list[str], folder: Path) -> float:
    """Train on all but every tenth topic, AdamW with one-cycle learning rate; the perplexity of a held-out token."""
    import transformers

    streams = Streams(0, "tiny-llama")
    tokenizer = _tokenizer(texts)
    held = [i % 10 == 9 for i in range(len(texts))]
    train, test = (
        torch.tensor([t for text, own in zip(texts, held, strict=True) if own == which for t in _ids(tokenizer, text)])
        for which in (False, True)
    )
    config = transformers.LlamaConfig(**RECIPE["config"], bos_token_id=0, eos_token_id=0, pad_token_id=0)
    with torch.random.fork_rng([]):
        torch.manual_seed(streams.integer("initialisation") % 2**63)
        model = transformers.LlamaForCausalLM(config)
    optimiser = torch.optim.AdamW(model.parameters(), RECIPE["lr"], (0.9, 0.95), weight_decay=RECIPE["weight_decay"])
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimiser, RECIPE["lr"], total_steps=RECIPE["steps"] + 1)
    rng, width = streams.numpy("batches"), RECIPE["context"]
    for _ in range(RECIPE["steps"]):
        starts = rng.integers(0, len(train) - width - 1, RECIPE["batch_size"])
        loss = _loss(model, train, starts, width)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        cycle.step()
    model.eval()
    with torch.no_grad():
        starts = np.arange(0, len(test) - width - 1, width)
        losses = [_loss(model, test, some, width) for some in np.array_split(starts, len(starts) // 8)]
        perplexity = math.exp(float(torch.stack(losses).mean()))
    if not perplexity < RECIPE["worst_perplexity"]:
        raise FedbenchError(f"tiny-llama: pre-training reached only a perplexity of {perplexity:.0f}; report this")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return perplexity


def _ids(tokenizer: Any, text: str) -> list[int]:
    return [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]


def _loss(model: Any, tokens: Tensor, starts: np.ndarray, width: int) -> Tensor:
    """Mean cross-entropy of the next token, in windows of the text that start there."""
    rows = torch.stack([tokens[s : s + width + 1] for s in starts.tolist()])
    logits = model(input_ids=rows[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
