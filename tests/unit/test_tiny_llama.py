"""The decoder that is pre-trained here: made once, kept as a checkpoint, made anew where it is damaged."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest

from fedbench.data.rows import Part
from fedbench.models.reading import encode
from fedbench.models.zoo import tiny_llama
from fedbench.models.zoo.load import load_fm, load_reader
from fedbench.objectives.base import IGNORED


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tenth of the text, two steps, and a model of a few thousand parameters."""
    config = tiny_llama.RECIPE["config"] | {
        "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 2,
        "intermediate_size": 24, "vocab_size": 400,
    }  # fmt: skip
    texts = tiny_llama.documentation()[:20]
    recipe = tiny_llama.RECIPE | {"config": config, "steps": 2, "context": 16, "worst_perplexity": 1e9}
    monkeypatch.setattr(tiny_llama, "RECIPE", recipe)
    monkeypatch.setattr(tiny_llama, "documentation", lambda: texts)


def test_it_is_made_once_and_reads_and_predicts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fm = load_fm("tiny-llama", 2, tmp_path)
    assert (fm.name, fm.spec.model_type, fm.spec.ffn_widths) == ("tiny-llama", "llama", (24, 24, 24))
    assert 1 < fm.provenance["held_out_perplexity"] < 1000
    monkeypatch.setattr(tiny_llama, "_pretrain", None)
    assert load_fm("tiny-llama", 2, tmp_path).content_hash == fm.content_hash
    assert load_reader("tiny-llama", 2, tmp_path).spec == fm.spec
    language = load_fm("tiny-llama", 2, tmp_path, head="vocabulary")
    assert language.content_hash != fm.content_hash
    rows = encode(Part(np.zeros(1, dtype=np.int64), ["What is it?"], text_pairs=["A list."]), language, 64, "language")
    asked = [int(t) for t in rows.labels[0] if t != IGNORED]
    assert language.processor.decode(asked) == "A list.\n"


def test_a_damaged_one_is_made_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = load_fm("tiny-llama", 2, tmp_path).content_hash
    folder, _ = tiny_llama.tiny_llama_folder(tmp_path)
    (folder / "model.safetensors").write_bytes(b"\0" * 100)
    with caplog.at_level(logging.WARNING):
        assert load_fm("tiny-llama", 2, tmp_path).content_hash == before
    assert "is damaged and made anew" in caplog.text
