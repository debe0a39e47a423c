"""The embedded image model: pre-trained from its recipe, cached, and good enough to be a foundation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fedbench.files import load_tensors, save_tensors
from fedbench.models.build import build
from fedbench.models.checkpoint import model_spec
from fedbench.models.zoo import vit_digits
from fedbench.models.zoo.load import load_fm


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
def made(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """Instead of pre-training, random weights of the model; the list says how often."""
    calls: list[None] = []

    def pretrain() -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        calls.append(None)
        generator = torch.Generator().manual_seed(0)
        shapes = build(model_spec("vit", vit_digits.RECIPE["config"], 10)).state_dict()
        state = {name: torch.randn(tensor.shape, generator=generator) for name, tensor in shapes.items()}
        return state, {"held_out_accuracy": "0.95"}

    monkeypatch.setattr(vit_digits, "_pretrain", pretrain)
    return calls


def test_what_the_model_is_is_its_recipe_and_its_weights(
    tmp_path: Path, made: list[None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def content() -> str:
        return load_fm("vit-digits", 7, tmp_path).content_hash

    first = content()
    assert content() == first
    assert load_fm("vit-digits", 10, tmp_path).content_hash != first, "its head is used for ten classes"
    [path] = (tmp_path / "fms").iterdir()
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


def test_a_damaged_file_in_the_cache_is_said_and_made_anew(
    tmp_path: Path, made: list[None], caplog: pytest.LogCaptureFixture
) -> None:
    whole = load_fm("vit-digits", 10, tmp_path)
    [path] = (tmp_path / "fms").iterdir()
    content = path.read_bytes()
    for count, damaged in enumerate((content[:-100], content[:-1] + bytes([content[-1] ^ 1])), 2):
        path.write_bytes(damaged)
        again = load_fm("vit-digits", 10, tmp_path)
        assert "a file of the cache is damaged and made anew" in caplog.text
        assert len(made) == count
        assert again.content_hash == whole.content_hash
        caplog.clear()
