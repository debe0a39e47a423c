"""The embedded image model: pre-trained from its recipe, cached, and good enough to be a foundation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fedbench import vit_digits
from fedbench.files import load_tensors, save_tensors
from fedbench.foundation import load_fm, model_spec
from fedbench.models import build


@pytest.mark.slow
def test_the_recipe_reaches_its_accuracy_and_is_cached(tmp_path: Path) -> None:
    fm = load_fm("vit-digits", 10, tmp_path)
    assert fm.provenance["held_out_accuracy"] >= 0.93
    assert fm.trained_head is not None
    [file] = (tmp_path / "fms").iterdir()
    stamp = file.stat().st_mtime_ns
    again = load_fm("vit-digits", 7, tmp_path)
    assert file.stat().st_mtime_ns == stamp
    assert again.trained_head is None, "the trained head is for ten classes only"


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Instead of pre-training, random weights of the model; the list says where it was done."""
    calls: list[Path] = []

    def pretrain(path: Path) -> None:
        calls.append(path)
        generator = torch.Generator().manual_seed(0)
        shapes = build(model_spec("vit", vit_digits.RECIPE["config"], 10)).state_dict()
        state = {name: torch.randn(tensor.shape, generator=generator) for name, tensor in shapes.items()}
        save_tensors(path, state, {"held_out_accuracy": "0.95"})

    monkeypatch.setattr(vit_digits, "_pretrain", pretrain)
    return calls


def test_what_the_model_is_is_its_recipe_and_its_weights(
    tmp_path: Path, made: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def content() -> str:
        return load_fm("vit-digits", 7, tmp_path).content_hash

    first = content()
    assert content() == first
    assert load_fm("vit-digits", 10, tmp_path).content_hash != first, "its head is used for ten classes"
    [path] = made
    tensors, about = load_tensors(path)
    weight = tensors["vit.layers.3.mlp.fc1.weight"]
    weight.view(torch.int32)[0, 0] ^= 1
    save_tensors(path, tensors, about)
    assert content() != first
    weight.view(torch.int32)[0, 0] ^= 1
    save_tensors(path, tensors, about)
    assert content() == first
    monkeypatch.setitem(vit_digits.RECIPE, "epochs", 21)
    assert content() != first


def test_a_damaged_file_in_the_cache_is_said_and_made_anew(tmp_path: Path, made: list[Path]) -> None:
    whole = load_fm("vit-digits", 10, tmp_path)
    assert whole.notes == ()
    [path] = made
    tensors, about = load_tensors(path)
    damages = (
        ({**tensors, "classifier.bias": torch.zeros(3)}, about, "holds other tensors"),
        (dict(list(tensors.items())[1:]), about, "holds other tensors"),
        (tensors, {}, "does not say what accuracy"),
    )
    for count, (kept, metadata, says) in enumerate(damages, 2):
        save_tensors(path, kept, metadata)
        again = load_fm("vit-digits", 10, tmp_path)
        [note] = again.notes
        assert "pre-trained again, since its file in the cache was damaged" in note and says in note
        assert len(made) == count
        assert again.content_hash == whole.content_hash
