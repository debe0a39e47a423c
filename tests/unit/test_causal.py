"""Layers of a decoder as one function each, against transformers' own, and stepping aside for whoever needs those."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from helpers import answers_of, random_values, save_tiny, save_tiny_decoder, train_rows
from torch import Tensor, nn

from fedbench.check.suite import tensors_close
from fedbench.compat import has_onednn
from fedbench.forward import causal
from fedbench.forward.feed import Forward, forward
from fedbench.machine.device import Execution
from fedbench.models.foundation import FoundationModel
from fedbench.models.parts import Parts
from fedbench.models.spec import LoraSpec
from fedbench.models.weights import set_tensors
from fedbench.models.zoo.load import load_fm

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(not has_onednn, reason="torch without oneDNN")


@cache
def fm_of(family: str, **changes: Any) -> FoundationModel:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "fm"
        save_tiny_decoder(family, path, **changes) if changes else save_tiny(family, path)
        return load_fm(str(path), 3, Path(folder))


def model_of(family: str, **changes: Any) -> nn.Module:
    model = fm_of(family, **changes).build(LoraSpec(2, 4), CPU)
    set_tensors(model, random_values(model))
    return model


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of tokens of each layer that is computed as one function."""
    seen: list[int] = []
    attend = causal.attend

    def counted(query: Tensor, *args: Any) -> Any:
        seen.append(len(query))
        return attend(query, *args)

    monkeypatch.setattr(causal, "attend", counted)
    return seen


def agree(model: nn.Module) -> None:
    batch = train_rows(9).batch(range(9))
    expected, wanted = answers_of(Forward(model, packed=False), batch, lambda out: out.square().sum())
    with forward(model, Execution(), gradients=True) as fast:
        found, grads = answers_of(fast, batch, lambda out: out.square().sum())
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert tensors_close(wanted, grads, 1e-5)


@pytest.mark.parametrize("heads", [1, 2], ids=["shared keys", "a key for each query"])
def test_a_layer_of_a_llama_is_what_transformers_computes(heads: int, calls: list[int]) -> None:
    model = model_of("llama", num_key_value_heads=heads)
    agree(model)
    assert len(calls) == 3
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_biases_of_a_qwen2_are_added(calls: list[int]) -> None:
    agree(model_of("qwen2", use_sliding_window=False))
    assert len(calls) == 3


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "gpt2"])
def test_attention_of_another_make_is_left_to_transformers(family: str, calls: list[int]) -> None:
    agree(model_of(family))
    assert not calls, "a window; norms of queries and keys; LayerNorms and one matrix"


def test_a_watched_ffn_is_computed_by_transformers(calls: list[int]) -> None:
    model = model_of("llama")
    seen: list[Tensor] = []
    hook = model.get_submodule(Parts(model).ffn_activation_path(1)).register_forward_hook(
        lambda _module, _inputs, out: seen.append(out)
    )
    agree(model)
    hook.remove()
    assert len(seen) == 2 and len(calls) == 2, "one layer of three steps aside"
